#!/usr/bin/env bash
# Qwen2.5-VL 32B with variance-aware sampling on this machine's GPUs. What else can be set: launch/train.sh
# Sized for 8 x H100; on 8 x B200 take CONFIG=mmr1_b200_32b. What each takes of a GPU: docs/presets.md
#
#   JOB_NAME=my_run bash launch/train_qwen2_5_vl_32b.sh data.train_files=/path/to/data 'data.curriculum_metrics=[learnability]'
set -euo pipefail
export JOB_NAME="${JOB_NAME:-qwen2_5_vl_32b}"
export MODEL_PATH="${MODEL_PATH:-Qwen/Qwen2.5-VL-32B-Instruct}"
export CONFIG="${CONFIG:-mmr1_h100_32b}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
