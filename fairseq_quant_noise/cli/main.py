"""`fairseq-quant-noise VERB`: each verb a few lines over the package.

Exit codes: 0 done, 2 the user's mistake, 3 a damaged file; a mistake is one line on standard error.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..plugin.exits import exits_on_user_error
from ..structure.layer_map import START
from .printing import print_inspection, print_table

Verb = Callable[[argparse.Namespace], None]
#: Of `bench`: the programs in benchmarks/.
CLAIMS = ("noise", "finetune", "encode", "infer", "generate", "growth", "sizes")


def user_dir(args: argparse.Namespace) -> None:
    """Print the path to give fairseq as --user-dir."""
    print(Path(__file__).parent)


def plan(args: argparse.Namespace) -> None:
    """Dry run: a row a tensor, the totals, nothing computed."""
    from ..checkpoints.network import has_words, load_trained, meta_model
    from ..plan.rules import Plan
    from ..quantization.table import make_table, resolve_stages
    from ..structure.modules import apply_structure

    if (args.path is None) == (args.arch is None):
        raise UserError("plan: give either --path CKPT or --arch ARCH")
    if args.path is not None:
        if args.set or args.head:
            raise UserError("plan: --set and --head go with --arch, for a checkpoint has its own; leave them out")
        model = load_trained(args.path).model
    else:
        from ..plugin.models.architectures import architecture_options

        if args.vocab_size is None and has_words(args.arch):
            raise UserError("plan: --arch needs --vocab-size, the number of words in the dictionary (dict.txt + 4)")
        options = architecture_options(args.arch, args.set, args.head)
        model = meta_model(args.arch, options, args.vocab_size or 0)
    the_plan = Plan.of(args.plan)
    original = make_table(model)
    if the_plan.structure is not None:
        apply_structure(model, the_plan.structure)
    table = make_table(model, resolve_stages(the_plan, model), original.dense_bytes)
    if args.json:
        print(json.dumps(table.to_dict()))
    else:
        print_table(table)


def quantize(args: argparse.Namespace) -> None:
    """One-shot quantization of a checkpoint, without training, into a packed file."""
    from ..artifact import pack, write
    from ..checkpoints.structure import load_structured
    from ..plan.rules import Plan
    from ..quantization.quantize import quantize_

    the_plan = Plan.of(args.plan)
    if not the_plan.stages:
        raise UserError(f"quantize: plan {args.plan} has no stages; add what to quantize")
    if the_plan.activations is not None and args.calibration_data is None:
        raise UserError(
            f"quantize: plan {args.plan} quantizes activations, whose ranges need data; give --calibration-data "
            "DATA, the folder that fairseq-train reads"
        )
    _check_out(args.out, args.path, args.plan, packed=True)
    trained = load_structured(args.path, the_plan.structure, the_plan.weighs)
    stages = replace(the_plan, structure=None)  # which the model has had
    importance = trained.importance
    if the_plan.weighs and not importance:
        note = f"note: {args.path} holds no second moments of Adam"
        if args.calibration_data is None:
            _progress(
                f"{note}, so all errors count alike in k-means; --calibration-data DATA measures gradients instead"
            )
        else:
            from ..plugin.calibration import gradients_on

            _progress(f"{note}: gradients on {args.calibration_data} stand for them")
            importance = gradients_on(trained.model, args.path, args.calibration_data, the_plan.structure, _progress)
    calibration = None
    if args.calibration_data is not None:
        from ..plugin.calibration import calibration_on

        calibration = calibration_on(trained.model, args.path, args.calibration_data, the_plan)
    quantize_(
        *(trained.model, stages),
        seed=args.seed,
        importance=importance,
        calibration=calibration,
        progress=_progress,
    )
    packed = pack(trained.model, the_plan, trained.config)
    write(packed, args.out)
    print_inspection(args.out, packed)


def export(args: argparse.Namespace) -> None:
    """A checkpoint that was trained with the stages, into the packed file."""
    from ..artifact import pack, write
    from ..checkpoints.network import STAGES, load_trained
    from ..layers import quantized_weights
    from ..plan.rules import Plan

    _check_out(args.out, args.path, packed=True)
    trained = load_trained(args.path)
    if not quantized_weights(trained.model):
        raise UserError(
            f"export: {args.path} holds no quantized weights; quantize it with `fairseq-quant-noise quantize`"
        )
    stages = trained.state.get("extra_state", {}).get(STAGES, {})
    the_plan = Plan.of(stages["plan"]) if "plan" in stages else None
    if the_plan is not None and stages["done"] < len(the_plan.stages):
        _progress(f"note: {stages['done']} of the plan's {len(the_plan.stages)} stages are done; the rest stays dense")
    packed = pack(trained.model, the_plan, trained.config)
    write(packed, args.out)
    print_inspection(args.out, packed)


def prune(args: argparse.Namespace) -> None:
    """Take layers out of a checkpoint that was trained with LayerDrop; the result trains, evaluates and quantizes."""
    from ..checkpoints.stock import write_checkpoint
    from ..checkpoints.structure import kept_checkpoint
    from ..structure.state import stack_sizes

    _check_out(args.out, args.path)
    state = kept_checkpoint(args.path, _keep(args.keep))
    write_checkpoint(state, args.out)
    print(f"{args.out}: {_stacks(stack_sizes(state['model']))}")


def share(args: argparse.Namespace) -> None:
    """Give adjacent layers of a dense checkpoint one set of weights; training goes on with them shared."""
    from ..checkpoints.stock import write_checkpoint
    from ..checkpoints.structure import shared_checkpoint
    from ..structure.state import stack_sizes

    _check_out(args.out, args.path)
    if args.share_layers < 2:
        raise UserError(f"--share-layers is {args.share_layers}; give how many adjacent layers share, 2 or more")
    state = shared_checkpoint(args.path, args.share_layers, args.share_from)
    write_checkpoint(state, args.out)
    print(
        f"{args.out}: {_stacks(stack_sizes(state['model']))}, {args.share_layers} adjacent ones with the same weights"
    )


def _keep(given: Sequence[str]) -> object:
    """`--keep LAYERS` for all stacks, or `--keep STACK=LAYERS` for each."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    named = dict(part.partition("=")[::2] for part in given)
    if len(named) < len(given) or not all("=" in part for part in given):
        raise UserError(f"--keep {' --keep '.join(given)}: give one list, or one for each stack, as encoder=0,2,4")
    return named


def _stacks(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{n} layers in {stack.removesuffix('.layers')}" for stack, n in sizes.items())


def inspect(args: argparse.Namespace) -> None:
    """What is in a packed file, and its bytes."""
    from ..artifact import read

    print_inspection(args.file, read(args.file), as_json=args.json)


def verify(args: argparse.Namespace) -> None:
    """Whether a packed file is whole: its hash, its header and every code."""
    from ..artifact import read

    packed = read(args.file)
    result = {"file": args.file, "whole": True, "tensors": len(packed.tensors)}
    print(json.dumps(result) if args.json else f"{args.file}: whole, {len(packed.tensors)} tensors")


def to_dense(args: argparse.Namespace) -> None:
    """A packed file or a checkpoint, into a stock fairseq checkpoint that needs no plugin."""
    from ..checkpoints.stock import stock_checkpoint, write_checkpoint

    _check_out(args.out, args.file)
    write_checkpoint(stock_checkpoint(args.file), args.out)
    print(f"{args.out}: a stock fairseq checkpoint")


def report(args: argparse.Namespace) -> None:
    """Finished runs as one HTML page with tables and pictures."""
    from ..report import write_report

    runs = write_report(args.folders, args.out)
    summary = {"page": str(Path(args.out) / "index.html"), "runs": runs.names, "missing": runs.notes}
    if args.json:
        print(json.dumps(summary))
        return
    print(f"{summary['page']}: {len(runs.names)} runs, {len(runs.points)} scores, {len(runs.files)} packed files")
    for note in runs.notes:
        _progress(f"note: {note}")


def bench(args: argparse.Namespace) -> None:
    """A performance claim, measured here and now beside fairseq's own code; what follows goes to the benchmark."""
    program = Path(__file__).parents[1] / "benchmarks" / f"{args.claim}.py"
    if not program.exists():
        raise UserError(f"bench {args.claim}: {program} is not there; run it in a checkout of the repository")
    raise SystemExit(subprocess.run([sys.executable, str(program), *args.options]).returncode)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_out(out: str, *read: str, packed: bool = False) -> None:
    """Before any work: that `out` can be written, is no checkpoint's name, and is none of the files that are read."""
    path = Path(out)
    folder = path.absolute().parent
    if not out or path.is_dir():
        raise UserError(f"--out {out or repr(out)}: is a folder; give the name of a file in it")
    if not folder.is_dir():
        raise UserError(f"--out {out}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: the folder {folder} cannot be written; choose another place")
    if path.exists() and any(path.samefile(name) for name in read if Path(name).exists()):
        raise UserError(f"--out {out}: is a file that is read, and would be lost; choose another name")
    if packed and path.suffix == ".pt":
        cure = f"call it {path.with_suffix('.safetensors')}"
        raise UserError(
            f"--out {out}: is a checkpoint's name, and fairseq's programs know a packed file by its; {cure}"
        )


def _option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, settings


_PATH = _option("--path", metavar="CKPT", required=True, help="a fairseq checkpoint")
_PLAN = _option("--plan", metavar="PLAN", required=True, help="a YAML plan, ours or fairseq's")
_OUT = _option(
    "--out", metavar="FILE", required=True, help="the file to write; replaced only once the new one is whole"
)
_FILE = _option("file", metavar="FILE", help="a packed file")
_JSON = _option("--json", action="store_true", help="print JSON")

_VERBS: dict[str, tuple[Verb, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "user-dir": (user_dir, 'fairseq-train DATA --user-dir "$(fairseq-quant-noise user-dir)" ...', []),
    "plan": (
        plan,
        "fairseq-quant-noise plan --arch quant_noise_roberta_base --vocab-size 50265 --head mnli=3 "
        "--set quant_noise_embedding_layer=true --plan configs/plans/roberta.yaml",
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
            _PLAN,
            _JSON,
        ],
    ),
    "quantize": (
        quantize,
        "fairseq-quant-noise quantize --path dense.pt --plan configs/plans/small.yaml --out model.safetensors",
        [
            _PATH,
            _PLAN,
            _OUT,
            _option("--seed", type=int, default=0, help="of k-means (default 0)"),
            _option(
                "--calibration-data",
                metavar="DATA",
                help="binarized data, or images, whose training split gives the ranges of activations, for a plan that "
                "has them, the statistics of batch normalisation, for a network that has it, and the gradients that "
                "errors are weighed by, of a checkpoint without Adam's second moments",
            ),
        ],
    ),
    "export": (
        export,
        "fairseq-quant-noise export --path ipq/checkpoint_best.pt --out model.safetensors",
        [_PATH, _OUT],
    ),
    "prune": (
        prune,
        "fairseq-quant-noise prune --path dense.pt --keep every-other --out pruned.pt",
        [
            _PATH,
            _option(
                "--keep",
                metavar="[STACK=]LAYERS",
                action="append",
                required=True,
                help="every-other, or numbers of layers such as 0,2,4; encoder=0,2 for one of two stacks, given again "
                "for the other. Layers that share their weights stay or go together",
            ),
            _OUT,
        ],
    ),
    "share": (
        share,
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
    "inspect": (inspect, "fairseq-quant-noise inspect model.safetensors --json", [_FILE, _JSON]),
    "verify": (verify, "fairseq-quant-noise verify model.safetensors", [_FILE, _JSON]),
    "report": (
        report,
        "fairseq-quant-noise report runs/quickstart --out runs/quickstart/report",
        [
            _option("folders", metavar="DIR", nargs="+", help="a finished run, or a folder above several"),
            _option("--out", metavar="REPORT", required=True, help="the folder of index.html, PNGs and report.json"),
            _JSON,
        ],
    ),
    "bench": (
        bench,
        "fairseq-quant-noise bench noise --threads 2 --json",
        [
            _option("claim", choices=CLAIMS, help="what is measured"),
            _option("options", nargs=argparse.REMAINDER, help="of the benchmark; --help lists them"),
        ],
    ),
    "to-dense": (
        to_dense,
        "fairseq-quant-noise to-dense model.safetensors --out stock.pt",
        [_option("file", metavar="FILE", help="a packed file or a checkpoint"), _OUT],
    ),
}


_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE has ended


def make_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand for each verb, each with an example."""
    parser = argparse.ArgumentParser(prog="fairseq-quant-noise", description="Quant-Noise and iPQ for fairseq.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (verb, example, options) in _VERBS.items():
        summary = (verb.__doc__ or "").strip()
        sub = verbs.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        for flags, settings in options:
            sub.add_argument(*flags, **settings)
        sub.set_defaults(run=verb)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Raises SystemExit with the exit code on a mistake."""
    logging.basicConfig(level=logging.WARNING)
    args = make_parser().parse_args(argv)
    with exits_on_user_error(always=True):
        try:
            args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads, as `head`, has read enough; Python would say so once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(_BROKEN_PIPE) from None
