#!/usr/bin/env bash
# Converts GLUE's MNLI to fairseq's binary format, in the byte pairs of GPT-2 that RoBERTa reads.
#
#     bash recipes/mnli/prepare.sh OUT_DIR               downloads MNLI and the byte pairs first
#     bash recipes/mnli/prepare.sh OUT_DIR --local DIR   takes DIR/train.tsv, dev_matched.tsv, dev_mismatched.tsv in
#                                                        GLUE's columns; the mismatched part may be missing
#     --bpe DIR       encoder.json, vocab.bpe and dict.txt of GPT-2's byte pairs, instead of a download
#     --dict FILE     the dictionary of the pre-trained model (default: dict.txt of the byte pairs, that of roberta.base)
#     --workers N     processes (default: the number of cores)
#
# OUT_DIR has input0, input1 and label; `valid` is dev_matched and `valid1` dev_mismatched. Under a minute for 13,000
# pairs. After a kill, the same command resumes; once complete, it does nothing.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

URL="https://dl.fbaipublicfiles.com/glue/data/MNLI.zip"
OUT="" LOCAL="" BPE="" DICT="" WORKERS="$(getconf _NPROCESSORS_ONLN)"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --local | --bpe | --dict | --workers)
      [ $# -ge 2 ] || die "$1 needs a value; see: bash recipes/mnli/prepare.sh --help"
      case "$1" in --local) LOCAL="$2" ;; --bpe) BPE="$2" ;; --dict) DICT="$2" ;; *) WORKERS="$2" ;; esac
      shift 2
      ;;
    -*) die "unknown option $1; see: bash recipes/mnli/prepare.sh --help" ;;
    *)
      [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
      OUT="${1%/}"
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "no output folder given; run: bash recipes/mnli/prepare.sh OUT_DIR [--local DIR]"
case "$WORKERS" in '' | *[!0-9]* | 0) die "--workers $WORKERS is not a positive number" ;; esac
need python fairseq-preprocess
free_dir "$OUT"

unpack() {
  fetch "$URL" "$OUT.download/MNLI.zip" ||
    die "MNLI could not be downloaded; fetch it elsewhere, unpack it, and pass --local DIR"
  python -m zipfile -e "$OUT.download/MNLI.zip" "$OUT.download"
}
if [ -z "$LOCAL" ]; then
  need curl
  step "download MNLI" "$OUT.download/.mnli" unpack
  LOCAL="$OUT.download/MNLI"
fi
for split in train dev_matched; do
  [ -f "$LOCAL/$split.tsv" ] || die "$LOCAL/$split.tsv does not exist; give --local the MNLI folder of GLUE"
done
gpt2_bpe "$BPE" "$OUT.download"
DICT="${DICT:-$BPE/dict.txt}"
[ -f "$DICT" ] || die "--dict $DICT does not exist; give the dict.txt beside the pre-trained model"

# fairseq-preprocess refuses to overwrite an older dictionary, so a new folder is written and then renamed.
binarize() {
  local part="$OUT.part" split name dev=dev_matched
  rm -rf "$part"
  mkdir -p "$part/text"
  if [ -f "$LOCAL/dev_mismatched.tsv" ]; then dev=dev_matched,dev_mismatched; fi
  for split in train ${dev//,/ }; do
    module recipes.mnli.pairs "$LOCAL/$split.tsv" "$part/text/$split"
    for name in input0 input1; do
      module recipes.gpt2_bpe --bpe "$BPE" --workers "$WORKERS" "$part/text/$split.$name" "$part/text/$split.$name.bpe"
    done
  done
  printf '%s 1\n' contradiction neutral entailment >"$part/labels.txt" # the order of the published roberta.large.mnli
  for name in input0 input1; do
    preprocess "$name" "$DICT" ".$name.bpe" "$dev"
  done
  preprocess label "$part/labels.txt" .label "$dev"
  rm -r "$part/text"
  touch "$part/.done" # marks the folder as this recipe's, even if it is killed right here
  rm -rf "$OUT"
  mv "$part" "$OUT"
}
# preprocess NAME DICTIONARY ENDING DEV: binarizes one column of the pairs
preprocess() {
  local dev="$OUT.part/text/${4/,/$3,$OUT.part/text/}$3"
  fairseq-preprocess --only-source --srcdict "$2" --workers "$WORKERS" --destdir "$OUT.part/$1" \
    --trainpref "$OUT.part/text/train$3" --validpref "$dev" 2>&1 | grep -E 'sents|rror' || return 1
}
step "binarize $LOCAL to $OUT" "$OUT/.done" binarize "$LOCAL" "$DICT" "$BPE"
