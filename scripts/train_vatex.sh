#!/usr/bin/env bash
# Train NarVid on VATEX: bash scripts/train_vatex.sh [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py vatex
set -euo pipefail
exec bash "$(dirname "$0")/train_preset.sh" vatex "$@"
