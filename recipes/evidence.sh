#!/usr/bin/env bash
# Tests the claims of the Quant-Noise paper over seeds, at the size of the quickstart: eighteen networks for each seed, and
# packed files of each. Each seed takes 45 minutes on two cores (the sum of its parts). Resumes when killed.
#
#     bash recipes/evidence.sh            everything
#     bash recipes/evidence.sh --list     the networks, each with its packed files
#     bash recipes/evidence.sh --page     the page of the results so far: evidence.md, evidence.png, evidence.jsonl
#
#     OUT=runs/evidence      the folder of all output
#     SEEDS="1 2 3"          ONLY="none proxy-0.05"    only these networks      ONLY_FILES="one-shot ipq"    only these files
#     JOBS=2                 runs side by side, with OMP_NUM_THREADS=1 each
#     UPDATES=1800  IPQ_UPDATES=150  VOCAB_SIZE=1000    the same values for all runs in one OUT
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$REPO"
OUT="${OUT:-$REPO/runs/evidence}"
NETWORKS="$(module recipes.evidence.grid --list | cut -d: -f1 | tr '\n' ' ')"
case "${1:-}" in
  '') ;;
  -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 0 ;;
  --list) module recipes.evidence.grid --list; exit 0 ;;
  --page) module recipes.evidence.page "$OUT"; exit 0 ;;
  *) die "unknown argument $1; run: bash recipes/evidence.sh --help" ;;
esac
SEEDS="${SEEDS:-1 2 3}" ONLY="${ONLY:-$NETWORKS}" JOBS="${JOBS:-2}"
UPDATES="${UPDATES:-1800}" IPQ_UPDATES="${IPQ_UPDATES:-150}"
export VOCAB_SIZE="${VOCAB_SIZE:-1000}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
whole_numbers JOBS UPDATES IPQ_UPDATES VOCAB_SIZE
known_names "ONLY names a network" "$NETWORKS" "$ONLY"
MADE="$(module recipes.evidence.grid --list | cut -d: -f2 | tr '\n' ' ')"
for name in ${ONLY_FILES:-}; do
  [[ " $MADE " == *" $name "* ]] || die "ONLY_FILES names a file '$name'; --list shows what there is"
done
need python fairseq-train fairseq-eval-lm fairseq-quant-noise

# train RUN: trains the dense network; for a pruned one, makes the checkpoint.
train() {
  local updates="$UPDATES" flags=(${FLAGS[@]+"${FLAGS[@]}"})
  if [ -n "$KEEP" ]; then
    mkdir -p "$1/dense"
    fairseq-quant-noise prune --path "$SEEDED/$START/dense/checkpoint_best.pt" --keep "$KEEP" --out "$1/dense/checkpoint_best.pt"
    return 0
  fi
  if [ -f "$1/noise.yaml" ]; then flags+=(--quantization-config-path "$1/noise.yaml"); fi
  if [ -n "$START" ]; then
    updates=$((UPDATES / 3))
    flags+=(--finetune-from-model "$SEEDED/$START/dense/checkpoint_best.pt")
  fi
  finished "$1/dense" "$updates" || UPDATES="$updates" lm_train "$1/dense" "${flags[@]}"
}

# pack RUN FILE: makes a packed file. In stages, weights that are still dense keep the noise of the run, which the plan has too.
pack() {
  local out="$1/$2.safetensors" dense="$1/dense/checkpoint_best.pt" tune=lm_ipq flags=(${FLAGS[@]+"${FLAGS[@]}"})
  if [[ " ${STAGED[*]-} " != *" $2 "* ]]; then
    if grep -q '^encode:' "$1/$2.yaml"; then flags=(--calibration-data "$DATA"); else flags=(); fi
    fairseq-quant-noise quantize --path "$dense" --plan "$1/$2.yaml" --out "$out" --seed "$SEED" ${flags[@]+"${flags[@]}"}
    return 0
  fi
  if [[ " ${TAUGHT[*]-} " == *" $2 "* ]]; then flags+=(--ipq-teacher "$dense"); fi
  flags+=(--decoder-layerdrop 0) # LayerDrop makes perplexity a quarter higher while centroids are fine-tuned
  if [ -n "$KEEP" ]; then flags+=(--decoder-layers "$(module recipes.n_layers "$dense")"); fi
  if [[ "$2" == best* ]]; then tune=lm_best; fi
  finished "$1/$2" "$IPQ_UPDATES" || "$tune" "$1/dense" "$1/$2.yaml" "$1/$2" "${flags[@]}"
  fairseq-quant-noise export --path "$1/$2/checkpoint_last.pt" --out "$out"
}

# network SEED NAME: all steps of a network, from the training to the perplexities.
network() {
  local SEED="$1" run="$OUT/seed-$1/$2" file
  SEEDED="$OUT/seed-$1"
  . "$run/settings"
  lm_flags
  step "$1 $2: train" "$run/.trained" quietly "$run/train.log" train "$run"
  step "$1 $2: evaluate" "$run/.eval-dense" lm_evaluate "$run/dense/checkpoint_best.pt" "$run/eval-dense.log"
  for file in "${FILES[@]}"; do
    if [ -n "${ONLY_FILES:-}" ] && [[ " $ONLY_FILES " != *" $file "* ]]; then continue; fi
    step "$1 $2: $file" "$run/.$file" quietly "$run/$file.log" pack "$run" "$file"
    step "$1 $2: evaluate $file" "$run/.eval-$file" lm_evaluate "$run/$file.safetensors" "$run/eval-$file.log"
  done
}

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
DATA="$OUT/data-bin"
lock "$OUT"
one_set_of UPDATES IPQ_UPDATES VOCAB_SIZE
bash recipes/quickstart/prepare.sh "$OUT"
for seed in $SEEDS; do
  module recipes.evidence.grid "$OUT/seed-$seed" --updates "$UPDATES"
  # A network that starts from another one must wait for it: first the networks from scratch, then the others.
  FIRST=() THEN=()
  for name in $ONLY; do
    if grep -qx "START=''" "$OUT/seed-$seed/$name/settings"; then
      FIRST+=("seed-$seed/$name: network $seed $name")
    else
      THEN+=("seed-$seed/$name: network $seed $name")
    fi
  done
  side_by_side "$JOBS" ${FIRST[@]+"${FIRST[@]}"}
  side_by_side "$JOBS" ${THEN[@]+"${THEN[@]}"}
done
module recipes.evidence.page "$OUT"
