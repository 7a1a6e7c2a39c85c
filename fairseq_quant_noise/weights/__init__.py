"""Weights of a model: each stored one once, as blocks, and the access of a module's weight."""
