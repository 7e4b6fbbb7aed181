#!/usr/bin/env bash
# Sourced by the launch scripts. visible_gpus prints the numbers of the GPUs that a run on this machine may take, one a
# line: those that CUDA_VISIBLE_DEVICES names, by number or by UUID, else all that nvidia-smi lists.
# The deepspeed launcher, told a number of GPUs, drops that variable and takes the machine's first ones.
visible_gpus() {
  local listed name number
  listed="$(nvidia-smi -L 2> /dev/null | grep '^GPU' || true)"
  if [[ -z "$listed" ]]; then return 0; fi
  if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    sed -n 's/^GPU \([0-9]*\):.*/\1/p' <<< "$listed"
    return 0
  fi
  for name in ${CUDA_VISIBLE_DEVICES//,/ }; do
    if [[ "$name" == -1 ]]; then return 0; fi  # CUDA reads no further
    if [[ "$name" == MIG-* ]]; then return 0; fi  # a part of a GPU: one process, which CUDA shows it to
    number="$name"
    if [[ ! "$name" =~ ^[0-9]+$ ]]; then number="$(sed -n "s/^GPU \([0-9]*\):.*UUID: $name.*/\1/p" <<< "$listed")"; fi
    if ! grep -q "^GPU $number:" <<< "$listed"; then
      echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: nvidia-smi -L lists no GPU $name" >&2
      return 2
    fi
    echo "$number"
  done
}

# take_gpus N: the first N of them, joined by commas; nothing on a machine without GPUs.
take_gpus() {
  local found
  found="$(visible_gpus)" || return 2
  if [[ -z "$found" ]]; then return 0; fi
  if (( $(wc -l <<< "$found") < $1 )); then
    echo "$1 processes, but this machine shows $(wc -l <<< "$found") GPUs (nvidia-smi -L, CUDA_VISIBLE_DEVICES)" >&2
    return 2
  fi
  head -n "$1" <<< "$found" | paste -sd,
}
