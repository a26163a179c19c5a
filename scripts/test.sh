#!/usr/bin/env bash
# Set up what is missing and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/env.sh"
echo "== lint"
"$PYTHON" -m flake8
echo "== tests"
export OMP_NUM_THREADS=1 # two processes of one thread are faster here than one of two
"$PYTHON" -m pytest -n 2 --dist worksteal "$@"
