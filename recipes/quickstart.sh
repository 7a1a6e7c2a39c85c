#!/usr/bin/env bash
# Shows Quant-Noise on your own machine: 9 to 12 minutes on two quiet cores, plus 1 to 5 minutes of set-up. Downloads no data.
#
#     bash recipes/quickstart.sh
#
# It trains a small language model on the documentation strings of the Python standard library, without noise and with it,
# and makes three packed files of the same size: by iterative product quantization (iPQ) as in the paper, by the same after
# training with Quant-Noise, and by ours, which finds the plan that loses least at that size and trains the codes too. It
# evaluates dense and packed models with fairseq-eval-lm, and ends with one table and one picture in runs/quickstart (set
# OUT for another place).
# Steps that are done are skipped. After a kill, the same command resumes.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$REPO"
bash scripts/setup.sh

OUT="${OUT:-$REPO/runs/quickstart}"
DATA="$OUT/data-bin"
export VOCAB_SIZE="${VOCAB_SIZE:-4000}"
UPDATES="${UPDATES:-2000}"          # updates of dense training, 1,024 tokens each: 5.6 passes over the corpus
IPQ_UPDATES="${IPQ_UPDATES:-400}"   # updates of fine-tuning, the same for all three files
NOISE="${NOISE:-0.05}"              # the share of weight blocks that Quant-Noise hits in each forward pass
SEED=1
PLAN="$REPO/configs/plans/small.yaml"
PROGRESS_SECONDS="${PROGRESS_SECONDS:-30}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two runs side by side, one core each
lm_flags

# train NAME P: trains a dense model with noise P, and evaluates it. After a kill, it resumes from its last checkpoint.
train() {
  finished "$OUT/$1/dense" "$UPDATES" || quietly "$OUT/$1/dense.log" \
    lm_train "$OUT/$1/dense" --quant-noise-pq "$2" --quant-noise-pq-block-size 8
  lm_evaluate "$OUT/$1/dense/checkpoint_best.pt" "$OUT/$1/eval-dense.log"
}

# one_shot NAME NETWORK [PLAN]: quantizes the dense model of NETWORK without fine-tuning, and evaluates it.
one_shot() {
  local run="$OUT/$1" plan="${3:-$PLAN}"
  quietly "$run/one-shot.log" fairseq-quant-noise quantize \
    --path "$OUT/$2/dense/checkpoint_best.pt" --plan "$plan" --out "$run/one-shot.safetensors"
  lm_evaluate "$run/one-shot.safetensors" "$run/eval-one-shot.log"
}

# ipq NAME P: quantizes in the plan's three stages, as the paper does; weights that are still dense keep noise P.
ipq() {
  finished "$OUT/$1/ipq" "$IPQ_UPDATES" ||
    quietly "$OUT/$1/ipq.log" lm_ipq "$OUT/$1/dense" "$PLAN" "$OUT/$1/ipq" --quant-noise-pq "$2"
}

# best: finds the plan that loses least in a file as small as the paper's, quantizes the model that was trained without
# noise at one go, and trains its codes.
best() {
  local plan="$OUT/ours/plan.yaml"
  [ -f "$plan" ] || quietly "$OUT/ours/plan.log" fairseq-quant-noise plan --path "$OUT/no-noise/dense/checkpoint_best.pt" \
    --budget "$(wc -c <"$OUT/no-noise/one-shot.safetensors")" --out "$plan"
  finished "$OUT/ours/ipq" "$IPQ_UPDATES" ||
    quietly "$OUT/ours/ipq.log" lm_best "$OUT/no-noise/dense" "$plan" "$OUT/ours/ipq"
  one_shot ours no-noise "$plan"
}

# pack NAME: writes the packed file and evaluates it.
pack() {
  local run="$OUT/$1"
  quietly "$run/export.log" fairseq-quant-noise export --path "$run/ipq/checkpoint_last.pt" --out "$run/model.safetensors"
  lm_evaluate "$run/model.safetensors" "$run/eval-packed.log"
}

mkdir -p "$OUT/no-noise" "$OUT/quant-noise" "$OUT/ours"
lock "$OUT"
bash recipes/quickstart/prepare.sh "$OUT"
MADE="$UPDATES-$NOISE"
step "train without and with noise, $UPDATES updates each" "$OUT/.trained-$MADE" side_by_side 2 \
  "no-noise: train no-noise 0 && one_shot no-noise no-noise" \
  "quant-noise: train quant-noise $NOISE && one_shot quant-noise quant-noise"
step "quantize in three ways, $IPQ_UPDATES updates each" "$OUT/.quantized-$MADE-$IPQ_UPDATES" side_by_side 2 \
  "ours: best && pack ours" "no-noise: ipq no-noise 0 && pack no-noise" "quant-noise: ipq quant-noise $NOISE && pack quant-noise"
cp "$OUT/no-noise/eval-dense.log" "$OUT/ours" # ours starts from the same model
for run in "no-noise 0" "quant-noise $NOISE" "ours 0"; do python recipes/results.py "$OUT/${run% *}" --noise "${run#* }"; done
python recipes/quickstart/summary.py "$OUT"
