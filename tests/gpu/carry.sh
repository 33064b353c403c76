#!/usr/bin/env bash
# Collects the wheels that a machine with a GPU and no network lacks: see usage() below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tests/gpu/carry.sh FOLDER [--have FILE] [--python 3.12]

Run it where there is a package registry, with the Python of the environment that the tests pass in. It fills FOLDER with
wheels of the project's packages in the versions installed here, for the Python of that machine, and says how large it
is. torch and what torch brings along are not among them: that machine has its own build. --have names a list of what
else is there (python3 -m pip list --format=freeze), which is then left out where its version will do.

On that machine, from the repository's root:

  python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
  PYTHONPATH=SITE python3 tests/gpu/check.py

examples:
  bash tests/gpu/carry.sh wheels
  bash tests/gpu/carry.sh wheels --have freeze.txt
TEXT
}

folder= python=3.12 have=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --have) have=(--have "${2:?--have takes a file}"); shift 2 ;;
        --python) python=${2:?--python takes a version, as 3.12}; shift 2 ;;
        -*) echo "error: carry.sh has no option '$1'; its options are --have, --python and --help" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
[ -n "$folder" ] || { usage >&2; exit 2; }

here=$(dirname "${BASH_SOURCE[0]}")
mapfile -t wanted < <(python "$here/wheels.py" "${have[@]}")
[ ${#wanted[@]} -gt 0 ] || { echo "error: no list of packages came from $here/wheels.py" >&2; exit 1; }
mkdir -p "$folder"

# pip matches each name of a platform exactly, so all that wheels are made for have to be named.
platforms=()
for version in 1 2010 2014; do platforms+=(--platform "manylinux${version}_x86_64"); done
for version in 5 12 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${version}_x86_64"); done
target=(--python-version "$python" --implementation cp "${platforms[@]}" --platform linux_x86_64)

for requirement in "${wanted[@]}"; do
    if ! python -m pip download --quiet --no-deps --only-binary=:all: "${target[@]}" --dest "$folder" "$requirement" 2> "$folder/said.txt"; then
        # Only as source, such as DeepSpeed, whose operators are compiled at their first use: the wheel is Python alone.
        echo "$requirement: built here" >&2
        python -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$requirement" || { cat "$folder/said.txt" >&2; exit 1; }
    fi
done
rm -f "$folder/said.txt"
for wheel in "$folder"/*.whl; do
    case "$wheel" in
        *-none-any.whl | *"cp${python/./}"* | *abi3* | *py3-none-*) ;;
        *) echo "error: $wheel was built for this Python, not for $python" >&2; exit 1 ;;
    esac
done
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MB in $folder"
