"""Everything that knows fairseq."""
