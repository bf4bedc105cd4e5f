#!/usr/bin/env bash
# Makes the drafters that ship for SmolLM2-135M-Instruct, by the product's own verbs: answers, training, shipping.
# Everything goes on where it stopped, so it can be killed and run again. On two CPU cores it takes hours, on a GPU minutes.
#
#   scripts/smollm2_drafters.sh WORK PROMPTS ANSWERS [key=value ...]
#
# WORK     folder for answers, features and runs
# PROMPTS  prompts without an answer yet, as `outdraft regenerate` reads them, or - to write no answers
# ANSWERS  answers of the model that are there already, in the format of `outdraft regenerate`, or -
# The rest are training settings for all drafters (max_steps=20 tries the whole way in minutes).
# OUTDRAFT and PYTHON name the commands of an environment that is not active; MODEL names another copy of the model (a folder); METHODS="fspad eagle eesd" chooses; SHIP=1 puts them into the package.
set -euo pipefail
work=$1 prompts=$2 answers=$3
shift 3
outdraft=${OUTDRAFT:-outdraft} model=${MODEL:-smollm2} python=${PYTHON:-python}
mkdir -p "$work"

: > "$work/data.jsonl"
[ "$answers" = - ] || cat "$answers" >> "$work/data.jsonl"
if [ "$prompts" != - ]; then
    "$outdraft" regenerate --model "$model" --data "$prompts" --output "$work/own.jsonl" --temperature 0,1 \
        --max-new-tokens 256 --on-bad-line skip
    cat "$work/own.jsonl" >> "$work/data.jsonl"
fi

for method in ${METHODS:-fspad eagle eesd}; do
    own=()
    [ "$method" = eesd ] && own=(--exit-layer auto)
    "$outdraft" train --model "$model" --method "$method" ${own[@]+"${own[@]}"} --data "$work/data.jsonl" --hold-out 64 \
        --max-length 768 --output-dir "$work/$method" --report-to none --resume feature_cache_dir="$work/features" "$@"
    [ -z "${SHIP:-}" ] || "$python" "$(dirname "$0")/reference_model/ship.py" "$work/$method" "$method" --model smollm2
done
