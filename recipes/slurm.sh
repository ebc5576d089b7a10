#!/bin/bash
# Trains on several nodes of a SLURM cluster, and goes on by itself when the job is requeued:
#
#     sbatch recipes/slurm.sh recipes/flickr8k.json --output_dir runs/cluster
#
# The repository, its .venv, the data and output_dir lie on a file system that all nodes share. Change what is below to
# what the cluster has. One task per node: torchrun starts a process for each GPU of its node.
#SBATCH --job-name=miniclip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # so that two jobs on a node do not meet

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first_node:$port" \
    train.py "$@" --resume
