#!/usr/bin/env bash
# Collects in one folder everything that scripts/setup.sh installs, for a machine without a network. Run it where a package
# index can be reached, on the same kind of machine (operating system, processor) and with the same version of Python.
#
#     bash scripts/bundle.sh DIR                 torch for a CPU: about 300 MB
#     bash scripts/bundle.sh DIR --torch cuda    the index's own torch, on Linux with CUDA: several gigabytes
#     bash scripts/bundle.sh DIR --vision        and what images need
#     bash scripts/bundle.sh DIR --dev           and what the tests need, images included
#     PYTHON=python3.12 bash scripts/bundle.sh DIR   for this Python (default: that of .venv, else python3)
#
# DIR gets packages/ (wheels, and sources where there is no wheel: fairseq), source.tar.gz (this checkout), bundle.txt
# (what it is for) and SHA256SUMS. Copy DIR to the other machine, which needs a C++ compiler and Python's headers, and run
# there:
#
#     mkdir quant-noise && tar xzf DIR/source.tar.gz -C quant-noise && cd quant-noise
#     bash scripts/setup.sh --bundle DIR
#
# To read what fairseq needs, it uses the checkout's .venv if that fits, or else makes one in DIR and removes it again.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
die() { printf 'error: %s\n' "$*" >&2 && exit 2; }
DIR="" TORCH=cpu DEV=0 VISION=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --dev) DEV=1 VISION=1 ;;
    --vision) VISION=1 ;;
    --torch) TORCH="${2:-}" && shift $(($# > 1)) ;;
    -*) die "unknown option $1; see: bash scripts/bundle.sh --help" ;;
    *) [ -z "$DIR" ] || die "two folders given, $DIR and $1; give one" && DIR="$1" ;;
  esac
  shift
done
[ -n "$DIR" ] || die "no folder given; run: bash scripts/bundle.sh DIR"
case "$TORCH" in cpu | cuda) ;; *) die "--torch is '$TORCH'; give cpu or cuda" ;; esac
if [ -e "$DIR" ] && [ ! -f "$DIR/bundle.txt" ] && [ ! -f "$DIR/.unfinished" ] && [ -n "$(ls -A "$DIR")" ]; then
  die "$DIR holds something else; give another folder or remove it"
fi

version_of() { "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null; }
VENV_PYTHON="$REPO/.venv/bin/python"
PYTHON="${PYTHON:-$([ -x "$VENV_PYTHON" ] && echo "$VENV_PYTHON" || echo python3)}"
VERSION="$(version_of "$PYTHON")" || die "$PYTHON does not run; give PYTHON=/path/to/python3.11"
case "$VERSION" in 3.11 | 3.12) ;; *) die "$PYTHON is $VERSION; fairseq needs 3.11 or 3.12: give PYTHON=" ;; esac

rm -rf "$DIR"
mkdir -p "$DIR/packages" && touch "$DIR/.unfinished"
DIR="$(cd "$DIR" && pwd)"
cd "$REPO"
text_of() { sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$@"; } # requirement files without their comments
pinned() { text_of requirements/setup.txt | grep "^$1=="; }
say() { printf '[%s/4] %s...\n' "$1" "$2"; }

# 1. torch, and the Python that reads what fairseq needs, for which torch must be there.
say 1 "torch for $TORCH"
WHICH="$(pinned torch)"
if [ "$TORCH" = cpu ] && [ "$(uname -s)" = Linux ]; then WHICH="$WHICH+cpu"; fi
if [ "$TORCH" = cuda ]; then WHICH="${WHICH/==/===}"; fi # else pip takes 2.13.0+cpu for 2.13.0, where it sees that
download() { "$BUILDER" -m pip --disable-pip-version-check download --quiet --dest "$DIR/packages" "$@"; }
BUILDER="$PYTHON"
download "$WHICH" || {
  [ "$TORCH" = cpu ] && download --extra-index-url https://download.pytorch.org/whl/cpu "$WHICH"
} || die "$WHICH could not be downloaded for Python $VERSION; check the network and pip's settings"
BUILDER="$VENV_PYTHON"
if [ "$(version_of "$BUILDER")" != "$VERSION" ] || ! "$BUILDER" -c 'import torch, Cython, numpy'; then
  "$PYTHON" -m venv "$DIR/.build"
  BUILDER="$DIR/.build/bin/python"
  "$BUILDER" -m pip install --quiet --find-links "$DIR/packages" -r requirements/build.txt numpy "$WHICH"
fi

# 2. Everything else. The constraint keeps a second torch out.
say 2 "the requirements, and fairseq's source"
echo "$WHICH" >"$DIR/.constraints"
REQUIREMENTS=(-r requirements/core.txt -r requirements/recipes.txt -r requirements/build.txt -r requirements/cluster.txt)
if [ "$DEV" = 1 ]; then REQUIREMENTS+=(-r requirements/dev.txt); fi
if [ "$VISION" = 1 ]; then
  REQUIREMENTS+=(-r requirements/vision.txt)
  MINOR="${WHICH#torch==*.}" && VISION_WHICH="torchvision==0.$((${MINOR%%.*} + 15))" # the one for this torch, as in setup.sh
  { [ "$TORCH" = cpu ] && download --no-deps "$VISION_WHICH.0+cpu"; } || download --no-deps "$VISION_WHICH.*" ||
    die "$VISION_WHICH could not be downloaded; check the network and pip's settings"
fi
download --find-links "$DIR/packages" -c "$DIR/.constraints" --no-build-isolation "${REQUIREMENTS[@]}" "$(pinned fairseq-fixed)" ||
  die "a package could not be downloaded (above); check the network and pip's settings"

# 3. This checkout as it is now, with what is not committed, without what git ignores.
say 3 "this checkout"
OURS=.venv # and DIR, where it is inside
case "$DIR" in "$REPO"/*) OURS="${DIR#"$REPO/"}" ;; esac
there() { while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done; }
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  git ls-files -z --cached --others --exclude-standard -- . ":(exclude).venv" ":(exclude)$OURS" | there |
    tar czf "$DIR/source.tar.gz" --null -T -
else
  tar czf "$DIR/source.tar.gz" --exclude=./.venv --exclude="./$OURS" --exclude=./runs --exclude=__pycache__ .
fi

# 4. What it is for, and the hashes.
say 4 "hashes"
rm -rf "$DIR/.build" "$DIR/.constraints"
MACHINE="$("$PYTHON" -c 'import platform, sys; print(f"{sys.platform}-{platform.machine()}")')"
printf 'python=%s\ntorch=%s\nmachine=%s\ndev=%s\nvision=%s\n' "$VERSION" "$WHICH" "$MACHINE" "$DEV" "$VISION" >"$DIR/bundle.txt"
(cd "$DIR" && find packages source.tar.gz bundle.txt -type f -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
rm "$DIR/.unfinished"
echo "ready: $DIR ($(find "$DIR/packages" -type f | wc -l) packages, $(du -sm "$DIR" | cut -f1) MB, Python $VERSION, $WHICH)"
