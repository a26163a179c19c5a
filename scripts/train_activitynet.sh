#!/usr/bin/env bash
# Train NarVid on ActivityNet: bash scripts/train_activitynet.sh [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py activitynet
set -euo pipefail
exec bash "$(dirname "$0")/train_preset.sh" activitynet "$@"
