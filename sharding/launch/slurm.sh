#!/usr/bin/env bash
# One process per GPU over several nodes, as a SLURM job:  sbatch slurm.sh
#
# stepjax reads its place from the variables that srun sets. A process that is lost takes the others with it (exit
# code 75); --requeue then starts all of them again.
#SBATCH --job-name=stepjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

MODEL=${MODEL:-stepfun-ai/Step-3.5-Flash}       # a folder that all nodes see, a hub id or an embedded name
MESH=${MESH:-expert=8,tensor=4}                 # its product is nodes × tasks per node
TOKENS=${TOKENS:-tokens.json}                   # a JSON list of lists of token ids
OUT=${OUT:-logits.npz}
SHARED=${SHARED:-$HOME/.cache/stepjax}          # a folder that all nodes see
MAX_SECONDS=${MAX_SECONDS:-14000}

export JAX_COMPILATION_CACHE_DIR=$SHARED/compiled  # process 0 writes, the others read
export NCCL_LAUNCH_ORDER_IMPLICIT=1
mkdir -p "$JAX_COMPILATION_CACHE_DIR"

# jax takes SIGTERM for a notice and goes on: hence the second, stronger signal.
srun --kill-on-bad-exit=1 timeout -k 30 "$MAX_SECONDS" \
    stepjax score --model "$MODEL" --mesh "$MESH" --tokens "$TOKENS" --out "$OUT"
