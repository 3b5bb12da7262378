#!/bin/sh
# Makes the peers' environment, .venv-peers beside the repository's own, or brings it up to date. Idempotent.
#
#   PYTHON=python3.11 benchmarks/peers/install.sh [folder]
#
# fastsparse itself is installed into it by the caller, with the build that is to be measured.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/.venv-peers}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# One call for all that has dependencies, so that pip can't trade torch for another release later.
"$venv/bin/python" -m pip install --quiet -r "$root/benchmarks/peers-requirements.txt" "numpy" "matplotlib>=3.8"
"$venv/bin/python" -m pip install --quiet --no-deps -r "$root/benchmarks/peers-requirements-nodeps.txt"
