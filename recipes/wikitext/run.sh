#!/usr/bin/env bash
# WikiText-103 with Quant-Noise, end to end: train, quantize in stages, export, evaluate. After recipes/wikitext/prepare.sh.
#
#     bash recipes/wikitext/run.sh DATA_BIN OUT_DIR                  the paper's setting: 8 GPUs of 32 GB, days
#     SIZE=cpu bash recipes/wikitext/run.sh DATA_BIN OUT_DIR         4 layers, d 256, on one CPU core: about an hour
#     NOISE=0 bash recipes/wikitext/run.sh DATA_BIN OUT_DIR          the same without noise, to compare
#
# It ends with a line of OUT_DIR/result.json: perplexity dense, after one-shot iPQ and after fine-tuning, and bytes.
# A step that is done is not done again; killed, the same command goes on. GPUS and OMP_NUM_THREADS are the caller's.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no data given; run: bash recipes/wikitext/run.sh DATA_BIN OUT_DIR" ;;
esac
DATA="$1"
OUT="${2:?error: no output folder given; run: bash recipes/wikitext/run.sh DATA_BIN OUT_DIR}"
SIZE="${SIZE:-paper}"
NOISE="${NOISE:-0.05}" # the paper's p for this model, in blocks of 8
PLAN="${PLAN:-$REPO/configs/plans/wikitext103.yaml}"
PLUGIN="$REPO/fairseq_quant_noise"
need fairseq-train fairseq-eval-lm fairseq-quant-noise
[ -f "$DATA/dict.txt" ] || die "$DATA/dict.txt is missing; run: bash recipes/wikitext/prepare.sh -h"

# The settings: MODEL, how it is TRAINed, how its centroids are TUNEd, how both are EVALuated.
case "$SIZE" in
  paper)
    # 16 layers, d 1024, adaptive input and softmax tied; nag, cosine from 1.0 over 270,000 updates; LayerDrop .2.
    MODEL=(--arch quant_noise_transformer_lm_wikitext103 --tokens-per-sample 3072)
    TRAIN=(--optimizer nag --clip-norm 0.1 --lr 1.0 --lr-scheduler cosine --lr-period-updates 270000 --t-mult 2
      --lr-shrink 0.75 --warmup-updates 16000 --warmup-init-lr 1e-7 --min-lr 1e-4 --stop-min-lr 1e-9
      --max-tokens 3072 --update-freq 3 --max-update 286000)
    # 3 stages of 4,500 updates. Attention over 2,944 tokens is what fits beside the codebooks.
    TUNE=(--optimizer nag --clip-norm 0.1 --lr 0.05 --lr-scheduler cosine --lr-period-updates 13500
      --max-tokens 2944 --tokens-per-sample 2944 --max-update 13500)
    EVAL=(--tokens-per-sample 3072 --context-window 2560 --max-tokens 3072 --softmax-batch 1024
      --sample-break-mode complete)
    ;;
  cpu)
    # The same architecture at 4 layers, d 256, for WikiText-2: 3.6 M parameters, three passes over the text.
    MODEL=(--arch quant_noise_transformer_lm_wikitext103 --cpu
      --decoder-layers 4 --decoder-embed-dim 256 --decoder-input-dim 256 --decoder-output-dim 256
      --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --decoder-layerdrop 0
      --adaptive-input-cutoff 2000,10000 --adaptive-softmax-cutoff 2000,10000
      --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.0 --adaptive-softmax-dropout 0.1
      --tokens-per-sample 128)
    TRAIN=(--optimizer adam --adam-betas "(0.9,0.98)" --weight-decay 0.01 --clip-norm 1.0
      --lr 2e-3 --lr-scheduler cosine --lr-period-updates 2700 --warmup-updates 300 --warmup-init-lr 1e-7
      --max-tokens 2048 --max-update 3000 --num-workers 0)
    TUNE=(--optimizer adam --adam-betas "(0.9,0.98)" --clip-norm 1.0
      --lr 1e-3 --lr-scheduler cosine --lr-period-updates 300 --max-tokens 2048 --max-update 300 --num-workers 0)
    EVAL=(--cpu --tokens-per-sample 128 --max-tokens 2048 --sample-break-mode none --num-workers 0)
    ;;
  *) die "SIZE is $SIZE; give paper or cpu" ;;
esac
COMMON=("$DATA" --user-dir "$PLUGIN" --task language_modeling "${MODEL[@]}" --sample-break-mode none
  --quant-noise-pq "$NOISE" --quant-noise-pq-block-size 8 --ddp-backend legacy_ddp --seed 1
  --required-batch-size-multiple 1 # or fairseq's validation leaves out what does not fill a multiple of 8
  --no-progress-bar --log-interval 100 --no-epoch-checkpoints --save-interval-updates 500 --keep-interval-updates 1)
SUBSET=test && [ -f "$DATA/test.bin" ] || SUBSET=valid

train() { fairseq-train "${COMMON[@]}" "${TRAIN[@]}" --criterion adaptive_loss --save-dir "$OUT/dense"; }

# The teacher and --ipq-distillation-weight would go here; the paper's language model is fine-tuned on the text alone.
quantize_in_stages() {
  fairseq-train "${COMMON[@]}" "${TUNE[@]}" --criterion ipq --ipq-criterion adaptive_loss \
    --quantization-config-path "$PLAN" --finetune-from-model "$OUT/dense/checkpoint_best.pt" --save-dir "$OUT/ipq"
}
export_packed() { fairseq-quant-noise export --path "$OUT/ipq/checkpoint_last.pt" --out "$OUT/model.safetensors"; }
quantize_one_shot() {
  fairseq-quant-noise quantize --path "$OUT/dense/checkpoint_best.pt" --plan "$PLAN" --out "$OUT/one-shot.safetensors"
}

# evaluate MODEL LOG
evaluate() {
  fairseq-eval-lm "$DATA" --user-dir "$PLUGIN" --path "$1" --gen-subset "$SUBSET" "${EVAL[@]}" --no-progress-bar 2>&1 |
    tee "$2.part"
  mv "$2.part" "$2"
}

mkdir -p "$OUT"
SETTING="$SIZE noise $NOISE" # a step is done again when this changes
step "train, noise $NOISE" "$OUT/.trained" train "$SETTING"
step "quantize in three stages" "$OUT/.quantized" quantize_in_stages "$SETTING $PLAN"
step "write the packed file" "$OUT/.exported" export_packed "$SETTING $PLAN"
step "one-shot iPQ, to compare" "$OUT/.one-shot" quantize_one_shot "$SETTING $PLAN"
step "evaluate dense" "$OUT/.eval-dense" evaluate "$OUT/dense/checkpoint_best.pt" "$OUT/eval-dense.log" "$SETTING $PLAN"
step "evaluate one-shot" "$OUT/.eval-one-shot" evaluate "$OUT/one-shot.safetensors" "$OUT/eval-one-shot.log" "$SETTING $PLAN"
step "evaluate the packed file" "$OUT/.eval-packed" evaluate "$OUT/model.safetensors" "$OUT/eval-packed.log" "$SETTING $PLAN"
python "$REPO/recipes/results.py" "$OUT" --noise "$NOISE"
