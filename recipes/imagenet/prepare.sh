#!/usr/bin/env bash
# Makes a tree of images for recipes/imagenet/run.sh.
#
#     bash recipes/imagenet/prepare.sh OUT --local DIR             ImageNet: DIR has train/WNID/*.JPEG and val/WNID/*.JPEG
#     bash recipes/imagenet/prepare.sh OUT --local DIR --cifar10   a subset of CIFAR-10, for SIZE=cpu
#
# ImageNet (ILSVRC 2012) cannot be downloaded here: register at image-net.org, unpack, and sort the validation images into
# a folder for each class. The tree is used in place, through a link. CIFAR-10: DIR, or an archive (.tar.xz, .tar.gz), holds
# either a tree train/CLASS and val/CLASS or the binary version of www.cs.toronto.edu/~kriz/cifar.html.
#
#     TRAIN=1000 VAL=200     images in each class of CIFAR-10
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

OUT="" LOCAL="" CIFAR=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --local) LOCAL="${2:-}" && shift ;;
    --cifar10) CIFAR=1 ;;
    -*) die "unknown option $1; see: bash recipes/imagenet/prepare.sh --help" ;;
    *) OUT="$1" ;;
  esac
  shift
done
if [ -z "$OUT" ] || [ -z "$LOCAL" ]; then die "give OUT and --local DIR; see: bash recipes/imagenet/prepare.sh --help"; fi
[ -e "$LOCAL" ] || die "$LOCAL does not exist; give --local the folder (or archive) with the images"
need python

unpack() { rm -rf "$OUT.unpacked" && mkdir -p "$OUT.unpacked" && tar xf "$LOCAL" -C "$OUT.unpacked"; }
cifar10() {
  module recipes.imagenet.cifar10 "$LOCAL" "$OUT" --train "${TRAIN:-1000}" --val "${VAL:-200}"
  rm -rf "$OUT.unpacked"
}
link() {
  local split
  for split in train val; do
    [ -n "$(find "$LOCAL/$split" -mindepth 2 -name '*.*' -print -quit 2>/dev/null)" ] ||
      die "$LOCAL/$split: holds no CLASS/IMAGE; sort the images into a folder for each class"
  done
  ln -sfn "$(cd "$LOCAL" && pwd)" "$OUT"
}

mkdir -p "$(dirname "$OUT")"
if [ "$CIFAR" = 0 ]; then
  link
  exit 0
fi
if [ -f "$LOCAL" ] && [ ! -f "$OUT.done" ]; then
  unpack
  LOCAL="$OUT.unpacked"
fi
step "CIFAR-10 as a tree of images" "$OUT.done" cifar10 "${TRAIN:-1000}" "${VAL:-200}"
