#!/usr/bin/env bash
# Makes .venv in the checkout, with torch, the requirements, fairseq, and this package (an editable installation).
#
#     bash scripts/setup.sh          what the recipes need
#     bash scripts/setup.sh --vision and what images need (timm, torchvision)
#     bash scripts/setup.sh --dev    and what the tests need (pytest, hypothesis, ruff, mypy, timm, torchvision)
#     bash scripts/setup.sh --bundle DIR    without a network, from the folder that scripts/bundle.sh made
#
#     PYTHON=python3.12 bash scripts/setup.sh    chooses the interpreter (default: python3, else 3.12 or 3.11)
#
# It takes four minutes on two idle cores, mostly for fairseq's C++ extensions. A step that is done is not repeated: it
# leaves .venv/.stamp-STEP-HASH, where HASH is computed from what the step depends on. pip's output is in .venv/setup.log.
# A fairseq that the interpreter can already import (git main, say) is left in place and used.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"
LOG="$VENV/setup.log"
STEPS=5
DEV=0 VISION=0 BUNDLE=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dev) DEV=1 VISION=1 STEPS=7 ;;
    --vision) VISION=1 STEPS=6 ;;
    --bundle)
      [ -d "${2:-}" ] || { echo "error: --bundle '${2:-}': no such folder; make it with scripts/bundle.sh" >&2 && exit 2; }
      BUNDLE="$(cd "$2" && pwd)"
      shift
      ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$REPO/scripts/setup.sh" && exit 0 ;;
    *) echo "error: unknown option $1; see: bash scripts/setup.sh --help" >&2 && exit 2 ;;
  esac
  shift
done
cd "$REPO"
# Two set-ups at once (a recipe and the tests) would undo each other's work: the second waits for the first.
exec 9<"$REPO/scripts/setup.sh"
if command -v flock >/dev/null; then flock 9; fi

hash_of() { printf '%s' "$*" | cksum | cut -d' ' -f1; }
text_of() { sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$@"; }      # requirement files without their comments
pinned() { text_of requirements/setup.txt | grep "^$1=="; }      # torch -> torch==2.13.0
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { "$VENV/bin/python" -c "from importlib.metadata import version; version('$1')" 2>/dev/null; } # an installed distribution
# say_now TEXT: to the terminal, from inside a step whose output goes to the log.
exec 3>&1
say_now() { printf '      %s\n' "$*" >&3; }

# step NUMBER NAME INPUTS TITLE CURE COMMAND...: runs COMMAND once for these INPUTS (a text), output to the log.
step() {
  local number="$1" name="$2" stamp title="$4" cure="$5" began=$SECONDS status
  stamp="$VENV/.stamp-$name-$(hash_of "$3")"
  shift 5
  if [ -f "$stamp" ]; then return 0; fi
  printf '[%d/%d] %s...\n' "$number" "$STEPS" "$title"
  printf '\n==== %s\n' "$title" >>"$LOG"
  set +e
  (set -e && "$@") >>"$LOG" 2>&1 </dev/null
  status=$?
  set -e
  if [ "$status" -ne 0 ]; then
    printf -- '--- the last lines of %s\n' "$LOG" >&2
    tail -n 15 "$LOG" >&2
    printf 'error: %s: failed. %s\n' "$title" "$cure" >&2
    exit 1
  fi
  rm -f "$VENV/.stamp-$name-"*
  touch "$stamp"
  printf '[%d/%d] done in %d s\n' "$number" "$STEPS" $((SECONDS - began))
}
NETWORK="If the package index was not reached, check the network and pip's settings and run the same command again."

# good_python PYTHON: it runs, and is a release that fairseq-fixed is made for.
good_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if good_python "$candidate"; then echo "$candidate" && return 0; fi
  done
  candidate="${PYTHON:-python3}"
  echo "error: $candidate is $("$candidate" --version 2>/dev/null || echo missing); fairseq needs Python 3.11 or 3.12:" \
    "run PYTHON=/path/to/python3.11 bash scripts/setup.sh" >&2
  return 2
}

# 1. The environment. One that somebody else made in .venv, or a link to one, is used as it is. Ours, known by its stamp, is made anew
#    where the checkout has moved (its scripts name their interpreter by its full path), where PYTHON asks for
#    another interpreter, and where it was left unfinished.
made_here() { [ ! -L "$VENV" ] && compgen -G "$VENV/.stamp-venv-*" >/dev/null; }
make_venv() {
  local python stamp
  stamp="$VENV/.stamp-venv-$(hash_of "$REPO")"
  if [ -f "$stamp" ] && { [ -z "${PYTHON:-}" ] || [ "$(cat "$stamp")" = "$PYTHON" ]; }; then return 0; fi
  if [ -L "$VENV" ] && [ ! -x "$VENV/bin/python" ]; then
    echo "error: .venv is a link to $(readlink "$VENV"), where there is no environment: remove the link" >&2
    exit 2
  fi
  if [ -x "$VENV/bin/python" ] && ! made_here; then
    good_python "$VENV/bin/python" || {
      echo "error: .venv has $("$VENV/bin/python" --version 2>&1); fairseq needs Python 3.11 or 3.12: remove .venv" >&2
      exit 2
    }
    printf '[1/%d] using the environment that is already in .venv\n' "$STEPS"
    return 0
  fi
  python="$(find_python)"
  printf '[1/%d] making .venv with %s...\n' "$STEPS" "$("$python" --version)"
  rm -rf "${VENV:?}/bin" && rm -rf "$VENV" # bin first: half an environment must not look like somebody else's
  mkdir "$VENV" && touch "$VENV/.stamp-venv-unfinished"
  "$python" -m venv "$VENV" || {
    echo "error: $python cannot make an environment; install its venv module (apt-get install python3-venv)" >&2
    exit 1
  }
  if (cd / && "$python" "$REPO/scripts/share_fairseq.py" "$VENV") >"$LOG" 2>&1; then tail -n 1 "$LOG"; fi
  printf '%s' "${PYTHON:-}" >"$stamp"
  rm "$VENV/.stamp-venv-unfinished"
}
make_venv
# With a bundle, pip sees nothing else: no index, no settings of the machine, none of the user.
if [ -n "$BUNDLE" ]; then
  BUNDLED_TORCH="$("$VENV/bin/python" scripts/check_bundle.py "$BUNDLE" $([ "$DEV" -eq 0 ] || echo --dev) $([ "$VISION" -eq 0 ] || echo --vision))"
  export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS="$BUNDLE/packages"
  unset PIP_CONSTRAINT PIP_INDEX_URL PIP_EXTRA_INDEX_URL
fi
# Before minutes of downloads, not after them.
if ! compgen -G "$VENV/.stamp-fairseq-*" >/dev/null; then "$VENV/bin/python" scripts/preflight.py; fi

# 2. torch. 2.13.0+cpu is 200 MB; plain 2.13.0 is the CUDA build on Linux, which only a machine with a GPU wants.
install_torch() {
  local torch
  torch="$(pinned torch)"
  if "$VENV/bin/python" -c 'import torch; assert torch.__version__ >= (2, 6)'; then
    say_now "torch is already there"
  elif [ -n "$BUNDLE" ]; then
    pip install "$BUNDLED_TORCH"
  elif [ "$(uname -s)" != Linux ] || { command -v nvidia-smi && nvidia-smi; }; then
    pip install "${torch/==/===}" # else pip takes 2.13.0+cpu for 2.13.0, where it sees that
  elif ! pip install "$torch+cpu" &&
    ! pip install --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu"; then
    say_now "warning: no CPU build of $torch in reach, so the CUDA build comes: several gigabytes"
    pip install "$torch"
  fi
}
step 2 torch "$(pinned torch)" "installing $(pinned torch)" "$NETWORK" install_torch
# Whatever is installed later must not bring another torch. The version is the distribution's: torch.__version__ of the
# package index's CUDA build is 2.13.0+cu130, which pip does not find in the 2.13.0 that it has installed.
TORCH_VERSION='from importlib.metadata import version; print("torch==" + version("torch"))'
"$VENV/bin/python" -c "$TORCH_VERSION" >"$VENV/constraints.txt"

# 3. What the package and the recipes need, with fairseq's build tools.
REQUIREMENTS=(requirements/core.txt requirements/recipes.txt requirements/build.txt)
install_requirements() {
  pip install -c "$VENV/constraints.txt" -r requirements/core.txt -r requirements/recipes.txt -r requirements/build.txt
}
step 3 requirements "$(text_of "${REQUIREMENTS[@]}")" "installing the requirements" "$NETWORK" install_requirements

# 4. fairseq, unless there is one. -O1 for the three extensions that are nothing but torch's headers halves the
#    build; those that batch the data set their own -O3.
install_fairseq() {
  local theirs=no
  if ! made_here && has torchaudio; then theirs=yes; fi
  if (cd / && "$VENV/bin/python" -c 'import fairseq'); then
    say_now "a fairseq is already there and stays as it is"
  else
    CFLAGS="${CFLAGS:--O1 -g0}" pip install -c "$VENV/constraints.txt" --no-build-isolation "$(pinned fairseq-fixed)"
    (cd / && "$VENV/bin/python" -c 'import fairseq')
  fi
  if [ "$theirs" = no ]; then drop_torchaudio; fi
}
# fairseq-fixed asks for torchaudio and imports it only to score generated speech. PyPI's build for Linux is for CUDA: beside a CPU
# torch it does not load, and transformers, which imports what it finds installed, fails with it.
drop_torchaudio() {
  if has torchaudio && ! (cd / && "$VENV/bin/python" -c 'import torchaudio'); then
    pip uninstall --yes torchaudio
    has torchaudio || # one that is outside of .venv stays
      say_now "torchaudio does not load beside this torch and was removed; only fairseq's text_to_speech scores with it"
  fi
}
step 4 fairseq "$(pinned fairseq-fixed), torchaudio if it loads" "building fairseq (about 3 minutes)" \
  "If the compiler was killed, memory is short: 2 GB are enough. $NETWORK" install_fairseq

# 5. This package, so that `fairseq-quant-noise` is a command and `import fairseq_quant_noise` works everywhere.
install_package() { pip install --no-build-isolation --no-deps -e .; }
step 5 package "$(cat setup.py pyproject.toml requirements/core.txt fairseq_quant_noise/_version.py)" \
  "installing fairseq-quant-noise" "The lines above say why." install_package

# 6. Images. torchvision must be the one for this torch; on a CPU its own build, or else PyPI's, which is made for CUDA. Beside a CPU
#    torch that one lacks its compiled operators and does not load, until they are declared: its transforms and folders
#    of images, all that is used here, need none.
install_vision() {
  local torchvision
  torchvision="$("$VENV/bin/python" -c 'import torch; print("torchvision==0.%d" % (int(torch.__version__.split(".")[1]) + 15))')"
  if "$VENV/bin/python" -c 'import torchvision'; then
    say_now "torchvision is already there"
  elif ! { "$VENV/bin/python" -c 'import torch; assert "+cpu" in torch.__version__' &&
    { pip install --no-deps "$torchvision.0+cpu" || pip install --no-deps --retries 0 --timeout 10 \
      --extra-index-url https://download.pytorch.org/whl/cpu "$torchvision.0+cpu"; }; }; then
    pip install --no-deps "$torchvision.*"
  fi
  pip install -c "$VENV/constraints.txt" -r requirements/vision.txt
  "$VENV/bin/python" -c 'import torchvision' || declare_operators
  "$VENV/bin/python" -c 'import torchvision' || say_now "warning: torchvision does not load; images need the one for this torch"
}
declare_operators() {
  local packages
  packages="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  cp scripts/torchvision_operators/sitecustomize.py "$packages/torchvision_operators.py"
  echo "import torchvision_operators" >"$packages/torchvision_operators.pth"
  say_now "warning: torchvision's CPU build is not in reach. Its CUDA build reads and transforms images, but its operators for" \
    "boxes do not run; the CPU build is at https://download.pytorch.org/whl/cpu"
}
if [ "$VISION" -eq 1 ]; then
  step 6 vision "$(text_of requirements/vision.txt) $(pinned torch) $(cat scripts/torchvision_operators/*.py)" \
    "installing what images need" "$NETWORK" install_vision
fi

# 7. The tests' tools.
install_dev() { pip install -c "$VENV/constraints.txt" -r requirements/cluster.txt -r requirements/dev.txt; }
if [ "$DEV" -eq 1 ]; then
  step 7 dev "$(text_of requirements/cluster.txt requirements/dev.txt)" "installing the tests' tools" "$NETWORK" install_dev
fi
echo "ready: $VENV (. .venv/bin/activate)"
