#!/usr/bin/env bash
# Trains a translation model with Quant-Noise, quantizes it in three stages with the trained network as the teacher,
# exports it, and translates. Run recipes/translation/prepare.sh first.
#
#     bash recipes/translation/run.sh DATA_BIN OUT_DIR            IWSLT'14's usual network and training, on one GPU
#     SIZE=cpu bash recipes/translation/run.sh DATA_BIN OUT_DIR   quant_noise_transformer_small on one CPU core
#     NOISE=0 bash recipes/translation/run.sh ...                 without noise, for comparison
#     TEACHER=0 bash recipes/translation/run.sh ...               iPQ without distillation, in OUT_DIR/ipq-alone
#     METHOD=best bash recipes/translation/run.sh ...             iPQ that trains its codes too, in OUT_DIR/ipq-best
#     SHARE=2 bash recipes/translation/run.sh ...                 pairs of layers share their weights, on both sides
#     KEEP=every-other bash recipes/translation/run.sh ...        both sides are pruned after training, before iPQ
#
# It ends with a line of OUT_DIR/result.json (ipq-alone.json): sacrebleu's BLEU on the test split (on valid if there is none)
# dense, after one-shot iPQ and after fine-tuning, and bytes. OUT_DIR/ipq.safetensors is the small file.
#     NOISE=0.1   SHARE=1   KEEP= (all)   LAYERDROP=0   UPDATES=50000 (cpu: 2000)   IPQ_UPDATES=9000 (300)   SEED=1
#     PLAN=configs/plans/translation.yaml   BEAM=5   IPQ=0: only train and translate   DENSE=CKPT: quantize this one
#     FLAGS= more options for both trainings, such as "--encoder-embed-dim 64"
# Steps that are done are skipped. After a kill, the same command resumes.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no data given; run: bash recipes/translation/run.sh DATA_BIN OUT_DIR" ;;
esac
DATA="$1"
OUT="${2:?error: no output folder given; run: bash recipes/translation/run.sh DATA_BIN OUT_DIR}"
SIZE="${SIZE:-paper}" NOISE="${NOISE:-0.1}" SHARE="${SHARE:-1}" KEEP="${KEEP:-}" LAYERDROP="${LAYERDROP:-0}"
SEED="${SEED:-1}" BEAM="${BEAM:-5}" PLAN="${PLAN:-$REPO/configs/plans/translation.yaml}"
need python fairseq-train fairseq-generate fairseq-quant-noise
[ -n "$(find "$DATA" -maxdepth 1 -name 'train.*.bin' 2>/dev/null)" ] ||
  die "$DATA holds no train.*.bin of two languages; run: bash recipes/translation/prepare.sh -h"

# The settings: MODEL, TRAIN, TUNE (fine-tuning of the centroids) and TRANSLATE. They are those of fairseq's example for
# IWSLT'14, except that source, target and output share one embedding.
case "$SIZE" in
  paper)
    UPDATES="${UPDATES:-50000}" IPQ_UPDATES="${IPQ_UPDATES:-9000}"
    MODEL=(--arch quant_noise_transformer_iwslt_de_en --dropout 0.3 --weight-decay 0.0001 --max-tokens 4096)
    TRAIN=(--lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000)
    TUNE=(--lr 2e-4)
    TRANSLATE=(--max-tokens 8000)
    ;;
  cpu)
    UPDATES="${UPDATES:-2000}" IPQ_UPDATES="${IPQ_UPDATES:-300}"
    MODEL=(--arch quant_noise_transformer_small --cpu --num-workers 0 --dropout 0.1 --max-tokens 2048 --clip-norm 1.0)
    TRAIN=(--lr 3e-3 --lr-scheduler cosine --warmup-updates $((UPDATES / 10)) --warmup-init-lr 1e-7
      --lr-period-updates $((UPDATES - UPDATES / 10)))
    TUNE=(--lr 1e-3)
    TRANSLATE=(--cpu --num-workers 0 --max-tokens 4000)
    ;;
  *) die "SIZE is $SIZE; give paper or cpu" ;;
esac
case "${TEACHER:-1}" in 0 | 1) ;; *) die "TEACHER is $TEACHER; give 1 or 0" ;; esac
method
FILE="ipq$BEST"
if [ "${TEACHER:-1}" = 0 ]; then FILE="ipq-alone$BEST"; fi
COMMON=("$DATA" --user-dir "$REPO/fairseq_quant_noise" --task translation "${MODEL[@]}" --share-all-embeddings
  --optimizer adam --adam-betas "(0.9, 0.98)" --quant-noise-pq "$NOISE" --quant-noise-pq-block-size 8 --share-layers "$SHARE"
  --ddp-backend legacy_ddp --seed "$SEED" --required-batch-size-multiple 1 --no-progress-bar --log-interval 100
  --no-epoch-checkpoints --save-interval-updates 500 --keep-interval-updates 1)
read -r -a more <<<"${FLAGS:-}"
COMMON+=(${more[@]+"${more[@]}"})
SUBSET=valid
if [ -n "$(find "$DATA" -maxdepth 1 -name 'test.*.bin')" ]; then SUBSET=test; fi

train() {
  finished "$OUT/dense" "$UPDATES" || fairseq-train "${COMMON[@]}" "${TRAIN[@]}" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-update "$UPDATES" \
    --encoder-layerdrop "$LAYERDROP" --decoder-layerdrop "$LAYERDROP" --save-dir "$OUT/dense"
}
prune() { fairseq-quant-noise prune --path "$TRAINED" --keep "$KEEP" --out "$OUT/pruned.pt"; }

# LayerDrop is only for the dense training. A pruned network has the layers of its checkpoint.
quantize_in_stages() {
  local options=(--encoder-layerdrop 0 --decoder-layerdrop 0 ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"}) counts
  if [ -n "$KEEP" ]; then
    read -r -a counts <<<"$(module recipes.n_layers "$DENSE")"
    options+=(--encoder-layers "${counts[0]}" --decoder-layers "${counts[1]}")
  fi
  if [ "${TEACHER:-1}" = 1 ]; then options+=(--ipq-teacher "$DENSE"); fi
  finished "$OUT/$FILE" "$IPQ_UPDATES" || fairseq-train "${COMMON[@]}" "${TUNE[@]}" "${options[@]}" \
    --lr-scheduler cosine --lr-period-updates "$IPQ_UPDATES" --max-update "$IPQ_UPDATES" \
    --criterion ipq --ipq-criterion label_smoothed_cross_entropy --ipq-criterion-options '{"label_smoothing": 0.1}' \
    --quantization-config-path "$PLAN" --finetune-from-model "$DENSE" --save-dir "$OUT/$FILE"
}
export_packed() { fairseq-quant-noise export --path "$OUT/$FILE/checkpoint_last.pt" --out "$OUT/$FILE.safetensors"; }
quantize_one_shot() {
  fairseq-quant-noise quantize --path "$DENSE" --plan "$PLAN" --out "$OUT/one-shot.safetensors"
}
# translate MODEL LOG: uses fairseq's own program; the log has the translations and ends with BLEU.
translate() {
  fairseq-generate "$DATA" --user-dir "$REPO/fairseq_quant_noise" --path "$1" --gen-subset "$SUBSET" --beam "$BEAM" \
    --remove-bpe sentencepiece --scoring sacrebleu "${TRANSLATE[@]}" --no-progress-bar >"$2.part" 2>&1 ||
    { tail -n 5 "$2.part" >&2; return 1; }
  tail -n 1 "$2.part"
  mv "$2.part" "$2"
}

mkdir -p "$OUT"
TRAINED="${DENSE:-$OUT/dense/checkpoint_best.pt}"
# A step runs again when its settings change.
SETTING="$SIZE noise $NOISE share $SHARE layerdrop $LAYERDROP updates $UPDATES seed $SEED ${FLAGS:-}"
if [ -z "${DENSE:-}" ]; then step "train, noise $NOISE, share $SHARE" "$OUT/.trained" train "$SETTING"; fi
SETTING="$SETTING $TRAINED keep $KEEP"
if [ -n "$KEEP" ]; then step "prune: keep $KEEP" "$OUT/.pruned" prune "$SETTING"; fi
DENSE="$TRAINED"
if [ -n "$KEEP" ]; then DENSE="$OUT/pruned.pt"; fi
TRANSLATED="$SUBSET beam $BEAM"
step "translate, dense" "$OUT/.eval-dense" translate "$DENSE" "$OUT/eval-dense.log" "$SETTING $TRANSLATED"
if [ "${IPQ:-1}" = 0 ]; then exit 0; fi
SETTING="$SETTING $IPQ_UPDATES $PLAN"
step "iPQ ($FILE)" "$OUT/.$FILE" quantize_in_stages "$SETTING"
step "write the packed file" "$OUT/.$FILE-exported" export_packed "$SETTING"
step "one-shot iPQ, to compare" "$OUT/.one-shot" quantize_one_shot "$SETTING"
step "translate, one-shot" "$OUT/.eval-one-shot" translate "$OUT/one-shot.safetensors" "$OUT/eval-one-shot.log" "$SETTING $TRANSLATED"
step "translate, the packed file" "$OUT/.eval-$FILE" translate "$OUT/$FILE.safetensors" "$OUT/eval-$FILE.log" "$SETTING $TRANSLATED"
module recipes.translation.result "$OUT" --noise "$NOISE" --file "$FILE"
