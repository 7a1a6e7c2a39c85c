"""The names of a quantized weight's entries, after the weight's name, in a state and in a packed file."""

from ..weights.access import LATENT

__all__ = ["AFFINE", "AGE", "CENTROIDS", "CENTROID_BITS", "CODEBOOK", "CODES", "FILE_AFFINE", "LATENT", "SPEC"]

CODES = "codes"
CENTROIDS = "centroids"
CENTROID_BITS = "centroid_bits"
FILE_AFFINE = "file_affine"  # scale and zero point of a file's int8 centroids
CODEBOOK = "codebook"  # the number of a shared codebook
SPEC = "scalar"  # N and the range
AFFINE = "affine"  # scales and zero points
AGE = "age"  # training forwards
