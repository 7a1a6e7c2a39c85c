"""Build EfficientNet (arXiv 1905.11946) from timm's blocks, in a form whose blocks can be shared and pruned.

The blocks of a stage are alike except for the first, which changes resolution and channels. So a stage here has its
first block and a ModuleList `layers` of the others, which can be shared and pruned as any layers (`structure/`). Names
differ from timm's only in this:

    timm      blocks.2.0.conv_dw.weight        blocks.2.1.conv_dw.weight
    here      blocks.2.first.conv_dw.weight    blocks.2.layers.0.conv_dw.weight

Legend: N images, H x W pixels, C channels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structure.state import stack_sizes
from .efficientnet_config import LAYER_OPTIONS, EfficientNetConfig
from .vision import import_vision


class Stage(nn.Module):
    """Blocks of one resolution, one after the other.

    Args:
        blocks: at least one.
    """

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.first, *others = blocks
        self.layers = nn.ModuleList(others)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W) -> (N, C_out, ceil(H / s), ceil(W / s)), s the stride of the stage's first block."""
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class EfficientNet(nn.Module):
    """A classifier of images.

    Raises:
        UserError: timm is not installed.
    """

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        network = _timm_network(config)
        if config.stem_stride != 2:
            network.conv_stem.stride = (config.stem_stride,) * 2
        self.conv_stem, self.bn1 = network.conv_stem, network.bn1
        self.blocks = nn.Sequential(*map(Stage, network.blocks))
        self.conv_head, self.bn2 = network.conv_head, network.bn2
        self.global_pool, self.classifier = network.global_pool, network.classifier
        self.dropout, self.lite = config.dropout, config.lite

    @property
    def depths(self) -> list[int]:
        """How many blocks each stage has."""
        return [1 + len(stage.layers) for stage in self.blocks if isinstance(stage, Stage)]

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), normalised as in training -> (N, classes) logits."""
        images = images.contiguous(memory_format=torch.channels_last)  # in which a CPU's convolutions are faster
        x = self.blocks(self.bn1(self.conv_stem(images)))
        x = self.global_pool(self.bn2(self.conv_head(x)))
        return self.classifier(F.dropout(x, self.dropout, self.training))


def _timm_network(config: EfficientNetConfig) -> Any:
    builder = import_vision("timm.models._efficientnet_builder")
    rounded = partial(builder.round_channels, multiplier=config.width)
    # Lite: the stem and the head do not grow with the width, and TensorFlow's padding and epsilon
    variant = {"fix_stem": True, "pad_type": "same", "norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}
    return import_vision("timm.models").EfficientNet(
        builder.decode_arch_def(config.stages),
        num_classes=config.num_classes,
        num_features=1280 if config.lite else rounded(1280),
        round_chs_fn=rounded,
        act_layer=nn.ReLU6 if config.lite else nn.SiLU,
        drop_path_rate=config.drop_path,
        **(variant if config.lite else {}),
    )


def seen_in_weights(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read options from a state: the number of classes, and the number of blocks after each stage's first.

    Args:
        state: an EfficientNet's, of any shapes; the number of classes is the length of `classifier.bias` (classes,).
    """
    sizes = stack_sizes(state)
    layers = {option: sizes.get(f"blocks.{i}.layers", 0) for i, option in enumerate(LAYER_OPTIONS)}
    return {**layers, **({"num_classes": len(state["classifier.bias"])} if "classifier.bias" in state else {})}
