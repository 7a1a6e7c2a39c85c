"""The command `fairseq-quant-noise`."""
