#!/bin/bash
# A run of several nodes under SLURM that survives preemption, time limits and dead nodes. From the repository:
#
#   sbatch configs/cluster/slurm.sh --config configs/fine_tune.yaml --run_dir path/on/all/nodes
#
# The folder of the run must be on a file system that all nodes see. Lines for SLURM begin with #SBATCH.

#SBATCH --job-name=peft-lightning
#SBATCH --nodes=2                # trainer.num_nodes of the overlay
#SBATCH --ntasks-per-node=8      # trainer.devices of the overlay: one task a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue                # preempted, or a node died: SLURM starts the job again, under the same number
#SBATCH --open-mode=append       # with its output after what was there
#SBATCH --signal=B:USR1@120      # to this script, 120 s before the time is over; before preemption as well, where the
                                 # cluster has PreemptParameters=send_user_signal
#SBATCH --output=%x-%j.log

# On SIGUSR1 every process saves after its optimizer step and ends; srun hands the signal on to all of them.
asked="" step=""
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1

# One process that dies ends all others at once, instead of leaving them to wait for it.
srun --kill-on-bad-exit=1 python -m peft_lightning fit --config configs/overlays/slurm.yaml "$@" &
step=$!
[ -z "$asked" ] || kill -USR1 "$step" # it came before there was a step

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
  wait "$step"
  code=$?
done

# The overlay's resume: auto goes on from there when the job is back. A run that failed by itself is not repeated.
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
