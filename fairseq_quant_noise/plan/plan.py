"""Represent a whole plan: noise, stages, centroids, dense numbers, activations, structure, tuning, codes, encoding."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .checks import check_keys, check_setting, read_yaml
from .fairseq_yaml import is_fairseq_format, stages_of
from .rules import Activations, Centroids, Codes, Dense, Encode, NoiseRule, StageRule, Structure, Tuning, given
from .shipped import plan_path

D = TypeVar("D")


@dataclass(frozen=True)
class Plan:
    """A checked plan. `Plan.of` makes one from a path, a shipped plan's name, a mapping or a Plan."""

    noise: tuple[NoiseRule, ...] = ()
    stages: tuple[StageRule, ...] = ()
    centroids: Centroids = field(default_factory=Centroids)
    dense: Dense = field(default_factory=Dense)
    activations: Activations | None = None  # left as they are without it
    structure: Structure | None = None  # left as it is without it
    tuning: Tuning = field(default_factory=Tuning)
    codes: Codes = field(default_factory=Codes)
    encode: Encode = field(default_factory=Encode)

    @property
    def weighs(self) -> bool:
        """Whether k-means takes place and weighs errors."""
        return self.centroids.weighted and any(rule.format.has_codebook for rule in self.stages)

    @classmethod
    def of(cls, source: "str | Path | Mapping[str, Any] | Plan") -> "Plan":
        """The plan of a YAML file, a shipped plan's name, a mapping, or a Plan (returned as it is).

        Raises:
            UserError: one line that names the file, rule or key and the cure.
        """
        if isinstance(source, Plan):
            return source
        if isinstance(source, str | Path):
            return cls.of(read_yaml(plan_path(source)))
        if is_fairseq_format(source):
            return cls.of({"stages": stages_of(source)})
        check_keys("plan", source, [f.name for f in fields(cls)])
        return cls(
            noise=_rules(NoiseRule, "noise", source.get("noise") or ()),
            stages=_rules(StageRule, "stages", source.get("stages") or ()),
            centroids=_build(Centroids, "centroids", source.get("centroids") or {}),
            dense=_by_word(Dense, "dense", source.get("dense") or {}, "dtype"),
            activations=_given_or_none(Activations, "activations", source),
            structure=_given_or_none(Structure, "structure", source),
            tuning=_build(Tuning, "tuning", source.get("tuning") or {}),
            codes=_by_word(Codes, "codes", source.get("codes") or {}),
            encode=_by_word(Encode, "encode", source.get("encode") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, without what is the default; `Plan.of` takes them back."""
        return {
            "noise": [rule.to_dict() for rule in self.noise],
            "stages": [given(rule) for rule in self.stages],
            "centroids": {"dtype": self.centroids.dtype, **given(self.centroids)},
            "activations": None if self.activations is None else asdict(self.activations),
            **({} if self.dense == Dense() else {"dense": given(self.dense)}),
            **({} if self.structure is None else {"structure": given(self.structure)}),
            **({} if self.tuning == Tuning() else {"tuning": given(self.tuning)}),
            **({} if self.codes == Codes() else {"codes": given(self.codes)}),
            **({} if self.encode == Encode() else {"encode": given(self.encode)}),
        }


def _given_or_none(cls: type[D], where: str, source: Mapping[str, Any]) -> D | None:
    """`activations: {}` stands for the defaults; without the key, or with none after it, there is no such section."""
    given = source.get(where)
    return None if given is None else _build(cls, where, given)


def _by_word(cls: type[D], where: str, source: object, key: str = "kind") -> D:
    """`codes: train` stands for `codes: {kind: train}`."""
    return _build(cls, where, {key: source} if isinstance(source, str) else source)


def _rules(cls: type[D], where: str, source: object) -> tuple[D, ...]:
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise UserError(f"plan: {where} must be a list of rules, not {type(source).__name__}")
    return tuple(_build(cls, f"{where}[{i}]", rule) for i, rule in enumerate(source))


def _build(cls: type[D], where: str, source: object) -> D:
    if not isinstance(source, Mapping):
        raise UserError(f"plan: {where} must be a mapping of keys to values, not {type(source).__name__}")
    wanted = fields(cls)  # type: ignore[arg-type]
    check_keys(f"plan: {where}", source, [f.name for f in wanted])
    needed = [f.name for f in wanted if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in source]
    if missing:
        raise UserError(f"plan: {where} lacks the key '{missing[0]}'")
    for f in wanted:
        settings = {StageRule: ("block_size", "n_centroids"), NoiseRule: ("block_size",)}.get(cls, ())
        if f.name in settings and source.get(f.name) is not None:
            check_setting(f"plan: {where}: {f.name}", source[f.name])
    return cls(**source)
