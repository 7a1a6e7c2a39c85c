"""Quantize a model as a plan says: the targets, the dry run, the work."""
