"""The options of fairseq-train that make the network of a checkpoint, one a line: the architecture and its sizes.

python -m recipes.posthoc.flags CKPT
"""

import sys

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.errors import UserError, end_program
from fairseq_quant_noise.networks.roberta import Roberta

_SIZES = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "max_positions")
_OTHERS = ("activation_fn", "layer_norm_eps")


def flags(path: str) -> list[str]:
    """The options, in the order of a command line.

    Raises:
        UserError: the file is no checkpoint, or not of a RoBERTa.
    """
    network = Checkpoint(path).network
    if not isinstance(network, Roberta):
        raise UserError(f"{path}: is a {type(network).__name__}; give a RoBERTa")
    options = ["--arch", "quant_noise_roberta"]
    for name in (*_SIZES, *_OTHERS):
        options += [f"--{name.replace('_', '-')}", str(getattr(network.config, name))]
    return options + ["--untie-weights-roberta"] * network.config.untie_weights_roberta


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
