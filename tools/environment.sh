#!/usr/bin/env bash
# Usage: tools/environment.sh VENV EXTRA
# Makes VENV, and installs the packages of requirements/EXTRA.txt, checked by their hashes, and this tree's two
# distributions in editable mode. Does nothing if that was done before with the same files. Run it from the top of the
# repository. $PYTHON chooses the interpreter; the default is the first of python3.12, python3.11, python3 and python
# that is a 3.11 or 3.12 and runs.
set -euo pipefail

venv=$1
extra=$2
log=$venv/pip.log
made=$venv/made.stamp            # exists if the venv is complete; holds the interpreter that made it
installed=$venv/$extra.stamp     # the checksum of what was installed

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

# Runs each candidate: pyenv has a shim for every version, but only those of chosen versions run.
usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs"
        echo "$PYTHON"
        return
    fi
    local candidate without_venv=
    for candidate in python3.12 python3.11 python3 python; do
        usable "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    # If a Python lacks venv, make_venv prints the error.
    [ -n "$without_venv" ] || fail "no Python 3.11 or 3.12 found (tried python3.12, python3.11, python3, python);" \
        "install one, or name it: make PYTHON=/path/to/python3.12"
    echo "$without_venv"
}

make_venv() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || fail \
        "Python $version ($python) cannot make virtual environments: its modules venv and ensurepip are missing;" \
        "on Debian and Ubuntu: apt-get install python$version-venv; or name another: make PYTHON=/path/to/python3.12"
    # --clear: do not repair what an interrupted run left.
    "$python" -m venv --clear "$venv"
    "$python" -c 'import sys; print(sys.executable)' >"$made"
}

# Without build isolation nothing unlocked is installed: setuptools, which builds the two distributions, is in the list.
pip_install() {
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    "${pip[@]}" --require-hashes -r "requirements/$extra.txt" &&
        "${pip[@]}" --no-deps --no-build-isolation -e ./stem_client -e .
}

# Installs, with pip's output in the log; shows the seconds on a terminal.
install() {
    local what=$1 start=$SECONDS pid status=0
    set -m # pip gets its own process group, which the trap ends
    pip_install >"$log" 2>&1 &
    pid=$!
    set +m
    trap 'kill -- "-$pid" 2>/dev/null; exit 130' INT TERM
    if [ -t 1 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r%s %4d s' "$what" $((SECONDS - start))
            sleep 1
        done
        printf '\r'
    else
        printf '%s\n' "$what"
    fi
    wait "$pid" || status=$?
    trap - INT TERM
    if [ "$status" -ne 0 ]; then
        printf '\n' >&2
        grep -v '^WARNING: Location' "$log" | tail -n 15 | cut -c 1-400 >&2
        fail "pip failed with code $status after $((SECONDS - start)) s; its whole log is $log; run make again to retry"
    fi
    printf '%s %4d s, done\n' "$what" $((SECONDS - start))
}

wanted=$(cat "requirements/$extra.txt" setup.py stem_client/setup.py stem_util/version.py | cksum)

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || [ ! -f "$made" ]; then
    make_venv "$(choose_python)"
elif [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs"
    # The environment was made with another interpreter.
    [ "$("$PYTHON" -c 'import sys; print(sys.executable)')" = "$(cat "$made")" ] || make_venv "$PYTHON"
fi

if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
    rm -f "$installed"
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
    size=
    [ -x "$venv/bin/saved_model_cli" ] || size=" (TensorFlow and its requirements: about 600 MB)"
    install "environment: Python $version, installing .[$extra] into $venv$size"
    echo "$wanted" >"$installed"
fi
