"""Implement the verbs of `fairseq-quant-noise`, which take parsed arguments.

`main.py` prints a verb's whole docstring in its --help, so that these have no sections. Verbs raise UserError for a
user's mistake and DamagedFileError for a damaged file; `bench` raises SystemExit with the benchmark's exit code.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..accounting import MIB
from ..artifact import pack, read, write
from ..artifact.reader import SUFFIX
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hugging_face import from_folder, to_folder
from ..checkpoints.stock import difference, stock_checkpoint
from ..checkpoints.structure import pruned, restructured, shared
from ..deployment import onnx_model
from ..errors import UserError
from ..layers import quantized_weights
from ..networks.registry import has_words, meta_model
from ..plan.plan import Plan
from ..quantization.budget.options import price
from ..quantization.budget.text import plan_text
from ..quantization.quantize import quantize_, quantized_values
from ..quantization.structure import apply_structure
from ..quantization.table import make_table
from ..quantization.targets import Target, resolve_stages
from ..report import write_report
from ..structure.state import stack_sizes
from ..utils.files import replace_file
from ..utils.progress import now_and_then
from ..weights.discovery import warn_of_uncovered
from .budget import best_plan, budget_of, smallest_plan
from .printing import print_inspection, print_table


def user_dir(args: argparse.Namespace) -> None:
    """Print the path to give fairseq as --user-dir."""
    print(Path(__file__).parents[1])


def plan(args: argparse.Namespace) -> None:
    """Show what a plan would do to each tensor, and the totals; or find the plan for a size, with --budget."""
    if (args.plan is None) == (args.budget is None):
        raise UserError("plan: give either --plan PLAN, to see what it does, or --budget SIZE, to find one")
    if args.budget is not None:
        _find_plan(args)
        return
    for option in ("out", "calibration_data"):
        if getattr(args, option) is not None:
            raise UserError(f"plan: --{option.replace('_', '-')} goes with --budget; leave it out")
    model = _network(args)
    the_plan = Plan.of(args.plan)
    original = make_table(model)
    if the_plan.structure is not None:
        apply_structure(model, the_plan.structure)
    targets = resolve_stages(the_plan, model)
    table = make_table(model, targets, original.dense_bytes, the_plan.codes.train)
    warn_of_uncovered(model, args.strict)
    if args.json:
        print(json.dumps(table.to_dict()))
    else:
        print_table(table)


def _find_plan(args: argparse.Namespace) -> None:
    """The plan of least predicted loss whose file has at most so many bytes: as a table, and in a file with --out."""
    if args.path is None or args.arch is not None:
        raise UserError("plan: --budget needs --path CKPT and no --arch, for it asks the weights what they lose")
    if args.out is not None:
        _check_out(args.out, args.path)
    if args.calibration_data is not None:
        _need_fairseq("--calibration-data", "leave it out")
    checkpoint = _dense_checkpoint(args)
    model = checkpoint.network
    warn_of_uncovered(model, args.strict)
    budget = budget_of(args.budget, make_table(model).dense_bytes)
    smallest = smallest_plan(checkpoint, budget)
    loss = None
    if args.calibration_data is not None:
        from ..plugin.calibration import loss_on

        loss = loss_on(checkpoint, args.calibration_data)
    importance = _importance(args, checkpoint)
    checkpoint.forget_optimizer()
    found = best_plan(checkpoint, price(model, importance, _progress), budget, smallest)
    targets = resolve_stages(found.plan, model)
    losses = None if loss is None else (loss({}), loss(_values(targets, importance)))
    table = make_table(model, targets)
    summary = f"The packed file has {found.bytes:,} bytes ({found.bytes / MIB:.3f} MiB)"
    if losses is not None:
        summary += f"; loss {losses[0]:.3f} before and {losses[1]:.3f} after, on {args.calibration_data}"
    if args.out is not None:
        heading = f"Found by `fairseq-quant-noise plan --budget {args.budget}`.", f"{summary}."
        replace_file(args.out, plan_text(found.chosen, heading).encode())
    if args.json:
        print(json.dumps({**table.to_dict(), "file_bytes": found.bytes, "losses": losses}))
        return
    print_table(table)
    print(summary)


def _values(targets: Sequence[Target], importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The targets' weights as `quantize` would give them to evaluation, by the tensor's name, of their own shapes."""
    values = quantized_values(targets, seed=0, importance=importance, progress=now_and_then(_progress))
    return {target.weight.tensor_name: value for target, (_, value) in zip(targets, values, strict=True)}


def _network(args: argparse.Namespace) -> nn.Module:
    """The network that `plan` is about: of a checkpoint, or of an architecture."""
    if (args.path is None) == (args.arch is None):
        raise UserError("plan: give either --path CKPT or --arch ARCH")
    if args.path is not None:
        return _dense_checkpoint(args).network
    _need_fairseq("--arch", "give --path CKPT instead")
    from ..plugin.models.architectures import architecture_options

    if args.vocab_size is None and has_words(args.arch):
        raise UserError("plan: --arch needs --vocab-size, the number of words in the dictionary (dict.txt + 4)")
    options = architecture_options(args.arch, args.set, args.head)
    return meta_model(args.arch, options, args.vocab_size or 0)


def _dense_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that `plan` is about. Raises UserError where it is quantized already."""
    if args.set or args.head:
        raise UserError("plan: --set and --head go with --arch, for a checkpoint has its own; leave them out")
    checkpoint = Checkpoint(args.path)
    if quantized_weights(checkpoint.network):
        raise UserError(
            f"plan: {args.path} holds quantized weights already; give the dense checkpoint, or look at this one by "
            "`fairseq-quant-noise export` and `inspect`"
        )
    return checkpoint


def quantize(args: argparse.Namespace) -> None:
    """Quantize a checkpoint at once, without training, and write a packed file."""
    the_plan = Plan.of(args.plan)
    if args.encode is not None:
        the_plan = replace(the_plan, encode=replace(the_plan.encode, kind=args.encode))
    _check_stages(args, the_plan)
    _check_out(args.out, args.path, args.plan, packed=True)
    checkpoint = restructured(Checkpoint(args.path), the_plan.structure)
    importance = _importance(args, checkpoint) if the_plan.weighs else {}
    checkpoint.forget_optimizer()
    without = replace(the_plan, structure=None)  # which the checkpoint has had
    calibration = inputs = None
    if args.calibration_data is not None:
        from ..plugin.calibration import calibration_on, inputs_on

        if the_plan.encode.feeds_back:
            inputs = inputs_on(checkpoint, args.calibration_data, without, _progress)
        calibration = calibration_on(checkpoint, args.calibration_data, without)
    quantize_(
        checkpoint.network,
        without,
        seed=args.seed,
        importance=importance,
        calibration=calibration,
        inputs=inputs,
        strict=args.strict,
        progress=_progress,
    )
    _write_packed(args.out, checkpoint, the_plan)


def _check_stages(args: argparse.Namespace, the_plan: Plan) -> None:
    """Before any work: that the plan has stages, and data where it needs them. Raises UserError."""
    if not the_plan.stages:
        raise UserError(f"quantize: plan {args.plan} has no stages; add what to quantize")
    if the_plan.activations is not None and args.calibration_data is None:
        raise UserError(
            f"quantize: plan {args.plan} quantizes activations, whose ranges need data; give --calibration-data "
            "DATA, the folder that fairseq-train reads"
        )
    if the_plan.encode.feeds_back and args.calibration_data is None:
        raise UserError(
            "quantize: encode: feedback measures the layers' inputs on data; give --calibration-data DATA, the folder "
            "that fairseq-train reads, or leave it out"
        )
    if args.calibration_data is not None:
        _need_fairseq("--calibration-data", "leave it out, with a plan that has no `activations`")


def _importance(args: argparse.Namespace, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """What k-means weighs errors by: the checkpoint's second moments, or gradients on the data, or nothing."""
    if checkpoint.moments:
        return checkpoint.moments
    note = f"note: {args.path} holds no second moments of Adam"
    if args.calibration_data is None:
        _progress(f"{note}, so all errors count alike in k-means; --calibration-data DATA measures gradients instead")
        return {}
    from ..plugin.calibration import gradients_on

    _progress(f"{note}: gradients on {args.calibration_data} stand for them")
    return gradients_on(checkpoint, args.calibration_data, _progress)


def export(args: argparse.Namespace) -> None:
    """Write the packed file of a checkpoint that was trained with the stages."""
    _check_out(args.out, args.path, packed=True)
    checkpoint = Checkpoint(args.path)
    if not quantized_weights(checkpoint.network):
        raise UserError(
            f"export: {args.path} holds no quantized weights; quantize it with `fairseq-quant-noise quantize`"
        )
    stages = checkpoint.stages
    the_plan = Plan.of(stages["plan"]) if "plan" in stages else None
    if the_plan is not None and stages["done"] < len(the_plan.stages):
        _progress(f"note: {stages['done']} of the plan's {len(the_plan.stages)} stages are done; the rest stays dense")
    _write_packed(args.out, checkpoint, the_plan)


def _write_packed(out: str, checkpoint: Checkpoint, the_plan: Plan | None) -> None:
    """The checkpoint's network, quantized by now, as a packed file; print what is in it."""
    packed = pack(checkpoint.network, the_plan, checkpoint.config)
    write(packed, out)
    print_inspection(out, packed)


def prune(args: argparse.Namespace) -> None:
    """Write a checkpoint without some of its layers, for networks that were trained with LayerDrop."""
    _check_out(args.out, args.path)
    checkpoint = pruned(Checkpoint(args.path), _keep(args.keep), "--keep")
    checkpoint.write(args.out)
    print(f"{args.out}: {_stacks(checkpoint)}")


def share(args: argparse.Namespace) -> None:
    """Write a checkpoint whose adjacent layers share one set of weights; training goes on with them shared."""
    _check_out(args.out, args.path)
    if args.share_layers < 2:
        raise UserError(f"--share-layers is {args.share_layers}; give how many adjacent layers share, 2 or more")
    checkpoint = shared(Checkpoint(args.path), args.share_layers, args.share_from)
    checkpoint.write(args.out)
    print(f"{args.out}: {_stacks(checkpoint)}, {args.share_layers} adjacent ones with the same weights")


def _keep(given: Sequence[str]) -> object:
    """`--keep LAYERS` for all stacks, or `--keep STACK=LAYERS` for each."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    named = dict(part.partition("=")[::2] for part in given)
    if len(named) < len(given) or not all("=" in part for part in given):
        raise UserError(f"--keep {' --keep '.join(given)}: give one list, or one for each stack, as encoder=0,2,4")
    return named


def _stacks(checkpoint: Checkpoint) -> str:
    sizes = stack_sizes(checkpoint.weights)
    return ", ".join(f"{n} layers in {stack.removesuffix('.layers')}" for stack, n in sizes.items())


def inspect(args: argparse.Namespace) -> None:
    """Show what a packed file holds, and its bytes."""
    print_inspection(args.file, read(args.file), as_json=args.json)


def verify(args: argparse.Namespace) -> None:
    """Check that a packed file is whole: its hash, its header and every code."""
    packed = read(args.file)
    result = {"file": args.file, "whole": True, "tensors": len(packed.tensors)}
    print(json.dumps(result) if args.json else f"{args.file}: whole, {len(packed.tensors)} tensors")


def to_dense(args: argparse.Namespace) -> None:
    """Turn a packed file or a checkpoint into a stock fairseq checkpoint that needs no plugin."""
    _check_out(args.out, args.file)
    stock = stock_checkpoint(args.file)
    stock.write(args.out)
    if (different := difference(stock)) is not None:
        _progress(f"note: {different}; scores may differ in the third digit")
    print(f"{args.out}: a stock fairseq checkpoint")


def export_onnx(args: argparse.Namespace) -> None:
    """Write the network of a packed file as an ONNX model, about as small, which onnxruntime runs without torch."""
    _check_out(args.out, args.file)
    content = onnx_model(args.file, read(args.file), args.part)
    replace_file(args.out, content)
    file_bytes = Path(args.file).stat().st_size
    print(f"{args.out}: {len(content) / MIB:.3f} MiB, from a packed file of {file_bytes / MIB:.3f} MiB")


def from_hf(args: argparse.Namespace) -> None:
    """A Hugging Face folder of a RoBERTa, XLM-R or BERT, into a fairseq checkpoint with its dictionary beside it."""
    _check_out(args.out, args.folder, makes_folder=True)
    converted = from_folder(args.folder)
    _write_beside(Path(args.out).absolute().parent, converted.files)
    converted.checkpoint.write(args.out)
    for note in converted.notes:
        _progress(f"note: {note}")
    print(f"{args.out}: a fairseq checkpoint, with {', '.join(converted.files)} beside it")
    print(f"to train it further: fairseq-train ... {' '.join(converted.flags)} --finetune-from-model {args.out}")


def to_hf(args: argparse.Namespace) -> None:
    """A fairseq checkpoint or a packed file of a RoBERTa, into a folder that transformers loads."""
    out = Path(args.out)
    if not args.out or out.is_file():
        raise UserError(f"--out {args.out or repr(args.out)}: is no folder; give the name of a new one")
    files, notes = to_folder(args.path, args.dict)
    _write_beside(out, files)
    for note in notes:
        _progress(f"note: {note}")
    print(f"{args.out}: {', '.join(files)}")


def _write_beside(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file of `files` in `folder`, where no other file of its name must be. Raises UserError."""
    for name, content in files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            raise UserError(f"--out: {folder / name} is there already and differs; choose another folder")
    for name, content in files.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: cannot make {(folder / name).parent}: {error.strerror}; choose another place"
            ) from None
        replace_file(folder / name, content)


def report(args: argparse.Namespace) -> None:
    """Show finished runs on one HTML page with tables and pictures."""
    runs = write_report(args.folders, args.out)
    summary = {"page": str(Path(args.out) / "index.html"), "runs": runs.names, "missing": runs.notes}
    if args.json:
        print(json.dumps(summary))
        return
    print(f"{summary['page']}: {len(runs.names)} runs, {len(runs.points)} scores, {len(runs.files)} packed files")
    for note in runs.notes:
        _progress(f"note: {note}")


def bench(args: argparse.Namespace) -> None:
    """Measure a performance claim on this machine, beside fairseq's own code."""
    program = Path(__file__).parents[2] / "benchmarks" / f"{args.claim}.py"
    if not program.exists():
        raise UserError(f"bench {args.claim}: {program} is not there; run it in a checkout of the repository")
    raise SystemExit(subprocess.run([sys.executable, str(program), *args.options]).returncode)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _need_fairseq(option: str, instead: str) -> None:
    """Raise UserError where fairseq, which the option works with, is not installed."""
    if importlib.util.find_spec("fairseq") is None:
        raise UserError(f"{option}: needs fairseq, which is not installed; install fairseq-fixed, or {instead}")


def _check_out(out: str, *read: str, packed: bool = False, makes_folder: bool = False) -> None:
    """Before any work: that `out` can be written, is no checkpoint's name, and is none of the files that are read."""
    path = Path(out)
    folder = path.absolute().parent
    if not out or path.is_dir():
        raise UserError(f"--out {out or repr(out)}: is a folder; give the name of a file in it")
    if makes_folder and not folder.exists():
        return  # it is made when there is something to put in
    if not folder.is_dir():
        raise UserError(f"--out {out}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: the folder {folder} cannot be written; choose another place")
    if path.exists() and any(path.samefile(name) for name in read if Path(name).exists()):
        raise UserError(f"--out {out}: is a file that is read, and would be lost; choose another name")
    if packed and path.suffix == ".pt":
        cure = f"call it {path.with_suffix(SUFFIX)}"
        raise UserError(f"--out {out}: packed files must end in .safetensors; {cure}")
