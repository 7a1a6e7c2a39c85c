#!/usr/bin/env bash
# Repeats Table 3 of the Quant-Noise paper for RoBERTa at a small size: iPQ on MNLI without noise, with noise from pre-training
# on, and with noise in fine-tuning only (post-hoc); and the first two without the teacher. quant_noise_roberta_small is
# pre-trained on WikiText-2. Takes about three hours on one CPU core, half of that on two (the sum of its parts).
#
#     bash recipes/table3.sh OUT_DIR --wikitext DIR --glue DIR [--bpe DIR]
#
# DIRs: wiki.{train,valid}.tokens; GLUE's MNLI folder; GPT-2's byte pairs (default: a download). The results are lines of
# JSON in OUT_DIR/table3.jsonl. After a kill, the same command resumes.
#     WORDS=16000 (of the dictionary)   PRETRAIN_UPDATES=6000  LAYERDROP=0.2 (in pre-training)  UPDATES=2000  IPQ_UPDATES=450
#     SEED=1   JOBS=2 (runs side by side)   METHOD=paper|best (best trains the codes too: docs/codes.md)
set -euo pipefail
. "$(dirname "$0")/lib.sh"

table_arguments "$0" "$@"
[ -n "$OUT" ] && [ -n "$WIKITEXT" ] && [ -n "$GLUE" ] || die "give OUT_DIR --wikitext DIR --glue DIR; see --help"
export SIZE=cpu LAYERDROP="${LAYERDROP:-0.2}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
method
export METHOD
mkdir -p "$OUT"
lock "$OUT"

mnli_data

# pretrain NAME NOISE, and mnli NAME PRETRAINED NOISE TEACHER: one run of each recipe
pretrain() {
  quietly "$OUT/$1/log" env UPDATES="${PRETRAIN_UPDATES:-6000}" NOISE="$2" \
    bash "$REPO/recipes/roberta/run.sh" "$OUT/text-bin" "$OUT/$1/pre"
}
mnli() {
  quietly "$OUT/$1/log" env NOISE="$3" TEACHER="$4" \
    bash "$REPO/recipes/mnli/run.sh" "$OUT/mnli-bin" "$OUT/$1" "$OUT/$2/pre/checkpoint_best.pt"
}

say "the logs are $OUT/{none,noise,posthoc}/log"
side_by_side "${JOBS:-2}" \
  "none: pretrain none 0 && mnli none none 0 1 && mnli none none 0 0 && mnli posthoc none 0.1 1" \
  "noise: pretrain noise 0.1 && mnli noise noise 0.1 1 && mnli noise noise 0.1 0"

for run in none noise posthoc; do
  for file in "$([ -z "$BEST" ] && echo result || echo "ipq$BEST")" "ipq-alone$BEST"; do
    [ ! -f "$OUT/$run/$file.json" ] || printf '{"run": "%s", "file": "%s", %s\n' "$run" "$file" "$(cut -c2- "$OUT/$run/$file.json")"
  done
done | tee "$OUT/table3.jsonl"
