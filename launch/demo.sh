#!/usr/bin/env bash
# The demo: prepare its data and model (cached), train with configs/demo.yaml, say what came of it.
# Every run starts afresh; the one before it is kept as runs/demo.previous.
#
#   bash launch/demo.sh [key=value ...]
#
# Environment: RESUME=1   go on with an interrupted run instead
#              NUM_RANKS  processes (default: 2 on the CPU, up to 2 GPUs)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"  # DeepSpeed looks for ninja there
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1  # nothing is fetched, nothing is sent
export OMP_WAIT_POLICY=passive                 # threads that spin starve the other rank

# shellcheck source=launch/visible_gpus.sh
source launch/visible_gpus.sh
gpus="$(visible_gpus)"
num_gpus="$(wc -w <<< "$gpus")"
num_cores="$(nproc)"
if (( num_gpus > 0 )); then
  num_ranks="${NUM_RANKS:-$(( num_gpus < 2 ? num_gpus : 2 ))}"
else
  num_ranks="${NUM_RANKS:-2}"
  export DS_ACCELERATOR=cpu
fi

echo "demo: preparing the model and the questions"
OMP_NUM_THREADS="$(( num_cores < 4 ? num_cores : 4 ))" .venv/bin/python -m mmr1_ds.commands.demo

run_dir=runs/demo
for word in "$@"; do
  if [[ "$word" == trainer.run_dir=* ]]; then run_dir="${word#*=}"; fi
  if [[ "$word" == trainer.experiment_name=* && "$run_dir" == runs/demo ]]; then run_dir="runs/${word#*=}"; fi
done
if [[ "$run_dir" == runs/demo && -e "$run_dir" && "${RESUME:-0}" != 1 ]]; then  # a folder of the user's is left alone
  rm -rf "$run_dir.previous"
  mv "$run_dir" "$run_dir.previous"
  echo "demo: the run before is kept in $run_dir.previous"
fi
mkdir -p "$run_dir/logs"

export OMP_NUM_THREADS="$(( num_cores / num_ranks > 0 ? num_cores / num_ranks : 1 ))"
echo "demo: training on $num_ranks ranks"
exec 3> >(tee -i -a "$run_dir/logs/console.log")
tee=$!
interrupted=0
trap 'interrupted=130; kill -TERM "$training" 2> /dev/null || true' INT
trap 'interrupted=143; kill -TERM "$training" 2> /dev/null || true' TERM HUP
PYTHON=.venv/bin/python bash launch/deepspeed.sh "$num_ranks" mmr1_ds.train config=configs/demo.yaml \
  "trainer.n_gpus_per_node=$num_ranks" "$@" >&3 2>&1 3>&- &  # in the background, for traps wait for what is in front
training=$!
status=0
wait "$training" || status=$?
if (( interrupted != 0 )); then
  wait "$training" || true  # the ranks are still ending
  status="$interrupted"
fi
trap - INT TERM HUP
exec 3>&-
wait "$tee" || true
if (( status != 0 )); then
  echo "demo: stopped with status $status; RESUME=1 make demo goes on from the last checkpoint in $run_dir" >&2
  exit "$status"
fi
echo
.venv/bin/python -m mmr1_ds.commands.demo.summary "$run_dir"
