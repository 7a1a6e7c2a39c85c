#!/usr/bin/env bash
# WikiText-103 (or WikiText-2, for a try) in fairseq's binary format, with the full vocabulary.
#
#     bash recipes/wikitext/prepare.sh OUT_DIR                 downloads WikiText-103 (183 MB), then as below
#     bash recipes/wikitext/prepare.sh OUT_DIR --local DIR     takes DIR/wiki.{train,valid,test}.tokens; test may be missing
#     ... --workers N                                          processes for the binarization (default: the number of cores)
#
# OUT_DIR is what fairseq-train reads. The vocabulary is every word of the training text: 267,744 entries for
# WikiText-103, fairseq's four special symbols included. Ten minutes on one core for WikiText-103, half a minute for WikiText-2.
# Killed and run again, it goes on; run twice, it does nothing.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

URL="https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip"
OUT="" LOCAL="" WORKERS="$(getconf _NPROCESSORS_ONLN)"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --local | --workers)
      [ $# -ge 2 ] || die "$1 needs a value; see: bash recipes/wikitext/prepare.sh --help"
      if [ "$1" = --local ]; then LOCAL="$2"; else WORKERS="$2"; fi
      shift 2
      ;;
    -*) die "unknown option $1; see: bash recipes/wikitext/prepare.sh --help" ;;
    *)
      [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
      OUT="$1"
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "no output folder given; run: bash recipes/wikitext/prepare.sh OUT_DIR [--local DIR]"
case "$WORKERS" in '' | *[!0-9]* | 0) die "--workers $WORKERS is not a positive number" ;; esac
need fairseq-preprocess

# The text. The zip is fetched in one piece or not at all; its checksum is printed for your records.
download() {
  mkdir -p "$OUT.download"
  curl -fL --retry 5 --retry-delay 5 --continue-at - -o "$OUT.download/wikitext-103-v1.zip.part" "$URL" ||
    die "cannot download $URL; fetch it elsewhere, unpack it, and pass --local DIR"
  mv "$OUT.download/wikitext-103-v1.zip.part" "$OUT.download/wikitext-103-v1.zip"
  sha256sum "$OUT.download/wikitext-103-v1.zip"
}
# python -m zipfile, because unzip is not on every machine.
unpack() { python -m zipfile -e "$OUT.download/wikitext-103-v1.zip" "$OUT.download"; }

if [ -z "$LOCAL" ]; then
  need curl python
  step "download WikiText-103" "$OUT.download/.downloaded" download
  step "unpack" "$OUT.download/.unpacked" unpack
  LOCAL="$OUT.download/wikitext-103"
fi
for split in train valid; do
  [ -f "$LOCAL/wiki.$split.tokens" ] ||
    die "$LOCAL/wiki.$split.tokens does not exist; pass --local with the folder that holds wiki.{train,valid,test}.tokens"
done

# fairseq-preprocess refuses to write over an older dictionary, so it writes beside, and the whole folder is renamed.
binarize() {
  local test=()
  if [ -f "$LOCAL/wiki.test.tokens" ]; then test=(--testpref "$LOCAL/wiki.test.tokens"); fi
  rm -rf "$OUT.part"
  fairseq-preprocess --only-source \
    --trainpref "$LOCAL/wiki.train.tokens" --validpref "$LOCAL/wiki.valid.tokens" "${test[@]}" \
    --workers "$WORKERS" --destdir "$OUT.part"
  rm -rf "$OUT"
  mv "$OUT.part" "$OUT"
}
step "binarize $LOCAL to $OUT" "$OUT/.done" binarize
