"""List the claims that recipes/evidence.sh tests, each a comparison of perplexities, and find the verdicts.

A run is `NETWORK/FILE` of recipes/evidence/grid.py; `NETWORK/dense` is the network before it is quantized. Comparisons
are paired by seed: x_s = PPL_ours / PPL_other - 1 for each seed s, with the mean's 95 % interval by Student's t.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
#: Student's t at 97.5 % for 2, 3, ... seeds.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
Scores = Mapping[tuple[str, int], float]  # run and seed -> perplexity


@dataclass(frozen=True)
class Claim:
    """State that `ours` has a lower perplexity than `other` or, with `within`, one higher by at most that share."""

    claim: str
    paper: str  # its figures; "r" marks one that was quoted from memory
    ours: str
    other: str
    within: float | None = None


CLAIMS = (
    Claim("iPQ: Quant-Noise beats no noise", "20.7 / 25.2", "proxy-0.05/ipq", "none/ipq"),
    Claim("one-shot iPQ: Quant-Noise beats no noise", "", "proxy-0.05/one-shot", "none/one-shot"),
    Claim("iPQ, K 64: Quant-Noise beats no noise", "20.7 / 25.2", "proxy-0.05/ipq-k64", "none/ipq-k64"),
    Claim("iPQ, K 16: Quant-Noise beats no noise", "", "proxy-0.05/ipq-k16", "none/ipq-k16"),
    Claim("iPQ, blocks of 16: Quant-Noise beats no noise", "", "proxy-0.05/ipq-d16", "none/ipq-d16"),
    Claim("iPQ, blocks of 4: Quant-Noise beats no noise", "", "proxy-0.05/ipq-d4", "none/ipq-d4"),
    Claim("iPQ: Quant-Noise beats QAT", "20.7 / 41.2", "proxy-0.05/ipq", "pq-1/ipq"),
    Claim("iPQ, K 64: Quant-Noise beats QAT", "20.7 / 41.2", "proxy-0.05/ipq-k64", "pq-1/ipq-k64"),
    Claim("int4: Quant-Noise beats no noise", "21.8 r / 39.4 r", "int4-0.5/int4", "none/int4"),
    Claim("int4: Quant-Noise beats QAT", "21.8 r / 34.1 r", "int4-0.5/int4", "int4-1/int4"),
    Claim("int8 is nearly free (3 %)", "18.7 r / 18.3 r", "int8-0.5/int8", "none/dense", 0.03),
    Claim("int8 is nearly free without noise too (3 %)", "19.6 r / 18.3 r", "none/int8", "none/dense", 0.03),
    Claim("int8: Quant-Noise beats QAT", "18.7 r / 21.0 r", "int8-0.5/int8", "int8-1/int8"),
    Claim("iPQ + int8 is as good as iPQ (2 %)", "21.1 / 20.7", "proxy-0.05/ipq-int8", "proxy-0.05/ipq", 0.02),
    Claim("the proxy is as good as exact noise (2 %)", "21.0 r / 21.1 r", "proxy-0.05/ipq", "pq-0.05/ipq", 0.02),
    Claim("K 64: the proxy is as good (2 %)", "21.0 r / 21.1 r", "proxy-0.05/ipq-k64", "pq-0.05/ipq-k64", 0.02),
    Claim("a p near .1 beats a large one", "", "proxy-0.1/ipq", "proxy-0.5/ipq"),
    Claim("K 64: a p near .1 beats a large one", "", "proxy-0.1/ipq-k64", "proxy-0.5/ipq-k64"),
    Claim("post-hoc noise is nearly as good (2 %)", "20.9 r / 20.7", "posthoc/ipq", "proxy-0.05/ipq", 0.02),
    Claim("post-hoc noise beats as long a training without", "20.9 r / 25.2", "posthoc/ipq", "longer/ipq"),
    Claim(
        "K 64: post-hoc noise is nearly as good (2 %)", "20.9 r / 20.7", "posthoc/ipq-k64", "proxy-0.05/ipq-k64", 0.02
    ),
    Claim(
        "K 64: post-hoc noise beats as long a training without", "20.9 r / 25.2", "posthoc/ipq-k64", "longer/ipq-k64"
    ),
    Claim("sharing costs at most a tenth", "22.0 r / 20.7", "shared/ipq", "proxy-0.05/ipq", 0.1),
    Claim("sharing and pruning cost at most a quarter", "24.7 / 20.7", "shared-pruned/ipq", "proxy-0.05/ipq", 0.25),
    Claim("int4: a range per channel beats one per tensor", "21.2 r / 39.4 r", "none/int4-channel", "none/int4"),
    Claim(
        "int4 per channel: noise beats none", "19.5 r / 21.2 r", "int4-channel-0.5/int4-channel", "none/int4-channel"
    ),
    Claim("distillation helps, without noise", "", "none/ipq-teacher", "none/ipq"),
    Claim("distillation helps, with noise", "", "proxy-0.05/ipq-teacher", "proxy-0.05/ipq"),
    Claim("a p that grows from 0 to .1 beats constant .1", "", "proxy-schedule/ipq", "proxy-0.1/ipq"),
    Claim("one-shot, no noise: weighted errors beat unweighted", "", "none/one-shot-weighted", "none/one-shot"),
    Claim(
        "one-shot, noise: weighted errors beat unweighted", "", "proxy-0.05/one-shot-weighted", "proxy-0.05/one-shot"
    ),
    Claim(
        "one-shot, no noise: error feedback beats weighted errors",
        "",
        "none/one-shot-feedback",
        "none/one-shot-weighted",
    ),
    Claim(
        "one-shot, noise: error feedback beats weighted errors",
        "",
        "proxy-0.05/one-shot-feedback",
        "proxy-0.05/one-shot-weighted",
    ),
    Claim("iPQ, no noise: weighted errors beat unweighted", "", "none/ipq-weighted", "none/ipq"),
    Claim("iPQ, noise: weighted errors beat unweighted", "", "proxy-0.05/ipq-weighted", "proxy-0.05/ipq"),
    Claim("one-shot, no noise: shared codebooks beat own ones", "", "none/one-shot-shared", "none/one-shot"),
    Claim("iPQ, no noise: shared codebooks beat own ones", "", "none/ipq-shared", "none/ipq"),
    Claim("iPQ, noise: shared codebooks beat own ones", "", "proxy-0.05/ipq-shared", "proxy-0.05/ipq"),
    Claim("iPQ, no noise, shared: weighted errors beat unweighted", "", "none/ipq-shared-weighted", "none/ipq-shared"),
    Claim("iPQ, no noise: shared and weighted beat the paper's way", "", "none/ipq-shared-weighted", "none/ipq"),
    Claim(
        "iPQ, noise: shared and weighted beat the paper's way", "", "proxy-0.05/ipq-shared-weighted", "proxy-0.05/ipq"
    ),
    Claim("attention last beats attention first", "", "none/ipq", "none/ipq-attention-first"),
    Claim("feed-forward first beats embedding first", "", "none/ipq", "none/ipq-embedding-first"),
)


@dataclass(frozen=True)
class Finding:
    """Hold the perplexities that decide a claim, by seed."""

    claim: Claim
    ours: list[float]
    other: list[float]

    @property
    def differences(self) -> list[float]:
        """Compute x_s for each seed."""
        return [a / b - 1 for a, b in zip(self.ours, self.other, strict=True)]

    @property
    def margin(self) -> float:
        """Compute half the 95 % interval of the mean difference; infinite with one seed."""
        x = self.differences
        if len(x) < 2:
            return math.inf
        t = _STUDENT[min(len(x), len(_STUDENT) + 1) - 2]
        return t * statistics.stdev(x) / math.sqrt(len(x))

    @property
    def verdict(self) -> str:
        """Decide by the interval; undecided with fewer than three seeds, or where the bound is inside it."""
        x, bound = self.differences, self.claim.within or 0.0
        if len(x) < 3:
            return UNDECIDED
        low, high = statistics.mean(x) - self.margin, statistics.mean(x) + self.margin
        return HOLDS if high < bound else FAILS if low > bound else UNDECIDED


def find(claim: Claim, scores: Scores) -> Finding:
    """Find the seeds that have both runs of a claim."""
    seeds = sorted(seed for run, seed in scores if run == claim.ours and (claim.other, seed) in scores)
    return Finding(claim, [scores[claim.ours, s] for s in seeds], [scores[claim.other, s] for s in seeds])
