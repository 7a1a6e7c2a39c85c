#!/usr/bin/env bash
# Converts text for pre-training RoBERTa to the byte pairs of GPT-2 and fairseq's binary format.
#
#     bash recipes/roberta/prepare.sh OUT_DIR --local DIR
#
# DIR holds train.txt and valid.txt, plain text with an empty line between documents, or WikiText's
# wiki.{train,valid}.tokens, which are converted to plain text first.
#     --bpe DIR       encoder.json, vocab.bpe and dict.txt of GPT-2's byte pairs, instead of a download
#     --words N       a dictionary of the N most frequent byte pairs of the text, instead of dict.txt, for small models
#     --workers N     processes (default: the number of cores)
#
# fairseq-train reads OUT_DIR. Takes a minute for WikiText-2. After a kill, the same command resumes; once complete, it does nothing.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

OUT="" LOCAL="" BPE="" WORDS="" WORKERS="$(getconf _NPROCESSORS_ONLN)"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --local | --bpe | --words | --workers)
      [ $# -ge 2 ] || die "$1 needs a value; see: bash recipes/roberta/prepare.sh --help"
      case "$1" in --local) LOCAL="$2" ;; --bpe) BPE="$2" ;; --words) WORDS="$2" ;; *) WORKERS="$2" ;; esac
      shift 2
      ;;
    -*) die "unknown option $1; see: bash recipes/roberta/prepare.sh --help" ;;
    *)
      [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
      OUT="${1%/}"
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "no output folder given; run: bash recipes/roberta/prepare.sh OUT_DIR --local DIR"
[ -n "$LOCAL" ] || die "no text given; give --local the folder of train.txt and valid.txt, or of wiki.train.tokens"
case "$WORKERS" in '' | *[!0-9]* | 0) die "--workers $WORKERS is not a positive number" ;; esac
case "$WORDS" in *[!0-9]* | 0) die "--words $WORDS is not a positive number" ;; esac
need python fairseq-preprocess
free_dir "$OUT"
for split in train valid; do
  [ -f "$LOCAL/$split.txt" ] || [ -f "$LOCAL/wiki.$split.tokens" ] ||
    die "$LOCAL holds neither $split.txt nor wiki.$split.tokens; give --local the folder of the text"
done
gpt2_bpe "$BPE" "$OUT.download"

# fairseq-preprocess refuses to overwrite an older dictionary, so it writes a new folder, which is then renamed.
binarize() {
  local part="$OUT.part" split text dictionary=(--srcdict "$BPE/dict.txt")
  if [ -n "$WORDS" ]; then dictionary=(--nwordssrc "$WORDS"); fi
  rm -rf "$part"
  mkdir -p "$part.text"
  for split in train valid; do
    text="$LOCAL/$split.txt"
    if [ ! -f "$text" ]; then
      text="$part.text/$split.txt"
      module recipes.roberta.plain_text "$LOCAL/wiki.$split.tokens" "$text"
    fi
    module recipes.gpt2_bpe --bpe "$BPE" --workers "$WORKERS" "$text" "$part.text/$split.bpe"
  done
  fairseq-preprocess --only-source "${dictionary[@]}" --workers "$WORKERS" --destdir "$part" \
    --trainpref "$part.text/train.bpe" --validpref "$part.text/valid.bpe"
  rm -r "$part.text"
  touch "$part/.done" # marks the folder as this recipe's, even if it is killed right here
  rm -rf "$OUT"
  mv "$part" "$OUT"
}
step "binarize $LOCAL to $OUT" "$OUT/.done" binarize "$LOCAL" "$BPE" "$WORDS"
