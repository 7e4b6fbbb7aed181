#!/usr/bin/env bash
# Run a module on ranks that mpirun starts; they find each other through MPI (mpi4py).
#
#   bash launch/mpi.sh NUM_RANKS mmr1_ds.train config=FILE key=value ...
#
# SIGTERM and SIGUSR1 reach the ranks as SIGUSR1: mpirun passes that on, and would kill them on SIGTERM.
# Environment: PYTHON    (default: .venv/bin/python, else python3)
#              HOSTFILE  hosts and slots, as mpirun reads them (default: this machine)
#              MPI_ARGS  further arguments of mpirun, as in "--map-by ppr:8:node -x NCCL_IB_HCA"
# A run that crashes is started again (restarts.sh).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/restarts.sh
source "$root/launch/restarts.sh"
make_key
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
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"

arguments=(-n "$num_ranks")
if mpirun --version 2> /dev/null | grep -q "Open MPI"; then
  arguments+=(--bind-to none -x PYTHONPATH -x MMR1_DS_RUN_KEY)
  if [[ -n "${HOSTFILE:-}" ]]; then arguments+=(--hostfile "$HOSTFILE"); else arguments+=(--oversubscribe); fi
  if (( EUID == 0 )); then arguments+=(--allow-run-as-root); fi
elif [[ -n "${HOSTFILE:-}" ]]; then
  arguments+=(-f "$HOSTFILE")
fi
read -r -a more <<< "${MPI_ARGS:-}"

told=0
while true; do
  mpirun "${arguments[@]}" ${more[@]+"${more[@]}"} "$python" -m "$module" "$@" &
  mpirun=$!
  trap 'told=1; kill -USR1 "$mpirun" 2> /dev/null || true' TERM HUP USR1
  trap 'told=1; kill -INT "$mpirun" 2> /dev/null || true' INT
  status=0
  wait "$mpirun" || status=$?
  while kill -0 "$mpirun" 2> /dev/null; do  # a trap ended the wait; mpirun's own status is still to come
    status=0
    wait "$mpirun" || status=$?
  done
  if (( told )) || [[ "$module" != mmr1_ds.train ]] || ! may_restart "$status" "$python" "$@" || (( told )); then exit "$status"; fi
done
