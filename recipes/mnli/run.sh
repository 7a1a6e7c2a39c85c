#!/usr/bin/env bash
# Trains RoBERTa on MNLI with Quant-Noise: fine-tunes a pre-trained checkpoint, quantizes it in three stages with the
# fine-tuned network as the teacher, exports and evaluates it. Run recipes/mnli/prepare.sh first.
#
#     bash recipes/mnli/run.sh DATA_BIN OUT_DIR PRETRAINED.pt            the paper's setting: base, one GPU
#     SIZE=cpu bash recipes/mnli/run.sh DATA_BIN OUT_DIR PRETRAINED.pt   quant_noise_roberta_small on one CPU core
#     NOISE=0 bash recipes/mnli/run.sh ...                               without noise, for comparison
#     TEACHER=0 bash recipes/mnli/run.sh ...                             iPQ without distillation, in OUT_DIR/ipq-alone
#     METHOD=best bash recipes/mnli/run.sh ...                           iPQ that trains its codes too, in OUT_DIR/ipq-best
#     SHARE=2 bash recipes/mnli/run.sh ...                               pairs of layers share their weights
#     KEEP=every-other bash recipes/mnli/run.sh ...                      the checkpoint is pruned, then fine-tuned
#
# PRETRAINED.pt is a checkpoint of recipes/roberta/run.sh, of fairseq, or the published roberta.base/model.pt.
# It ends with a line of OUT_DIR/result.json (ipq-alone.json): accuracy on dev_matched (valid) and dev_mismatched
# (valid1) dense, after one-shot iPQ and after fine-tuning, and bytes. OUT_DIR/ipq.safetensors is the small file.
#     NOISE=0.2 (paper; .1 for cpu)   UPDATES, IPQ_UPDATES   PLAN=configs/plans/roberta.yaml (roberta_small.yaml)   SEED=1
#     IPQ=0: only fine-tune and evaluate
# Steps that are done are skipped. After a kill, the same command resumes.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no data given; run: bash recipes/mnli/run.sh DATA_BIN OUT_DIR PRETRAINED.pt" ;;
esac
DATA="$1"
OUT="${2:?error: no output folder given; run: bash recipes/mnli/run.sh DATA_BIN OUT_DIR PRETRAINED.pt}"
PRETRAINED="${3:?error: no checkpoint given; run: bash recipes/mnli/run.sh DATA_BIN OUT_DIR PRETRAINED.pt}"
SEED="${SEED:-1}" SHARE="${SHARE:-1}" KEEP="${KEEP:-}"
need python fairseq-train fairseq-validate fairseq-quant-noise
[ -f "$DATA/input0/dict.txt" ] || die "$DATA/input0/dict.txt is missing; run: bash recipes/mnli/prepare.sh -h"
[ -f "$PRETRAINED" ] || die "$PRETRAINED does not exist; give a checkpoint of RoBERTa"

# The settings: MODEL for the network, TRAIN for the training, TUNE for the fine-tuning of the centroids.
case "${SIZE:-paper}" in
  paper)
    NOISE="${NOISE:-0.2}" PLAN="${PLAN:-$REPO/configs/plans/roberta.yaml}"
    UPDATES="${UPDATES:-123873}"         # 10 epochs
    IPQ_UPDATES="${IPQ_UPDATES:-371619}" # three stages, each as long as the fine-tuning, as in fairseq's command for RTE
    MODEL=(--arch quant_noise_roberta_base --max-positions 512 --fp16)
    TRAIN=(--lr 1e-5 --warmup-updates 7432)
    TUNE=(--lr 2e-5 --warmup-updates 7432)
    VALIDATE=()
    ;;
  cpu)
    NOISE="${NOISE:-0.1}" PLAN="${PLAN:-$REPO/configs/plans/roberta_small.yaml}"
    UPDATES="${UPDATES:-2000}" IPQ_UPDATES="${IPQ_UPDATES:-450}"
    MODEL=(--arch quant_noise_roberta_small --max-positions 128 --cpu --num-workers 0)
    TRAIN=(--lr 5e-4 --warmup-updates 120)
    TUNE=(--lr 3e-4)
    VALIDATE=(--cpu --num-workers 0)
    ;;
  *) die "SIZE is $SIZE; give paper or cpu" ;;
esac
SUBSETS=valid
if [ -f "$DATA/label/valid1.bin" ]; then SUBSETS=valid,valid1; fi
method
case "${TEACHER:-1}" in
  1) FILE="ipq$BEST" TEACHER_FLAGS=(--ipq-teacher "$OUT/dense/checkpoint_best.pt") ;;
  0) FILE="ipq-alone$BEST" TEACHER_FLAGS=() ;;
  *) die "TEACHER is $TEACHER; give 1 or 0" ;;
esac
COMMON=("$DATA" --user-dir "$PLUGIN" --task sentence_prediction "${MODEL[@]}"
  --num-classes 3 --classification-head-name mnli --init-token 0 --separator-token 2 --shorten-method truncate
  --quant-noise-pq "$NOISE" --quant-noise-pq-block-size 8 --share-layers "$SHARE" --ddp-backend legacy_ddp
  --batch-size 32 --required-batch-size-multiple 1 --clip-norm 0.0 --weight-decay 0.1
  --optimizer adam --adam-betas "(0.9,0.98)" --adam-eps 1e-6 --lr-scheduler polynomial_decay
  --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints --keep-interval-updates 1
  --no-progress-bar --log-format simple --log-interval 100 --seed "$SEED")

# layers CKPT: prints the option for the number of layers of a pruned checkpoint.
layers() { if [ -n "$KEEP" ]; then echo "--encoder-layers $(module recipes.n_layers "$1")"; fi; }

# The embedding, the layers and the pooler come from the checkpoint; the head is new. A pruned checkpoint sets the
# number of layers.
train() {
  if [ -n "$KEEP" ]; then
    fairseq-quant-noise prune --path "$PRETRAINED" --keep "$KEEP" --out "$OUT/pruned.pt"
    PRETRAINED="$OUT/pruned.pt"
  fi
  finished "$OUT/dense" "$UPDATES" || logged "$OUT/dense.log" fairseq-train "${COMMON[@]}" "${TRAIN[@]}" $(layers "$PRETRAINED") --criterion sentence_prediction \
    --total-num-update "$UPDATES" --max-update "$UPDATES" --finetune-from-model "$PRETRAINED" --save-dir "$OUT/dense"
}
quantize_in_stages() {
  finished "$OUT/$FILE" "$IPQ_UPDATES" || logged "$OUT/$FILE.log" fairseq-train "${COMMON[@]}" "${TUNE[@]}" $(layers "$OUT/dense/checkpoint_best.pt") \
    --criterion ipq --ipq-criterion sentence_prediction ${TEACHER_FLAGS[@]+"${TEACHER_FLAGS[@]}"} \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    --quantization-config-path "$PLAN" --total-num-update "$IPQ_UPDATES" --max-update "$IPQ_UPDATES" \
    --save-interval-updates $((IPQ_UPDATES / 3)) --finetune-from-model "$OUT/dense/checkpoint_best.pt" --save-dir "$OUT/$FILE"
}
export_packed() { fairseq-quant-noise export --path "$OUT/$FILE/checkpoint_last.pt" --out "$OUT/$FILE.safetensors"; }
quantize_one_shot() {
  logged "$OUT/one-shot.log" \
    fairseq-quant-noise quantize --path "$OUT/dense/checkpoint_best.pt" --plan "$PLAN" --out "$OUT/one-shot.safetensors"
}
# evaluate MODEL LOG: measures accuracy with fairseq-validate
evaluate() {
  fairseq-validate "$DATA" --user-dir "$PLUGIN" --path "$1" --valid-subset "$SUBSETS" \
    --task sentence_prediction --criterion sentence_prediction --classification-head-name mnli \
    --batch-size 32 --required-batch-size-multiple 1 ${VALIDATE[@]+"${VALIDATE[@]}"} --no-progress-bar --log-format simple \
    >"$2.part" 2>&1 || { tail -n 5 "$2.part" >&2; return 1; }
  mv "$2.part" "$2"
}

mkdir -p "$OUT"
SETTING="${SIZE:-paper} noise $NOISE updates $UPDATES seed $SEED $PRETRAINED" # a step runs again when this changes
if [ "$SHARE$KEEP" != 1 ]; then SETTING="$SETTING share $SHARE keep $KEEP"; fi
IPQ_SETTING="$SETTING $IPQ_UPDATES $PLAN"
step "fine-tune, noise $NOISE" "$OUT/.trained" train "$SETTING"
step "evaluate dense" "$OUT/.eval-dense" evaluate "$OUT/dense/checkpoint_best.pt" "$OUT/eval-dense.log" "$SETTING"
if [ "${IPQ:-1}" = 0 ]; then exit 0; fi
step "iPQ ($FILE)" "$OUT/.$FILE" quantize_in_stages "$IPQ_SETTING"
step "write the packed file" "$OUT/.$FILE-exported" export_packed "$IPQ_SETTING"
step "one-shot iPQ, to compare" "$OUT/.one-shot" quantize_one_shot "$IPQ_SETTING"
step "evaluate one-shot" "$OUT/.eval-one-shot" evaluate "$OUT/one-shot.safetensors" "$OUT/eval-one-shot.log" "$IPQ_SETTING"
step "evaluate the packed file" "$OUT/.eval-$FILE" evaluate "$OUT/$FILE.safetensors" "$OUT/eval-$FILE.log" "$IPQ_SETTING"
module recipes.mnli.result "$OUT" --noise "$NOISE" --file "$FILE"
