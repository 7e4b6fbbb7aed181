#!/usr/bin/env bash
# Run the deepspeed launcher on this machine so that a signal ends all that it started before this script returns.
# `deepspeed` alone, told to stop by SIGTERM, is gone at once; ours end soon after, others' ranks run on.
#
#   bash launch/deepspeed.sh NUM_RANKS MODULE ARGUMENT ...
#
# Exits with the status of the rank that failed first, 0 when none did, 130 after Ctrl-C, 143 after SIGTERM.
# Environment: PYTHON (default: .venv/bin/python), STOP_SECONDS that ranks have to end after a signal (default: 60)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
num_ranks="$1" module="$2"
shift 2
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"

set -m  # the launcher gets a process group of its own: Ctrl-C reaches it once, through us
"$python" -m deepspeed.launcher.runner --hostfile /dev/null/none --num_gpus "$num_ranks" --no_local_rank \
  --master_port "$port" --log_level error --module "$module" "$@" < /dev/null &
runner=$!
set +m

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
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

status=0
wait "$runner" || status=$?
exit "$status"
