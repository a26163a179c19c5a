#!/usr/bin/env bash
# Train NarVid on DiDeMo: bash scripts/train_didemo.sh [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py didemo
set -euo pipefail
exec bash "$(dirname "$0")/train_preset.sh" didemo "$@"
