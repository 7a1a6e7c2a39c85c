#!/usr/bin/env bash
# Pre-trains RoBERTa with Quant-Noise and LayerDrop. Run recipes/roberta/prepare.sh first.
#
#     bash recipes/roberta/run.sh DATA_BIN OUT_DIR             the paper's setting: base, 125,000 updates, many GPUs
#     SIZE=cpu bash recipes/roberta/run.sh DATA_BIN OUT_DIR    quant_noise_roberta_small on one CPU core: an hour
#     NOISE=0 bash recipes/roberta/run.sh DATA_BIN OUT_DIR     without noise, for comparison
#
# The result is OUT_DIR/checkpoint_best.pt, to fine-tune with recipes/mnli/run.sh. After a kill, the same command resumes.
#     NOISE=0.2 (paper; .1 for cpu)   LAYERDROP=0.2 (paper; 0 for cpu)   UPDATES=125000 (paper; 6000 for cpu)   SEED=1
#     SHARE=2: pairs of layers share their weights
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

case "${1:-}" in
  -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 0 ;;
  '' | -*) die "no data given; run: bash recipes/roberta/run.sh DATA_BIN OUT_DIR" ;;
esac
DATA="$1"
OUT="${2:?error: no output folder given; run: bash recipes/roberta/run.sh DATA_BIN OUT_DIR}"
need fairseq-train
[ -f "$DATA/dict.txt" ] || die "$DATA/dict.txt is missing; run: bash recipes/roberta/prepare.sh -h"

case "${SIZE:-paper}" in
  paper)
    UPDATES="${UPDATES:-125000}" NOISE="${NOISE:-0.2}" LAYERDROP="${LAYERDROP:-0.2}"
    FLAGS=(--arch quant_noise_roberta_base --untie-weights-roberta --tokens-per-sample 512 --sample-break-mode complete --fp16
      --skip-invalid-size-inputs-valid-test # skips lines over 512 tokens, as training does
      --batch-size 16 --update-freq 2 --lr 5e-4 --warmup-updates 10000 --clip-norm 0.0 --log-interval 100)
    ;;
  cpu)
    UPDATES="${UPDATES:-6000}" NOISE="${NOISE:-0.1}" LAYERDROP="${LAYERDROP:-0}"
    # Masks more words than the usual .15, so that a short training learns more from each row.
    FLAGS=(--arch quant_noise_roberta_small --tokens-per-sample 128 --max-positions 128 --sample-break-mode none --cpu
      --mask-prob 0.3 --max-tokens 2048 --lr 1.5e-3 --warmup-updates 400 --clip-norm 1.0 --num-workers 0
      --log-interval 100 --save-interval-updates 500)
    ;;
  *) die "SIZE is $SIZE; give paper or cpu" ;;
esac

train() {
  finished "$OUT" "$UPDATES" || fairseq-train "$DATA" --user-dir "$PLUGIN" --task masked_lm --criterion masked_lm \
    "${FLAGS[@]}" --required-batch-size-multiple 1 --ddp-backend legacy_ddp \
    --quant-noise-pq "$NOISE" --quant-noise-pq-block-size 8 --encoder-layerdrop "$LAYERDROP" --share-layers "${SHARE:-1}" \
    --optimizer adam --adam-betas "(0.9,0.98)" --adam-eps 1e-6 --weight-decay 0.01 \
    --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --max-update "$UPDATES" --seed "${SEED:-1}" \
    --keep-interval-updates 1 --no-epoch-checkpoints --no-progress-bar --log-format simple --save-dir "$OUT"
}
SETTING="$UPDATES $NOISE $LAYERDROP ${SIZE:-paper} ${SEED:-1}"
if [ "${SHARE:-1}" != 1 ]; then SETTING="$SETTING share $SHARE"; fi
step "pre-train, noise $NOISE" "$OUT/.trained" train "$SETTING"
