#!/usr/bin/env bash
# From nothing to a table of results on this machine: see usage() below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [--help]

Needs Python 3.11 or newer and 4 GB of disk; no GPU. On 2 cores it takes about 15 minutes after installation.

  1. makes .venv and installs requirements.txt into it
  2. prepares SmolLM2-135M and the eight commonsense suites in data/cache
  3. scores the model as it is
  4. trains LoRA adapters on it, in 2 processes started by the deepspeed launcher
  5. scores the model with the adapters
  6. prints both in one table

What is there already is used again, so a second call continues where the first one stopped. To train anew, remove
runs/quickstart. It leaves runs/quickstart (adapters, logs, every scored item) and runs/quickstart/table.md behind.

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

run=quickstart
step "1/6 install"
make_environment requirements.txt
step "2/6 prepare the model and the data"
supervise subspace prepare
step "3/6 score the model as it is"
supervise subspace evaluate "launch/recipes/$run.yaml" --processes 2
step "4/6 train"
if [ -f "runs/$run/adapter/adapter.safetensors" ]; then
    echo "runs/$run has its adapters; remove it to train anew"
else
    supervise subspace train "launch/recipes/$run.yaml" --processes 2
fi
step "5/6 score the model with the adapters"
supervise subspace evaluate "runs/$run" --processes 2
step "6/6 results"
subspace table runs/smollm2-135m "runs/$run" --markdown > "runs/$run/table.md"
subspace table runs/smollm2-135m "runs/$run"
