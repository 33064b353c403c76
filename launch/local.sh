#!/usr/bin/env bash
# Train or evaluate on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh train CONFIG [key=value ...] [--processes N] [--dry-run]
       bash launch/local.sh evaluate RUN [key=value ...] [--processes N] [--dry-run]

Runs `subspace` with the environment in .venv (else with python3): one process for each device, or N. --dry-run prints the
exact command instead of running it.

examples:
  bash launch/local.sh train launch/recipes/quickstart.yaml --processes 2
  CUDA_VISIBLE_DEVICES=2,3 bash launch/local.sh train launch/recipes/commonsense-smollm2.yaml --dry-run
TEXT
}

case "${1-}" in -h | --help | "") usage; exit 0 ;; esac

python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m subspace "$@"
