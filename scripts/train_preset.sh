#!/usr/bin/env bash
# What the train_<corpus>.sh share: bash scripts/train_preset.sh PRESET [flags of main_task_retrieval.py]
#
# configs/PRESET.yaml -> runs/PRESET, taken up again where it was interrupted. One process a GPU of this machine;
# NPROC=n for another number. Several machines: scripts/train_nodes.sh.
set -euo pipefail
source "$(dirname "$0")/env.sh"
preset=${1:?a file of configs/, without .yaml}
shift
processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
launch=()
if [ "$processes" -gt 1 ]; then # plain python says what is wrong in one sentence, torchrun in forty lines
    launch=(-m torch.distributed.run --standalone --nproc_per_node "$processes")
fi
"$PYTHON" "${launch[@]}" main_task_retrieval.py \
    --config "configs/$preset.yaml" --output_dir "runs/$preset" --resume auto "$@"
