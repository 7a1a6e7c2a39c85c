"""The stages of a plan for a tiny EfficientNet, which has three layers of a kind and 16 blocks in each at least."""

#: 1x1 in 4, 3x3 in 9, 5x5 in 5.
STAGES = [
    {"match": r"blocks\..*\.conv_pwl?|conv_head", "block_size": 4, "n_centroids": 16},
    {
        "match": r"conv_stem|blocks\..*\.(conv_dw|se\.conv_(reduce|expand))",
        "block_size": {r"conv_stem|blocks\.[0136]\..*\.conv_dw": 9, r".*\.conv_dw": 5, "default": 2},
        "n_centroids": 16,
    },
    {"match": "classifier", "block_size": 4, "n_centroids": 16},
]
