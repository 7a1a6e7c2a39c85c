#!/usr/bin/env bash
# Trains on WikiText-103 with Quant-Noise, quantizes in stages, exports and evaluates. Run recipes/wikitext/prepare.sh first.
#
#     bash recipes/wikitext/run.sh DATA_BIN OUT_DIR                  the paper's setting: 8 GPUs of 32 GB, days
#     SIZE=cpu bash recipes/wikitext/run.sh DATA_BIN OUT_DIR         4 layers, d 256, on one CPU core: about an hour
#     NOISE=0 bash recipes/wikitext/run.sh DATA_BIN OUT_DIR          the same without noise, for comparison
#     SHARE=2 bash recipes/wikitext/run.sh DATA_BIN OUT_DIR          pairs of layers share their weights
#     KEEP=every-other bash recipes/wikitext/run.sh DATA_BIN OUT_DIR   pruned after training, before iPQ
#     METHOD=best bash recipes/wikitext/run.sh DATA_BIN OUT_DIR      iPQ that trains its codes too, not the paper's
#
# It ends with a line of OUT_DIR/result.json: perplexity dense, after one-shot iPQ and after fine-tuning, and bytes.
# METHOD=best leaves result-best.json and model-best.safetensors, beside those of METHOD=paper if OUT_DIR has them.
# Steps that are done are skipped. After a kill, the same command resumes. The caller may set GPUS and OMP_NUM_THREADS.
#     NOISE=0.05   SHARE=1   KEEP= (all)   LAYERDROP=0.2 (paper; 0 for cpu)   UPDATES=286000 (3000)   IPQ_UPDATES=13500 (300)
#     SEED=1   PLAN=configs/plans/wikitext103.yaml   IPQ=0: only train and evaluate   DENSE=CKPT: quantize this one
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no data given; run: bash recipes/wikitext/run.sh DATA_BIN OUT_DIR" ;;
esac
DATA="$1"
OUT="${2:?error: no output folder given; run: bash recipes/wikitext/run.sh DATA_BIN OUT_DIR}"
SIZE="${SIZE:-paper}"
method
NOISE="${NOISE:-0.05}" # the paper's p for this model, in blocks of 8
SHARE="${SHARE:-1}" KEEP="${KEEP:-}" SEED="${SEED:-1}"
PLAN="${PLAN:-$REPO/configs/plans/wikitext103.yaml}"
PLUGIN="$REPO/fairseq_quant_noise"
need fairseq-train fairseq-eval-lm fairseq-quant-noise
[ -f "$DATA/dict.txt" ] || die "$DATA/dict.txt is missing; run: bash recipes/wikitext/prepare.sh -h"

# The settings: MODEL, TRAIN, TUNE (fine-tuning of the centroids) and EVAL (evaluation).
case "$SIZE" in
  paper)
    LAYERDROP="${LAYERDROP:-0.2}" UPDATES="${UPDATES:-286000}" IPQ_UPDATES="${IPQ_UPDATES:-13500}"
    # 16 layers, d 1024, adaptive input and softmax tied; nag, cosine from 1.0 over 270,000 updates; LayerDrop .2.
    MODEL=(--arch quant_noise_transformer_lm_wikitext103 --tokens-per-sample 3072)
    TRAIN=(--optimizer nag --clip-norm 0.1 --lr 1.0 --lr-scheduler cosine --lr-period-updates 270000 --t-mult 2
      --lr-shrink 0.75 --warmup-updates 16000 --warmup-init-lr 1e-7 --min-lr 1e-4 --stop-min-lr 1e-9
      --max-tokens 3072 --update-freq 3 --max-update "$UPDATES")
    # 3 stages of 4,500 updates, without noise, as in fairseq's published command. Its cosine is so long that the rate
    # hardly falls. Rows of 2,944 tokens leave memory for the codebooks.
    TUNE=(--optimizer nag --clip-norm 0.1 --lr 0.05 --lr-scheduler cosine --lr-period-updates 270000 --t-mult 2
      --lr-shrink 0.75 --min-lr 1e-4 --stop-min-lr 1e-9 --quant-noise-pq 0 --fp16 --update-freq 3
      --max-tokens 2944 --tokens-per-sample 2944 --max-update "$IPQ_UPDATES")
    EVAL=(--tokens-per-sample 3072 --context-window 2560 --max-tokens 3072 --softmax-batch 1024
      --sample-break-mode complete)
    ;;
  cpu)
    LAYERDROP="${LAYERDROP:-0}" UPDATES="${UPDATES:-3000}" IPQ_UPDATES="${IPQ_UPDATES:-300}"
    # The same architecture with 4 layers, d 256, for WikiText-2: 3.6 M parameters, three passes over the text.
    MODEL=(--arch quant_noise_transformer_lm_wikitext103 --cpu
      --decoder-layers 4 --decoder-embed-dim 256 --decoder-input-dim 256 --decoder-output-dim 256
      --decoder-ffn-embed-dim 512 --decoder-attention-heads 4
      --adaptive-input-cutoff 2000,10000 --adaptive-softmax-cutoff 2000,10000
      --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.0 --adaptive-softmax-dropout 0.1
      --tokens-per-sample 128)
    TRAIN=(--optimizer adam --adam-betas "(0.9,0.98)" --weight-decay 0.01 --clip-norm 1.0
      --lr 2e-3 --lr-scheduler cosine --lr-period-updates $((UPDATES * 9 / 10)) --warmup-updates $((UPDATES / 10))
      --warmup-init-lr 1e-7 --max-tokens 2048 --max-update "$UPDATES" --num-workers 0)
    TUNE=(--optimizer adam --adam-betas "(0.9,0.98)" --clip-norm 1.0
      --lr 1e-3 --lr-scheduler cosine --lr-period-updates "$IPQ_UPDATES" --max-tokens 2048 --max-update "$IPQ_UPDATES"
      --num-workers 0)
    EVAL=(--cpu --tokens-per-sample 128 --max-tokens 2048 --sample-break-mode none --num-workers 0)
    ;;
  *) die "SIZE is $SIZE; give paper or cpu" ;;
esac
COMMON=("$DATA" --user-dir "$PLUGIN" --task language_modeling "${MODEL[@]}" --sample-break-mode none
  --quant-noise-pq "$NOISE" --quant-noise-pq-block-size 8 --ddp-backend legacy_ddp --seed "$SEED"
  --share-layers "$SHARE"
  --required-batch-size-multiple 1 # otherwise validation leaves out sentences that do not fill a multiple of 8
  --no-progress-bar --log-interval 100 --no-epoch-checkpoints --save-interval-updates 500 --keep-interval-updates 1)
SUBSET=test && [ -f "$DATA/test.bin" ] || SUBSET=valid

train() {
  finished "$OUT/dense" "$UPDATES" || logged "$OUT/dense.log" fairseq-train "${COMMON[@]}" "${TRAIN[@]}" --criterion adaptive_loss \
    --decoder-layerdrop "$LAYERDROP" --save-dir "$OUT/dense"
}
prune() { fairseq-quant-noise prune --path "$TRAINED" --keep "$KEEP" --out "$OUT/pruned.pt"; }

# The paper's language model is fine-tuned on the text alone; METHOD=best has the dense network for a teacher besides.
# LayerDrop is only for the dense training: while centroids are fine-tuned, it makes perplexity a quarter higher. A pruned
# network has the layers of its checkpoint.
quantize_in_stages() {
  local layers=(--decoder-layerdrop 0)
  if [ -n "$KEEP" ]; then layers+=(--decoder-layers "$(module recipes.n_layers "$DENSE")"); fi
  if [ -n "$BEST" ]; then METHOD_FLAGS+=(--ipq-teacher "$DENSE"); fi
  finished "$OUT/ipq$BEST" "$IPQ_UPDATES" || logged "$OUT/ipq$BEST.log" fairseq-train "${COMMON[@]}" "${TUNE[@]}" "${layers[@]}" \
    --criterion ipq --ipq-criterion adaptive_loss ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    --quantization-config-path "$PLAN" --finetune-from-model "$DENSE" --save-dir "$OUT/ipq$BEST"
}
export_packed() { fairseq-quant-noise export --path "$OUT/ipq$BEST/checkpoint_last.pt" --out "$OUT/model$BEST.safetensors"; }
quantize_one_shot() {
  logged "$OUT/one-shot.log" fairseq-quant-noise quantize --path "$DENSE" --plan "$PLAN" --out "$OUT/one-shot.safetensors"
}

# evaluate MODEL LOG: measures perplexity with fairseq-eval-lm
evaluate() {
  fairseq-eval-lm "$DATA" --user-dir "$PLUGIN" --path "$1" --gen-subset "$SUBSET" "${EVAL[@]}" --no-progress-bar 2>&1 |
    tee "$2.part"
  mv "$2.part" "$2"
}

mkdir -p "$OUT"
TRAINED="${DENSE:-$OUT/dense/checkpoint_best.pt}"
# A step runs again when its settings change.
SETTING="$SIZE noise $NOISE share $SHARE layerdrop $LAYERDROP updates $UPDATES seed $SEED"
if [ -z "${DENSE:-}" ]; then step "train, noise $NOISE, share $SHARE" "$OUT/.trained" train "$SETTING"; fi
SETTING="$SETTING $TRAINED keep $KEEP"
if [ -n "$KEEP" ]; then step "prune: keep $KEEP" "$OUT/.pruned" prune "$SETTING"; fi
DENSE="$TRAINED"
if [ -n "$KEEP" ]; then DENSE="$OUT/pruned.pt"; fi
step "evaluate dense" "$OUT/.eval-dense" evaluate "$DENSE" "$OUT/eval-dense.log" "$SETTING"
if [ "${IPQ:-1}" = 0 ]; then exit 0; fi
SETTING="$SETTING $IPQ_UPDATES $PLAN"
step "iPQ, $METHOD method" "$OUT/.quantized$BEST" quantize_in_stages "$SETTING"
step "write the packed file" "$OUT/.exported$BEST" export_packed "$SETTING"
step "one-shot iPQ, to compare" "$OUT/.one-shot" quantize_one_shot "$SETTING"
step "evaluate one-shot" "$OUT/.eval-one-shot" evaluate "$OUT/one-shot.safetensors" "$OUT/eval-one-shot.log" "$SETTING"
step "evaluate the packed file" "$OUT/.eval-packed$BEST" evaluate "$OUT/model$BEST.safetensors" "$OUT/eval-packed$BEST.log" "$SETTING"
python "$REPO/recipes/results.py" "$OUT" --noise "$NOISE" --method "$METHOD"
