"""Product quantization: k-means, codebooks and codes."""
