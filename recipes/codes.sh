#!/usr/bin/env bash
# Measures what codes that train win (docs/codes.md): the quickstart's language model over seeds, the paper's iPQ against ours
# at the same bytes and the same updates. A run of ours took 7 minutes on a core with another program beside it. Resumes when
# killed.
#
#     bash recipes/codes.sh            everything
#     bash recipes/codes.sh --list     the runs
#
#     OUT=runs/codes   SEEDS="1 2 3"   ONLY="paper best"   only these runs   JOBS=2   runs side by side
#     UPDATES=2000  IPQ_UPDATES=1000  VOCAB_SIZE=4000  BUDGET=308000      the same values for all runs in one OUT
# It ends with the table, and a line for each run and seed in OUT/codes.jsonl.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$REPO"

RUNS="paper fixed best budget-best noise noise-best k64 k64-best d16 d16-best pruned pruned-best int4 int4-learned int2 int2-learned"
case "${1:-}" in
  '') ;;
  -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 0 ;;
  --list) say "$RUNS" && exit 0 ;;
  *) die "unknown argument $1; run: bash recipes/codes.sh --help" ;;
esac
OUT="${OUT:-$REPO/runs/codes}" SEEDS="${SEEDS:-1 2 3}" ONLY="${ONLY:-$RUNS}" JOBS="${JOBS:-2}"
UPDATES="${UPDATES:-2000}" IPQ_UPDATES="${IPQ_UPDATES:-1000}"
BUDGET="${BUDGET:-308000}" # bytes of the file of budget-best, no more than those of the others
export VOCAB_SIZE="${VOCAB_SIZE:-4000}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
whole_numbers JOBS UPDATES IPQ_UPDATES VOCAB_SIZE
known_names "ONLY names a run" "$RUNS" "$ONLY"
need python fairseq-train fairseq-eval-lm fairseq-quant-noise

# dense SEED NAME OPTIONS...: trains a dense network, or prunes the one called `shared`, and evaluates it.
dense() {
  local SEED="$1" of="$OUT/seed-$1/$2" from="$OUT/seed-$1/shared/dense"
  lm_flags
  if [ "$2" = pruned ]; then
    mkdir -p "$of/dense"
    fairseq-quant-noise prune --path "$from/checkpoint_best.pt" --keep every-other --out "$of/dense/checkpoint_best.pt"
  else
    finished "$of/dense" "$UPDATES" || quietly "$of/dense.log" lm_train "$of/dense" --quant-noise-pq-block-size 8 "${@:3}"
  fi
  [ -f "$of/eval-dense.log" ] || lm_evaluate "$of/dense/checkpoint_best.pt" "$of/eval-dense.log"
}

# tune SEED RUN: quantizes and tunes a network, writes the packed file and evaluates it.
tune() {
  local SEED="$1" plan="$OUT/plans/small.yaml" network=none how=lm_ipq flags=(--quant-noise-pq 0) from to="$OUT/seed-$1/$2"
  lm_flags
  case "$2" in
    noise*) network=noise flags=(--quant-noise-pq 0.05) ;;
    k64* | d16*) plan="$OUT/plans/${2%-best}.yaml" ;;
    pruned*) network=pruned ;;
    int*) plan="$OUT/plans/$2.yaml" ;;
  esac
  from="$OUT/seed-$1/$network/dense"
  if [ "$network" = pruned ]; then
    flags+=(--share-layers 2 --decoder-layers "$(module recipes.n_layers "$from/checkpoint_best.pt")")
  fi
  if [ "$2" = budget-best ]; then
    plan="$to.yaml"
    [ -f "$plan" ] || fairseq-quant-noise plan --path "$from/checkpoint_best.pt" --budget "$BUDGET" --out "$plan"
  fi
  case "$2" in
    *best) how=lm_best ;;
    fixed | int*) flags+=(--ipq-stages joint --ipq-teacher "$from/checkpoint_best.pt" --lr 2e-3 --dropout 0) ;;
  esac
  finished "$to" "$IPQ_UPDATES" || "$how" "$from" "$plan" "$to" "${flags[@]}"
  fairseq-quant-noise export --path "$to/checkpoint_last.pt" --out "$to.safetensors"
  lm_evaluate "$to.safetensors" "$OUT/seed-$1/eval-$2.log"
}

mkdir -p "$OUT/plans"
OUT="$(cd "$OUT" && pwd)"
DATA="$OUT/data-bin"
lock "$OUT"
one_set_of UPDATES IPQ_UPDATES VOCAB_SIZE BUDGET
bash recipes/quickstart/prepare.sh "$OUT"
module recipes.codes.table "$OUT" --plans
for seed in $SEEDS; do
  NETWORKS=()
  for name in $ONLY; do
    case "$name" in noise* | pruned*) ;; *) NETWORKS=("seed-$seed/none: dense $seed none") ;; esac
  done
  if [[ " $ONLY" == *" noise"* ]]; then NETWORKS+=("seed-$seed/noise: dense $seed noise --quant-noise-pq 0.05"); fi
  if [[ " $ONLY" == *" pruned"* ]]; then
    NETWORKS+=("seed-$seed/shared: dense $seed shared --share-layers 2 --decoder-layerdrop 0.2 && dense $seed pruned")
  fi
  step "$seed: dense networks" "$OUT/seed-$seed/.dense" side_by_side "$JOBS" "${NETWORKS[@]}"
  NOW=()
  for name in $ONLY; do
    NOW+=("seed-$seed: step '$seed: $name' '$OUT/seed-$seed/.$name' quietly '$OUT/seed-$seed/$name.log' tune $seed $name")
  done
  side_by_side "$JOBS" "${NOW[@]}"
done
module recipes.codes.table "$OUT"
