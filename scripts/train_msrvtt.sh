#!/usr/bin/env bash
# Train NarVid on MSR-VTT: bash scripts/train_msrvtt.sh [vitb16|vitb32] [flags of main_task_retrieval.py]
#
# Needs data/msrvtt/ with train.jsonl, test.jsonl, frames/ and narrations.jsonl: data/README.md says how to make them.
# One process a GPU of this machine; NPROC=n for another number. Several machines: README, "One GPU, many, several nodes".
set -euo pipefail
source "$(dirname "$0")/env.sh"
case "${1:-}" in
    vitb16 | vitb32) size=$1; shift ;;
    *) size=vitb16 ;;
esac
gpus=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "${NPROC:-$gpus}" main_task_retrieval.py \
    --config "configs/msrvtt_$size.yaml" --output_dir "runs/msrvtt_$size" --resume auto "$@"
