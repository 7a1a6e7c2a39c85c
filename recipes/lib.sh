# shellcheck shell=bash
# Helpers that every recipe sources before anything else:   . "$(dirname "$0")/../lib.sh"
#
# A recipe is a list of steps. A step that succeeds leaves a stamp beside its output, so that a recipe that was
# killed resumes where it stopped. The stamp holds the command line: a step runs again if its command has
# changed or its stamp was deleted. So if a step is a function, pass everything that its result depends on
# as arguments.

# end_group PGID: ends every process of the group, and waits until they have ended.
end_group() {
  local tries
  for tries in {1..50}; do
    if [ "$tries" -eq 1 ]; then kill -TERM -- "-$1" 2>/dev/null || return 0; fi
    kill -0 -- "-$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

# When a recipe ends, also by TERM, INT or HUP, everything that it has started ends with it. bash handles a signal only
# after its foreground command has ended, and does not end that command when the signal ends bash. So the recipe runs
# as a second bash in its own process group; the first one waits for it and ends the group. Everything that a recipe
# calls, including other recipes, is in the same group.
if [ "${BASH_SOURCE[1]:-}" = "$0" ] && [ -z "${RECIPE_GROUP:-}" ]; then
  GROUP=""
  trap 'end_group "${GROUP:-$(jobs -p)}"; exit 129' HUP
  trap 'end_group "${GROUP:-$(jobs -p)}"; exit 130' INT
  trap 'end_group "${GROUP:-$(jobs -p)}"; exit 143' TERM
  set -m # a group of its own
  RECIPE_GROUP=1 bash "$0" "$@" </dev/null &
  GROUP=$!
  set +m
  STATUS=0
  wait "$GROUP" || STATUS=$?
  end_group "$GROUP"
  exit "$STATUS"
fi

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Prefer the tools of the checkout's own environment; without it, use those of the caller's environment.
PATH="$REPO/.venv/bin:$PATH"
export REPO PATH

# RECIPE: the command line of the recipe that sources this file, with the settings that its caller gave.
RECIPE=""
for name in OUT SIZE METHOD NOISE SHARE KEEP LAYERDROP TEACHER UPDATES IPQ_UPDATES PRETRAIN_UPDATES SEED PLAN IPQ DENSE ONLY WORDS VOCAB_SIZE TASKS SEEDS NOISES METHODS TRAIN; do
  if [ -n "${!name:-}" ]; then RECIPE+="$name=$(printf '%q' "${!name}") "; fi
done
RECIPE+="bash $(printf '%q ' "$0" "$@")"
unset name

# say TEXT...: prints one line of progress.
say() { printf '%s\n' "$*"; }

# die TEXT...: reports a user's mistake in one line that names the cure; exit code 2, as in the command line tool.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# need TOOL...: stops at once, and not after an hour, when a program is missing.
need() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool is not installed; run: bash $REPO/scripts/setup.sh"
  done
}

# whole_numbers NAME...: stops unless each of these variables is a whole number from 1 up.
whole_numbers() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || die "$name is '${!name}'; give a whole number from 1 up"
  done
}

# known_names WHAT KNOWN LIST: stops if a word of LIST is not one of KNOWN. WHAT says of a word what it is, such as "ONLY
# names a run".
known_names() {
  local word
  for word in $3; do
    [[ " $2 " == *" $word "* ]] || die "$1 '$word'; there are: $2"
  done
}

# method: reads METHOD. `paper`, the default, is the paper's iPQ: one group of weights after the other, with fixed codes.
# `best` quantizes all weights at once and trains their codes too (docs/codes.md). It sets METHOD_FLAGS for fairseq-train
# with --criterion ipq, and BEST, which is added to the names of files, so that one folder can hold both.
method() {
  case "${METHOD:=paper}" in
    paper) METHOD_FLAGS=() BEST="" ;;
    best) METHOD_FLAGS=(--ipq-codes train --ipq-stages joint) BEST=-best ;;
    *) die "METHOD is $METHOD; give paper or best" ;;
  esac
}

# one_set_of NAME...: stops if the runs in OUT were made with other values of these variables.
one_set_of() {
  local name settings=""
  for name in "$@"; do settings="$settings${settings:+ }$name=${!name}"; done
  if [ -f "$OUT/.settings" ] && [ "$(cat "$OUT/.settings")" != "$settings" ]; then
    die "$OUT holds runs of $(cat "$OUT/.settings"), not of $settings; give another OUT or remove it"
  fi
  printf '%s' "$settings" >"$OUT/.settings"
}

# free_dir DIR: stops before a recipe would replace a folder that no recipe made (a recipe's own has a .done).
free_dir() {
  if [ -e "$1" ] && [ ! -f "$1/.done" ] && [ -n "$(ls -A "$1")" ]; then
    die "$1 exists and holds something else; give another folder or remove it"
  fi
}

# minutes SECONDS: 75 -> 1m15s
minutes() { if [ "$1" -lt 60 ]; then printf '%ds' "$1"; else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi; }

# took DIR NAME SECONDS COMMAND: adds a line to DIR/steps.jsonl, which `fairseq-quant-noise report` reads.
took() {
  local line
  line="$(printf '%s\t%s\t%s' "$2" "$4" "${RECIPE% }" | tr '\n' ' ' | sed 's/[\\"]/\\&/g')"
  printf '%s' "$line" | awk -F '\t' -v n="$3" '{printf "{\"step\": \"%s\", \"seconds\": %d, \"command\": \"%s\", \"recipe\": \"%s\"}\n", $1, n, $2, $3}' >>"$1/steps.jsonl"
}

# step NAME STAMP COMMAND...: runs the command once. STAMP is a file written only after it succeeded.
# The command may be a function of the recipe; it runs in a subshell that stops at the first failure. The folder of STAMP
# gets a line of steps.jsonl: how long the last attempt took.
step() {
  local name="$1" stamp="$2" line status began=$SECONDS
  shift 2
  line="$(printf '%q ' "$@")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$line" ]; then
    say "[skip] $name (done)"
    return 0
  fi
  say "[step] $name"
  set +e # otherwise the recipe would end here without naming the step that failed
  (set -e && "$@")
  status=$?
  set -e
  if [ "$status" -ne 0 ]; then
    say "[fail] $name after $(minutes $((SECONDS - began))), exit code $status; the same command goes on from here" >&2
    exit "$status"
  fi
  mkdir -p "$(dirname "$stamp")"
  took "$(dirname "$stamp")" "$name" $((SECONDS - began)) "${line% }"
  printf '%s' "$line" >"$stamp.part" && mv "$stamp.part" "$stamp"
  say "[done] $name ($(minutes $((SECONDS - began))))"
}

# logged LOG COMMAND...: shows the command's output and appends it to LOG.
logged() {
  local log="$1"
  shift
  "$@" 2>&1 | tee -a "$log"
}

# lock DIR: trainings outlive a shell that was killed hard (kill -9). They hold this lock, and the next run waits for
# them.
lock() {
  exec 8>"$1/.lock"
  if command -v flock >/dev/null && ! flock -n 8; then
    say "waiting for an earlier run in $1 that is still going on"
    flock 8
  fi
}

# progress NAME LOG: prints one line with the last figures in the log of fairseq-train; nothing while there are none.
progress() {
  tail -n 50 "$2" 2>/dev/null | grep -oE '(loss=|ppl=|num_updates=|minutes_left=)[0-9.]+' | tail -n 4 | tr '\n' ' ' |
    sed "s|^|    $1: |;s| \$|\n|" || true # nothing logged yet
}

# module NAME ARG...: runs one of the recipes' Python programs, from any folder.
module() { PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" python -m "$@"; }

# finished DIR UPDATES: true if a training is complete. fairseq-train would add an update to a complete one.
finished() {
  [ -f "$1/checkpoint_last.pt" ] && python - "$@" 2>/dev/null <<'PYTHON'
import sys

from fairseq_quant_noise.checkpoints.safe_load import safe_load

state = safe_load(f"{sys.argv[1]}/checkpoint_last.pt")
sys.exit(state["optimizer_history"][-1]["num_updates"] < int(sys.argv[2]))
PYTHON
}

# fetch URL FILE [SHA256]: downloads to FILE, which appears whole or not at all.
fetch() {
  mkdir -p "$(dirname "$2")"
  say "fetching $1"
  curl -fL --retry 5 --retry-delay 5 --connect-timeout 30 -o "$2.part" "$1" || return 1
  if [ $# -gt 2 ]; then
    python - "$2.part" "$3" <<'PYTHON' || return 1
import hashlib, sys
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
print(f"sha256 {found}: {'as expected' if found == sys.argv[2] else 'NOT the expected ' + sys.argv[2]}")
sys.exit(found != sys.argv[2])
PYTHON
  fi
  mv "$2.part" "$2"
}

GPT2_BPE_URL="https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe"
# gpt2_file DIR NAME SHA256: downloads one of the files of GPT-2's byte pairs to DIR.
gpt2_file() {
  need curl
  fetch "$GPT2_BPE_URL/$2" "$1/$2" "$3" ||
    die "GPT-2's $2 could not be downloaded; fetch encoder.json, vocab.bpe and dict.txt elsewhere and pass --bpe DIR"
}

# gpt2_bpe DIR DOWNLOADS: sets BPE, the folder of GPT-2's byte pairs: DIR, or a download if DIR is empty.
gpt2_bpe() {
  local file sum
  BPE="${1:-$2/gpt2_bpe}"
  while read -r file sum; do
    if [ -z "$1" ]; then step "download GPT-2's $file" "$BPE/.$file" gpt2_file "$BPE" "$file" "$sum" </dev/null; fi
    [ -f "$BPE/$file" ] || die "$BPE/$file does not exist; give --bpe the folder of encoder.json, vocab.bpe and dict.txt"
  done <<'FILES'
encoder.json 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
vocab.bpe 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
dict.txt 2c31c5b236661067fe8626775eb995ef5fe808ac87d2ad4a6ddbef68550f5cc6
FILES
  BPE="$(cd "$BPE" && pwd)"
}

# The small language model of quickstart.sh and table1.sh. They set DATA, UPDATES, IPQ_UPDATES and SEED.
PLUGIN="$REPO/fairseq_quant_noise"

# lm_flags: sets LM_FLAGS, which dense trainings and fine-tunings have in common. Without --required-batch-size-multiple
# 1, fairseq's validation leaves out the sentences that do not fill a multiple of 8, and disagrees with
# fairseq-eval-lm.
lm_flags() {
  LM_FLAGS=(
    "$DATA" --user-dir "$PLUGIN" --task language_modeling --arch quant_noise_transformer_lm_small
    --tokens-per-sample 128 --max-tokens 1024 --required-batch-size-multiple 1
    --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --lr-scheduler cosine
    --seed "$SEED" --num-workers 0 --no-progress-bar --log-interval 50 --log-format simple
  )
  if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    LM_FLAGS+=(--cpu)
    # glibc gives the memory of each large tensor back to the system and fetches it again, page by page: a tenth of an update.
    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824
  fi
}

# lm_train DIR NOISE_FLAGS...: trains a dense model in DIR. After a kill, it resumes from its last checkpoint.
lm_train() {
  local dir="$1"
  shift
  fairseq-train "${LM_FLAGS[@]}" --criterion cross_entropy "$@" \
    --lr 2e-3 --warmup-updates 200 --warmup-init-lr 1e-7 \
    --lr-period-updates $((UPDATES - 200)) --max-update "$UPDATES" \
    --save-interval-updates 500 --keep-interval-updates 1 --no-epoch-checkpoints --save-dir "$dir"
}

# lm_ipq DENSE PLAN DIR FLAGS...: runs iPQ on the best model in DENSE. Each stage of the plan quantizes its weights by
# k-means and fine-tunes everything that is quantized so far.
# lm_best takes the same arguments for METHOD=best, with the dense model as the teacher.
lm_best() { METHOD=best method && lm_ipq "$@" "${METHOD_FLAGS[@]}" --ipq-teacher "$1/checkpoint_best.pt" --ipq-codes-lr 2 --lr 2e-3 --dropout 0; }
lm_ipq() {
  local dense="$1" plan="$2" dir="$3"
  shift 3
  fairseq-train "${LM_FLAGS[@]}" --criterion ipq --ipq-criterion cross_entropy --lr 1e-3 "$@" \
    --quantization-config-path "$plan" --finetune-from-model "$dense/checkpoint_best.pt" \
    --lr-period-updates "$IPQ_UPDATES" --max-update "$IPQ_UPDATES" \
    --save-interval-updates 50 --keep-interval-updates 1 --no-epoch-checkpoints --save-dir "$dir"
}

# lm_evaluate MODEL LOG: measures perplexity on the test split with fairseq's own program.
lm_evaluate() {
  fairseq-eval-lm "$DATA" --user-dir "$PLUGIN" --path "$1" --gen-subset test --tokens-per-sample 128 \
    --max-tokens 2048 --num-workers 0 --no-progress-bar --cpu >"$2.part" 2>&1 || { tail -n 5 "$2.part" >&2; return 1; }
  mv "$2.part" "$2"
}

# side_by_side JOBS RUN...: starts the runs, at most JOBS at once. RUN is "NAME: COMMAND", where the command is a line of
# shell. Prints progress from the newest log in $OUT/NAME every minute. The first run that fails ends the recipe and all runs.
side_by_side() {
  local jobs="$1" run
  shift
  RUNNING=() # pid:name
  SHOW=$((SECONDS + ${PROGRESS_SECONDS:-60}))
  for run in "$@"; do
    wait_below "$jobs"
    (set -e && eval "${run#*: }") </dev/null &
    RUNNING+=("$!:${run%%:*}")
  done
  wait_below 1
}

# wait_below N: waits until fewer than N runs are active.
wait_below() {
  local entry status left
  while true; do
    left=()
    for entry in ${RUNNING[@]+"${RUNNING[@]}"}; do
      if kill -0 "${entry%%:*}" 2>/dev/null; then
        left+=("$entry")
      else
        status=0
        wait "${entry%%:*}" || status=$?
        [ "$status" -eq 0 ] || { say "error: ${entry#*:} failed, so the recipe stops" >&2 && exit "$status"; }
      fi
    done
    RUNNING=(${left[@]+"${left[@]}"})
    [ "${#RUNNING[@]}" -ge "$1" ] || return 0
    sleep 1
    if [ "$SECONDS" -ge "$SHOW" ]; then
      SHOW=$((SECONDS + ${PROGRESS_SECONDS:-60}))
      for entry in "${RUNNING[@]}"; do progress "${entry#*:}" "$(newest_log "$OUT/${entry#*:}")"; done
    fi
  done
}

# newest_log DIR: prints the log that was written to last.
newest_log() { find "$1" -maxdepth 1 \( -name '*.log' -o -name log \) -exec ls -t {} + 2>/dev/null | head -n 1; }

# quietly LOG COMMAND...: appends the command's output to LOG; shows the last lines of LOG if the command fails.
quietly() {
  local log="$1"
  shift
  mkdir -p "$(dirname "$log")"
  "$@" >>"$log" 2>&1 || { { say "$log ends with:" && tail -n 8 "$log"; } >&2 && return 1; }
}

# table_arguments RECIPE ARG...: reads the arguments of table2.sh and table3.sh into OUT, WIKITEXT, GLUE and BPE.
table_arguments() {
  local recipe="$1" help
  help="bash recipes/$(basename "$1") --help"
  shift
  OUT="" WIKITEXT="" GLUE="" BPE=()
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$recipe" && exit 0 ;;
      --wikitext | --glue | --bpe)
        [ $# -ge 2 ] || die "$1 needs a value; see: $help"
        case "$1" in --wikitext) WIKITEXT="$2" ;; --glue) GLUE="$2" ;; *) BPE=(--bpe "$2") ;; esac
        shift 2
        ;;
      -*) die "unknown option $1; see: $help" ;;
      *)
        [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
        OUT="${1%/}"
        shift
        ;;
    esac
  done
}

# mnli_data: prepares the text for pre-training RoBERTa and the pairs of MNLI, in OUT/text-bin and OUT/mnli-bin.
mnli_data() {
  bash "$REPO/recipes/roberta/prepare.sh" "$OUT/text-bin" --local "$WIKITEXT" --words "${WORDS:-16000}" ${BPE[@]+"${BPE[@]}"}
  bash "$REPO/recipes/mnli/prepare.sh" "$OUT/mnli-bin" --local "$GLUE" --dict "$OUT/text-bin/dict.txt" ${BPE[@]+"${BPE[@]}"}
}
