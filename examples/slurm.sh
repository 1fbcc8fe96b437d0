#!/usr/bin/env bash
#SBATCH --job-name=mlembed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# One torchrun a node, one process a GPU: sbatch --nodes 4 slurm.sh RECIPE --key value ..
# The run's directory and the data are on a file system that all nodes see. Two minutes before the
# time limit, and on preemption, SIGTERM reaches every process: the run saves and stops. What SLURM
# puts back into the queue goes on from there (SLURM_RESTART_COUNT), what a process took down from the
# last checkpoint (--max-restarts); what ran out of time, with --resume.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:29500" \
    train.py "$@"
