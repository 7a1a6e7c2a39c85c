"""Implement the command `fairseq-quant-noise`."""
