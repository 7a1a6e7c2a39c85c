#!/usr/bin/env bash
# Converts parallel text to sentencepiece's pieces and fairseq's binary format, with one dictionary for both languages.
#
#     bash recipes/translation/prepare.sh OUT_DIR               downloads IWSLT'14 German-English first
#     bash recipes/translation/prepare.sh OUT_DIR --iwslt DIR   takes its unpacked folder de-en
#     bash recipes/translation/prepare.sh OUT_DIR --langs de en --train PREFIX --valid PREFIX [--test PREFIX]
#                                                               takes PREFIX.de and PREFIX.en: any text, line by line
#     --words N       size of the dictionary (default: 10000)
#     --workers N     processes for the binarization (default: the number of cores)
#
# fairseq-train reads OUT_DIR; OUT_DIR/spm.model is the tokenizer. Translation is from the first of --langs to the second.
# Takes twenty seconds on a busy core for 28,000 short pairs. After a kill, the same command resumes; once complete, it does nothing.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

URL="https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
HELP="bash recipes/translation/prepare.sh --help"
OUT="" IWSLT="" LANGS=(de en) TRAIN="" VALID="" TEST="" WORDS=10000 WORKERS="$(getconf _NPROCESSORS_ONLN)"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --langs)
      [ $# -ge 3 ] || die "--langs needs two languages, such as de en; see: $HELP"
      LANGS=("$2" "$3")
      shift 3
      ;;
    --iwslt | --train | --valid | --test | --words | --workers)
      [ $# -ge 2 ] || die "$1 needs a value; see: $HELP"
      case "$1" in
        --iwslt) IWSLT="$2" ;; --train) TRAIN="$2" ;; --valid) VALID="$2" ;; --test) TEST="$2" ;;
        --words) WORDS="$2" ;; *) WORKERS="$2" ;;
      esac
      shift 2
      ;;
    -*) die "unknown option $1; see: $HELP" ;;
    *)
      [ -z "$OUT" ] || die "two output folders given, $OUT and $1; give one"
      OUT="${1%/}"
      shift
      ;;
  esac
done
[ -n "$OUT" ] || die "no output folder given; run: bash recipes/translation/prepare.sh OUT_DIR"
case "$WORKERS" in '' | *[!0-9]* | 0) die "--workers $WORKERS is not a positive number" ;; esac
case "$WORDS" in '' | *[!0-9]* | 0) die "--words $WORDS is not a positive number" ;; esac
if [ -n "$TRAIN$VALID$TEST" ]; then
  [ -n "$TRAIN" ] && [ -n "$VALID" ] || die "text of your own needs both --train PREFIX and --valid PREFIX"
  [ -z "$IWSLT" ] || die "--iwslt and --train: give one of them"
fi
need python fairseq-preprocess
free_dir "$OUT"

download() {
  fetch "$URL" "$OUT.download/de-en.tgz" ||
    die "IWSLT'14 could not be downloaded; fetch it elsewhere, unpack it, and pass --iwslt DIR"
  tar -xzf "$OUT.download/de-en.tgz" -C "$OUT.download"
}
plain_text() { module recipes.translation.iwslt14 "$IWSLT" "$OUT.download/text"; }
if [ -z "$TRAIN" ]; then
  [ "${LANGS[*]}" = "de en" ] || [ "${LANGS[*]}" = "en de" ] || die "--langs ${LANGS[*]}: IWSLT'14 here is de and en"
  if [ -z "$IWSLT" ]; then
    need curl tar
    step "download IWSLT'14" "$OUT.download/.downloaded" download
    IWSLT="$OUT.download/de-en"
  fi
  [ -d "$IWSLT" ] || die "--iwslt $IWSLT is not a folder; give the one that holds train.tags.de-en.de"
  step "plain text of $IWSLT" "$OUT.download/.text" plain_text "$IWSLT"
  TRAIN="$OUT.download/text/train" VALID="$OUT.download/text/valid" TEST="$OUT.download/text/test"
fi
for prefix in "$TRAIN" "$VALID" ${TEST:+"$TEST"}; do
  for lang in "${LANGS[@]}"; do
    [ -f "$prefix.$lang" ] || die "$prefix.$lang does not exist; give a prefix of two files, PREFIX.${LANGS[0]} and PREFIX.${LANGS[1]}"
  done
done

# fairseq-preprocess refuses to overwrite an older dictionary, so it writes a new folder, which is then renamed.
binarize() {
  local part="$OUT.part" test=()
  rm -rf "$part" "$part.text"
  module recipes.translation.pieces "$part.text" --langs "${LANGS[@]}" --words "$WORDS" \
    "train=$TRAIN" "valid=$VALID" ${TEST:+"test=$TEST"}
  if [ -n "$TEST" ]; then test=(--testpref "$part.text/test"); fi
  fairseq-preprocess --source-lang "${LANGS[0]}" --target-lang "${LANGS[1]}" \
    --joined-dictionary --srcdict "$part.text/dict.txt" --trainpref "$part.text/train" --validpref "$part.text/valid" \
    ${test[@]+"${test[@]}"} --workers "$WORKERS" --destdir "$part" >"$part.log" 2>&1 || { tail -n 5 "$part.log" >&2 && return 1; }
  mv "$part.text/spm.model" "$part/spm.model"
  rm -r "$part.text" "$part.log"
  touch "$part/.done" # marks the folder as this recipe's, even if it is killed right here
  rm -rf "$OUT"
  mv "$part" "$OUT"
}
step "binarize $TRAIN, $VALID${TEST:+, $TEST} to $OUT" "$OUT/.done" binarize "$TRAIN" "$VALID" "$TEST" "${LANGS[*]}" "$WORDS"
