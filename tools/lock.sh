#!/usr/bin/env bash
# Usage: tools/lock.sh [--upgrade | --upgrade-package=NAME]...
# Writes requirements/plots.txt and requirements/dev.txt: exact versions and hashes of all packages that this tree's two
# distributions need with that extra, for each supported Python. Keeps the versions in these files if the requirements
# still allow them; --upgrade takes the newest. Needs PyPI. $PYTHON chooses the interpreter that runs uv.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work"
"$work/bin/pip" install --quiet --disable-pip-version-check uv

compile() {
    local extra=$1
    shift
    printf -- './stem_client\n.[%s]\n' "$extra" | "$work/bin/uv" pip compile - --quiet --universal --python-version=3.11 \
        --generate-hashes --no-emit-package=stem-tf --no-emit-package=stem-tf-client \
        --custom-compile-command='make lock' --output-file="requirements/$extra.txt" "$@" >/dev/null
}

# dev first: it holds everything in plots, and its tools allow fewer versions of some packages.
compile dev "$@"
compile plots "$@" --constraints=requirements/dev.txt
