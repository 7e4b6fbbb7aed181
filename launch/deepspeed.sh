#!/usr/bin/env bash
# Run the deepspeed launcher so that a signal ends all that it started here before this script returns.
# `deepspeed` alone, told to stop by SIGTERM, is gone at once; ours end soon after, others' ranks run on.
# The ranks of one machine are started without the launcher, 8 seconds sooner (mmr1_ds/cluster/local_ranks.py).
#
#   bash launch/deepspeed.sh NUM_RANKS MODULE ARGUMENT ...
#
# Exits with the status of the rank that failed first, 0 when none did, 130 after Ctrl-C, 143 after SIGTERM.
# A run that crashes is started again (restarts.sh), unless each host has a script of its own (NODE_RANK).
# Environment: PYTHON (default: .venv/bin/python, else python3)
#              STOP_SECONDS that ranks have to end after a signal (default: 60)
#              CUDA_VISIBLE_DEVICES  the GPUs to take, the first NUM_RANKS of them (default: the machine's first)
#              HOSTFILE  hosts and slots, as the launcher reads them: it starts NUM_RANKS on each, by ssh. Without ssh,
#                        call this on every host, with NODE_RANK (its place in the file, from 0), MASTER_ADDR and
#                        MASTER_PORT; with one host in the file that is not needed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/visible_gpus.sh
source "$root/launch/visible_gpus.sh"
# shellcheck source=launch/restarts.sh
source "$root/launch/restarts.sh"
if [[ -z "${HOSTFILE:-}" ]]; then make_key; fi  # other hosts would not get it
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi
num_ranks="$1" module="$2"
shift 2
if [[ -n "${HOSTFILE:-}" && ! -f "$HOSTFILE" ]]; then
  echo "HOSTFILE=$HOSTFILE: no such file; write one with a line for each host, as in: node1 slots=8" >&2
  exit 2
fi
port="${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
if [[ -n "${HOSTFILE:-}" ]]; then
  hosts=(--hostfile "$HOSTFILE")
  if [[ -n "${NODE_RANK:-}" ]]; then
    hosts+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?the address of the first host}")
  elif (( $(grep -cE '^[^#[:space:]]' "$HOSTFILE") == 1 )); then
    hosts+=(--no_ssh --node_rank 0 --master_addr "${MASTER_ADDR:-127.0.0.1}")
  fi
fi
if [[ -z "${HOSTFILE:-}" && "${DS_ACCELERATOR:-}" != cpu ]]; then
  gpus="$(take_gpus "$num_ranks")"
  if [[ -n "$gpus" ]]; then
    # For rollout servers, whose GPUs come after the ranks'.
    if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then export MMR1_DS_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"; fi
    export CUDA_VISIBLE_DEVICES="$gpus"
  fi
fi

# stop SIGNAL STATUS: pass the signal to the launcher's child, which ends the ranks and waits for them; whatever is
# left of the process group after that is killed.
stop() {
  trap '' INT TERM HUP
  local children
  children="$(cat "/proc/$runner/task/$runner/children" 2> /dev/null || true)"
  # shellcheck disable=SC2086  # several numbers
  kill -TERM ${children:-$runner} 2> /dev/null || true
  for ((waited = 0; waited < ${STOP_SECONDS:-60} * 10; waited++)); do
    if ! kill -0 -- "-$runner" 2> /dev/null; then break; fi
    sleep 0.1
  done
  kill -KILL -- "-$runner" 2> /dev/null || true
  exit "$1"
}

start=("$python" -P "$root/mmr1_ds/cluster/local_ranks.py" "$num_ranks" "$module")
if [[ -n "${HOSTFILE:-}" ]]; then
  start=("$python" -m deepspeed.launcher.runner "${hosts[@]}" --num_gpus "$num_ranks" --no_local_rank
    --master_port "$port" --log_level error --module "$module")
fi
export MASTER_PORT="$port"

while true; do
  set -m  # the launcher gets a process group of its own: Ctrl-C reaches it once, through us
  "${start[@]}" "$@" < /dev/null &
  runner=$!
  set +m
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  status=0
  wait "$runner" || status=$?
  if [[ "$module" != mmr1_ds.train || -n "${NODE_RANK:-}" ]] || ! may_restart "$status" "$python" "$@"; then
    exit "$status"
  fi
done
