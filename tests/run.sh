#!/usr/bin/env bash
# Checks and tests, in an environment that it makes: see usage() below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash tests/run.sh [--help] [PYTEST_ARGUMENT ...]

Needs Python 3.11 or newer; no GPU. Takes 10 to 12 minutes on 2 idle cores after installation.

  1. makes .venv and installs requirements.txt and tests/requirements.txt into it; as root on Debian, Chromium as well, in
     which pages of results are looked at (without it, those tests are left out)
  2. ruff, codespell, mypy, import-linter; beside them, prepares SmolLM2-135M and the eight suites in data/cache
  3. pytest on every core, without the tests that take minutes (-m long), need a GPU (-m gpu), or hosts and SLURM
     (-m cluster; tests/cluster/run.sh installs what those need); arguments are passed on to it

examples:
  bash tests/run.sh                        everything
  bash tests/run.sh -k lora                the tests whose names speak of lora
  bash tests/run.sh -m long                the tests that take minutes: about an hour
  bash tests/cluster/run.sh                two hosts and SLURM on this machine: as root, on Debian
  python tests/gpu/check.py                on a machine with a GPU, with what is installed there: see tests/README.md
TEXT
}

case "${1-}" in -h | --help) usage; exit 0 ;; esac

. launch/environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # several ranks share the cores
unset PYTHONDONTWRITEBYTECODE             # hundreds of processes would each compile the package anew

# Pages are looked at where there is a browser; that there is none is no failure.
install_chromium() {
    if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        supervise apt-get update -qq && supervise apt-get install -qq --yes --no-install-recommends chromium ||
            echo "Chromium cannot be installed: the tests of pages in a browser are left out" >&2
    fi
}

step "1/3 install"
make_environment requirements.txt tests/requirements.txt
install_chromium
step "2/3 ruff, codespell, mypy, import-linter; beside them, the model and the data"
supervise bash -euo pipefail -c '
    subspace prepare & prepared=$!
    trap "kill $prepared" ERR
    ruff check .
    ruff format --check .
    codespell
    mypy
    lint-imports --no-logo
    trap - ERR
    wait $prepared
'
step "3/3 pytest"
supervise python -m pytest --durations=25 -n auto --dist loadfile -m "not long and not gpu and not cluster" "$@"
