#!/usr/bin/env bash
#SBATCH --job-name=subspace
#SBATCH --signal=USR1@120
# Check, train or evaluate in a SLURM job: srun starts the processes, no ssh is used.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch --nodes N --ntasks-per-node M --gpus-per-node M launch/slurm.sh doctor [CONFIG] [key=value ...]
       sbatch --nodes N --ntasks-per-node M --gpus-per-node M launch/slurm.sh train CONFIG [key=value ...]
       sbatch --nodes N --ntasks-per-node M --gpus-per-node M launch/slurm.sh evaluate RUN [key=value ...]

Submit it from the repository's root, or call it inside an allocation. Each task runs one process; the first node is the
master. --dry-run prints the exact command instead of running it. Every task sees all GPUs of its node, or one of its own
(--gpus-per-task 1). The folder, .venv and prepared data included, must exist on every node.

Two minutes before the job's time limit, training saves a checkpoint and exits with status 75; add --resume to continue.

examples:
  sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh doctor              is every node ready?
  sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh train launch/recipes/commonsense-smollm2.yaml
  salloc --nodes 1 --ntasks-per-node 4 --gpus-per-node 4 bash launch/slurm.sh evaluate runs/quickstart
  SLURM_JOB_ID=1 SLURM_JOB_NODELIST='node[01-02]' SLURM_NNODES=2 SLURM_NTASKS_PER_NODE=8 \
      bash launch/slurm.sh train launch/recipes/quickstart.yaml --dry-run
TEXT
}

case "${1-}" in -h | --help | "") usage; exit 0 ;; esac

dry_run=no
arguments=()
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
done

if [ -z "${SLURM_JOB_NODELIST-}" ]; then
    echo "error: this is not a SLURM job (SLURM_JOB_NODELIST is not set). Submit it with sbatch, or run 'subspace $*' on this machine" >&2
    exit 2
fi

# The first of 'node[01-04,07],other3'.
first_node() {
    local names
    if names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2> /dev/null) && [ -n "$names" ]; then
        echo "${names%%$'\n'*}"
    else # there is no scontrol here, or it has no configuration
        sed -E 's/^([^,[]*)\[([^],-]*)[^]]*\].*$/\1\2/; s/,.*$//' <<< "$SLURM_JOB_NODELIST"
    fi
}

tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
MASTER_ADDR=$(first_node)
MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000)) # jobs that share a node differ in their number
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python3

# SLURM's equivalents of a launcher's variables for each rank; expanded where the task runs. Until Python heeds the signal
# before the time limit, it must not end the task.
# shellcheck disable=SC2016
rank='trap "" USR1; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
command=(
    env MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" LOCAL_SIZE="$tasks"
    srun --nodes="${SLURM_NNODES:-1}" --ntasks-per-node="$tasks" --kill-on-bad-exit=0 --wait=60
    bash -c "$rank" rank "$python" -m subspace "${arguments[@]}"
)
if [ "$dry_run" = yes ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
