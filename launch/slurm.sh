#!/usr/bin/env bash
# A run on Slurm that goes on until it is finished, whatever the time limit: one task per GPU, no other launcher.
#   sbatch launch/slurm.sh --recipe sd35-geneval
# The run is runs/slurm-JOB, or what the variable RUN says. The machines need the same code, weights and prompts, and the
# run's folder lies on storage that they share. Change the numbers below, or give sbatch others: sbatch --nodes=4 ...
#SBATCH --job-name=vgpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
run=${RUN:-runs/slurm-$SLURM_JOB_ID}

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}  # srun no longer takes it from the lines above
# A job that ended while it was loading leaves a folder that is no run yet, and would keep its name taken.
if [ -d "$run" ] && [ ! -f "$run/config.yaml" ]; then mv "$run" "$run.dead-$(date +%s)"; fi
# 600 s before the end every task gets SIGTERM: the run writes a checkpoint and ends with exit code 75, "go on later".
if [ -f "$run/config.yaml" ]; then
  words=(--resume "$run")
else
  words=("$@" --output_dir="$(dirname "$run")" --name="$(basename "$run")")
fi
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# --wait: when one task has ended, the others have a minute. (--kill-on-bad-exit=1 would kill the rest of a run that is
# just stopping, and hide its 75 behind their 137.)
srun --kill-on-bad-exit=0 --wait=60 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python -m vgpo.train "$@"' vgpo "${words[@]}"
code=$?
if [ $code = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
