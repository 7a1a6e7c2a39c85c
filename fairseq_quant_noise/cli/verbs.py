"""Implement the verbs of `fairseq-quant-noise`, which take parsed arguments.

They raise UserError for a user's mistake and DamagedFileError for a damaged file.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..accounting import MIB
from ..artifact import pack, read, write
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hugging_face import from_folder, to_folder
from ..checkpoints.stock import difference, stock_checkpoint
from ..checkpoints.structure import pruned, restructured, shared
from ..deployment import onnx_model
from ..errors import UserError
from ..layers import quantized_weights
from ..plan.plan import Plan
from ..quantization.quantize import quantize_
from ..report import write_report
from ..structure.state import stack_sizes
from ..utils.files import replace_file
from .common import check_out, importance_of, need_fairseq, say
from .printing import print_inspection


def quantize(args: argparse.Namespace) -> None:
    """Quantize a checkpoint at once, without training, and write a packed file."""
    the_plan = Plan.of(args.plan)
    if args.encode is not None:
        the_plan = replace(the_plan, encode=replace(the_plan.encode, kind=args.encode))
    the_plan = _with_dense(args, the_plan)
    _check_stages(args, the_plan)
    check_out(args.out, args.path, args.plan, packed=True)
    checkpoint = restructured(Checkpoint(args.path), the_plan.structure)
    if not the_plan.stages:  # and `dense: fp16` is all that it asks for
        _write_packed(args.out, checkpoint, the_plan)
        return
    importance = importance_of(args, checkpoint) if the_plan.weighs else {}
    checkpoint.forget_optimizer()
    without = replace(the_plan, structure=None)  # which the checkpoint has had
    calibration = inputs = None
    if args.calibration_data is not None:
        from ..plugin.calibration import calibration_on, inputs_on

        if the_plan.encode.feeds_back:
            inputs = inputs_on(checkpoint, args.calibration_data, without, say)
        calibration = calibration_on(checkpoint, args.calibration_data, without)
    quantize_(
        checkpoint.network,
        without,
        seed=args.seed,
        importance=importance,
        calibration=calibration,
        inputs=inputs,
        strict=args.strict,
        progress=say,
    )
    _write_packed(args.out, checkpoint, the_plan)


def _check_stages(args: argparse.Namespace, the_plan: Plan) -> None:
    """Before any work: that the plan has something to do, and data where it needs them. Raises UserError."""
    halves_alone = the_plan.dense.bits == 16 and the_plan.activations is None and not the_plan.encode.feeds_back
    if not the_plan.stages and not halves_alone:
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
        need_fairseq("--calibration-data", "leave it out, with a plan that has no `activations`")


def export(args: argparse.Namespace) -> None:
    """Write the packed file of a checkpoint that was trained with the stages."""
    check_out(args.out, args.path, packed=True)
    checkpoint = Checkpoint(args.path)
    if not quantized_weights(checkpoint.network):
        raise UserError(
            f"export: {args.path} holds no quantized weights; quantize it with `fairseq-quant-noise quantize`"
        )
    stages = checkpoint.stages
    the_plan = Plan.of(stages["plan"]) if "plan" in stages else None
    if the_plan is not None and stages["done"] < len(the_plan.stages):
        say(f"note: {stages['done']} of the plan's {len(the_plan.stages)} stages are done; the rest stays dense")
    if args.dense is not None:
        the_plan = _with_dense(args, the_plan or Plan())
    _write_packed(args.out, checkpoint, the_plan)


def _with_dense(args: argparse.Namespace, the_plan: Plan) -> Plan:
    """The plan, with --dense in the place of its `dense`."""
    return the_plan if args.dense is None else replace(the_plan, dense=replace(the_plan.dense, dtype=args.dense))


def _write_packed(out: str, checkpoint: Checkpoint, the_plan: Plan | None) -> None:
    """The checkpoint's network, quantized by now, as a packed file; print what is in it."""
    packed = pack(checkpoint.network, the_plan, checkpoint.config)
    write(packed, out)
    print_inspection(out, packed)


def prune(args: argparse.Namespace) -> None:
    """Write a checkpoint without some of its layers, for networks that were trained with LayerDrop."""
    check_out(args.out, args.path)
    checkpoint = pruned(Checkpoint(args.path), _keep(args.keep), "--keep")
    checkpoint.write(args.out)
    print(f"{args.out}: {_stacks(checkpoint)}")


def share(args: argparse.Namespace) -> None:
    """Write a checkpoint whose adjacent layers share one set of weights; training goes on with them shared."""
    check_out(args.out, args.path)
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
    check_out(args.out, args.file)
    stock = stock_checkpoint(args.file)
    stock.write(args.out)
    if (different := difference(stock)) is not None:
        say(f"note: {different}; scores may differ in the third digit")
    print(f"{args.out}: a stock fairseq checkpoint")


def export_onnx(args: argparse.Namespace) -> None:
    """Write the network of a packed file as an ONNX model, about as small, which onnxruntime runs without torch."""
    check_out(args.out, args.file)
    content = onnx_model(args.file, read(args.file), args.part, args.products)
    replace_file(args.out, content)
    file_bytes = Path(args.file).stat().st_size
    print(f"{args.out}: {len(content) / MIB:.3f} MiB, from a packed file of {file_bytes / MIB:.3f} MiB")


def from_hf(args: argparse.Namespace) -> None:
    """A Hugging Face folder of a RoBERTa, XLM-R or BERT, into a fairseq checkpoint with its dictionary beside it."""
    check_out(args.out, args.folder, makes_folder=True)
    converted = from_folder(args.folder)
    _write_beside(Path(args.out).absolute().parent, converted.files)
    converted.checkpoint.write(args.out)
    for note in converted.notes:
        say(f"note: {note}")
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
        say(f"note: {note}")
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
        say(f"note: {note}")
