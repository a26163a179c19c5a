#!/usr/bin/env bash
# Train NarVid on MSVD: bash scripts/train_msvd.sh [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py msvd
set -euo pipefail
exec bash "$(dirname "$0")/train_preset.sh" msvd "$@"
