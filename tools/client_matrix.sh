#!/usr/bin/env bash
# Usage: tools/client_matrix.sh dist/stem_tf_client-*.whl
# Tests the client's wheel with the oldest, the newest and some other versions of its requirements: installs each
# combination into a fresh environment, and ranks there with a server in the same process. Downloads about 200 MB.
set -euo pipefail

wheel=$(readlink -f "$1")
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# interpreter: requirements (the oldest ones have wheels for old interpreters only)
rows=(
    "python3.10: protobuf==4.22.* grpcio==1.50.* numpy==1.23.*"
    "python3.11: protobuf==4.25.* grpcio==1.62.* numpy==1.26.*"
    "python3.12: protobuf==5.26.* grpcio numpy==1.26.*"
    "python3.12: protobuf==5.29.* grpcio numpy"
    "python3.12: protobuf==6.30.* grpcio numpy"
    "python3.12: protobuf==6.33.* grpcio numpy"
    "python3.13: protobuf==7.* grpcio numpy"
    "python3.12: protobuf==7.* grpcio==1.62.* numpy"
)

failed=0
for row in "${rows[@]}"; do
    python=${row%%:*}
    read -ra requirements <<<"${row#*: }"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "skipped, there is no $python that makes environments: ${requirements[*]}"
        continue
    fi
    rm -rf "$work/venv" && "$python" -m venv "$work/venv"
    if ! "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$wheel" "${requirements[@]}" \
        >"$work/log" 2>&1 || ! "$work/venv/bin/pip" check >>"$work/log" 2>&1; then
        tail -n 5 "$work/log"
        echo "FAILED to install with $python: ${requirements[*]}"
        failed=1
    elif ! (cd "$work" && PYTHONPATH='' "$work/venv/bin/python" "$here/client_matrix_check.py"); then
        echo "FAILED with $python: ${requirements[*]}"
        failed=1
    fi
done
exit $failed
