"""The options of fairseq-train that make the network of a checkpoint, one a line: the architecture and its sizes.

python -m recipes.posthoc.flags CKPT

For an EfficientNet also those of its task: what its images are like.
"""

import sys

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.errors import UserError, end_program
from fairseq_quant_noise.networks import EfficientNet
from fairseq_quant_noise.networks.efficientnet_config import LAYER_OPTIONS
from fairseq_quant_noise.networks.roberta import Roberta

_SIZES = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "max_positions")
_OTHERS = ("activation_fn", "layer_norm_eps")
_OF_IMAGES = ("width", "depth", "stem_stride", *LAYER_OPTIONS)
#: How images are prepared, and fairseq_quant_noise's defaults.
PIXELS = {"image_size": 224, "crop_ratio": 0.875, "normalization": "imagenet"}


def flags(path: str) -> list[str]:
    """The options, in the order of a command line.

    Raises:
        UserError: the file is no checkpoint, or not of a RoBERTa or an EfficientNet.
    """
    checkpoint = Checkpoint(path)
    network = checkpoint.network
    if isinstance(network, EfficientNet):
        given = checkpoint.config["cfg"]["model"]
        options = _options({name: given[name] for name in _OF_IMAGES if given.get(name) is not None})
        lite = ["--lite"] * network.lite
        return ["--arch", "quant_noise_efficientnet", *options, *lite, *_options(pixels(checkpoint))]
    if not isinstance(network, Roberta):
        raise UserError(f"{path}: is a {type(network).__name__}; give a RoBERTa or an EfficientNet")
    options = _options({name: getattr(network.config, name) for name in (*_SIZES, *_OTHERS)})
    untied = ["--untie-weights-roberta"] * network.config.untie_weights_roberta
    return ["--arch", "quant_noise_roberta", *options, *untied]


def pixels(checkpoint: Checkpoint) -> dict[str, int | float | str]:
    """How the images of an EfficientNet's checkpoint were prepared: `image_size`, `crop_ratio` and `normalization`."""
    task = (checkpoint.state.get("cfg") or {}).get("task") or {}
    return {name: task.get(name, default) for name, default in PIXELS.items()}


def _options(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def main() -> None:
    """Print them."""
    if len(sys.argv) != 2:
        sys.exit("error: give a checkpoint: python -m recipes.posthoc.flags CKPT")
    try:
        print("\n".join(flags(sys.argv[1])))
    except UserError as error:
        end_program(error)


if __name__ == "__main__":
    main()
