"""What is missing to build fairseq's extensions, said before a download begins: one line, exit code 1.

python scripts/preflight.py
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> str | None:
    """The first thing missing and its cure, or None."""
    for variable, usual in (("CC", "gcc"), ("CXX", "g++")):
        command = os.environ.get(variable) or sysconfig.get_config_var(variable) or usual
        if shutil.which(command.split()[0]) is None:
            return (
                f"no C++ compiler ({command.split()[0]} not found); fairseq is built from source: "
                "install one (apt-get install g++) or set CC and CXX"
            )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return (
            f"{header} is missing; fairseq is built from source: install Python's headers (apt-get install python3-dev)"
        )
    return None


def main() -> int:
    """0 when fairseq is already there or can be built."""
    fault = None if importlib.util.find_spec("fairseq") else missing()
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
