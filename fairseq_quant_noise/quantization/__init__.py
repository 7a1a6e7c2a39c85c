"""Quantize a model as a plan says: find the target weights, tabulate their sizes, encode them."""
