r"""Define a plan's rules: which weights get noise in training, which are quantized, in which order and how.

    noise:
      - {match: 'decoder\.layers\.\d+\.fc[12]', kind: proxy, p: 0.05, block_size: 8}
    stages:
      - {match: 'decoder\.layers\.\d+\.fc[12]', scheme: pq, block_size: 8, n_centroids: 256, updates: 4500}
      - {match: 'decoder\.embed_tokens\..*', block_size: {default: 8, '.*\.1': 4}}
      - {match: 'decoder\.layers\.\d+\.self_attn\..*', scheme: int8, range: channel}
    centroids: {dtype: fp16}
    activations: {bits: 8, range: histogram, calibration_batches: 8}
    structure: {share_layers: 2, keep_layers: every-other}
    tuning: {schedule: restart}            # or {stages: joint}
    codes: {kind: train, every: 1}
    encode: {kind: feedback, damping: 0.1}

A plan is one YAML file, checked before any work. `match` is a regular expression that must match a whole module name.
A rule that matches nothing, a weight that two stages match and an unknown key are errors. fairseq's own quantization
YAML is a plan too (`fairseq_yaml.py`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import nn

from ..errors import UserError
from ..layers.registry import Format, plan_formats
from ..scalar import BITS, INPUT_RANGES, RANGES, STAGE_RANGES, bits_of
from ..structure.layer_map import START, parse_keep
from ..utils.bits import MOST_CENTROIDS
from ..weights.blocks import kinds
from .checks import check_keys, check_one_of, check_positive, check_probability, check_regex, check_word
from .fairseq_yaml import setting_by_feature
from .vocabulary import (
    CENTROID_BITS,
    CHOICES,
    CODEBOOKS,
    CONTINUE,
    DENSE_BITS,
    EPOCH,
    FEEDBACK,
    FIXED,
    IN_TURN,
    JOINT,
    KINDS,
    OWN,
    PLAIN,
    RESTART,
    SCHEDULES,
    SHARED,
    TRAIN,
)

V = TypeVar("V")
_MOST = f"give at most {MOST_CENTROIDS}, codes of 12 bits"

#: One number for all, a number per name (`default` and regular expressions), or fairseq's per module type.
Setting = int | Mapping[str, Any]
#: One word for all, or a word per name (`default` and regular expressions).
Word = str | Mapping[str, str]


@dataclass(frozen=True)
class Schedule:
    """How p gets from `start` (in YAML: `from`) to the rule's p over the first `updates` (`noise/schedule.py`)."""

    kind: str = "constant"  # shape of the schedule: constant, linear, cosine, step
    start: float = 0.0  # p at the first update
    updates: int = 0  # number of updates until the rule's p is reached
    steps: int = 4  # number of equal steps, for kind step

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"schedule: unknown kind {self.kind!r}; known kinds: {', '.join(SCHEDULES)}")
        check_probability("schedule: from", self.start)
        check_positive("schedule: steps", self.steps)
        if self.kind != "constant":
            check_positive("schedule: updates", self.updates)

    def to_dict(self) -> dict[str, Any]:
        """As in YAML."""
        return {"kind": self.kind, "from": self.start, "updates": self.updates, "steps": self.steps}


@dataclass(frozen=True)
class NoiseRule:
    """Noise for the weights whose module name matches."""

    match: str  # regular expression over module names, full match
    p: float  # share of blocks hit in each forward pass, in [0, 1]; 1 is quantization-aware training
    kind: str | tuple[str, ...] = "proxy"  # proxy, mean, pq, int2 … int8 (noise/distortions.py), or a list to compose
    block_size: Setting | None = None  # d; default: 1 where all kinds are intN, else 8
    choice: str = "subvectors"  # subvectors: blocks are hit one by one; clusters: all of a centroid together
    n_centroids: int = 256  # K of the codebook that kind pq and choice clusters need
    range: str = "tensor"  # intN only: tensor, channel, histogram (scalar/ranges.py)
    refresh: int | str | None = None  # recompute codebooks and ranges every so many updates, or each `epoch`
    schedule: Schedule | None = None  # schedule of p; default: constant

    def __post_init__(self) -> None:
        where = f"noise rule '{self.match}'"
        check_regex("noise", self.match)
        check_probability(f"{where}: p", self.p)
        if isinstance(self.kind, list):
            object.__setattr__(self, "kind", tuple(self.kind))
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            object.__setattr__(self, "schedule", _schedule(where, self.schedule))
        strange = [kind for kind in self.kinds or ((),) if not isinstance(kind, str) or kind not in KINDS]
        if strange:
            raise UserError(f"{where}: unknown kind {strange[0]!r}; known kinds: {', '.join(KINDS)}")
        for name, value, known in (("choice", self.choice, CHOICES), ("range", self.range, RANGES)):
            if value not in known:
                raise UserError(f"{where}: unknown {name} {value!r}; known: {', '.join(known)}")
        if not isinstance(self.block_size, Mapping):
            check_positive(f"{where}: block_size", self.d)
        check_positive(f"{where}: n_centroids", self.n_centroids)
        if self.n_centroids > MOST_CENTROIDS:
            raise UserError(f"{where}: n_centroids is {self.n_centroids}; {_MOST}")
        if self.refresh not in (None, EPOCH):
            check_positive(f"{where}: refresh (updates, or '{EPOCH}')", self.refresh)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in the order in which they are applied."""
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)

    @property
    def d(self) -> int:
        """The block size in numbers, of a rule that has one for all weights (see `of_weight`)."""
        if isinstance(self.block_size, int):
            return self.block_size
        return 1 if all(bits_of(kind) for kind in self.kinds) else 8

    def of_weight(self, name: str, module: nn.Module) -> "NoiseRule":
        """The rule for one weight. Raises UserError when it gives the weight of `module` no block size."""
        if not isinstance(self.block_size, Mapping):
            return self
        return replace(
            self, block_size=_resolve(f"noise rule '{self.match}': block_size", self.block_size, name, module)
        )

    @property
    def interval(self) -> int | str:
        """Updates between fits, or `epoch`: a codebook each epoch, a histogram each 100 updates, min and max always."""
        if self.refresh is not None:
            return self.refresh
        if "pq" in self.kinds or self.choice == "clusters":
            return EPOCH
        return 100 if self.range == "histogram" else 1

    def to_dict(self) -> dict[str, Any]:
        """As in YAML, without what is the default."""
        plain = given(self)
        if isinstance(self.kind, tuple):
            plain["kind"] = list(self.kind)
        if self.schedule is not None:
            plain["schedule"] = self.schedule.to_dict()
        return plain


@dataclass(frozen=True)
class StageRule:
    """One stage: the weights whose module name matches are quantized together."""

    match: str  # regular expression over module names, full match
    scheme: str = "pq"  # pq (product quantization), or int2 … int8
    block_size: Setting = 8  # d, pq only
    n_centroids: Setting = 256  # K, pq only; at most 4096, codes of 12 bits
    codebook: Word = OWN  # pq only. own: one per weight; shared: one per stage for weights of equal d and K
    centroids: Word | None = None  # pq only. fp16 or int8; default: that of the section `centroids`
    range: str = "tensor"  # intN only: tensor, channel, histogram; or learned, learned-channel (scalar/ranges.py)
    updates: int | None = None  # length of this stage; default: an equal share of the training's updates

    def __post_init__(self) -> None:
        check_regex("stage", self.match)
        schemes = sorted(plan_formats(), key=lambda scheme: scheme != StageRule.scheme)  # the default first
        if self.scheme not in schemes:
            raise UserError(
                f"stage '{self.match}': unknown scheme {self.scheme!r}; known schemes: {', '.join(schemes)}"
            )
        check_one_of(f"stage '{self.match}'", "range", self.range, STAGE_RANGES)
        check_word(f"stage '{self.match}'", "codebook", self.codebook, CODEBOOKS)
        if self.centroids is not None:
            if not self.format.has_codebook:
                raise UserError(f"stage '{self.match}': {self.scheme} has no centroids; leave `centroids` out")
            check_word(f"stage '{self.match}'", "centroids", self.centroids, tuple(CENTROID_BITS))
        if self.updates is not None:
            check_positive(f"stage '{self.match}': updates", self.updates)

    @property
    def format(self) -> type[Format]:
        """What the weights become."""
        return plan_formats()[self.scheme]

    def block_size_of(self, name: str, module: nn.Module) -> int:
        """d for the weight of `module`. Raises UserError when the rule gives it none."""
        return _resolve(f"stage '{self.match}': block_size", self.block_size, name, module)

    def n_centroids_of(self, name: str, module: nn.Module) -> int:
        """K for the weight of `module`. Raises UserError when the rule gives it none, or more than 4096."""
        n = _resolve(f"stage '{self.match}': n_centroids", self.n_centroids, name, module)
        if n > MOST_CENTROIDS:
            what = f"stage '{self.match}': n_centroids is {n} for the weight of module '{name}'"
            raise UserError(f"{what}; {_MOST}")
        return n

    def shares_codebook(self, name: str, module: nn.Module) -> bool:
        """Whether the weight of `module` has one codebook with others. Raises UserError when the rule does not say."""
        return _word(f"stage '{self.match}': codebook", self.codebook, name, module) == SHARED

    def centroid_bits_of(self, name: str, module: nn.Module, default: int) -> int:
        """Bits of a centroid's number, for the weight of `module`; `default` is the plan's. Raises UserError so."""
        if self.centroids is None:
            return default
        return CENTROID_BITS[_word(f"stage '{self.match}': centroids", self.centroids, name, module)]


@dataclass(frozen=True)
class Centroids:
    """How centroids are found and stored."""

    dtype: str = "fp16"  # number format of the centroids in the file and in evaluation: fp16 or int8
    weighted: bool = True  # weigh k-means errors by squared gradients, Adam's or measured (quantization/importance.py)

    def __post_init__(self) -> None:
        if self.dtype not in CENTROID_BITS:
            raise UserError(f"centroids: unknown dtype {self.dtype!r}; known dtypes: {', '.join(CENTROID_BITS)}")
        if type(self.weighted) is not bool:
            raise UserError(f"centroids: weighted is {self.weighted!r}; give true or false")

    @property
    def bits(self) -> int:
        """Bits of a centroid's number."""
        return CENTROID_BITS[self.dtype]


@dataclass(frozen=True)
class Dense:
    """How the packed file stores what has no codes: biases, norms, batch statistics, dense weights."""

    dtype: str = "fp32"  # fp32, or fp16 for each tensor whose values survive it (utils/halves.py)

    def __post_init__(self) -> None:
        check_one_of("dense", "dtype", self.dtype, tuple(DENSE_BITS))

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return DENSE_BITS[self.dtype]


@dataclass(frozen=True)
class Activations:
    """The inputs of the quantized weights' products, in N bits (`layers/inputs.py`)."""

    bits: int = 8  # N, from 2 to 8
    range: str = "histogram"  # histogram or tensor
    calibration_batches: int = 8  # number of forward passes whose ranges are averaged, at most 255

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise UserError(f"activations: bits is {self.bits!r}; give 2 to 8")
        if self.range not in INPUT_RANGES:
            raise UserError(f"activations: unknown range {self.range!r}; known: {', '.join(INPUT_RANGES)}")
        check_positive("activations: calibration_batches", self.calibration_batches)
        if self.calibration_batches > 255:
            raise UserError(f"activations: calibration_batches is {self.calibration_batches}; give at most 255")


@dataclass(frozen=True)
class Structure:
    """Which layers are stored and in use: shared first, then pruned (`structure/`)."""

    share_layers: int = 1  # number of adjacent layers that share one set of weights
    share_from: str = "first"  # initial weights of a chunk: those of its first layer, or the mean of its layers
    keep_layers: Any = (
        None  # every-other, a list of layers, or either by stack: {encoder: [0, 2], decoder: every-other}
    )
    layerdrop: float | None = None  # probability of skipping a chunk in training; default: --*-layerdrop

    def __post_init__(self) -> None:
        check_positive("structure: share_layers", self.share_layers)
        if self.share_from not in START:
            raise UserError(f"structure: unknown share_from {self.share_from!r}; known: {', '.join(START)}")
        if self.layerdrop is not None:
            check_probability("structure: layerdrop", self.layerdrop)
            if self.layerdrop >= 1:
                raise UserError("structure: layerdrop is 1, which leaves out every layer; give less")
        by_stack = self.keep_layers if isinstance(self.keep_layers, Mapping) else {"": self.keep_layers}
        for stack, keep in by_stack.items():
            if self.keep_layers is not None:
                parse_keep(f"structure: keep_layers{f' of {stack}' if stack else ''}", keep)


@dataclass(frozen=True)
class Tuning:
    """How the network is trained in the stages, on what the training's own options leave open."""

    schedule: str = CONTINUE  # learning-rate schedule. continue: one over all stages; restart: a new one in each
    stages: str = IN_TURN  # in-turn: one after the other, the paper's; joint: all at once, then tuned together

    def __post_init__(self) -> None:
        check_one_of("tuning", "schedule", self.schedule, (CONTINUE, RESTART))
        check_one_of("tuning", "stages", self.stages, (IN_TURN, JOINT))

    @property
    def restarts(self) -> bool:
        """Whether each stage has a learning-rate schedule of its own."""
        return self.schedule == RESTART

    @property
    def joint(self) -> bool:
        """Whether all stages begin together."""
        return self.stages == JOINT


@dataclass(frozen=True)
class Codes:
    """Whether the codes of product quantization change while the network is tuned (`layers/pq_latent.py`)."""

    kind: str = FIXED  # fixed: as k-means found them, the paper's; train: found anew while a dense weight trains
    every: int = 1  # train only: updates between two encodings
    share: float = 1.0  # train only: share of the blocks in each encoding, those that moved away most
    learning_rate: float = 1.0  # train only: learning rate of the dense weights, as a factor of the training's

    def __post_init__(self) -> None:
        check_one_of("codes", "kind", self.kind, (FIXED, TRAIN))
        check_positive("codes: every", self.every)
        check_probability("codes: share", self.share)
        for name in ("share", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"codes: {name} is {value!r}; give a number above 0")

    @property
    def train(self) -> bool:
        """Whether codes are found anew."""
        return self.kind == TRAIN


@dataclass(frozen=True)
class Encode:
    """How codes and centroids of product quantization are found (`pq/feedback.py`)."""

    kind: str = PLAIN  # plain: by k-means; feedback: then by the error of each layer's outputs, on calibration inputs
    batches: int = 16  # feedback only: number of forward passes on which the inputs of the layers are measured
    damping: float = 0.1  # feedback only: share of the inputs' correlations that is left out

    def __post_init__(self) -> None:
        check_one_of("encode", "kind", self.kind, (PLAIN, FEEDBACK))
        check_positive("encode: batches", self.batches)
        check_probability("encode: damping", self.damping)
        if not self.damping > 0:
            raise UserError("encode: damping is 0, which correlated inputs do not allow; give more, such as 0.01")

    @property
    def feeds_back(self) -> bool:
        """Whether errors are fed back."""
        return self.kind == FEEDBACK


def given(rule: "NoiseRule | StageRule | Centroids | Dense | Structure | Tuning | Codes | Encode") -> dict[str, Any]:
    """The fields of a rule that are not the default."""
    return {f.name: value for f in fields(rule) if (value := getattr(rule, f.name)) != f.default}


def _resolve(what: str, setting: Setting, name: str, module: nn.Module) -> int:
    if isinstance(setting, int):
        return setting
    value = setting_by_feature(setting, name, module)
    if value is None:
        value = _by_name({k: v for k, v in setting.items() if isinstance(v, int)}, name, module)
    if not isinstance(value, int):
        raise UserError(f"{what} gives no value for {name}; add a pattern or a type that matches it, or a default")
    check_positive(f"{what} for {name}", value)
    return value


def _word(what: str, setting: Word, name: str, module: nn.Module) -> str:
    value = setting if isinstance(setting, str) else _by_name(setting, name, module)
    if value is None:
        raise UserError(f"{what} gives no value for {name}; add a pattern or a type that matches it, or a default")
    return value


def _by_name(setting: Mapping[str, V], name: str, module: nn.Module) -> V | None:
    """The value of the first pattern that is a type or kernel of `module` or matches `name`, else the default."""
    known = kinds(module)
    found = (value for k, value in setting.items() if k != "default" and (k in known or re.fullmatch(k, name)))
    return next(found, setting.get("default"))


def _schedule(where: str, source: object) -> Schedule:
    """A schedule from its keys in YAML, where `start` is called `from`."""
    if not isinstance(source, Mapping):
        raise UserError(f"{where}: schedule must be a mapping such as {{kind: linear, from: 0.0, updates: 1000}}")
    check_keys(f"{where}: schedule", source, ["kind", "from", "updates", "steps"])
    return Schedule(**{("start" if key == "from" else key): value for key, value in source.items()})
