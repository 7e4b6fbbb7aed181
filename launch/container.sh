#!/usr/bin/env bash
# Run a command in an image that launch/Dockerfile or launch/apptainer.def made, by the project that is in it:
#
#   bash launch/container.sh IMAGE python3 -m mmr1_ds.train config=... key=value ...
#
# A file that ends in .sif is run by apptainer, any other name by docker. The command sees the GPUs, the host's shared
# memory and network, this folder, and the environment; the folders of models, data and runs are to be mounted.
#
# Environment: CONTAINER_MOUNTS  FROM:TO,...  (default: none but this folder)
set -euo pipefail

image="${1:?usage: container.sh IMAGE COMMAND ...}"
shift
mounts=("$PWD:$PWD")
IFS=, read -ra more <<< "${CONTAINER_MOUNTS:-}"
mounts+=(${more[@]+"${more[@]}"})
unset PYTHONPATH  # the image's project, whose extension is compiled, and not the host's

if [[ "$image" == *.sif ]]; then
  options=(--pwd "$PWD")
  for mount in "${mounts[@]}"; do options+=(--bind "$mount"); done
  if [[ "${DS_ACCELERATOR:-}" != cpu ]]; then options+=(--nv); fi
  exec apptainer exec "${options[@]}" "$image" "$@"
fi

mkdir -p "$HOME/.cache"
options=(--rm --init --ipc=host --network=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" --workdir "$PWD")
for mount in "${mounts[@]}" "$HOME/.cache:$HOME/.cache"; do options+=(--volume "$mount"); done
if [[ "${DS_ACCELERATOR:-}" != cpu ]]; then options+=(--gpus all); fi
# By name alone: everybody can read the values in a command line. What says where programs lie is the image's own.
while read -r name; do
  case "$name" in
    PATH | PWD | OLDPWD | SHLVL | HOSTNAME | SHELL | TMPDIR | LD_* | VIRTUAL_ENV | PYTHON* | CUDA_HOME | BASH_*) ;;
    *) options+=(--env "$name") ;;
  esac
done < <(compgen -e)
exec docker run "${options[@]}" "$image" "$@"
