"""Read and check a plan: its rules, and fairseq's own YAML as a plan."""
