"""The weights of a model: find each stored one once, split it into blocks, intercept the reads of it."""
