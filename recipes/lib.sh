# shellcheck shell=bash
# Helpers that every recipe sources:   . "$(dirname "$0")/../lib.sh"
#
# A recipe is a list of steps. A step that succeeded leaves a stamp beside its output, so a recipe that was
# killed goes on where it stopped when it is run again. The stamp holds the command line: a step whose
# command has changed is done again, and so is one whose stamp was deleted. So give a step that is a function
# whatever its result depends on as arguments.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The tools of the checkout's own environment come first; without it, those of the caller's environment serve.
if [ -d "$REPO/.venv/bin" ]; then PATH="$REPO/.venv/bin:$PATH"; fi
export REPO PATH

# say TEXT...: one line for the person who waits.
say() { printf '%s\n' "$*"; }

# die TEXT...: the user's mistake, in one line that names the cure; exit code 2, as in the command line tool.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# need TOOL...: stops at once, not after an hour, when a program is missing.
need() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool is not installed; run: bash $REPO/scripts/setup.sh"
  done
}

# free_dir DIR: stops before a recipe would replace a folder that no recipe made (a recipe's own has a .done).
free_dir() {
  if [ -e "$1" ] && [ ! -f "$1/.done" ] && [ -n "$(ls -A "$1")" ]; then
    die "$1 exists and holds something else; give another folder or remove it"
  fi
}

# minutes SECONDS: 75 -> 1m15s
minutes() { if [ "$1" -lt 60 ]; then printf '%ds' "$1"; else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi; }

# step NAME STAMP COMMAND...: runs the command once. STAMP is a file written only after it succeeded.
# The command may be a function of the recipe; it runs in a subshell that stops at the first failure.
step() {
  local name="$1" stamp="$2" line status began=$SECONDS
  shift 2
  line="$(printf '%q ' "$@")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$line" ]; then
    say "[skip] $name (done)"
    return 0
  fi
  say "[step] $name"
  set +e # or the recipe would end here without a word about which step failed
  (set -e && "$@")
  status=$?
  set -e
  if [ "$status" -ne 0 ]; then
    say "[fail] $name after $(minutes $((SECONDS - began))), exit code $status; the same command goes on from here" >&2
    exit "$status"
  fi
  mkdir -p "$(dirname "$stamp")"
  printf '%s' "$line" >"$stamp.part" && mv "$stamp.part" "$stamp"
  say "[done] $name ($(minutes $((SECONDS - began))))"
}
