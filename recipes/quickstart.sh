#!/usr/bin/env bash
# Shows Quant-Noise on your own machine: 10 to 12 minutes on two cores, plus 1 to 5 minutes of set-up. Downloads no data.
#
#     bash recipes/quickstart.sh
#
# It trains a small language model on the documentation strings of the Python standard library, without noise and with it,
# and makes three packed files of the same size: by iterative product quantization (iPQ) as in the paper, by the same after
# training with Quant-Noise, and by ours, which trains the codes too. It evaluates dense and packed models with
# fairseq-eval-lm, and ends with one table and one picture in runs/quickstart (set OUT for another place).
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

# train NAME P: trains a dense model with noise P. After a kill, it resumes from its last checkpoint.
train() {
  finished "$OUT/$1/dense" "$UPDATES" || quietly "$OUT/$1/dense.log" \
    lm_train "$OUT/$1/dense" --quant-noise-pq "$2" --quant-noise-pq-block-size 8
}

# ipq NAME P: quantizes in the plan's three stages, as the paper does; weights that are still dense keep noise P.
ipq() {
  finished "$OUT/$1/ipq" "$IPQ_UPDATES" ||
    quietly "$OUT/$1/ipq.log" lm_ipq "$OUT/$1/dense" "$PLAN" "$OUT/$1/ipq" --quant-noise-pq "$2"
}

# best: quantizes the model that was trained without noise at one go, and trains its codes.
best() {
  finished "$OUT/ours/ipq" "$IPQ_UPDATES" ||
    quietly "$OUT/ours/ipq.log" lm_best "$OUT/no-noise/dense" "$PLAN" "$OUT/ours/ipq"
}

# evaluate NAME: evaluates the dense model, and the same quantized without fine-tuning.
evaluate() {
  local run="$OUT/$1"
  lm_evaluate "$run/dense/checkpoint_best.pt" "$run/eval-dense.log"
  quietly "$run/one-shot.log" fairseq-quant-noise quantize \
    --path "$run/dense/checkpoint_best.pt" --plan "$PLAN" --out "$run/one-shot.safetensors"
  lm_evaluate "$run/one-shot.safetensors" "$run/eval-one-shot.log"
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
  "no-noise: train no-noise 0" "quant-noise: train quant-noise $NOISE"
step "quantize in three ways, $IPQ_UPDATES updates each, and evaluate" "$OUT/.quantized-$MADE-$IPQ_UPDATES" side_by_side 2 \
  "ours: best && pack ours" "no-noise: ipq no-noise 0 && pack no-noise" "quant-noise: ipq quant-noise $NOISE && pack quant-noise" \
  "no-noise: evaluate no-noise" "quant-noise: evaluate quant-noise"
cp "$OUT"/no-noise/eval-{dense,one-shot}.log "$OUT/ours" # ours starts from the same model
for run in "no-noise 0" "quant-noise $NOISE" "ours 0"; do python recipes/results.py "$OUT/${run% *}" --noise "${run#* }"; done
python recipes/quickstart/summary.py "$OUT"
