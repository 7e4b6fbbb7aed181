#!/usr/bin/env bash
# Train on this machine. The scripts beside this one set a model and call it; it is of use alone as well.
#
#   JOB_NAME=my_run MODEL_PATH=/path/to/model bash launch/train.sh key=value 'list=[a,b]' ...
#
# Environment:
#   JOB_NAME        names the run directory, runs/JOB_NAME               (default: the config's)
#   MODEL_PATH      model folder or hub id                               (default: the config's)
#   CONFIG          run config: a path, or a name in configs/            (default: mmr1_h100)
#   NUM_GPUS        processes to start                                   (default: the GPUs of CUDA_VISIBLE_DEVICES, else all)
#   PYTHON          interpreter                                          (default: .venv/bin/python, else python3)
#   DEEPSPEED_ARGS  further arguments of the deepspeed launcher, as in "--hostfile hosts"
#   STOP_SECONDS    whole seconds to wait for ranks whose launcher ended (default: 60)
# Overrides come last and win. Relative paths are relative to where you call it. A run that crashes is started again
# (restarts.sh).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/visible_gpus.sh
source "$root/launch/visible_gpus.sh"
# shellcheck source=launch/restarts.sh
source "$root/launch/restarts.sh"
if [[ "${DEEPSPEED_ARGS:-}" != *"-H"* && "${DEEPSPEED_ARGS:-}" != *"--hostfile"* ]]; then make_key; fi
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi

num_gpus="${NUM_GPUS:-}"
if [[ -z "$num_gpus" ]]; then
  gpus="$(visible_gpus)"
  num_gpus="$(wc -w <<< "$gpus")"
fi

dry_run=false
for argument in "$@"; do
  case "$argument" in
    trainer.dry_run=[Tt]rue) dry_run=true ;;
    trainer.dry_run=*) dry_run=false ;;
  esac
done

arguments=("config=${CONFIG:-mmr1_h100}")
if [[ -n "${JOB_NAME:-}" ]]; then arguments+=("trainer.experiment_name=$JOB_NAME"); fi
if [[ -n "${MODEL_PATH:-}" ]]; then arguments+=("worker.actor.model.model_path=$MODEL_PATH"); fi

if [[ "$dry_run" == true ]]; then
  # One process plans for all ranks: those counted here, or the config's on a machine without GPUs.
  if (( num_gpus > 0 )); then arguments+=("trainer.n_gpus_per_node=$num_gpus"); fi
  exec "$python" -m mmr1_ds.train "${arguments[@]}" "$@"
fi

export MMR1_DS_SCRIPT_PID=$$  # whose end, by whatever signal, ends the ranks
# train COMMAND ...: run it in a process group of its own, which our signals reach, until it is done.
train() {
  local child status waited told=0
  while true; do
    set -m
    "$@" < /dev/null &
    child=$!
    set +m
    # Ctrl-C is for all that the terminal started. The others are warnings: the ranks save, for which they know SIGTERM.
    trap 'told=1; kill -INT -- "-$child" 2> /dev/null || true' INT
    trap 'told=1; kill -TERM "$child" 2> /dev/null || true' TERM HUP USR1
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2> /dev/null; do  # a trap ended the wait
      status=0
      wait "$child" || status=$?
    done
    # The deepspeed runner, told to end, is gone at once. Its ranks save first, and what started this script may end
    # whatever is left when it returns; ranks that are started anew would meet those of before.
    if (( told )); then trap '' INT TERM HUP USR1; fi
    for ((waited = 0; waited < ${STOP_SECONDS:-60} * 10; waited++)); do
      if ! kill -0 -- "-$child" 2> /dev/null; then break; fi
      sleep 0.1
    done
    if (( told )) || ! may_restart "$status" "$python" "${arguments[@]}" || (( told )); then exit "$status"; fi
  done
}

arguments+=("trainer.n_gpus_per_node=$(( num_gpus > 1 ? num_gpus : 1 ))" "$@")
if (( num_gpus <= 1 )); then train "$python" -m mmr1_ds.train "${arguments[@]}"; fi
read -r -a launcher_arguments <<< "${DEEPSPEED_ARGS:-}"
case " ${DEEPSPEED_ARGS:-} " in
  *" --include"* | *" --exclude"* | *" --num_gpus"* | *" -i "* | *" -e "*) ;;
  *" --hostfile"* | *" -H "*) launcher_arguments+=(--num_gpus "$num_gpus") ;;  # the first of each host
  *)
    gpus="$(take_gpus "$num_gpus")"
    if [[ -n "$gpus" ]]; then launcher_arguments+=(--include "localhost:$gpus"); fi
    if [[ -z "$gpus" ]]; then launcher_arguments+=(--num_gpus "$num_gpus"); fi
    # For rollout servers, whose GPUs come after the ranks'.
    if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then export MMR1_DS_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"; fi
    ;;
esac
train "$python" -m deepspeed.launcher.runner ${launcher_arguments[@]+"${launcher_arguments[@]}"} \
  --module mmr1_ds.train "${arguments[@]}"
