"""SIGKILL at random moments over an iPQ run and its export, then the same command again: what comes out is the same.

    python tests/scripts/kill_anywhere.py                       30 kills
    python tests/scripts/kill_anywhere.py --kills 5 --seed 1    fewer, at moments that can be had again

One run is left alone. The others are killed until they are done: at any time, or as soon as k-means, the writing of
a checkpoint or the writing of the packed file begins. Each must end with the weights, codes, centroids, optimizer,
noise and stages of the first, bit for bit, with its packed file byte for byte, and log its losses update by update.
Exit code 1 where something differs. About half a minute a kill on one core.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from finished import differences  # noqa: E402
from lm_fixture import BANDS, FFN, Lab, ipq_flags, split  # noqa: E402

PLAN = {
    "stages": [
        {**FFN, "n_centroids": 256},
        {**BANDS, "n_centroids": 256},
        {"match": r"decoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj", "scheme": "int8", "range": "channel"},
    ],
    "noise": [
        {"match": r".*\.fc[12]", "kind": "pq", "p": 0.1, "choice": "clusters", "n_centroids": 16, "refresh": "epoch"},
        {"match": r".*self_attn.*", "kind": ["pq", "int8"], "p": 0.2, "n_centroids": 16, "refresh": 7},
        {"match": r".*embed.*", "p": 0.1, "schedule": {"kind": "linear", "from": 0.0, "updates": 30}},
    ],
    "activations": {"bits": 8},
    "codes": {"kind": "train", "every": 2, "share": 0.5},
}
SIZE = split("--decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 --decoder-ffn-embed-dim 512")
FLAGS = split("--decoder-layerdrop 0.2 --batch-size 8 --save-interval-updates 4 --log-format json --log-interval 1")
MOMENTS = ("any time", "any time", "k-means", "checkpoint", "export")
TIMED = re.compile(r"wps|ups|wall|minutes_left")


def commands(lab: Lab, teacher: Path, plan: str, folder: Path) -> list[list[str]]:
    """The two commands of a run: training, export."""
    flags = [*SIZE, *FLAGS, *ipq_flags("adaptive"), "--ipq-teacher", teacher, "--finetune-from-model", teacher]
    train = lab.arguments(*flags, "--quantization-config-path", plan, "--save-dir", folder, kind="adaptive", updates=60)
    programs = Path(sys.executable).parent
    export = ["export", "--path", folder / "checkpoint_last.pt", "--out", folder / "model.safetensors"]
    return [[str(programs / "fairseq-train"), *train], [str(programs / "fairseq-quant-noise"), *map(str, export)]]


class Attempt:
    """One process of a command, which may be killed, with its log."""

    def __init__(self, command: list[str], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.before, self.program = folder, leftovers(folder), Path(command[0]).name
        self.log = folder / f"log-{len(list(folder.glob('log-*'))):03d}.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def kill_at(self, moment: str, after: float) -> bool:
        """Kill it `after` seconds, counted from the moment; False where it was done before."""
        sights = {"k-means": self.in_kmeans, "checkpoint": self.writes, "export": self.writes}
        sees = sights.get(moment, lambda: True)
        while not sees():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        time.sleep(after)
        killed = self.process.poll() is None
        if killed:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return killed

    def in_kmeans(self) -> bool:
        """Whether a stage's k-means has begun and not ended."""
        text = self.log.read_text()
        return text.count(": quantizing ") > text.count(": quantized in ")

    def writes(self) -> bool:
        """Whether a file is being written."""
        return bool(leftovers(self.folder) - self.before)

    def where(self) -> str:
        """What it was at when it was killed, by what it left."""
        names = {name for name, _ in leftovers(self.folder) - self.before}
        if names:
            return (
                "writing the packed file" if any(name.endswith(".part") for name in names) else "writing a checkpoint"
            )
        if self.in_kmeans():
            return "k-means"
        return "training" if '"num_updates"' in self.log.read_text() else f"starting {self.program}"


def leftovers(folder: Path) -> set[tuple[str, int]]:
    """Files that are half written, with when they were begun."""
    found = set()
    for path in folder.iterdir():
        if path.suffix in (".tmp", ".part"):
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:  # finished meanwhile
                continue
    return found


def losses(folder: Path) -> dict[tuple, set[str]]:
    """All that a run's attempts logged of each update, without times."""
    found: dict[tuple, set[str]] = {}
    for log in folder.glob("log-*"):
        for line in re.findall(r"\| (train_inner|valid) \| (\{.*\})", log.read_text()):
            values = {k: v for k, v in json.loads(line[1]).items() if v is not None and not TIMED.search(k)}
            update = values.get("num_updates", values.get("valid_num_updates"))
            found.setdefault((line[0], update), set()).add(json.dumps(values))
    return found


def compared(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same."""
    found = differences(*(folder / "checkpoint_last.pt" for folder in (one, other)))
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors")
    logged, again = losses(one), losses(other)
    return found + [f"{key}: {logged[key]}, {again.get(key)}" for key in logged if logged[key] != again.get(key)]


def prepare(folder: Path) -> tuple[Lab, Path, str]:
    """Data, the dense checkpoint and the plan."""
    lab = Lab(folder)
    dense = folder / "dense"
    arguments = lab.arguments(*SIZE, "--save-dir", dense, "--batch-size", 8, kind="adaptive", updates=20)
    attempt = Attempt([str(Path(sys.executable).parent / "fairseq-train"), *arguments], dense)
    if attempt.process.wait():
        raise SystemExit(attempt.log.read_text()[-2000:])
    return lab, dense / "checkpoint_last.pt", lab.plan(PLAN)


def run_through(steps: list[list[str]], folder: Path) -> list[float]:
    """A run that nobody kills; the seconds of each command."""
    took = []
    for step in steps:
        began = time.monotonic()
        attempt = Attempt(step, folder)
        if attempt.process.wait():
            raise SystemExit(f"{step[0]} failed:\n{attempt.log.read_text()[-2000:]}")
        took.append(time.monotonic() - began)
    return took


def killed_run(steps: list[list[str]], folder: Path, took: list[float], kills: int, chance: random.Random) -> Counter:
    """A run that is killed up to `kills` times, then done; what it was at, each time."""
    seen: Counter = Counter()
    for step, seconds in zip(steps, took, strict=True):
        done = False
        while not done and seen.total() < kills:
            moment = chance.choice(MOMENTS)
            after = chance.uniform(0, seconds) if moment == "any time" else chance.choice((0, 0, 0.003, 0.03))
            attempt = Attempt(step, folder)
            killed = attempt.kill_at(moment, after)
            done = not killed and attempt.process.returncode == 0
            if killed:
                seen[attempt.where()] += 1
                print(f"  killed: {attempt.where()} ({moment})", flush=True)
            elif not done:
                raise SystemExit(f"{step[0]} failed after a kill:\n{attempt.log.read_text()[-2000:]}")
        if not done:
            run_through([step], folder)
    return seen


def main() -> int:
    """Kill, compare, print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    chance, seen, runs, wrong = random.Random(options.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lab, teacher, plan = prepare(folder)
        took = run_through(commands(lab, teacher, plan, folder / "whole"), folder / "whole")
        print(f"uninterrupted: {took[0]:.0f} s, export {took[1]:.0f} s", flush=True)
        while seen.total() < options.kills:
            runs += 1
            where = folder / f"run{runs}"
            steps = commands(lab, teacher, plan, where)
            seen += killed_run(steps, where, took, options.kills - seen.total(), chance)
            found = compared(folder / "whole", where)
            wrong += len(found)
            print(f"run {runs}: {'; '.join(found)[:500] or 'the same'}; {seen.total()} kills so far", flush=True)
    print(", ".join(f"{count} {what}" for what, count in seen.items()))
    print(f"{seen.total()} kills in {runs} runs, {wrong} differences")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
