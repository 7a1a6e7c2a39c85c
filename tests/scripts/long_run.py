"""Memory over a long run: 2,000 updates with noise, exact-pq refreshes and three stages.

    python tests/scripts/long_run.py
    python tests/scripts/long_run.py --updates 200

Prints the memory that the process holds (RSS) twenty times, and by how much it grew within each stage once that had
settled. Exit code 1 where one grew by more than 4 MiB. Two minutes on one core.
"""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
os.environ.setdefault("LOGLEVEL", "WARNING")  # of fairseq, read when it is imported

import fairseq.distributed.utils  # noqa: E402
import fairseq_cli.train  # noqa: E402
import torch  # noqa: E402
from lm_fixture import PLANS, Lab, forgetful_fairseq, ipq_flags  # noqa: E402
from watching import NOISE, watched  # noqa: E402

MOST = 4.0  # MiB of growth within a stage


def resident() -> float:
    """MiB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(folder: Path, updates: int) -> list[tuple[int, float]]:
    """(update, MiB) twenty times over a run."""
    lab, seen = Lab(folder), []
    plan = lab.plan({"noise": NOISE, **PLANS["adaptive"]})
    flags = ["--quantization-config-path", plan, "--quant-noise-log-interval", 10, *ipq_flags("adaptive")]
    flags += ["--save-interval-updates", updates // 10, "--validate-interval", 50, "--save-interval", 50]

    def look(trainer, _):
        update = trainer.get_num_updates()
        if update % (updates // 20) == 0:
            gc.collect()
            seen.append((update, resident()))
            print(f"update {update:5d}  {resident():7.1f} MiB", flush=True)

    cfg = lab.config(*flags, kind="adaptive", updates=updates)
    cfg.checkpoint.save_dir = str(lab.new())
    with watched(look), forgetful_fairseq():
        fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)  # not lab.train, which keeps each log
    return seen


def growth(seen: list[tuple[int, float]], updates: int) -> list[float]:
    """MiB from the second measurement of each stage to its last."""
    stages = [[mib for at, mib in seen if updates * i // 3 < at <= updates * (i + 1) // 3] for i in range(3)]
    return [of_stage[-1] - of_stage[1] for of_stage in stages]


def main() -> int:
    """Train and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = growth(train(Path(name), options.updates), options.updates)
    print(f"{options.updates} updates; growth within each stage: {', '.join(f'{mib:+.1f} MiB' for mib in found)}")
    return int(max(found) > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
