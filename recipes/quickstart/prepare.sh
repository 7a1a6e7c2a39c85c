#!/usr/bin/env bash
# Makes the quickstart's data: the documentation strings of the Python standard library, about 1.5 million characters,
# 380 thousand tokens, in fairseq's binary format. Half a minute on one core.
#
#     bash recipes/quickstart/prepare.sh OUT_DIR
#
# It makes OUT_DIR/corpus (text, tokens, tokenizer, dict.txt) and OUT_DIR/data-bin (what fairseq-train reads).
# After a kill, the same command resumes; once complete, it does nothing. VOCAB_SIZE (6000) sets the dictionary's size.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no output folder given; run: bash recipes/quickstart/prepare.sh OUT_DIR" ;;
esac
OUT="${1%/}"
VOCAB_SIZE="${VOCAB_SIZE:-6000}"
need python fairseq-preprocess
free_dir "$OUT/data-bin"

# Docstrings are prose that every machine has, without a download or a licence to accept.
step "corpus of docstrings" "$OUT/corpus/.done" \
  python "$REPO/recipes/quickstart/corpus.py" "$OUT/corpus" --vocab-size "$VOCAB_SIZE"

# fairseq-preprocess refuses to overwrite an older dictionary, so it writes a new folder, which is then renamed.
binarize() {
  rm -rf "$OUT/data-bin" "$OUT/data-bin.part"
  # --srcdict: gives every piece of the tokenizer a number, even one that is in no training line.
  fairseq-preprocess --only-source --srcdict "$OUT/corpus/dict.txt" \
    --trainpref "$OUT/corpus/train.spm" --validpref "$OUT/corpus/valid.spm" --testpref "$OUT/corpus/test.spm" \
    --workers 2 --destdir "$OUT/data-bin.part"
  touch "$OUT/data-bin.part/.done" # marks the folder as this recipe's, even if it is killed right here
  mv "$OUT/data-bin.part" "$OUT/data-bin"
}
step "binarize to $OUT/data-bin" "$OUT/data-bin/.done" binarize "$VOCAB_SIZE"
