#!/usr/bin/env bash
# Shows Quant-Noise on your own machine: 8 minutes on two busy cores, plus 1 to 5 minutes of set-up. Downloads no data.
#
#     bash recipes/quickstart.sh
#
# It trains a small language model twice on the documentation strings of the Python standard library, without noise and
# with it, quantizes both by iterative product quantization (iPQ), writes two packed files, evaluates dense and packed
# models with fairseq-eval-lm, and ends with one table and one picture in runs/quickstart (set OUT for another place).
# Steps that are done are skipped. After a kill, the same command resumes.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$REPO"
bash scripts/setup.sh

OUT="${OUT:-$REPO/runs/quickstart}"
DATA="$OUT/data-bin"
export VOCAB_SIZE="${VOCAB_SIZE:-4000}"
UPDATES="${UPDATES:-2000}"          # updates of dense training, 1,024 tokens each: 5.6 passes over the corpus
IPQ_UPDATES="${IPQ_UPDATES:-300}"   # updates of fine-tuning, a third for each of the plan's three stages
NOISE="${NOISE:-0.05}"              # the share of weight blocks that Quant-Noise hits in each forward pass
SEED=1
PLAN="$REPO/configs/plans/small.yaml"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two runs side by side, one core each
lm_flags

# train NAME P: trains a dense model with noise P. After a kill, it resumes from its last checkpoint.
train() { lm_train "$OUT/$1/dense" --quant-noise-pq "$2" --quant-noise-pq-block-size 8 >>"$OUT/$1/dense.log" 2>&1; }

# ipq NAME P: quantizes in stages; weights that are still dense keep noise P.
ipq() { lm_ipq "$OUT/$1/dense" "$PLAN" "$OUT/$1/ipq" --quant-noise-pq "$2" >>"$OUT/$1/ipq.log" 2>&1; }

# finish NAME: writes the packed file and evaluates the dense, the one-shot quantized and the packed model.
finish() {
  local run="$OUT/$1"
  fairseq-quant-noise export --path "$run/ipq/checkpoint_last.pt" --out "$run/model.safetensors" >"$run/export.log"
  fairseq-quant-noise quantize --path "$run/dense/checkpoint_best.pt" --plan "$PLAN" --out "$run/one-shot.safetensors" \
    >"$run/one-shot.log" 2>&1
  lm_evaluate "$run/dense/checkpoint_best.pt" "$run/eval-dense.log"
  lm_evaluate "$run/one-shot.safetensors" "$run/eval-one-shot.log"
  lm_evaluate "$run/model.safetensors" "$run/eval-packed.log"
  python recipes/results.py "$run" --noise "$2"
}

# side_by_side COMMAND LOG: runs COMMAND for both runs at once, and prints progress from LOG every half minute.
side_by_side() {
  local a b
  "$1" no-noise 0 & a=$!
  "$1" quant-noise "$NOISE" & b=$!
  while kill -0 "$a" 2>/dev/null || kill -0 "$b" 2>/dev/null; do
    sleep "${PROGRESS_SECONDS:-30}"
    for name in no-noise quant-noise; do
      progress "$name" "$OUT/$name/$2.log"
    done
  done
  wait "$a" && wait "$b" || { tail -n 5 "$OUT"/*/"$2.log" >&2; return 1; }
}

mkdir -p "$OUT/no-noise" "$OUT/quant-noise"
lock "$OUT"
bash recipes/quickstart/prepare.sh "$OUT"
step "train without and with noise, $UPDATES updates each" "$OUT/.trained-$UPDATES-$NOISE" side_by_side train dense
step "iPQ in three stages, $IPQ_UPDATES updates" "$OUT/.quantized-$UPDATES-$NOISE-$IPQ_UPDATES" side_by_side ipq ipq
step "write the packed files and evaluate" "$OUT/.evaluated-$UPDATES-$NOISE-$IPQ_UPDATES" side_by_side finish export
python recipes/quickstart/summary.py "$OUT"
