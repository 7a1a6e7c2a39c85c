"""Prune and share layers: map the layers that a network uses to those that are stored.

layer_map.py holds the arithmetic; modules.py, state.py and checkpoints/structure.py apply it to a network, a state dict
and a checkpoint.
"""
