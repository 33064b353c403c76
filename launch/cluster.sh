#!/usr/bin/env bash
# Check, train or evaluate on several machines through ssh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/cluster.sh HOSTFILE doctor [CONFIG] [key=value ...] [--processes N] [--dry-run]
       bash launch/cluster.sh HOSTFILE train CONFIG [key=value ...] [--processes N] [--dry-run]
       bash launch/cluster.sh HOSTFILE evaluate RUN [key=value ...] [--processes N] [--dry-run]

Runs `subspace` on every host of HOSTFILE (launch/hostfile.example shows one), with as many processes as its line has slots,
or N. --dry-run prints the exact command instead of running it.

Needs pdsh on this machine, passwordless ssh to every host, and this folder, .venv and prepared data included, at the same
path on each. Set environment variables for the hosts in ~/.deepspeed_env, one NAME=VALUE per line, as NCCL_SOCKET_IFNAME=eth0;
values are taken as they are, without expanding $.

Ctrl-C and SIGTERM make training save a checkpoint and exit with status 75; add --resume to continue. A second one ends all
processes of this run on all hosts at once.

examples:
  bash launch/cluster.sh hostfile doctor launch/recipes/commonsense-smollm2.yaml                  is every host ready?
  bash launch/cluster.sh hostfile train launch/recipes/commonsense-smollm2.yaml
  bash launch/cluster.sh hostfile train launch/recipes/commonsense-smollm2.yaml --dry-run
TEXT
}

case "${1-}" in -h | --help | "") usage; exit 0 ;; esac
hostfile=$1
shift

python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m subspace "$@" --hostfile "$hostfile"
