#!/usr/bin/env bash
# Train on a Slurm cluster, from the repository's top folder:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/train_slurm.sh msrvtt_vitb16 [flags of main_task_retrieval.py]
#
# Slurm's own options stand before the script's name and win over the lines below. A job that was preempted or ran out
# of time is queued again (or submit it again) and goes on from runs/PRESET/last.pt: --save_every 200 loses at most 200
# steps. On a cluster whose nodes see no package index `source scripts/env.sh` once on the login node. Give the loader
# cores: 8 GPUs x (1 + --num_workers) processes run on each machine.
#SBATCH --job-name=narvid
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=narvid-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" # Slurm runs a copy that lies elsewhere
if [ ! -f scripts/train_nodes.sh ]; then
    echo "error: $PWD is not the repository: submit from its top folder" >&2
    exit 1
fi
source scripts/env.sh # here first, so that the machines do not install at the same time
export NODES=$SLURM_JOB_NUM_NODES
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$((20000 + SLURM_JOB_ID % 10000))
export HEAD
# srun does not inherit the number of cores, and would bind all processes of a machine to one.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none --kill-on-bad-exit=1 \
    bash scripts/train_nodes.sh "$@"
