#!/usr/bin/env bash
# Train on the GPUs of a SLURM cluster, one process a GPU; JAX finds the processes itself. Not run: no cluster was at hand.
#
#   sbatch scripts/launch/slurm.sh
#
# The working directory, the data and the runs lie on a file system that all nodes share.
#SBATCH --job-name=pushpull
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -uo pipefail
source .venv/bin/activate
command=(pushpull train quick
    --data.root mvtec_ad --data.category bottle --workdir runs/bottle
    --mesh.data -1 --hosts.heartbeat_timeout_seconds 60)

# --kill-on-bad-exit: when one process dies, srun says which and of what, and ends the others.
srun --kill-on-bad-exit=1 --label "${command[@]}" &
step=$!
# The batch script gets the signal, 120 s before the time is up, and passes it on to all processes.
trap 'scancel --signal=TERM "$SLURM_JOB_ID".0' TERM
wait "$step"
code=$?
if [ "$code" -gt 128 ] && kill -0 "$step" 2> /dev/null; then # it was the wait that the signal ended
    wait "$step"
    code=$?
fi
if [ "$code" -eq 75 ]; then # told to stop, its state is saved
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -ne 0 ]; then
    echo "a process ended with $code; to resume: sbatch scripts/launch/slurm.sh" >&2
fi
exit "$code"
