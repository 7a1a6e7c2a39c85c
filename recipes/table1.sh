#!/usr/bin/env bash
# Repeats Table 1 of the Quant-Noise paper, and its table of exact and proxy noise, at the size of the quickstart: twelve
# small language models on the documentation strings of the Python standard library. Takes about two hours on two cores,
# without a GPU.
#
#     bash recipes/table1.sh           everything
#     bash recipes/table1.sh --list    the twelve runs, each with its packed files
#
# It trains each network with its noise, quantizes it (intN at once; iPQ in three stages with fine-tuning), evaluates
# network and packed files with fairseq-eval-lm, prints the run's lines as it ends, and ends with the tables in
# runs/table1/table.md and table.jsonl. Steps that are done are skipped. After a kill, the same command resumes.
#
#     OUT=runs/table1        the folder of all output
#     ONLY="none int4-qn"    only these runs; the tables show the runs that exist
#     JOBS=2                 runs side by side, with OMP_NUM_THREADS=1 each
#     METHOD=paper           best: iPQ trains its codes too (docs/codes.md); its files are called ipq-best, ipq-int8-best
#     UPDATES=3000  IPQ_UPDATES=300  SEED=1  VOCAB_SIZE=4000    the same values for all runs in one OUT
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$REPO"

RUNS="none int4-qat int4-qn int8-qat int8-qn pq-qat proxy pq pq-clusters proxy-clusters int4-channel-qn int8-channel-qn"

# files NAME: prints the names of a run's packed files.
files() {
  case "$1" in
    none) say int4 int4-channel int8 int8-channel ipq ipq-int8 ;;
    int?-qat) say "${1%-qat}" ;;
    int?-qn | int?-channel-qn) say "${1%-qn}" ;;
    proxy) say ipq ipq-int8 ;;
    *) say ipq ;;
  esac
}

case "${1:-}" in
  '') ;;
  -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0" && exit 0 ;;
  --list) for name in $RUNS; do say "$name: $(files "$name")"; done && exit 0 ;;
  *) die "unknown argument $1; run: bash recipes/table1.sh --help" ;;
esac

OUT="${OUT:-$REPO/runs/table1}"
ONLY="${ONLY:-$RUNS}"
JOBS="${JOBS:-2}"
UPDATES="${UPDATES:-3000}"          # updates of dense training, 1,024 tokens each: 8.4 passes over the corpus
IPQ_UPDATES="${IPQ_UPDATES:-300}"   # updates of fine-tuning, a third for each of the plan's three stages
SEED="${SEED:-1}"
export VOCAB_SIZE="${VOCAB_SIZE:-4000}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core for each run
whole_numbers JOBS UPDATES IPQ_UPDATES SEED VOCAB_SIZE
known_names "ONLY names a run" "$RUNS" "$ONLY"
method
need python fairseq-train fairseq-eval-lm fairseq-quant-noise

# noise_flags NAME: sets NOISE_FLAGS, the noise of a training. QAT is noise on every weight in every forward pass.
noise_flags() {
  case "$1" in
    none) NOISE_FLAGS=(--quant-noise-pq 0) ;;
    int?-qat) NOISE_FLAGS=(--quant-noise-pq 1 --quant-noise-kind "${1%-qat}") ;;
    int?-channel-qn) NOISE_FLAGS=(--quant-noise-pq 0.5 --quant-noise-kind "${1%-channel-qn}" --quant-noise-range channel) ;;
    int?-qn) NOISE_FLAGS=(--quant-noise-pq 0.5 --quant-noise-kind "${1%-qn}") ;;
    *) NOISE_FLAGS=(--quantization-config-path "$OUT/$1/noise.yaml") ;;
  esac
}

# train NAME: trains the dense model.
train() {
  noise_flags "$1"
  finished "$OUT/$1/dense" "$UPDATES" || quietly "$OUT/$1/dense.log" lm_train "$OUT/$1/dense" "${NOISE_FLAGS[@]}"
}

# ipq NAME FILE: quantizes in stages. Weights that are still dense keep the noise of the run, which the plan has too.
ipq() {
  local run="$OUT/$1" tune=lm_ipq out="$OUT/$1/$2$BEST"
  if [ -n "$BEST" ]; then tune=lm_best; fi
  finished "$out" "$IPQ_UPDATES" || quietly "$out.log" "$tune" "$run/dense" "$run/$2-plan.yaml" "$out" --quant-noise-pq 0
  quietly "$out.log" fairseq-quant-noise export --path "$out/checkpoint_last.pt" --out "$out.safetensors"
}

# one_shot NAME FILE PLAN: quantizes without fine-tuning.
one_shot() {
  quietly "$OUT/$1/$2.log" \
    fairseq-quant-noise quantize --path "$OUT/$1/dense/checkpoint_best.pt" --plan "$3" --out "$OUT/$1/$2.safetensors"
}

# run NAME: all steps of a run, from the training to its lines in the tables.
run() {
  local name="$1" dir="$OUT/$1" file made
  mkdir -p "$dir"
  step "$name: train, $UPDATES updates" "$dir/.trained" train "$name"
  step "$name: evaluate" "$dir/.eval-dense" lm_evaluate "$dir/dense/checkpoint_best.pt" "$dir/eval-dense.log"
  for file in $(files "$name"); do
    made="$file"
    case "$file" in
      ipq*)
        made="$file$BEST"
        step "$name: $made, $IPQ_UPDATES updates" "$dir/.$made" ipq "$name" "$file"
        ;;
      *-channel) step "$name: $file" "$dir/.$file" one_shot "$name" "$file" "$OUT/plans/$file.yaml" ;;
      *) step "$name: $file" "$dir/.$file" one_shot "$name" "$file" "$REPO/configs/plans/small_$file.yaml" ;;
    esac
    step "$name: evaluate $made" "$dir/.eval-$made" lm_evaluate "$dir/$made.safetensors" "$dir/eval-$made.log"
  done
  python -m recipes.table1.table "$OUT" --run "$name" --method "$METHOD"
}

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
DATA="$OUT/data-bin"
lock "$OUT"
one_set_of UPDATES IPQ_UPDATES SEED VOCAB_SIZE
bash recipes/quickstart/prepare.sh "$OUT"
python -m recipes.table1.plans "$OUT"
lm_flags
RUNS_NOW=()
for name in $ONLY; do RUNS_NOW+=("$name: run $name"); done
side_by_side "$JOBS" "${RUNS_NOW[@]}"
python -m recipes.table1.table "$OUT" --method "$METHOD"
