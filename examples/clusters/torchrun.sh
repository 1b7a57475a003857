#!/usr/bin/env bash
# Train on all GPUs of this node: examples/clusters/torchrun.sh CONFIG [KEY=VALUE]...
# A run that stopped, for whatever reason, is continued by adding training.resume_from_checkpoint=latest-valid.
# After a SIGTERM or Ctrl-C torchrun gives the ranks 30 seconds for the rest of their step and a checkpoint.
set -euo pipefail

# "gpu" counts those that CUDA_VISIBLE_DEVICES leaves.
exec torchrun --standalone --nproc-per-node gpu -m fastpref train "$@"
