"""Which layers of a network are stored and which are in use: pruning with LayerDrop, and sharing.

layer_map.py holds the arithmetic; modules.py, state.py and checkpoints/structure.py apply it to a network, a state dict
and a fairseq checkpoint.
"""
