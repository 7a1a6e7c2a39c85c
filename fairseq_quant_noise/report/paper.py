"""List the points of tables 1 and 2 of the paper (arXiv 2004.07320), to compare with ours, in the paper's MB."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperPoint:
    """Hold a score and a size from the paper."""

    name: str
    megabytes: float
    score: float
    recalled: bool  # from memory: look it up before you cite it


TITLES = {
    "ppl": "WikiText-103, 16 layers, test PPL",
    "accuracy": "RoBERTa-base, MNLI, accuracy",
    "top1": "EfficientNet-B3, ImageNet, top-1",
}

POINTS: dict[str, tuple[PaperPoint, ...]] = {
    "ppl": (
        PaperPoint("uncompressed", 942, 18.3, True),
        PaperPoint("int8", 236, 19.6, True),
        PaperPoint("int8, Quant-Noise", 236, 18.7, True),
        PaperPoint("int4", 118, 39.4, True),
        PaperPoint("int4, Quant-Noise", 118, 21.8, True),
        PaperPoint("iPQ", 38, 25.2, False),
        PaperPoint("iPQ, QAT", 38, 41.2, False),
        PaperPoint("iPQ, Quant-Noise", 38, 20.7, False),
        PaperPoint("+ sharing", 19, 22.0, True),
        PaperPoint("+ pruning", 10, 24.7, False),
    ),
    "accuracy": (
        PaperPoint("uncompressed", 480, 84.8, False),
        PaperPoint("iPQ", 38, 82.5, False),
        PaperPoint("iPQ, Quant-Noise", 38, 83.6, False),
        PaperPoint("+ sharing", 14, 82.5, False),
        PaperPoint("+ pruning", 8, 78.8, True),
    ),
    "top1": (
        PaperPoint("uncompressed", 46.7, 81.5, False),
        PaperPoint("int8", 11.7, 80.7, True),
        PaperPoint("int8, Quant-Noise", 11.7, 80.9, True),
        PaperPoint("int4", 5.8, 45.3, True),
        PaperPoint("int4, Quant-Noise", 5.8, 67.8, True),
        PaperPoint("iPQ", 3.3, 79.0, True),
        PaperPoint("iPQ, Quant-Noise", 3.3, 80.0, False),
        PaperPoint("+ sharing", 2.6, 78.9, True),
        PaperPoint("+ pruning", 2.3, 77.8, False),
    ),
}
