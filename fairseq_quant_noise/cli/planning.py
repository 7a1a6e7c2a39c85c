"""The verb `plan`: what a plan does, and the plans that spend bytes best."""

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..accounting import MIB
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.structure import restructured
from ..errors import UserError
from ..layers import quantized_weights, warn_of_unrounded
from ..networks.registry import has_words, meta_model
from ..plan.plan import Plan
from ..plan.rules import Structure
from ..quantization.budget.options import Priced
from ..quantization.budget.pricing import price
from ..quantization.budget.text import plan_text
from ..quantization.structure import apply_structure
from ..quantization.table import Table, make_table
from ..quantization.targets import resolve_stages
from ..report.frontier import check_picture, frontier_picture
from ..structure.layer_map import START
from ..utils.files import replace_file
from ..utils.progress import now_and_then
from ..weights.discovery import warn_of_uncovered
from .budget import (
    BEST,
    TUNING,
    UNKNOWN,
    Losses,
    Planned,
    Subject,
    best_plan,
    budget_of,
    frontier,
    least_plan,
    smallest_plan,
)
from .common import check_out, importance_of, need_fairseq, say
from .printing import format_rows, print_table

ALL = "all"  # of the layers


def plan(args: argparse.Namespace) -> None:
    """Show what a plan would do to each tensor, and the totals; or find the plans that spend bytes best."""
    ways = {"--plan": args.plan, "--budget": args.budget, "--target-loss": args.target_loss}
    given = [option for option, value in ways.items() if value is not None] + ["--frontier"] * args.frontier
    if len(given) != 1:
        raise UserError(
            "plan: give one of --plan PLAN, to see what it does, --budget SIZE or --target-loss LOSS, to find one, and "
            "--frontier, to draw loss against bytes"
        )
    if args.plan is None:
        _find(args, given[0])
        return
    for option in ("out", "calibration_data", "keep_layers", "share_from"):
        if getattr(args, option):
            raise UserError(f"plan: --{option.replace('_', '-')} goes with --budget, not with --plan; leave it out")
    if args.share_layers != 1:
        raise UserError("plan: --share-layers goes with --budget, not with --plan, which has `structure` for it")
    model = _network(args)
    the_plan = Plan.of(args.plan)
    original = make_table(model)
    if the_plan.structure is not None:
        apply_structure(model, the_plan.structure)
    targets = resolve_stages(the_plan, model)
    table = make_table(model, targets, original.dense_bytes, the_plan.codes.train, the_plan.dense.bits)
    warn_of_uncovered(model, args.strict)
    if the_plan.activations is not None:
        warn_of_unrounded(model, (t.weight.name for t in targets), args.strict)
    if args.json:
        print(json.dumps(table.to_dict()))
    else:
        print_table(table)


def _find(args: argparse.Namespace, option: str) -> None:
    """The plans of least predicted loss; each option prints what it found, and writes it with --out."""
    _check_find(args, option)
    candidates, dense_bytes, budget = _candidates(args)
    found: list[tuple[Planned, tuple[float, float] | None, Subject]] = []
    for keep, subject, of, smallest in candidates:
        warn_of_uncovered(subject.network, args.strict)
        losses, priced = _priced(args, of, subject.network)
        if args.frontier:
            _show_frontier(args, frontier(subject, priced, smallest), losses, dense_bytes)
            return
        if budget is None and losses is not None:
            least, loss = least_plan(subject, priced, args.target_loss, losses, smallest)
            found.append((least, (losses.dense, loss), subject))
        elif budget is not None:
            reserve = UNKNOWN if of is None else TUNING
            best = best_plan(subject, priced, budget - reserve, smallest)
            if best.bytes > budget - reserve:
                say(f"note: the smallest file takes {best.bytes:,} bytes; a training may record up to {reserve:,} more")
            found.append((best, None if losses is None else (losses.dense, losses(best.plan)), subject))
        after = found[-1][1]
        if len(args.keep_layers) > 1 and after is not None:
            say(f"--keep-layers {keep}: loss {after[0]:.3f} before and {after[1]:.3f} after")
    by = f"--budget {args.budget}" if budget is not None else f"--target-loss {args.target_loss:g}"
    planned, after, subject = min(found, key=lambda one: _rank(one[1]))
    targets = resolve_stages(planned.plan, subject.network)
    table = make_table(subject.network, targets, dense_bytes, dense_bits=planned.plan.dense.bits)
    _show_found(args, table, planned, subject.structure, by, after)


def _candidates(
    args: argparse.Namespace,
) -> tuple[list[tuple[str, Subject, Checkpoint | None, Planned]], int, int | None]:
    """Before any work: what each --keep-layers leaves and its smallest plan, the dense bytes, and those of --budget.

    Raises:
        UserError: none of them fits the budget, or one asks for layers that are not there.
    """
    checkpoint = None if args.path is None else _dense_checkpoint(args)
    network = _network(args) if checkpoint is None else checkpoint.network
    config = {} if args.arch is None else {"architecture": args.arch, "cfg": {"model": _options(args)}}
    dense_bytes = make_table(network).dense_bytes
    budget = None if args.budget is None else budget_of(args.budget, dense_bytes)
    left: list[tuple[str, Subject, Checkpoint | None]] = []
    for keep in args.keep_layers or [ALL]:
        structure = _structure(args, keep)
        if checkpoint is not None:
            of = restructured(checkpoint, structure)
            left.append((keep, Subject(of.network, of.config, structure), of))
        else:
            model = copy.deepcopy(network)
            if structure is not None:
                apply_structure(model, structure)
            left.append((keep, Subject(model, config, structure), None))
    found: list[tuple[str, Subject, Checkpoint | None, Planned]] = []
    too_large: list[tuple[str, UserError]] = []
    for keep, subject, of_it in left:
        try:
            found.append((keep, subject, of_it, smallest_plan(subject, budget)))
        except UserError as error:
            too_large.append((keep, error))
    if not found:
        raise too_large[-1][1]
    for keep, why in too_large:
        say(f"--keep-layers {keep} is left out: {why}")
    return found, dense_bytes, budget


def _rank(losses: tuple[float, float] | None) -> float:
    """The loss after, for choosing the least; one that is no number is the worst."""
    after = 0.0 if losses is None else losses[1]
    return math.inf if math.isnan(after) else after


def _structure(args: argparse.Namespace, keep: str) -> Structure | None:
    """What --share-layers and one --keep-layers ask for; None for the network as it is."""
    found = Structure(args.share_layers, args.share_from or START[0], None if keep == ALL else keep)
    return None if found.share_layers == 1 and found.keep_layers is None else found


def _check_find(args: argparse.Namespace, option: str) -> None:
    """Before any work: that the options go together. Raises UserError."""
    if (args.path is None) == (args.arch is None):
        raise UserError("plan: give either --path CKPT or --arch ARCH")
    if args.arch is not None and (args.budget is None or args.calibration_data is not None):
        raise UserError(
            f"plan: with --arch only --budget finds a plan, and without --calibration-data, for nobody has trained its "
            f"weights; {'leave it out' if args.budget is not None else f'give {option} with --path CKPT'}"
        )
    if args.share_from is not None and args.share_layers == 1:
        raise UserError("plan: --share-from says where shared layers start from; give --share-layers N with it")
    if args.target_loss is not None and not math.isfinite(args.target_loss):
        raise UserError(f"--target-loss {args.target_loss}: is no loss; give a number, more than the dense network's")
    if len(args.keep_layers) > 1 and (args.calibration_data is None or args.budget is None):
        raise UserError(
            "plan: which of several --keep-layers is best cannot be predicted, for nothing is known of layers that "
            "are left out; give --budget with --path CKPT and --calibration-data DATA, to measure, or one --keep-layers"
        )
    if args.out is not None:
        check_out(args.out, *[path for path in (args.path,) if path is not None])
    if args.frontier:
        check_picture(args.out)
    if args.target_loss is not None and args.calibration_data is None:
        raise UserError(
            "plan: --target-loss measures losses; give --calibration-data DATA, the folder that fairseq-train reads"
        )
    if args.calibration_data is not None:
        need_fairseq("--calibration-data", "leave it out")


def _priced(
    args: argparse.Namespace, checkpoint: Checkpoint | None, model: nn.Module
) -> tuple[Losses | None, list[Priced]]:
    """What measures the losses of plans, with --calibration-data, and the options of each weight."""
    if checkpoint is None:
        say("note: of an architecture alone all weights are taken to be normal and to count alike; --path knows better")
        return None, price(model, {}, say)
    measure = None
    if args.calibration_data is not None:
        from ..plugin.calibration import loss_on

        measure = loss_on(checkpoint, args.calibration_data)
    importance = importance_of(args, checkpoint)
    checkpoint.forget_optimizer()
    losses = None if measure is None else Losses(model, importance, measure, now_and_then(say))
    return losses, price(model, importance, say)


def _show_found(
    args: argparse.Namespace,
    table: Table,
    found: Planned,
    structure: Structure | None,
    by: str,
    losses: tuple[float, float] | None,
) -> None:
    """Print the table of a plan that was found, and write it with --out; `losses` are those before and after."""
    summary = f"The packed file has {found.bytes:,} bytes ({found.bytes / MIB:.3f} MiB)"
    if losses is not None:
        summary += f"; loss {losses[0]:.3f} before and {losses[1]:.3f} after, on {args.calibration_data}"
    if args.out is not None:
        heading = f"Found by `fairseq-quant-noise plan {by}`.", f"{summary}."
        replace_file(args.out, plan_text(found.chosen, heading, structure).encode())
    if args.json:
        print(json.dumps({**table.to_dict(), "file_bytes": found.bytes, "losses": losses}))
        return
    print_table(table)
    print(summary)


def _show_frontier(
    args: argparse.Namespace, points: Sequence[tuple[str, Planned]], losses: Losses | None, dense_bytes: int
) -> None:
    """Print loss against bytes, and draw it with --out."""
    measured = None if losses is None else [losses(planned.plan) for _, planned in points]
    rows = [
        {
            "plan": name,
            "file_bytes": planned.bytes,
            "ratio": dense_bytes / planned.bytes,
            "predicted_loss": planned.predicted,
            "loss": None if measured is None else measured[i],
        }
        for i, (name, planned) in enumerate(points)
    ]
    dense_loss = None if losses is None else losses.dense
    if args.out is not None:
        values = [planned.predicted for _, planned in points] if measured is None else measured
        drawn = [(name, planned.bytes, value) for (name, planned), value in zip(points, values, strict=True)]
        what = "predicted loss, in no unit" if measured is None else "loss a token on the calibration data"
        replace_file(args.out, frontier_picture(drawn, BEST, what, dense_loss, Path(args.out).suffix))
    if args.json:
        print(json.dumps({"dense_bytes": dense_bytes, "dense_loss": dense_loss, "points": rows}))
        return
    header = ("plan", "bytes", "MiB", "ratio", "predicted loss", "loss")[: 5 + (measured is not None)]
    print(format_rows(header, [_cells(row)[: len(header)] for row in rows]))
    if dense_loss is not None:
        print(f"the dense network: {dense_bytes:,} bytes, loss {dense_loss:.3f}, on {args.calibration_data}")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    size, loss = row["file_bytes"], row["loss"]
    start = row["plan"], f"{size:,}", f"{size / MIB:.3f}", f"x{row['ratio']:.1f}", f"{row['predicted_loss']:.4g}"
    return *start, "" if loss is None else f"{loss:.3f}"


def _network(args: argparse.Namespace) -> nn.Module:
    """The network that `plan` is about: of a checkpoint, or of an architecture."""
    if (args.path is None) == (args.arch is None):
        raise UserError("plan: give either --path CKPT or --arch ARCH")
    if args.path is not None:
        return _dense_checkpoint(args).network
    options = _options(args)
    if args.vocab_size is None and has_words(args.arch):
        raise UserError("plan: --arch needs --vocab-size, the number of words in the dictionary (dict.txt + 4)")
    return meta_model(args.arch, options, args.vocab_size or 0)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """fairseq's options of the model of --arch."""
    need_fairseq("--arch", "give --path CKPT instead")
    from ..plugin.models.architectures import architecture_options

    return architecture_options(args.arch, args.set, args.head)


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
