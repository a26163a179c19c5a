#!/usr/bin/env bash
# Train NarVid on LSMDC: bash scripts/train_lsmdc.sh [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py lsmdc
set -euo pipefail
exec bash "$(dirname "$0")/train_preset.sh" lsmdc "$@"
