#!/usr/bin/env bash
# Install, train and evaluate a small model on this machine: see usage() below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [--help]

Trains SmolLM2-135M on arithmetic and shows its improvement with a confidence interval. Needs Python 3.11 or newer, 4 GB of
disk and 8 GB of memory; no GPU. On 2 idle cores it takes at most 8 minutes after installation (installation: 2 to 5).

  1. makes .venv and installs requirements.txt into it
  2. prepares the model and the two suites in data/cache (160 MB are downloaded)      about 1 minute
  3. scores the base model, by likelihood                                             about 1 minute
  4. trains LoRA adapters on it, in 2 processes started by the deepspeed launcher
     (1 where there is one GPU)                                                       about 3 minutes
  5. scores the model with the adapters                                               about 1 minute
  6. prints both in one table, with confidence intervals and a paired test

A second call continues where the first one stopped; stopped training resumes from its last checkpoint. To train again from
the start, remove runs/quickstart. Adapters, logs and all scored items are written to runs/quickstart, and the table to
runs/quickstart/table.md.

environment:
  PYTHON   interpreter for .venv (default: python3.11, else python3)
TEXT
}

case "${1-}" in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: quickstart.sh takes no '$1'; see --help" >&2; exit 2 ;;
esac

. launch/environment.sh

recipe=launch/recipes/quickstart.yaml
base=runs/smollm2-135m
run=runs/quickstart

# Run a command unless it has already succeeded for this recipe.
once() { # STAMP COMMAND ...
    local stamp=$1
    shift
    if cmp -s "$recipe" "$stamp"; then
        echo "done before; its results are used"
    else
        supervise "$@"
        cp "$recipe" "$stamp"
    fi
}

step "1/6 install into .venv"
make_environment requirements.txt
step "2/6 prepare the model and the data in data/cache (about a minute)"
supervise subspace prepare --data arithmetic,arc_easy
processes=$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)') # one per GPU
step "3/6 score the base model; results go to $base (about a minute)"
once "$base/.quickstart" subspace evaluate "$recipe" --processes "$processes"
step "4/6 train; adapters, checkpoints and logs go to $run (about 3 minutes)"
once "$run/.trained" subspace train "$recipe" --processes "$processes" --resume
step "5/6 score the model with the adapters; results go to $run (about a minute)"
once "$run/.scored" subspace evaluate "$run" --processes "$processes"
step "6/6 both in one table, $run/table.md"
subspace table "$base" "$run" --markdown > "$run/table.md"
subspace table "$base" "$run"
subspace compare "$base" "$run"
step "done"
