#!/usr/bin/env bash
# Train or evaluate on several machines that are reached by ssh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/cluster.sh HOSTFILE train CONFIG [key=value ...] [--processes N] [--dry-run]
       bash launch/cluster.sh HOSTFILE evaluate RUN [key=value ...] [--processes N] [--dry-run]

Runs `subspace` on every host of HOSTFILE (launch/hostfile.example shows one), with as many processes as each line's slots, or
N on each. --dry-run prints the exact command instead of running it.

Needs pdsh here, ssh without a password to every host, and this folder, .venv and prepared data included, at the same path on
each. Environment variables for the hosts stand in ~/.deepspeed_env, a line NAME=VALUE each, as NCCL_SOCKET_IFNAME=eth0.

examples:
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
