#!/usr/bin/env bash
# One process per GPU over several nodes, as a SLURM job:  sbatch slurm.sh
#
# stepjax reads its place from the variables that srun sets. A process that is lost takes the others with it (exit
# code 75); the job then goes back to the queue, up to three times. (--requeue alone allows that, and does it only when
# a node fails.)
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
STEPJAX_KEY=${STEPJAX_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}  # only processes of this job can join
export STEPJAX_KEY
export NCCL_LAUNCH_ORDER_IMPLICIT=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # which srun no longer takes from sbatch, since 22.05
mkdir -p "$JAX_COMPILATION_CACHE_DIR"

# jax takes SIGTERM for a notice and goes on: hence the second, stronger signal. The processes end each other, each with
# its own exit code and its last words; srun ends what is left a minute after the first.
code=0
srun --kill-on-bad-exit=0 --wait=60 timeout -k 30 "$MAX_SECONDS" \
    stepjax score --model "$MODEL" --mesh "$MESH" --tokens "$TOKENS" --out "$OUT" || code=$?

# 1 and 2 are the input's fault, and 124 is the time limit: another try would not help. srun reports the highest code.
if [[ -n ${SLURM_JOB_ID:-} ]] && ((code >= 75 && code != 124 && ${SLURM_RESTART_COUNT:-0} < 3)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
