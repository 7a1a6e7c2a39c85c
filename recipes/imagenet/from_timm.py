"""Weights of timm's EfficientNet as a checkpoint, for the verbs and fairseq-validate without a training.

    python -m recipes.imagenet.from_timm efficientnet_b3.safetensors --arch quant_noise_efficientnet_b3 --out b3.pt

fairseq-train needs no checkpoint: its --timm-weights reads the file itself.
"""

import argparse
import sys
from collections.abc import Sequence

import fairseq.models  # noqa: F401 (first, so that the package registers its models)

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.keys import no_training
from fairseq_quant_noise.images import NORMALIZATIONS
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.networks.timm_weights import load_timm_weights
from fairseq_quant_noise.plugin.exits import exits_on_user_error
from fairseq_quant_noise.plugin.models.architectures import architecture_options


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a state dict (.pth) or a .safetensors file")
    parser.add_argument("--arch", default="quant_noise_efficientnet_b3")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="an option of the model")
    parser.add_argument("--image-size", type=int, default=300)
    parser.add_argument("--crop-ratio", type=float, default=0.904)
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="imagenet")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    with exits_on_user_error(always=True):
        options = architecture_options(args.arch, args.set)
        model = build(args.arch, options, 0)
        load_timm_weights(model, args.weights)
        task = {
            "data": "",
            "image_size": args.image_size,
            "crop_ratio": args.crop_ratio,
            "normalization": args.normalization,
        }
        cfg = {
            "common": {"seed": 1},  # the task's seed refers to it
            "model": options,
            "task": {"_name": "image_classification", **task},
            "criterion": {"_name": "cross_entropy", "sentence_avg": False},
        }
        state = {"args": None, "cfg": cfg, "model": model.state_dict(), **no_training()}
        Checkpoint(args.out, state).write(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(sys.argv[1:])
