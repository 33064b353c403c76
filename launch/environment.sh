# shellcheck shell=bash
# What quickstart.sh and tests/run.sh share; sourced from the repository's root.

# Say which step begins, and when.
step() {
    printf '\n== %s  (%s)\n' "$1" "$(date +%H:%M:%S)"
}

# Make .venv hold what the given requirements files ask for, and the command `subspace`. Does nothing where it does already.
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
    # One command for all: with torch's pin in sight, no other package makes pip take another build of it.
    supervise python -m pip install --disable-pip-version-check "${wanted[@]}"
    supervise python -m pip install --disable-pip-version-check --no-deps --editable .
    mkdir -p .venv/installed
    for file in "$@" pyproject.toml; do
        cp "$file" ".venv/installed/${file//\//_}"
    done
}

# Run a command so that Ctrl-C, SIGTERM and SIGHUP to this script end it and everything it started.
supervise() { # COMMAND ...
    "$@" < /dev/null &
    child=$!
    wait "$child"
    child=
}

_stop() { # STATUS
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2> /dev/null || true
        wait "$child" 2> /dev/null || true
    fi
    echo "stopped" >&2
    exit "$1"
}

child=
set -m # a process group for every command that is supervised
trap '_stop 130' INT
trap '_stop 143' TERM
trap '_stop 129' HUP
