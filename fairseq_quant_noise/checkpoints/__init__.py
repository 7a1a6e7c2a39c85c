"""Read fairseq checkpoints of any age without running code in them, and write ones that stock fairseq reads."""
