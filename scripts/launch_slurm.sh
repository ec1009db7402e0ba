#!/usr/bin/env bash
# A batch script to copy and adapt: sbatch scripts/launch_slurm.sh CONFIG [orthrus train options]
# Five minutes before the time limit Slurm sends SIGUSR1; the ranks save and end with 75, and the job goes
# back into the queue, where it resumes.
#SBATCH --job-name=orthrus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

config=${1:?usage: sbatch launch_slurm.sh CONFIG [options of orthrus train]}
shift
run_dir=${ORTHRUS_RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK OPENBLAS_NUM_THREADS=$SLURM_CPUS_PER_TASK
resume=()
if [[ -d $run_dir ]]; then resume=(--resume); fi

# In the background: bash handles a signal only between commands, and `wait` ends for one.
srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  orthrus train "$config" --run-dir "$run_dir" "${resume[@]}" "$@" &
ranks=$!
interrupted=1
trap 'interrupted=1; kill -USR1 "$ranks"' USR1
while ((interrupted)); do
  interrupted=0
  wait "$ranks"
  status=$?
done

if ((status == 75)); then
  echo "saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
