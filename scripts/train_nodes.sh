#!/usr/bin/env bash
# Train on several machines: the same command on each of them, the repository and its data on a disk they share.
#
#   NODES=2 HEAD=node0:29500 bash scripts/train_nodes.sh msrvtt_vitb16 [flags of main_task_retrieval.py]
#
# HEAD: one of the machines, as the others reach it, and a free port. One process a GPU; NPROC=n for another number, the
# same everywhere. --batch_size stays global. Taken up again where it was interrupted; when one machine fails all stop
# with an error: start them again. For Slurm: scripts/train_slurm.sh. The first time let `source scripts/env.sh` end on
# one machine before the others start, since it installs .venv.
set -euo pipefail
source "$(dirname "$0")/env.sh"
preset=${1:?a file of configs/, without .yaml}
shift
: "${NODES:?how many machines}" "${HEAD:?host:port of one of them}"
processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
host=() # which machine is HEAD is guessed from its name, where nobody says so
if [ -n "${SLURM_NODEID:-}" ]; then
    host=(--rdzv_conf "is_host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false)")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$processes" --max_restarts 0 \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${SLURM_JOB_ID:-$preset}" "${host[@]}" \
    main_task_retrieval.py --config "configs/$preset.yaml" --output_dir "runs/$preset" --resume auto "$@"
