"""The plan: what is noised while training, what is quantized, in which order. One YAML file, checked before any work.

    noise:
      - {match: 'decoder\\.layers\\.\\d+\\.fc[12]', kind: proxy, p: 0.05, block_size: 8}
    stages:
      - {match: 'decoder\\.layers\\.\\d+\\.fc[12]', scheme: pq, block_size: 8, n_centroids: 256, updates: 4500}
      - {match: 'decoder\\.embed_tokens\\..*', block_size: {default: 8, '.*\\.1': 4}}
    centroids: {dtype: fp16}

`match` is a regular expression that must match a whole module name. A rule that matches nothing, a weight that two
stages match, an unknown key: errors, before any work. fairseq's own quantization YAML is a plan too
(`fairseq_yaml.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from torch import nn

from .errors import UserError
from .fairseq_yaml import is_fairseq_format, setting_by_feature, stages_of

#: One number for all, a number per name (`default` and regular expressions), or fairseq's per module type.
Setting = int | Mapping[str, Any]


@dataclass(frozen=True)
class NoiseRule:
    """Noise for the weights whose module name matches."""

    match: str  # regular expression over module names, full match
    p: float  # the share of blocks hit in each forward, in [0, 1]
    kind: str = "proxy"  # a name in noise.distortions.DISTORTIONS
    block_size: int = 8  # d

    def __post_init__(self) -> None:
        from .noise.distortions import DISTORTIONS

        _check_regex("noise", self.match)
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise UserError(f"noise rule '{self.match}': p is {self.p!r}; give a probability from 0 to 1")
        if not isinstance(self.kind, str) or self.kind not in DISTORTIONS:
            known = ", ".join(DISTORTIONS)
            raise UserError(f"noise rule '{self.match}': unknown kind {self.kind!r}; known kinds: {known}")
        _check_positive(f"noise rule '{self.match}': block_size", self.block_size)


@dataclass(frozen=True)
class StageRule:
    """One stage: the weights whose module name matches are quantized together."""

    match: str  # regular expression over module names, full match
    scheme: str = "pq"  # product quantization
    block_size: Setting = 8  # d
    n_centroids: Setting = 256  # K, 256 at most: a code is a byte
    updates: int | None = None  # of fine-tuning in this stage; without it, the stages share --max-update

    def __post_init__(self) -> None:
        _check_regex("stage", self.match)
        if self.scheme != "pq":
            raise UserError(f"stage '{self.match}': unknown scheme {self.scheme!r}; known schemes: pq")
        if self.updates is not None:
            _check_positive(f"stage '{self.match}': updates", self.updates)

    def block_size_of(self, name: str, module: nn.Module) -> int:
        """d for the weight of `module`. Raises UserError when the rule gives it none."""
        return _resolve(f"stage '{self.match}': block_size", self.block_size, name, module)

    def n_centroids_of(self, name: str, module: nn.Module) -> int:
        """K for the weight of `module`. Raises UserError when the rule gives it none, or more than 256."""
        n = _resolve(f"stage '{self.match}': n_centroids", self.n_centroids, name, module)
        if n > 256:
            raise UserError(f"stage '{self.match}': n_centroids is {n} for {name}; a code is a byte, give at most 256")
        return n


@dataclass(frozen=True)
class Centroids:
    """How centroids are stored."""

    dtype: str = "fp16"  # of the centroids in the file, and of the centroids that evaluation uses

    def __post_init__(self) -> None:
        if self.dtype != "fp16":
            raise UserError(f"centroids: unknown dtype {self.dtype!r}; known dtypes: fp16")


@dataclass(frozen=True)
class Plan:
    """A checked plan. `Plan.of` makes one from a path, a mapping or a Plan."""

    noise: tuple[NoiseRule, ...] = ()
    stages: tuple[StageRule, ...] = ()
    centroids: Centroids = field(default_factory=Centroids)

    @classmethod
    def of(cls, source: "str | Path | Mapping[str, Any] | Plan") -> "Plan":
        """The plan of a YAML file, a mapping, or a Plan (returned as it is).

        Raises:
            UserError: one line that names the file, rule or key and the cure.
        """
        if isinstance(source, Plan):
            return source
        if isinstance(source, str | Path):
            return cls.of(_read_yaml(Path(source)))
        if is_fairseq_format(source):
            return cls.of({"stages": stages_of(source)})
        _check_keys("plan", source, [f.name for f in fields(cls)])
        return cls(
            noise=_rules(NoiseRule, "noise", source.get("noise") or ()),
            stages=_rules(StageRule, "stages", source.get("stages") or ()),
            centroids=_build(Centroids, "centroids", source.get("centroids") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts; `Plan.of` takes them back."""
        return asdict(self) | {"noise": [asdict(r) for r in self.noise], "stages": [asdict(r) for r in self.stages]}


class Rule(Protocol):
    """What `match_rules` needs of a rule."""

    @property
    def match(self) -> str:
        """A regular expression."""


R = TypeVar("R", bound=Rule)
D = TypeVar("D")


def match_rules(what: str, rules: Sequence[R], names: Sequence[str]) -> list[list[R]]:
    """For each name the rules that match the whole of it, in order.

    Raises:
        UserError: a rule matches no name.
    """
    matches: list[list[R]] = [[] for _ in names]
    for rule in rules:
        hits = [i for i, name in enumerate(names) if re.fullmatch(rule.match, name)]
        if not hits:
            some = ", ".join([*names[:2], "…", *names[-2:]] if len(names) > 4 else names) or "none"
            raise UserError(
                f"{what} rule '{rule.match}' matches no weight of this model; its weights are {some} "
                "(`fairseq-quant-noise plan` lists them; match needs the whole name)"
            )
        for i in hits:
            matches[i].append(rule)
    return matches


def _resolve(what: str, setting: Setting, name: str, module: nn.Module) -> int:
    if isinstance(setting, int):
        return setting
    value = setting_by_feature(setting, name, module)
    if value is None:
        patterns = [k for k in setting if k != "default" and isinstance(setting[k], int)]
        value = next((setting[k] for k in patterns if re.fullmatch(k, name)), setting.get("default"))
    if not isinstance(value, int):
        raise UserError(f"{what} gives no value for {name}; add a pattern that matches it, or a default")
    _check_positive(f"{what} for {name}", value)
    return value


def _rules(cls: type[D], where: str, source: Any) -> tuple[D, ...]:
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise UserError(f"plan: {where} must be a list of rules, not {type(source).__name__}")
    return tuple(_build(cls, f"{where}[{i}]", rule) for i, rule in enumerate(source))


def _build(cls: type[D], where: str, source: Any) -> D:
    if not isinstance(source, Mapping):
        raise UserError(f"plan: {where} must be a mapping of keys to values, not {type(source).__name__}")
    wanted = fields(cls)  # type: ignore[arg-type]
    _check_keys(f"plan: {where}", source, [f.name for f in wanted])
    needed = [f.name for f in wanted if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in source]
    if missing:
        raise UserError(f"plan: {where} lacks the key '{missing[0]}'")
    for f in wanted:
        if f.name in ("block_size", "n_centroids") and f.name in source:
            _check_setting(f"plan: {where}: {f.name}", source[f.name])
    return cls(**source)


def _check_keys(where: str, source: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in source if key not in known]
    if unknown:
        raise UserError(f"{where}: unknown key '{unknown[0]}'; known keys: {', '.join(known)}")


def _check_setting(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        _check_positive(where, value)
        return
    for pattern, number in value.items():
        if isinstance(number, Mapping):
            continue  # fairseq's form, checked by setting_by_feature
        _check_regex(where, str(pattern))
        _check_positive(f"{where}: '{pattern}'", number)


def _check_positive(where: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} is {value!r}; give a whole number from 1 up")


def _check_regex(where: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} rule '{pattern}': not a regular expression ({error})") from None


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"plan {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date like 2001-99-99
        raise UserError(f"plan {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"plan {path}: must hold a mapping with noise, stages, …; it holds {type(content).__name__}")
    return content
