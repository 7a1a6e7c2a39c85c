"""What the benchmarks have in common: timing side by side, and the report.

Every round runs each contender once, in turn, so that a machine that gets slower meanwhile slows them all. A claim's
ratio is of medians over the rounds; its spread is from the least to the largest ratio within a round.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Claim:
    """One line of a report."""

    claim: str
    ours: float
    peer: float
    peer_name: str
    ratio: float  # ours / peer where less is better and the target is an upper bound, else peer / ours
    target: str  # such as <= 1.05
    unit: str
    spread: tuple[float, float]  # of the ratio

    @property
    def holds(self) -> bool:
        """Whether the ratio meets the target."""
        sign, bound = self.target.split()
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)


def rounds(
    contenders: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 2, rest: float = 0
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after some rounds to warm up.

    With `rest` seconds, the machine rests before each contender, which then runs once more before it is timed: threads
    of two libraries would otherwise compete, since both stay awake for a while after their work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + repeats):
        for name, run in contenders.items():
            if rest:
                time.sleep(rest)
                run()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Seconds = Mapping[str, list[float]]


def at_most(
    claim: str, seconds: Seconds, ours: str, peer: str, bound: float, extra: float = 0, unit: str = "s"
) -> Claim:
    """The claim that ours takes at most `bound` times what the peer takes; `extra` a run is added to ours."""
    mine, its = [s + extra for s in seconds[ours]], seconds[peer]
    return _claim(claim, mine, its, peer, f"<= {bound}", [a / b for a, b in zip(mine, its, strict=True)], unit)


def at_least(claim: str, seconds: Seconds, ours: str, peer: str, bound: float) -> Claim:
    """The claim that ours is at least `bound` times faster than the peer."""
    mine, its = seconds[ours], seconds[peer]
    return _claim(claim, mine, its, peer, f">= {bound}", [b / a for a, b in zip(mine, its, strict=True)], "s")


def _claim(
    claim: str, ours: list[float], theirs: list[float], peer: str, target: str, ratios: list[float], unit: str
) -> Claim:
    mine, its = statistics.median(ours), statistics.median(theirs)
    ratio = mine / its if target.startswith("<=") else its / mine
    return Claim(claim, mine, its, peer, ratio, target, unit, (min(ratios), max(ratios)))


def machine() -> str:
    """Processor or GPU, threads and versions, in a line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or [platform.machine()])[0]
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=positive, default=repeats, help=f"rounds that are timed (default {repeats})")
    made.add_argument("--threads", type=positive, default=torch.get_num_threads())
    made.add_argument("--json", action="store_true", help="print a JSON list of the claims")
    return made


def report(claims: list[Claim], as_json: bool) -> None:
    """Print the claims, as a table or as JSON."""
    if as_json:
        print(json.dumps([asdict(claim) | {"holds": claim.holds, "machine": machine()} for claim in claims]))
        return
    print(machine())
    print("| claim | ours | peer | ratio (spread) | target | |\n|---|---|---|---|---|---|")
    for c in claims:
        low, high = c.spread
        print(
            f"| {c.claim} | {c.ours:.4g} {c.unit} | {c.peer_name}: {c.peer:.4g} {c.unit} | {c.ratio:.3g} "
            f"({low:.3g} to {high:.3g}) | {c.target} | {'holds' if c.holds else 'does not hold'} |"
        )
