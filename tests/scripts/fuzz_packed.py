"""Mutations of packed files of every kind: each is refused in one line with exit code 3, or is still a file.

    python tests/scripts/fuzz_packed.py                           10,000 mutations, ten minutes on one core
    python tests/scripts/fuzz_packed.py --count 500 --seed 3      fewer, others
    python tests/scripts/fuzz_packed.py --seed 1 --only 4711      one of them again, with the traceback

`tests/support/mutations.py` makes them. Each is read and verified; one whose hash holds is inspected, loaded and made
dense. A fault is any other exception, a refusal of several lines or with another exit code, more than 20 s, more memory
than twice the file (and 64 MB), or something left on the disk. Prints what became of them; exit code 1 after a fault.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from fuzzing import Fault, outcome, sources, warm_up  # noqa: E402
from mutations import mutate  # noqa: E402

ADDRESS_SPACE = 2 << 30  # bytes beyond what the process has: a bomb ends in MemoryError, not in the machine's


def limit_memory() -> None:
    """No case may ask for more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """Run them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="mutations (default 10,000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default 1)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one, to go on from (default 0)")
    parser.add_argument("--only", type=int, help="the number of one mutation, to run it alone")
    args = parser.parse_args()
    kinds, outcomes, faults = sources(), Counter[tuple[str, str]](), 0
    warm_up()
    limit_memory()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.first, args.first + args.count) if args.only is None else [args.only]:
            rng = random.Random(f"{args.seed} {number}")
            source = rng.choice([*kinds])
            mutation, forged, content = mutate(kinds[source].content, rng)
            try:
                found = outcome(kinds[source], content, forged, Path(folder) / "model.safetensors")
            except Fault as fault:
                if args.only is not None:
                    raise
                found, faults = "FAULT", faults + 1
                print(f"{number}: {mutation} of {source}: {str(fault)[:500]}", flush=True)
            outcomes[mutation, found] += 1
            if (number + 1) % 1000 == 0:
                print(f"{number + 1:,} in {time.monotonic() - began:.0f} s, {faults} faults", flush=True)
    for (mutation, found), count in sorted(outcomes.items()):
        print(f"{mutation:16} {found:20} {count:6,}")
    totals = Counter[str]()
    for (_, found), count in outcomes.items():
        totals[found] += count
    print(
        f"{outcomes.total():,} mutations of {len(kinds)} files: " + ", ".join(f"{n:,} {k}" for k, n in totals.items())
    )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
