#!/usr/bin/env bash
# Runs everything that a change must pass: style and format (Python and C++), types, the direction of imports, tests.
# Sets up .venv first if it is missing.
#
#     bash scripts/test.sh                    all of it
#     bash scripts/test.sh tests/pq           the arguments go to pytest
#     bash scripts/test.sh -m "not slow"      without the tests that take longest
#     bash scripts/test.sh -n 0 -x            in one process; by default a worker for each core, and 8 at the most
#
# Exit code 0 only if all six pass. pytest comes last, so its closing line is the end of the output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev
PATH="$PWD/.venv/bin:$PATH"

FAILED=""
check() {
  local name="$1"
  shift
  echo "== $name"
  "$@" || FAILED="$FAILED $name,"
}
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "clang-format" clang-format --dry-run --Werror fairseq_quant_noise/kernels/native/*
check "mypy" mypy
check "imports" lint-imports --no-logo
STATUS=0
echo "== pytest"
# The tests and what they start take one thread each: the cores are busy with the other workers. A worker that is
# done takes over half of what is left to another (worksteal), so that all end at about the same time.
OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@" || STATUS=$?

if [ -n "$FAILED" ]; then
  echo "error: failed:${FAILED%,}; ruff check --fix . and ruff format . cure most of the style, clang-format -i that of C++" >&2
  if [ "$STATUS" -eq 0 ]; then STATUS=1; fi
fi
exit "$STATUS"
