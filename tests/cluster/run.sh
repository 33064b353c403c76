#!/usr/bin/env bash
# Two hosts and SLURM on this machine, and the runs on them: see usage() below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'TEXT'
usage: bash tests/cluster/run.sh [--help] [PYTEST_ARGUMENT ...]

Needs Debian or Ubuntu, root, and leave to make network namespaces. Takes about 10 minutes on 2 cores after installation.

  1. installs what is missing of pdsh, openssh-server, munge, slurmctld, slurmd, slurm-client and iproute2, without starting
     any of their services
  2. makes .venv, as tests/run.sh does
  3. runs tests/cluster: two hosts in namespaces of their own, with sshd, pdsh and SLURM; arguments are passed on to pytest

The hosts see no other network, and nothing of them outlives the tests.

examples:
  bash tests/cluster/run.sh                  everything
  bash tests/cluster/run.sh -k signal        the tests whose names speak of a signal
TEXT
}

case "${1-}" in -h | --help) usage; exit 0 ;; esac

. launch/environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # several ranks share the cores
export PYTHONDONTWRITEBYTECODE=1

# Debian's packages start their services when they are installed, unless this script forbids it.
policy=/usr/sbin/policy-rc.d
install_packages() { # PACKAGE ...
    [ "$(id -u)" = 0 ] || { echo "error: installing $* needs root" >&2; exit 2; }
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    supervise apt-get update -qq
    supervise apt-get install -qq --yes --no-install-recommends "$@"
}

step "1/3 install Debian packages"
missing=()
for package in iproute2 openssh-server pdsh munge slurmctld slurmd slurm-client; do
    dpkg-query --show --showformat '${Status}' "$package" 2> /dev/null | grep -q ' installed$' || missing+=("$package")
done
[ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
step "2/3 install Python packages"
make_environment requirements.txt tests/requirements.txt
step "3/3 pytest"
supervise python -m pytest --durations=25 tests/cluster -m cluster "$@"
