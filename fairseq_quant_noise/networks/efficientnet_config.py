"""Read the options of `quant_noise_efficientnet`, from which an EfficientNet is built, without fairseq."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from .options import given_options

#: The seven stages of EfficientNet-B0 (arXiv 1905.11946, table 1), as timm writes blocks: ds depthwise separable, ir
#: inverted residual; r repeats, k kernel, s stride of the first block, e expansion, c channels, se squeeze-excitation.
STAGES = (
    ("ds", 1, "k3_s1_e1_c16_se0.25"),
    ("ir", 2, "k3_s2_e6_c24_se0.25"),
    ("ir", 2, "k5_s2_e6_c40_se0.25"),
    ("ir", 3, "k3_s2_e6_c80_se0.25"),
    ("ir", 3, "k5_s1_e6_c112_se0.25"),
    ("ir", 4, "k5_s2_e6_c192_se0.25"),
    ("ir", 1, "k3_s1_e6_c320_se0.25"),
)
#: The options that say how many blocks a stage has after its first, which alone differs from the others in shape.
LAYER_OPTIONS = tuple(f"blocks_{i}_layers" for i in range(len(STAGES)))
_LIMITS = {"width": (0.01, 10.0), "depth": (0.01, 10.0), "dropout": (0.0, 0.99), "drop_path": (0.0, 0.99)}
_COUNTS = {"num_classes": (1, 1_000_000), "stem_stride": (1, 2)} | dict.fromkeys(LAYER_OPTIONS, (0, 100))


@dataclass(frozen=True)
class EfficientNetConfig:
    """The names are those of the options, the defaults those of EfficientNet-B0.

    Raises:
        UserError: an option is out of range.
    """

    num_classes: int = 1000
    width: float = 1.0
    # channels, as a multiple of B0's; rounded to multiples of 8
    depth: float = 1.0
    # blocks of a stage, as a multiple of B0's; rounded up
    stem_stride: int = 2
    # stride of the first convolution; 1 for images of 32 x 32
    lite: bool = False
    # EfficientNet-Lite: no squeeze-excitation, ReLU6; stem, head and the first and last stage keep B0's size. The
    # published networks pad as TensorFlow does and divide by sqrt(variance + 1e-3) in batch normalisation.
    dropout: float = 0.2
    # before the classifier, in training
    drop_path: float = 0.2
    # stochastic depth: the probability of leaving out the last block, in training; it grows linearly over the blocks
    blocks_0_layers: int | None = None
    blocks_1_layers: int | None = None
    blocks_2_layers: int | None = None
    blocks_3_layers: int | None = None
    blocks_4_layers: int | None = None
    blocks_5_layers: int | None = None
    blocks_6_layers: int | None = None
    # blocks after the first in each stage, where `depth` does not say it: in a pruned network

    def __post_init__(self) -> None:
        if type(self.lite) is not bool:
            raise UserError(f"option lite is {self.lite!r}; give true or false")
        for name, (low, high) in {**_LIMITS, **_COUNTS}.items():
            value = getattr(self, name)
            kinds: tuple[type, ...] = (int,) if name in _COUNTS else (int, float)
            if value is not None and (type(value) not in kinds or not low <= value <= high):
                whole = "a whole number" if name in _COUNTS else "a number"
                raise UserError(f"option {name} is {value!r}; give {whole} from {low} to {high}")

    @classmethod
    def from_fairseq(cls, options: Mapping[str, Any]) -> "EfficientNetConfig":
        """The configuration that the model's options (fairseq's `cfg.model`, as a dict) describe.

        Args:
            options: by name; one that is absent or None has its default, one that is unknown is ignored.

        Raises:
            UserError: an option out of range.
        """
        return cls(**given_options(options, [f.name for f in fields(cls)]))

    def blocks(self, stage: int) -> int:
        """How many blocks the stage has."""
        layers = getattr(self, LAYER_OPTIONS[stage])
        if layers is not None:
            return 1 + int(layers)
        fixed = self.lite and stage in (0, len(STAGES) - 1)
        return STAGES[stage][1] if fixed else math.ceil(STAGES[stage][1] * self.depth)

    @property
    def stages(self) -> list[list[str]]:
        """The stages in timm's notation."""
        found = [f"{kind}_r{self.blocks(i)}_{rest}" for i, (kind, _, rest) in enumerate(STAGES)]
        return [[stage.removesuffix("_se0.25") if self.lite else stage] for stage in found]
