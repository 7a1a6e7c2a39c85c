"""Files, ranks, bits, progress and autograd: what several rooms need and no room owns."""
