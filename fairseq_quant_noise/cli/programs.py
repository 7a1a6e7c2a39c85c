"""The verbs that point to other programs, fairseq's and those in benchmarks/, and need no torch."""

import argparse
import subprocess
import sys
from pathlib import Path

from ..errors import UserError


def user_dir(args: argparse.Namespace) -> None:
    """Print the path to give fairseq as --user-dir."""
    print(Path(__file__).parents[1])


def bench(args: argparse.Namespace) -> None:
    """Measure a performance claim on this machine, beside fairseq's own code."""
    program = Path(__file__).parents[2] / "benchmarks" / f"{args.claim}.py"
    if not program.exists():
        raise UserError(f"bench {args.claim}: {program} is not there; run it in a checkout of the repository")
    raise SystemExit(subprocess.run([sys.executable, str(program), *args.options]).returncode)
