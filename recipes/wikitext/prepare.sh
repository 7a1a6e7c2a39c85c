#!/usr/bin/env bash
# Converts WikiText-103 (or WikiText-2, for a trial) to fairseq's binary format, with the full vocabulary.
#
#     bash recipes/wikitext/prepare.sh OUT_DIR               downloads WikiText-103 (183 MB) first
#     bash recipes/wikitext/prepare.sh OUT_DIR --local DIR   takes DIR/wiki.{train,valid,test}.tokens, where
#                                                            the test split may be missing
#     --workers N     processes for the binarization (default: the number of cores)
#
# fairseq-train reads OUT_DIR. The vocabulary is every word of the training text: 267,744 entries for
# WikiText-103, fairseq's four special symbols included. Takes half a minute for WikiText-2, fifty times that for
# WikiText-103. After a kill, the same command resumes; once complete, it does nothing.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

# First the copy of the data set's author, then the address in fairseq's examples, which has answered 403 since 2024.
URLS=(
  "https://wikitext.smerity.com/wikitext-103-v1.zip"
  "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip"
)
SHA256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
OUT="" LOCAL="" WORKERS="$(getconf _NPROCESSORS_ONLN)"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --local | --workers)
      [ $# -ge 2 ] || die "$1 needs a value; see: bash recipes/wikitext/prepare.sh --help"
      if [ "$1" = --local ]; then LOCAL="$2"; else WORKERS="$2"; fi
      shift 2
      ;;
    -*) die "unknown option $1; see: bash recipes/wikitext/prepare.sh --help" ;;
    *)
      [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
      OUT="${1%/}"
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "no output folder given; run: bash recipes/wikitext/prepare.sh OUT_DIR [--local DIR]"
case "$WORKERS" in '' | *[!0-9]* | 0) die "--workers $WORKERS is not a positive number" ;; esac
need fairseq-preprocess
free_dir "$OUT"

# Get the text. The zip is kept only if its checksum is right; it is the same at every address.
download() {
  local url
  for url in "${URLS[@]}"; do
    if fetch "$url" "$OUT.download/wikitext-103-v1.zip" "$SHA256"; then return 0; fi
  done
  die "WikiText-103 could not be downloaded; fetch it elsewhere, unpack it, and pass --local DIR"
}
# python -m zipfile, because unzip is not on every machine.
unpack() { python -m zipfile -e "$OUT.download/wikitext-103-v1.zip" "$OUT.download"; }

if [ -n "$LOCAL" ]; then
  [ -d "$LOCAL" ] || die "--local $LOCAL is not a folder; give the one that holds wiki.train.tokens"
  LOCAL="$(cd "$LOCAL" && pwd)"
else
  need curl python
  step "download WikiText-103" "$OUT.download/.downloaded" download
  step "unpack" "$OUT.download/.unpacked" unpack
  LOCAL="$OUT.download/wikitext-103"
fi
for split in train valid; do
  [ -f "$LOCAL/wiki.$split.tokens" ] ||
    die "$LOCAL/wiki.$split.tokens does not exist; give --local the folder that holds wiki.$split.tokens"
done

# fairseq-preprocess refuses to overwrite an older dictionary, so it writes a new folder, which is then renamed.
binarize() {
  local test=()
  if [ -f "$LOCAL/wiki.test.tokens" ]; then test=(--testpref "$LOCAL/wiki.test.tokens"); fi
  rm -rf "$OUT.part"
  fairseq-preprocess --only-source \
    --trainpref "$LOCAL/wiki.train.tokens" --validpref "$LOCAL/wiki.valid.tokens" ${test[@]+"${test[@]}"} \
    --workers "$WORKERS" --destdir "$OUT.part"
  touch "$OUT.part/.done" # marks the folder as this recipe's, even if it is killed right here
  rm -rf "$OUT"
  mv "$OUT.part" "$OUT"
}
step "binarize $LOCAL to $OUT" "$OUT/.done" binarize "$LOCAL"
