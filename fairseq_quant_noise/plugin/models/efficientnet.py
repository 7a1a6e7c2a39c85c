# ruff: noqa: UP045 (fairseq reads `Optional`, not `| None`)
"""Provide `quant_noise_efficientnet`: EfficientNet for fairseq from timm's blocks, with Quant-Noise and iPQ."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from torch import Tensor, nn

from ...errors import UserError
from ...networks.efficientnet import EfficientNet
from ...networks.efficientnet_config import LAYER_OPTIONS, EfficientNetConfig
from ...networks.timm_weights import our_names
from ..exits import exits_on_user_error
from .layers import update_options
from .options import QuantNoiseOptions, option
from .quantizable import Quantizable


def _layers(stage: int) -> Any:
    return option(None, f"blocks after the first in stage {stage} (default: as --depth says)")


def _keep(stage: int) -> Any:
    return option(None, f"of the blocks after the first in stage {stage}, which to keep: every-other, or 0,2")


@dataclass
class QuantNoiseEfficientNetConfig(QuantNoiseOptions, FairseqDataclass):
    """Hold the options of the model; the defaults are EfficientNet-B0's (`networks/efficientnet_config.py`)."""

    num_classes: Optional[int] = option(None, "number of classes (default: the data's; 1000 without data)")
    width: float = option(1.0, "channels, as a multiple of EfficientNet-B0's; B3 has 1.2")
    depth: float = option(1.0, "blocks of a stage, as a multiple of EfficientNet-B0's; B3 has 1.4")
    stem_stride: int = option(2, "of the first convolution; 1 for images of 32 x 32")
    lite: bool = option(False, "EfficientNet-Lite: no squeeze-excitation, ReLU6, TensorFlow's padding")
    dropout: float = option(0.2, "dropout before the classifier")
    drop_path: float = option(
        0.2, "stochastic depth: probability of leaving out the last block, less for those before it (LayerDrop)"
    )
    blocks_0_layers: Optional[int] = _layers(0)
    blocks_1_layers: Optional[int] = _layers(1)
    blocks_2_layers: Optional[int] = _layers(2)
    blocks_3_layers: Optional[int] = _layers(3)
    blocks_4_layers: Optional[int] = _layers(4)
    blocks_5_layers: Optional[int] = _layers(5)
    blocks_6_layers: Optional[int] = _layers(6)
    blocks_0_layers_to_keep: Optional[str] = _keep(0)
    blocks_1_layers_to_keep: Optional[str] = _keep(1)
    blocks_2_layers_to_keep: Optional[str] = _keep(2)
    blocks_3_layers_to_keep: Optional[str] = _keep(3)
    blocks_4_layers_to_keep: Optional[str] = _keep(4)
    blocks_5_layers_to_keep: Optional[str] = _keep(5)
    blocks_6_layers_to_keep: Optional[str] = _keep(6)
    quant_noise_pq: float = option(0.0, "share of the blocks of weights that are hit in each forward")
    quant_noise_pq_block_size: int = option(
        4, "block size of 1x1 convolutions and the classifier, less where it does not divide; 3x3 has 9, 5x5 has 5"
    )
    quant_noise_scalar: float = option(0.0, "int8 noise of this share, and int8 weights and activations in evaluation")


class EfficientNetModel(EfficientNet, BaseFairseqModel):
    """Give the network the methods that fairseq calls on a model."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """Build the network of these options, for the classes of `task`."""
        return cls(EfficientNetConfig.from_fairseq({**vars_of(args), "num_classes": _classes(args, task)}))

    def get_targets(self, sample: Any, net_output: Any) -> Tensor:
        """Return the sample's classes, (N,)."""
        target: Tensor = sample["target"]
        return target

    def get_normalized_probs(self, net_output: Any, log_probs: bool, sample: Any = None) -> Tensor:
        """Compute (N, classes) probabilities, or their logarithms, from logits."""
        softmax = torch.log_softmax if log_probs else torch.softmax
        return softmax(net_output.float(), dim=-1)


@register_model("quant_noise_efficientnet", dataclass=QuantNoiseEfficientNetConfig)
class QuantNoiseEfficientNet(Quantizable, EfficientNetModel):
    """EfficientNet with noise on every convolution and the classifier."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """Build the network, with noise on its weights where the options ask for it."""
        with exits_on_user_error():
            config = EfficientNetConfig.from_fairseq(vars_of(args))
            update_options(args, {name: config.blocks(i) - 1 for i, name in enumerate(LAYER_OPTIONS)})
            return super().build_model(args, task)

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Load a state as fairseq does; weights may have timm's names, as `to-dense` writes them."""
        return super().load_state_dict(our_names(state_dict), strict, model_cfg, args)


def vars_of(options: Any) -> dict[str, Any]:
    """Return a model's options as a dict, whatever fairseq holds them in."""
    return dict(options) if hasattr(options, "items") else dict(vars(options))


def _classes(args: Any, task: Any) -> int | None:
    given, found = getattr(args, "num_classes", None), len(getattr(task, "classes", ()))
    if given and found and given != found:
        raise UserError(f"--num-classes is {given}, and the data has {found} classes; leave the option out")
    return given or found or None


@register_model_architecture("quant_noise_efficientnet", "quant_noise_efficientnet_b0")
def b0(args: Any) -> None:
    """Set the options of EfficientNet-B0: 5,288,548 parameters with 1000 classes."""


def _defaults(args: Any, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(args, name):
            setattr(args, name, value)


@register_model_architecture("quant_noise_efficientnet", "quant_noise_efficientnet_b3")
def b3(args: Any) -> None:
    """Set the options of EfficientNet-B3, the paper's: 12,233,232 parameters with 1000 classes."""
    _defaults(args, width=1.2, depth=1.4, dropout=0.3)


#: Width, depth and dropout of the published EfficientNet-Lite0 to 4, for images of 224, 240, 260, 280 and 300 pixels.
_LITES = ((1.0, 1.0, 0.2), (1.0, 1.1, 0.2), (1.1, 1.2, 0.3), (1.2, 1.4, 0.3), (1.4, 1.8, 0.3))
for _number, (_width, _depth, _dropout) in enumerate(_LITES):
    register_model_architecture("quant_noise_efficientnet", f"quant_noise_efficientnet_lite{_number}")(
        partial(_defaults, lite=True, width=_width, depth=_depth, dropout=_dropout)
    )


@register_model_architecture("quant_noise_efficientnet", "quant_noise_efficientnet_small")
def small(args: Any) -> None:
    """For 32 x 32 pixels on a CPU: a third of B0's channels, half of its depth; 335,594 parameters with 10 classes."""
    _defaults(args, width=0.35, depth=0.5, dropout=0.1, drop_path=0.0)
