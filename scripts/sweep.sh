#!/usr/bin/env bash
# Seeds and values of flags in one command: bash scripts/sweep.sh PRESET --seeds 1 2 3 --set lam=0.5,0.7,0.9 [flags]
#
# Every combination is a run in runs/sweep_PRESET; what has ended is kept, what was killed goes on. Ends with one table
# (mean, deviation, paired bootstrap) and Figure 7 where lambda or eta vary. --dry_run says what would run and how long.
# One run a GPU; --gpus_a_run all gives all of them to one run at a time. See narvid/report/sweep.py.
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec "$PYTHON" scripts/sweep.py "$@"
