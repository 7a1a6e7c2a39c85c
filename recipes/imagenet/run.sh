#!/usr/bin/env bash
# Trains EfficientNet with Quant-Noise and quantizes it by iPQ, from a tree of images to packed files and accuracies.
#
#     bash recipes/imagenet/run.sh DATA OUT              EfficientNet-B3 on ImageNet
#     SIZE=cpu bash recipes/imagenet/run.sh DATA OUT     a narrow network on a subset of CIFAR-10, on one core
#
#     NOISE=none|pq|int4    no noise; noise on PQ's blocks (p NOISE_P, default .1); int4 noise (p .5). One OUT for each:
#     for noise in none pq int4; do NOISE=$noise SIZE=cpu bash recipes/imagenet/run.sh DATA runs/cifar10/$noise; done
#     METHOD=paper|best     best: iPQ that trains its codes too, in OUT/ipq-best
#     WEIGHTS=FILE          start from timm's weights instead of random ones: post-hoc
#     SEED=1 UPDATES=N IPQ_UPDATES=N
#
# The paper's setting, as far as it is known: EfficientNet-B3 at 300 pixels, noise .1, iPQ with the classifier last and the
# dense network as the teacher. EfficientNet was first trained with RMSProp, which fairseq does not have; this recipe uses
# nag with a cosine, and its own epochs and rates. ImageNet takes days on 8 GPUs and has not been run with it yet.
# DATA comes from recipes/imagenet/prepare.sh. Steps that are done are skipped.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
case "${1:-}" in -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
if [ $# -lt 2 ]; then die "give DATA and OUT; see: bash recipes/imagenet/run.sh --help"; fi
need fairseq-train fairseq-quant-noise
DATA="$1" OUT="$2" NOISE="${NOISE:-pq}" SEED="${SEED:-1}"
method
[ -d "$DATA/train" ] || die "$DATA has no folder train; make one with recipes/imagenet/prepare.sh"

case "$NOISE" in
  none) NOISE_FLAGS=() ;;
  pq) NOISE_FLAGS=(--quant-noise-pq "${NOISE_P:-0.1}" --quant-noise-pq-block-size 4) ;;
  int4) NOISE_FLAGS=(--quant-noise-pq "${NOISE_P:-0.5}" --quant-noise-kind int4) ;;
  *) die "NOISE=$NOISE; give none, pq or int4" ;;
esac
if [ "${SIZE:-paper}" = cpu ]; then
  ARCH=quant_noise_efficientnet_small PLAN="$REPO/configs/plans/efficientnet_small.yaml"
  UPDATES="${UPDATES:-300}" IPQ_UPDATES="${IPQ_UPDATES:-120}"
  TASK=(--task image_classification --image-size 32 --crop-ratio 1.0 --augmentation cifar)
  MACHINE=(--cpu --num-workers 0 --batch-size 64 --log-interval 20)
  TRAIN=(--optimizer adam --lr 0.004 --lr-scheduler polynomial_decay --warmup-updates 30 --total-num-update "$UPDATES")
  TUNE=(--optimizer adam --lr 0.001 --lr-scheduler polynomial_decay --total-num-update "$IPQ_UPDATES")
else
  ARCH=quant_noise_efficientnet_b3 PLAN="$REPO/configs/plans/efficientnet_b3.yaml"
  UPDATES="${UPDATES:-440000}" IPQ_UPDATES="${IPQ_UPDATES:-60000}"
  TASK=(--task image_classification --image-size 300 --crop-ratio 0.904 --augmentation randaugment)
  MACHINE=(--amp --num-workers 12 --batch-size 128 --log-interval 200 --ddp-backend pytorch_ddp --broadcast-buffers)
  TRAIN=(--optimizer nag --momentum 0.9 --weight-decay 1e-5 --lr 0.4 --lr-scheduler cosine --warmup-updates 6000
    --warmup-init-lr 1e-6 --max-update "$UPDATES")
  TUNE=(--optimizer nag --momentum 0.9 --weight-decay 1e-5 --lr 0.01 --lr-scheduler cosine --max-update "$IPQ_UPDATES")
fi
COMMON=("$DATA" --user-dir "$PLUGIN" --arch "$ARCH" "${TASK[@]}" "${MACHINE[@]}" --seed "$SEED" --clip-norm 5
  --best-checkpoint-metric top1 --maximize-best-checkpoint-metric --no-epoch-checkpoints --required-batch-size-multiple 1
  --save-interval-updates "${SAVE_EVERY:-$(((UPDATES + 3) / 4))}" --keep-interval-updates 1 --log-format simple --no-progress-bar)
if [ -n "${WEIGHTS:-}" ]; then COMMON+=(--timm-weights "$WEIGHTS"); fi

dense() {
  finished "$OUT/dense" "$UPDATES" || quietly "$OUT/dense.log" fairseq-train "${COMMON[@]}" "${TRAIN[@]}" \
    ${NOISE_FLAGS[@]+"${NOISE_FLAGS[@]}"} --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-update "$UPDATES" --save-dir "$OUT/dense"
}
one_shot() {
  quietly "$OUT/$1.log" fairseq-quant-noise quantize --path "$OUT/dense/checkpoint_last.pt" --plan "$2" --out "$OUT/$1.safetensors" \
    --calibration-data "$DATA" # re-estimates the batch statistics for the quantized weights
}
# Weights that are still dense keep their noise while the stages run.
ipq() {
  finished "$OUT/ipq$BEST" "$IPQ_UPDATES" || quietly "$OUT/ipq$BEST.log" fairseq-train "${COMMON[@]}" "${TUNE[@]}" \
    ${NOISE_FLAGS[@]+"${NOISE_FLAGS[@]}"} --criterion ipq --ipq-criterion cross_entropy ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} \
    --ipq-teacher "$OUT/dense/checkpoint_last.pt" --quantization-config-path "$PLAN" \
    --finetune-from-model "$OUT/dense/checkpoint_last.pt" --max-update "$IPQ_UPDATES" --save-dir "$OUT/ipq$BEST"
  quietly "$OUT/ipq$BEST.log" fairseq-quant-noise export --path "$OUT/ipq$BEST/checkpoint_last.pt" --out "$OUT/ipq$BEST.safetensors"
}
# evaluate MODEL LOG: measures accuracy on the validation images
evaluate() {
  local log="$OUT/eval-$2.log"
  fairseq-validate "$DATA" --user-dir "$PLUGIN" --path "$1" "${TASK[@]}" --criterion cross_entropy --batch-size 100 \
    ${CPU_FLAG[@]+"${CPU_FLAG[@]}"} --required-batch-size-multiple 1 --log-format simple --no-progress-bar >"$log.part" 2>&1 ||
    { tail -n 5 "$log.part" >&2; return 1; }
  mv "$log.part" "$log"
}
CPU_FLAG=()
if [ "${SIZE:-paper}" = cpu ]; then CPU_FLAG=(--cpu --num-workers 0); fi

mkdir -p "$OUT"
lock "$OUT"
SETTING="${SIZE:-paper} noise $NOISE ${NOISE_P:-} updates $UPDATES seed $SEED ${WEIGHTS:-}"
IPQ_SETTING="$SETTING $IPQ_UPDATES"
step "$NOISE: train, $UPDATES updates" "$OUT/.dense" dense "$SETTING"
step "$NOISE: evaluate dense" "$OUT/.eval-dense" evaluate "$OUT/dense/checkpoint_last.pt" dense "$SETTING"
if [ "$NOISE" != pq ]; then
  step "$NOISE: int4" "$OUT/.int4" one_shot int4 "$REPO/configs/plans/efficientnet_int4.yaml" "$SETTING, statistics"
  step "$NOISE: evaluate int4" "$OUT/.eval-int4" evaluate "$OUT/int4.safetensors" int4 "$SETTING, statistics"
fi
if [ "$NOISE" != int4 ]; then
  step "$NOISE: iPQ at one go" "$OUT/.one-shot" one_shot one-shot "$PLAN" "$SETTING, statistics"
  step "$NOISE: evaluate it" "$OUT/.eval-one-shot" evaluate "$OUT/one-shot.safetensors" one-shot "$SETTING, statistics"
  step "$NOISE: iPQ, $METHOD method, $IPQ_UPDATES updates" "$OUT/.ipq$BEST" ipq "$IPQ_SETTING"
  step "$NOISE: evaluate iPQ" "$OUT/.eval-ipq$BEST" evaluate "$OUT/ipq$BEST.safetensors" "ipq$BEST" "$IPQ_SETTING"
fi
module recipes.imagenet.result "$OUT"
