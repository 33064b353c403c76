# shellcheck shell=bash
# Functions shared by quickstart.sh and tests/run.sh; to be sourced from the repository's root.

# Print the title and start time of a step.
step() {
    printf '\n== %s  (%s)\n' "$1" "$(date +%H:%M:%S)"
}

# Install the given requirements files and the command `subspace` into .venv, unless it is up to date.
make_environment() { # FILE ...
    local file stamp python="${PYTHON:-}" current=yes
    local -a wanted=()
    for file in "$@" pyproject.toml; do
        stamp=".venv/installed/${file//\//_}"
        cmp -s "$file" "$stamp" || current=no
        [ "$file" = pyproject.toml ] || wanted+=(-r "$file")
    done
    export PATH="$PWD/.venv/bin:$PATH"
    [ "$current" = yes ] && echo ".venv is up to date" && return

    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        [ -n "$python" ] || python=$(command -v python3.11 || command -v python3) || python=python3
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: '$python' is not Python 3.11 or newer; name one as PYTHON=/path/to/python3.11" >&2
            exit 2
        fi
        if ! "$python" -m venv --clear .venv; then
            echo "error: '$python' cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 2
        fi
    fi
    # One pip command for all files, so that torch's pin holds for the dependencies of all other packages.
    supervise python -m pip install --disable-pip-version-check "${wanted[@]}"
    supervise python -m pip install --disable-pip-version-check --no-deps --editable .
    mkdir -p .venv/installed
    for file in "$@" pyproject.toml; do
        cp "$file" ".venv/installed/${file//\//_}"
    done
}

# Run a command such that Ctrl-C, SIGTERM and SIGHUP to this script end it and all its child processes.
supervise() { # COMMAND ...
    "$@" < /dev/null &
    local status=0
    wait $! || status=$?
    return "$status" # also where a caller goes on after a failure
}

_stop() { # STATUS
    trap '' INT TERM HUP
    # bash's own list: a signal may come between the start of a command and the next line, which would note its number.
    local group
    for group in $(jobs -p); do
        kill -TERM -- "-$group" 2> /dev/null || true
    done
    wait 2> /dev/null || true
    echo "stopped" >&2
    exit "$1"
}

set -m # a process group for every command that is supervised
trap '_stop 130' INT
trap '_stop 143' TERM
trap '_stop 129' HUP
