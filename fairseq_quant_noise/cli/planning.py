"""The verb `plan`: what a plan does, and the plans that spend bytes best."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..accounting import MIB
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..layers import quantized_weights, warn_of_unrounded
from ..networks.registry import has_words, meta_model
from ..plan.plan import Plan
from ..quantization.budget.pricing import price
from ..quantization.budget.text import plan_text
from ..quantization.structure import apply_structure
from ..quantization.table import make_table
from ..quantization.targets import resolve_stages
from ..report.frontier import check_picture, frontier_picture
from ..utils.files import replace_file
from ..utils.progress import now_and_then
from ..weights.discovery import warn_of_uncovered
from .budget import BEST, TUNING, Losses, Planned, best_plan, budget_of, frontier, least_plan, smallest_plan
from .common import check_out, importance_of, need_fairseq, say
from .printing import format_rows, print_table


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
    for option in ("out", "calibration_data"):
        if getattr(args, option) is not None:
            raise UserError(f"plan: --{option.replace('_', '-')} goes with --budget, not with --plan; leave it out")
    model = _network(args)
    the_plan = Plan.of(args.plan)
    original = make_table(model)
    if the_plan.structure is not None:
        apply_structure(model, the_plan.structure)
    targets = resolve_stages(the_plan, model)
    table = make_table(model, targets, original.dense_bytes, the_plan.codes.train)
    warn_of_uncovered(model, args.strict)
    if the_plan.activations is not None:
        warn_of_unrounded(model, (t.weight.name for t in targets), args.strict)
    if args.json:
        print(json.dumps(table.to_dict()))
    else:
        print_table(table)


def _find(args: argparse.Namespace, option: str) -> None:
    """The plans of least predicted loss; each option prints what it found, and writes it with --out."""
    if args.path is None or args.arch is not None:
        raise UserError(f"plan: {option} needs --path CKPT and no --arch, for it asks the weights what they lose")
    if args.out is not None:
        check_out(args.out, args.path)
    if args.frontier:
        check_picture(args.out)
    if args.target_loss is not None and args.calibration_data is None:
        raise UserError(
            "plan: --target-loss measures losses; give --calibration-data DATA, the folder that fairseq-train reads"
        )
    if args.calibration_data is not None:
        need_fairseq("--calibration-data", "leave it out")
    checkpoint = _dense_checkpoint(args)
    model = checkpoint.network
    warn_of_uncovered(model, args.strict)
    dense_bytes = make_table(model).dense_bytes
    budget = None if args.budget is None else budget_of(args.budget, dense_bytes)
    smallest = smallest_plan(checkpoint, budget)
    measure = None
    if args.calibration_data is not None:
        from ..plugin.calibration import loss_on

        measure = loss_on(checkpoint, args.calibration_data)
    importance = importance_of(args, checkpoint)
    checkpoint.forget_optimizer()
    priced = price(model, importance, say)
    losses = None if measure is None else Losses(model, importance, measure, now_and_then(say))
    if args.frontier:
        _show_frontier(args, frontier(checkpoint, priced, smallest), losses, dense_bytes)
    elif budget is not None:
        found = best_plan(checkpoint, priced, budget - TUNING, smallest)
        after = None if losses is None else (losses.dense, losses(found.plan))
        _show_found(args, model, found, f"--budget {args.budget}", after)
    elif losses is not None:
        found, loss = least_plan(checkpoint, priced, args.target_loss, losses, smallest)
        _show_found(args, model, found, f"--target-loss {args.target_loss:g}", (losses.dense, loss))


def _show_found(
    args: argparse.Namespace, model: nn.Module, found: Planned, by: str, losses: tuple[float, float] | None
) -> None:
    """Print the table of a plan that was found, and write it with --out; `losses` are those before and after."""
    table = make_table(model, resolve_stages(found.plan, model))
    summary = f"The packed file has {found.bytes:,} bytes ({found.bytes / MIB:.3f} MiB)"
    if losses is not None:
        summary += f"; loss {losses[0]:.3f} before and {losses[1]:.3f} after, on {args.calibration_data}"
    if args.out is not None:
        heading = f"Found by `fairseq-quant-noise plan {by}`.", f"{summary}."
        replace_file(args.out, plan_text(found.chosen, heading).encode())
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
    need_fairseq("--arch", "give --path CKPT instead")
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
