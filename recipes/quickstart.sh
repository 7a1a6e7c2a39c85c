#!/usr/bin/env bash
# Quant-Noise on your own machine, in one command: about 20 minutes on two cores, no GPU, no download of data.
#
#     bash recipes/quickstart.sh
#
# trains a small language model twice on the documentation strings of the Python standard library, without noise and
# with it, quantizes both by iterative product quantization (iPQ), writes two packed files, evaluates dense and packed
# models with fairseq-eval-lm, and ends with one table and one picture in runs/quickstart (set OUT for another place).
# A step that is done is not done again; killed, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
. recipes/lib.sh

OUT="${OUT:-$REPO/runs/quickstart}"
DATA="$OUT/data-bin"
export VOCAB_SIZE="${VOCAB_SIZE:-4000}"
UPDATES="${UPDATES:-2000}"          # of dense training, 1,024 tokens each: 5.6 passes over the corpus
IPQ_UPDATES="${IPQ_UPDATES:-300}"   # of fine-tuning, a third for each of the plan's three stages
NOISE="${NOISE:-0.05}"              # the share of weight blocks that Quant-Noise hits in each forward
PLUGIN="$REPO/fairseq_quant_noise"
PLAN="$REPO/configs/plans/small.yaml"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two runs side by side, a core each

# What both trainings, and the fine-tunings, have in common. --required-batch-size-multiple 1: otherwise fairseq's
# validation leaves out the sentences that do not fill a multiple of 8, and disagrees with fairseq-eval-lm.
COMMON=(
  "$DATA" --user-dir "$PLUGIN" --task language_modeling --arch quant_noise_transformer_lm_small
  --tokens-per-sample 128 --max-tokens 1024 --required-batch-size-multiple 1
  --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --lr-scheduler cosine
  --seed 1 --num-workers 0 --no-progress-bar --log-interval 50 --log-format simple
)
if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then COMMON+=(--cpu); fi

# train NAME P: a dense model; P is the noise. Killed, it goes on from its last checkpoint.
train() {
  fairseq-train "${COMMON[@]}" --criterion cross_entropy --quant-noise-pq "$2" --quant-noise-pq-block-size 8 \
    --lr 2e-3 --warmup-updates 200 --warmup-init-lr 1e-7 --lr-period-updates $((UPDATES - 200)) --max-update "$UPDATES" \
    --save-interval-updates 500 --keep-interval-updates 1 --no-epoch-checkpoints --save-dir "$OUT/$1/dense" >>"$OUT/$1/dense.log" 2>&1
}

# ipq NAME P: three stages, each quantizes its weights by k-means and fine-tunes what there is so far. The weights that
# are still dense keep their noise.
ipq() {
  fairseq-train "${COMMON[@]}" --criterion ipq --ipq-criterion cross_entropy --quant-noise-pq "$2" \
    --quantization-config-path "$PLAN" --finetune-from-model "$OUT/$1/dense/checkpoint_best.pt" \
    --lr 1e-3 --lr-period-updates "$IPQ_UPDATES" --max-update "$IPQ_UPDATES" \
    --save-interval-updates 50 --keep-interval-updates 1 --no-epoch-checkpoints --save-dir "$OUT/$1/ipq" >>"$OUT/$1/ipq.log" 2>&1
}

# evaluate MODEL LOG: perplexity on the test split with fairseq's own program.
evaluate() {
  fairseq-eval-lm "$DATA" --user-dir "$PLUGIN" --path "$1" --gen-subset test --tokens-per-sample 128 \
    --max-tokens 2048 --num-workers 0 --no-progress-bar --cpu >"$2.part" 2>&1 || { tail -n 5 "$2.part" >&2; return 1; }
  mv "$2.part" "$2"
}

# finish NAME: the packed file, and the perplexities of what was one-shot quantized, of the dense and the packed model.
finish() {
  local run="$OUT/$1"
  fairseq-quant-noise export --path "$run/ipq/checkpoint_last.pt" --out "$run/model.safetensors" >"$run/export.log"
  fairseq-quant-noise quantize --path "$run/dense/checkpoint_best.pt" --plan "$PLAN" --out "$run/one-shot.safetensors" \
    >"$run/one-shot.log" 2>&1
  evaluate "$run/dense/checkpoint_best.pt" "$run/eval-dense.log"
  evaluate "$run/one-shot.safetensors" "$run/eval-one-shot.log"
  evaluate "$run/model.safetensors" "$run/eval-packed.log"
  python recipes/results.py "$run" --noise "$2"
}

# side_by_side COMMAND LOG: COMMAND for both runs at once, with a line of progress from LOG every half minute.
side_by_side() {
  local a b
  "$1" no-noise 0 & a=$!
  "$1" quant-noise "$NOISE" & b=$!
  trap 'kill $a $b 2>/dev/null' INT TERM
  while kill -0 "$a" 2>/dev/null || kill -0 "$b" 2>/dev/null; do
    sleep "${PROGRESS_SECONDS:-30}" & wait $! || true
    for name in no-noise quant-noise; do
      tail -n 50 "$OUT/$name/$2.log" 2>/dev/null | grep -oE '(loss=|ppl=|num_updates=)[0-9.]+' | tail -n 3 | tr '\n' ' ' |
        sed "s|^|    $name: |;s| \$|\n|" || true # nothing logged yet
    done
  done
  wait "$a" && wait "$b" || { tail -n 5 "$OUT"/*/"$2.log" >&2; return 1; }
}

mkdir -p "$OUT/no-noise" "$OUT/quant-noise"
# Trainings outlive a shell that was killed hard (kill -9). They hold this lock, and the next run waits for them.
exec 8>"$OUT/.lock"
if command -v flock >/dev/null && ! flock -n 8; then
  say "waiting for an earlier run in $OUT that is still going on"
  flock 8
fi
bash recipes/quickstart/prepare.sh "$OUT"
step "train without and with noise, $UPDATES updates each" "$OUT/.trained-$UPDATES-$NOISE" side_by_side train dense
step "iPQ in three stages, $IPQ_UPDATES updates" "$OUT/.quantized-$UPDATES-$NOISE-$IPQ_UPDATES" side_by_side ipq ipq
step "write the packed files and evaluate" "$OUT/.evaluated-$UPDATES-$NOISE-$IPQ_UPDATES" side_by_side finish export
python recipes/quickstart/summary.py "$OUT"
