#!/usr/bin/env bash
# The published tables with ours beside them: bash scripts/eval_tables.sh [RUNS_DIR]      (default: runs)
#
# Finds the runs, evaluates those that were trained to the end and not evaluated, prints the tables and writes
# RUNS_DIR/tables.md and RUNS_DIR/tables.csv. Paths are seen from the repository's top folder.
set -euo pipefail
source "$(dirname "$0")/env.sh"
"$PYTHON" scripts/eval_tables.py "$@"
