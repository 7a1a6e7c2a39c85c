#!/usr/bin/env bash
# Everything a change must pass: style, format, types, tests. Sets up .venv first, if need be.
#
#     bash scripts/test.sh                    all of it
#     bash scripts/test.sh tests/test_pq.py   the arguments go to pytest
#
# Exit code 0 only if all four pass. pytest comes last, so its closing line is the end of the output.
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
check "mypy" mypy
STATUS=0
echo "== pytest"
python -m pytest "$@" || STATUS=$?

if [ -n "$FAILED" ]; then
  echo "error: failed:${FAILED%,}; ruff check --fix . and ruff format . cure most of the style" >&2
  if [ "$STATUS" -eq 0 ]; then STATUS=1; fi
fi
exit "$STATUS"
