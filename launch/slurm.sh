#!/usr/bin/env bash
#SBATCH --job-name=gpart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8      # one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue                # a preempted job comes back, and goes on from the last checkpoint
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# sbatch launch/slurm.sh --config=configs/glue.py:rte,large --workdir=/shared/runs/rte      (launch/slurm.md)
set -uo pipefail

export PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-3}

for attempt in $(seq 0 "$RESTARTS"); do
  # Another port each time: the last attempt's may not be free yet.
  port=$((20000 + (SLURM_JOB_ID + attempt) % 20000))
  export JAX_COORDINATOR_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$port"
  # A process that dies takes the others along, which would wait for it for ever.
  srun --kill-on-bad-exit=1 bash -c '
    export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
    exec "$PYTHON" -m experiments.train "$@"' -- "$@"
  code=$?
  [ "$code" -eq 0 ] && exit 0
  [ "$code" -eq 143 ] && exit 143 # preempted, and saved: Slurm starts the job again
  echo "launch: ended with code $code; attempt $((attempt + 1)) of $((RESTARTS + 1))"
done
exit "$code"
