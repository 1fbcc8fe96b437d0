#!/usr/bin/env bash
#SBATCH --job-name=mlembed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# Start one torchrun on each node and one process on each GPU. Submit it from the checkout:
#
#     sbatch --nodes 4 examples/slurm.sh RECIPE --key value ...
#
# All nodes must see the run's directory and the data. Two minutes before the time limit, and on
# preemption, SIGTERM reaches every process, and the run saves and stops. A job that SLURM requeues
# resumes by itself (SLURM_RESTART_COUNT), on these or other nodes, and so does a run whose process
# crashed (--max-restarts). If a node died with the run, the next one waits a minute for its
# heartbeat. After the time limit, submit the job again with --resume.
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:29500" \
    train.py "$@"
