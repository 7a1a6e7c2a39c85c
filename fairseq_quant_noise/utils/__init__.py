"""Helpers that several packages share: files, ranks, bits, progress and autograd."""
