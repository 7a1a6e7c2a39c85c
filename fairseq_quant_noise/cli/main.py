"""Parse the command line `fairseq-quant-noise VERB` and run the verb.

Exit codes: 0 done, 2 the user's mistake, 3 a damaged file; a mistake is one line on standard error.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import UserError, end_program
from ..plan.vocabulary import DENSE_BITS, FEEDBACK, PLAIN
from ..structure.layer_map import START

#: The claims that `bench` can measure: the programs in benchmarks/.
CLAIMS = ("noise", "finetune", "encode", "infer", "encoder", "graphs", "phone", "generate", "growth", "ranks", "sizes")
#: `deployment.products.PRODUCTS`, whose module needs torch.
PRODUCTS = ("float", "int8", "int4")


def _option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, settings


_PATH = _option("--path", metavar="CKPT", required=True, help="a fairseq checkpoint")
_PLAN_HELP = "a YAML plan, ours or fairseq's, or the name of a plan that comes with the package, such as small_int8"
_PLAN = _option("--plan", metavar="PLAN", required=True, help=_PLAN_HELP)
_OUT = _option(
    "--out", metavar="FILE", required=True, help="the file to write; replaced only once the new one is whole"
)
_FILE = _option("file", metavar="FILE", help="a packed file")
_STRICT = _option(
    "--strict",
    action="store_true",
    help="refuse a network with a weight that no rule can name, or whose inputs `activations` cannot round",
)
_DENSE = _option(
    "--dense",
    choices=[*DENSE_BITS],
    help="in place of the plan's: how biases, norms, batch statistics and dense weights are stored, in fp32 (default) "
    "or, where their values survive it, in fp16",
)
_JSON = _option("--json", action="store_true", help="print JSON")


class Verb(NamedTuple):
    """What the command line says of a verb. The code behind it is imported when it runs, and torch with it."""

    module: str  # in this folder; its function has the verb's name
    summary: str  # the function's docstring
    example: str
    options: list[tuple[tuple[str, ...], dict[str, Any]]]


_VERBS = {
    "user-dir": Verb(
        "programs",
        "Print the path to give fairseq as --user-dir.",
        'fairseq-train DATA --user-dir "$(fairseq-quant-noise user-dir)" ...',
        [],
    ),
    "plan": Verb(
        "planning",
        "Show what a plan would do to each tensor, and the totals; or find the plans that spend bytes best.",
        "fairseq-quant-noise plan --arch quant_noise_roberta_base --vocab-size 50265 --head mnli=3 "
        "--set quant_noise_embedding_layer=true --plan roberta",
        [
            _option("--path", metavar="CKPT", help="a fairseq checkpoint"),
            _option("--arch", metavar="ARCH", help="an architecture's name, instead of a checkpoint"),
            _option("--vocab-size", type=int, metavar="N", help="words in the dictionary, with --arch"),
            _option(
                "--head",
                metavar="NAME=CLASSES",
                action="append",
                default=[],
                help="a classification head, with --arch; may be given again",
            ),
            _option(
                "--set",
                metavar="KEY=VALUE",
                action="append",
                default=[],
                help="an option of the model, with --arch; may be given again",
            ),
            _option("--plan", metavar="PLAN", help=_PLAN_HELP),
            _option(
                "--budget",
                metavar="SIZE",
                help="find the plan whose packed file has at most this size and loses least: 10MiB, 10MB, bytes, or "
                "x17 for a 17th of the dense network, before --share-layers and --keep-layers",
            ),
            _option(
                "--target-loss",
                type=float,
                metavar="LOSS",
                help="find the smallest plan whose loss on --calibration-data is at most this, with --path",
            ),
            _option(
                "--frontier",
                action="store_true",
                help="show loss against bytes: the best plans from the smallest to the largest, and the paper's",
            ),
            _option(
                "--share-layers",
                type=int,
                metavar="N",
                default=1,
                help="let N adjacent layers share their weights, in a plan that is found",
            ),
            _option(
                "--share-from", choices=START, help=f"the weights that --share-layers starts from (default {START[0]})"
            ),
            _option(
                "--keep-layers",
                metavar="LAYERS",
                action="append",
                default=[],
                help="keep every-other layer, numbers such as 0,2,4, or all, in a plan that is found; given again, the "
                "plan is of those with the least loss on --calibration-data",
            ),
            _option(
                "--calibration-data",
                metavar="DATA",
                help="with --budget, --target-loss and --frontier: binarized data, or images, on whose training split "
                "losses are measured, and the gradients that errors are weighed by, of a checkpoint without Adam's "
                "second moments",
            ),
            _option(
                "--out", metavar="FILE", help="the plan to write, in YAML; with --frontier, the picture (.svg, .png)"
            ),
            _STRICT,
            _JSON,
        ],
    ),
    "quantize": Verb(
        "verbs",
        "Quantize a checkpoint at once, without training, and write a packed file.",
        "fairseq-quant-noise quantize --path dense.pt --plan small --out model.safetensors",
        [
            _PATH,
            _PLAN,
            _OUT,
            _STRICT,
            _DENSE,
            _option("--seed", type=int, default=0, help="the seed of k-means (default 0)"),
            _option(
                "--encode",
                choices=(PLAIN, FEEDBACK),
                help="in place of the plan's: plain, by k-means (default); feedback, then by the errors of the layers' "
                "outputs, with --calibration-data",
            ),
            _option(
                "--calibration-data",
                metavar="DATA",
                help="binarized data, or images, whose training split gives the ranges of activations, for a plan that "
                "has them, the layers' inputs, for --encode feedback, the statistics of batch normalisation, for a "
                "network that has it, and the gradients that errors are weighed by, of a checkpoint without Adam's "
                "second moments",
            ),
        ],
    ),
    "export": Verb(
        "verbs",
        "Write the packed file of a checkpoint that was trained with the stages.",
        "fairseq-quant-noise export --path ipq/checkpoint_best.pt --out model.safetensors",
        [_PATH, _OUT, _DENSE],
    ),
    "prune": Verb(
        "verbs",
        "Write a checkpoint without some of its layers, for networks that were trained with LayerDrop.",
        "fairseq-quant-noise prune --path dense.pt --keep every-other --out pruned.pt",
        [
            _PATH,
            _option(
                "--keep",
                metavar="[STACK=]LAYERS",
                action="append",
                required=True,
                help="every-other, or numbers of layers such as 0,2,4, or learned (learned:6 for six layers) after a "
                "training with --learn-layerdrop; encoder=0,2 for one of two stacks, given again for the other. Layers "
                "that share their weights stay or go together",
            ),
            _OUT,
        ],
    ),
    "share": Verb(
        "verbs",
        "Write a checkpoint whose adjacent layers share one set of weights; training goes on with them shared.",
        "fairseq-quant-noise share --path dense.pt --share-layers 2 --share-from mean --out shared.pt",
        [
            _PATH,
            _option(
                "--share-layers", type=int, metavar="N", required=True, help="adjacent layers that share, 2 or more"
            ),
            _option(
                "--share-from",
                choices=START,
                default=START[0],
                help="the weights they start from: those of the first of them (default), or their mean",
            ),
            _OUT,
        ],
    ),
    "inspect": Verb(
        "verbs",
        "Show what a packed file holds, and its bytes.",
        "fairseq-quant-noise inspect model.safetensors --json",
        [_FILE, _JSON],
    ),
    "verify": Verb(
        "verbs",
        "Check that a packed file is whole: its hash, its header and every code.",
        "fairseq-quant-noise verify model.safetensors",
        [_FILE, _JSON],
    ),
    "report": Verb(
        "verbs",
        "Show finished runs on one HTML page with tables and pictures.",
        "fairseq-quant-noise report runs/quickstart --out runs/quickstart/report",
        [
            _option("folders", metavar="DIR", nargs="+", help="a finished run, or a folder above several"),
            _option("--out", metavar="REPORT", required=True, help="the folder of index.html, PNGs and report.json"),
            _JSON,
        ],
    ),
    "bench": Verb(
        "programs",
        "Measure a performance claim on this machine, beside fairseq's own code.",
        "fairseq-quant-noise bench noise --threads 2 --json",
        [
            _option("claim", choices=CLAIMS, help="what is measured"),
            _option(
                "options", nargs=argparse.REMAINDER, help="options of the benchmark; `bench CLAIM --help` lists them"
            ),
        ],
    ),
    "to-dense": Verb(
        "verbs",
        "Turn a packed file or a checkpoint into a stock fairseq checkpoint that needs no plugin.",
        "fairseq-quant-noise to-dense model.safetensors --out stock.pt",
        [_option("file", metavar="FILE", help="a packed file or a checkpoint"), _OUT],
    ),
    "export-onnx": Verb(
        "verbs",
        "Write the network of a packed file as an ONNX model, about as small, which onnxruntime runs without torch.",
        "fairseq-quant-noise export-onnx model.safetensors --out model.onnx",
        [
            _FILE,
            _OUT,
            _option(
                "--part",
                metavar="PART",
                help="of a RoBERTa, the head whose classes are scored (default: words); of a model for translation, "
                "encoder or decoder; or source and step, and of a language model step, where a word costs a step",
            ),
            _option(
                "--products",
                choices=PRODUCTS,
                default=PRODUCTS[0],
                help="how weights in integers are multiplied: float, by the decoded weight (default); int8, in whole "
                "numbers, with inputs of 8 bits; int4, as int8, but int4 weights stay in 4 bits in memory",
            ),
        ],
    ),
    "from-hf": Verb(
        "verbs",
        "A Hugging Face folder of a RoBERTa, XLM-R or BERT, into a fairseq checkpoint with its dictionary beside it.",
        "fairseq-quant-noise from-hf roberta-base --out roberta/model.pt",
        [
            _option("folder", metavar="DIR", help="a folder with config.json, weights and a tokenizer"),
            _option(
                "--out",
                metavar="CKPT",
                required=True,
                help="the checkpoint to write; dict.txt and the tokenizer's files come into the same folder",
            ),
        ],
    ),
    "to-hf": Verb(
        "verbs",
        "A fairseq checkpoint or a packed file of a RoBERTa, into a folder that transformers loads.",
        "fairseq-quant-noise to-hf model.safetensors --dict roberta --out folder",
        [
            _option("path", metavar="CKPT", help="a checkpoint or a packed file of a RoBERTa"),
            _option("--out", metavar="DIR", required=True, help="the folder to write; it need not exist"),
            _option(
                "--dict",
                metavar="FOLDER",
                help="the folder of dict.txt, the tokenizer's files and label/dict.txt, as from-hf wrote it "
                "(default: that of CKPT)",
            ),
        ],
    ),
}


_BROKEN_PIPE = 141  # the exit code that a shell reports for a program ended by SIGPIPE


def make_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand for each verb, each with an example."""
    parser = argparse.ArgumentParser(prog="fairseq-quant-noise", description="Quant-Noise and iPQ for fairseq.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in _VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary, description=verb.summary, epilog=f"example: {verb.example}")
        for flags, settings in verb.options:
            sub.add_argument(*flags, **settings)
    return parser


def function(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of a verb."""
    module = importlib.import_module(f".{_VERBS[name].module}", __package__)
    found: Callable[[argparse.Namespace], None] = getattr(module, name.replace("-", "_"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: the arguments; those of the process by default.

    Raises:
        SystemExit: with exit code 2 or 3 after a UserError, 2 for arguments that do not parse, 141 where the reader of
            standard output has closed it.
    """
    logging.basicConfig(level=logging.WARNING)
    args = make_parser().parse_args(argv)
    try:
        function(args.verb)(args)
        sys.stdout.flush()
    except UserError as error:
        end_program(error)
    except BrokenPipeError:  # whoever reads, as `head`, has read enough; Python would say so once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_BROKEN_PIPE) from None
