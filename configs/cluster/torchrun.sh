#!/bin/bash
# The line for each node of a job without SLURM: the same words on all of them, with HEAD naming one. From the repository:
#
#   NODES=2 DEVICES=8 HEAD=node0:29400 bash configs/cluster/torchrun.sh --config configs/fine_tune.yaml --run_dir path/on/all/nodes
#
# NODES and DEVICES (processes a node) must be what trainer.num_nodes and trainer.devices say; the overlay takes all GPUs of
# two nodes. JOB tells jobs apart that share a HEAD. The folder of the run must be on a file system that all nodes see.

# A process that dies ends all others. All are started again, up to RESTARTS times, and go on from the last checkpoint. So
# does a job that is started by hand once more. With torchrun's store shared, restarted processes would look for dead ones.
# SIGTERM, SIGINT or SIGUSR1 to torchrun goes to all processes, which save and end; to one of them, it is a process that died.
# SIGHUP, as from a terminal that closes, goes to all as well but saves nothing: start it under nohup, tmux or the like.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${NODES:-2}" --nproc-per-node="${DEVICES:-8}" --max-restarts="${RESTARTS:-3}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?name a node and a port}" --rdzv-id="${JOB:-peft-lightning}" \
  -m peft_lightning fit --config configs/overlays/multi_node.yaml "$@"
