"""Define the options that every model of this package adds to fairseq's own, for the command line and Hydra.

`--share-layers N` and `--learn-layerdrop` are about layers (`layers.py`); all others are about the noise.

fairseq's `--quant-noise-pq P`, `--quant-noise-pq-block-size` and `--quant-noise-scalar P` say how much noise; these say
which. They are shorthand for a plan's one rule over every weight; a plan with its own rules goes to
`--quantization-config-path`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from ...errors import UserError
from ...plan.rules import NoiseRule
from ...scalar import bits_of

SCALAR_BITS = 8  # what --quant-noise-scalar means, as in fairseq


def option(default: Any, text: str) -> Any:
    """Make a field of a model's dataclass: an option with its default and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class QuantNoiseOptions:
    """Add the options of this package to a model's dataclass."""

    share_layers: int = option(1, "adjacent layers that share one set of weights: with 2, layers 1 = 2, 3 = 4, ...")
    share_from: str = option(
        "first", "the weights that layers of an unshared checkpoint start from: of the first, or their mean"
    )
    learn_layerdrop: bool = option(
        False, "learn how often each layer stays under LayerDrop, for `fairseq-quant-noise prune --keep learned`"
    )

    quant_noise_kind: str = option(
        "proxy", "distortion of --quant-noise-pq: proxy, mean, pq, int2 ... int8; pq,int8 composes"
    )
    quant_noise_choice: str = option(
        "subvectors", "subvectors: blocks are hit independently; clusters: with all blocks of their centroid"
    )
    quant_noise_range: Optional[str] = option(  # noqa: UP045 (fairseq reads `Optional`, not `| None`)
        None, "range of intN: tensor, channel or histogram (default tensor; histogram with --quant-noise-scalar)"
    )
    quant_noise_refresh: Optional[str] = option(  # noqa: UP045
        None, "codebooks and ranges are found anew after so many updates, or each 'epoch'"
    )
    quant_noise_schedule: Optional[str] = option(  # noqa: UP045
        None, "of P: KIND:FROM:UPDATES, such as linear:0:1000; KIND is linear, cosine or step"
    )
    quant_noise_embedding_layer: bool = option(
        False, "keep the d x d layer after the embedding that fairseq's own --quant-noise-pq adds"
    )
    quant_noise_log_interval: int = option(
        100, "log the relative distortion of weights and outputs every so many updates; 0: never"
    )
    quant_noise_gap_batches: int = option(
        0,
        "log the loss under the target quantization on the first so many batches of each validation; this "
        "quantizes the weights anew each time; 0: never",
    )


def set_defaults(args: Any, **values: Any) -> None:
    """Set the options of an architecture that the command line does not give."""
    for name, value in values.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def noise_rules(options: Any) -> list[NoiseRule]:
    """Turn the `--quant-noise-*` options into rules: they are short for one rule over every weight.

    Raises:
        UserError: an option is out of range, or both kinds of noise are given.
    """
    pq, scalar = (getattr(options, f"quant_noise_{kind}", 0) or 0 for kind in ("pq", "scalar"))
    for flag, p in (("--quant-noise-pq", pq), ("--quant-noise-scalar", scalar)):
        if not 0 <= p <= 1:
            raise UserError(f"{flag} is {p}; give a probability from 0 to 1")
    if pq and scalar:
        raise UserError("--quant-noise-pq and --quant-noise-scalar: give one; a plan's noise rules can combine both")
    if not pq and not scalar:
        return []
    shared: dict[str, Any] = {
        "refresh": _refresh(getattr(options, "quant_noise_refresh", None)),
        "schedule": _schedule(getattr(options, "quant_noise_schedule", None)),
    }
    range_ = getattr(options, "quant_noise_range", None)
    try:
        if scalar:
            _check_scalar_alone(options)
            return [NoiseRule(".*", scalar, f"int{SCALAR_BITS}", range=range_ or "histogram", **shared)]
        kinds = tuple(getattr(options, "quant_noise_kind", "proxy").replace(" ", "").split(","))
        choice = getattr(options, "quant_noise_choice", "subvectors")
        block_size = None if all(bits_of(kind) for kind in kinds) else getattr(options, "quant_noise_pq_block_size", 8)
        kind = kinds[0] if len(kinds) == 1 else kinds
        return [NoiseRule(".*", pq, kind, block_size, choice=choice, range=range_ or "tensor", **shared)]
    except UserError as error:
        raise UserError(f"--quant-noise-*: {str(error).removeprefix(_ANY)}") from None


def _check_scalar_alone(options: Any) -> None:
    """Refuse options that contradict `--quant-noise-scalar`, which has its own kind and hits numbers one by one."""
    for name, default in (("kind", "proxy"), ("choice", "subvectors")):
        value = getattr(options, f"quant_noise_{name}", default)
        if value != default:
            raise UserError(
                f"--quant-noise-{name} {value} goes with --quant-noise-pq, not with --quant-noise-scalar; leave one out"
            )


_ANY = "noise rule '.*': "


def _refresh(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _schedule(text: str | None) -> Mapping[str, Any] | None:
    if text is None:
        return None
    kind, *numbers = text.split(":")
    try:
        values = dict(zip(("from", "updates", "steps"), (float(numbers[0]), *map(int, numbers[1:])), strict=False))
    except (ValueError, IndexError):
        values = {}
    if len(numbers) not in (2, 3) or len(values) != len(numbers):
        raise UserError(
            f"--quant-noise-schedule {text}: give KIND:FROM:UPDATES, such as linear:0:1000 (step takes :STEPS besides)"
        )
    return {"kind": kind, **values}
