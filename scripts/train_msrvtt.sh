#!/usr/bin/env bash
# Train NarVid on MSR-VTT: bash scripts/train_msrvtt.sh [vitb16|vitb32] [flags of main_task_retrieval.py]
# What it needs and what is missing: python scripts/check_data.py msrvtt_vitb16
set -euo pipefail
case "${1:-}" in
    vitb16 | vitb32) size=$1; shift ;;
    *) size=vitb16 ;;
esac
exec bash "$(dirname "$0")/train_preset.sh" "msrvtt_$size" "$@"
