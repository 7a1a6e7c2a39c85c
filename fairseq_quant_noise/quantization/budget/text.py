"""Write the choice for each weight as a plan: a YAML file whose comments say what each part costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import yaml

from ...plan.rules import Structure, given
from ...plan.vocabulary import CENTROID_BITS, OWN, SHARED
from ...weights.discovery import Weight
from .kinds import ORDER, kind_of
from .names import expression
from .options import DENSE, DENSE_DTYPE, PQ, RANGE, Option, codebook_bytes

T = TypeVar("T")
K = TypeVar("K")
_DTYPES = {bits: dtype for dtype, bits in CENTROID_BITS.items()}


@dataclass(frozen=True)
class Chosen:
    """A weight and the option taken for it."""

    weight: Weight
    option: Option

    @property
    def name(self) -> str:
        """What a plan calls the weight."""
        return self.weight.name

    @property
    def kind(self) -> str:
        """The group of stages that it belongs to, one of ORDER."""
        return kind_of(self.weight)


def bytes_of(chosen: Sequence[Chosen]) -> int:
    """Bytes in the file of these weights; a codebook that several share counts once."""
    shared = {(one.kind, one.option.codebook) for one in chosen if one.option.shared}
    return sum(one.option.bytes for one in chosen) + sum(codebook_bytes(codebook) for _, codebook in shared if codebook)


def plan_text(chosen: Sequence[Chosen], heading: Sequence[str] = (), structure: Structure | None = None) -> str:
    """The plan in YAML; its rules give each weight its option, and no other weight a stage.

    Args:
        chosen: every weight of the model that a plan can name.
        heading: lines of the comment that the file begins with.
        structure: that the model has had already, and the plan's.
    """
    names = [one.name for one in chosen]
    losses = sum(one.option.loss for one in chosen)
    lines = [f"# {line}" for line in heading]
    if structure is not None and given(structure):
        lines += yaml.safe_dump({"structure": given(structure)}, sort_keys=False).splitlines()
    lines += [f"dense: {DENSE_DTYPE}", "stages:"]
    groups = _grouped(chosen, lambda one: (ORDER.index(one.kind), one.option.scheme))
    for (kind, scheme), group in sorted(groups.items()):
        if scheme == DENSE:
            continue
        lines += [f"  # {ORDER[kind]}: {_cost(group, losses)}"]
        of = _grouped(group, lambda one: _what(one.option)) if scheme == PQ else {}
        lines += [f"  #   {what}: {_cost(some, losses)}" for what, some in of.items() if len(of) > 1]
        lines += [f"  - match: {_quoted(expression((one.name for one in group), names))}", f"    scheme: {scheme}"]
        if scheme == PQ:
            lines += _setting("block_size", {one.name: one.option.block_size or 0 for one in group})
            lines += _setting("n_centroids", {one.name: one.option.n_centroids or 0 for one in group})
            lines += _setting("codebook", {one.name: SHARED if one.option.shared else OWN for one in group}, OWN)
            lines += _setting("centroids", {one.name: _DTYPES[one.option.centroid_bits] for one in group}, _DTYPES[16])
        else:
            lines += [f"    range: {RANGE}"]
    dense = [one for one in chosen if one.option.scheme == DENSE]
    lines += [f"# As they are: {', '.join(one.name for one in dense)}; {_cost(dense, losses)}"] if dense else []
    return "\n".join([*lines, ""])


def _what(option: Option) -> str:
    """How a pq weight is stored, in a few words."""
    words = f"d {option.block_size}, K {option.n_centroids}"
    words += ", int8 centroids" if option.centroid_bits == 8 else ""
    return words + (", one codebook" if option.shared else "")


def _setting(key: str, values: Mapping[str, T], default: T | None = None) -> list[str]:
    """The lines of a setting: one value, or by name, with the commonest as the default; none where all are the plan's.

    Args:
        key: the setting.
        values: by the weight's name.
        default: what a plan without the setting means.
    """
    groups = sorted(_grouped(values, values.__getitem__).items(), key=lambda item: -len(item[1]))
    (usual, _), *others = groups
    if not others:
        return [f"    {key}: {usual}"] if usual != default else []
    lines = [f"      {_quoted(expression(names, values))}: {value}" for value, names in others]
    return [f"    {key}:", f"      default: {usual}", *lines]


def _quoted(text: str) -> str:
    """A text in YAML, with backslashes as they are."""
    return "'" + text.replace("'", "''") + "'"


def _cost(group: Sequence[Chosen], losses: float) -> str:
    share = sum(one.option.loss for one in group) / losses if losses else 0.0
    size = bytes_of(group)
    return f"{len(group)} weight{'s' * (len(group) > 1)}, {size:,} bytes, {share:.1%} of the predicted loss"


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
