#!/usr/bin/env bash
# Repeats Table 2 of the Quant-Noise paper at a small size: what sharing (pairs of layers), pruning (every other pair), iPQ
# and noise do. It has seven rows for a language model on WikiText-2 and, with --glue, for quant_noise_roberta_small on MNLI.
# Takes two to three hours on one core for the language model and as much again for MNLI (the sum of its parts); less if
# runs of table3.sh exist.
#
#     bash recipes/table2.sh OUT_DIR --wikitext DIR [--glue DIR [--bpe DIR]]
#
# DIRs: wiki.{train,valid}.tokens; GLUE's MNLI folder; GPT-2's byte pairs (default: a download). Every network is trained
# with LayerDrop .2. In the OUT_DIR of table3.sh, its pre-trained networks are used. The tables are in OUT_DIR/table2.md and
# table2.jsonl. Steps that are done are skipped. After a kill, the same command resumes.
#     JOBS=2 (runs side by side)   UPDATES=3000  IPQ_UPDATES=300 (language model)   PRETRAIN_UPDATES=6000
#     MNLI_UPDATES=2000  MNLI_IPQ_UPDATES=450   WORDS=16000  SEED=1   ONLY="lm mnli"
#     METHOD=paper|best (best trains the codes of iPQ too: docs/codes.md)
set -euo pipefail
. "$(dirname "$0")/lib.sh"

table_arguments "$0" "$@"
[ -n "$OUT" ] && [ -n "$WIKITEXT" ] || die "give OUT_DIR --wikitext DIR; see: bash recipes/table2.sh --help"
export SIZE=cpu LAYERDROP="${LAYERDROP:-0.2}" SEED="${SEED:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ONLY="${ONLY:-lm${GLUE:+ mnli}}"
JOBS="${JOBS:-2}"
method
export METHOD
whole_numbers JOBS
mkdir -p "$OUT/lm"
lock "$OUT"

# lm NAME NOISE SHARE IPQ: trains a language model and makes its files.
lm() {
  quietly "$OUT/lm/$1/log" env NOISE="$2" SHARE="$3" IPQ="$4" UPDATES="${UPDATES:-3000}" IPQ_UPDATES="${IPQ_UPDATES:-300}" \
    bash "$REPO/recipes/wikitext/run.sh" "$OUT/lm-bin" "$OUT/lm/$1"
}
# lm_pruned NAME FROM NOISE IPQ: keeps every other pair of layers of the network FROM.
lm_pruned() {
  KEEP=every-other DENSE="$OUT/lm/$2/dense/checkpoint_best.pt" lm "$1" "$3" 2 "$4"
}
# lm_x94 NAME FROM NOISE: the same with the plan for x94, which prunes by itself and has larger blocks.
lm_x94() {
  PLAN="$REPO/configs/plans/wikitext103_x94.yaml" DENSE="$OUT/lm/$2/dense/checkpoint_best.pt" lm "$1" "$3" 2 1
}
# mnli NAME NOISE SHARE IPQ KEEP: pre-trains in OUT/NAME/pre, or prunes the network of the pre-training KEEP; then
# fine-tunes and makes the files.
mnli() {
  local pre="${5:-$1}"
  if [ -z "${5:-}" ]; then
    quietly "$OUT/$1/log" env UPDATES="${PRETRAIN_UPDATES:-6000}" NOISE="$2" SHARE="$3" \
      bash "$REPO/recipes/roberta/run.sh" "$OUT/text-bin" "$OUT/$1/pre"
  fi
  quietly "$OUT/$1/log" env NOISE="$2" SHARE="$3" IPQ="$4" KEEP="${5:+every-other}" \
    UPDATES="${MNLI_UPDATES:-2000}" IPQ_UPDATES="${MNLI_IPQ_UPDATES:-450}" \
    bash "$REPO/recipes/mnli/run.sh" "$OUT/mnli-bin" "$OUT/$1" "$OUT/$pre/pre/checkpoint_best.pt"
}

if [[ " $ONLY " == *" lm "* ]]; then
  bash "$REPO/recipes/wikitext/prepare.sh" "$OUT/lm-bin" --local "$WIKITEXT"
  side_by_side "$JOBS" "lm/none: lm none 0 1 1" "lm/noise: lm noise 0.05 1 1" \
    "lm/shared: lm shared 0 2 0 && lm_pruned shared-pruned shared 0 0" \
    "lm/noise-shared: lm noise-shared 0.05 2 1 && lm_pruned noise-shared-pruned noise-shared 0.05 1 && lm_x94 noise-x94 noise-shared 0.05"
fi
if [[ " $ONLY " == *" mnli "* ]]; then
  [ -n "$GLUE" ] || die "give --glue DIR, the folder of MNLI"
  mnli_data
  side_by_side "$JOBS" "none: mnli none 0 1 1" "noise: mnli noise 0.1 1 1" \
    "shared: mnli shared 0 2 0 && mnli shared-pruned 0 2 0 shared" \
    "noise-shared: mnli noise-shared 0.1 2 1 && mnli noise-shared-pruned 0.1 2 1 noise-shared"
fi
module recipes.table2.table "$OUT" --method "$METHOD"
