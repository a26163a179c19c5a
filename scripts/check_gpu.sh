#!/usr/bin/env bash
# All that only a GPU can show, on one GPU in 8 minutes: bash scripts/check_gpu.sh [--out FILE]
#
# Equality with the CPU and with one process, number formats, the captioner, speed. Needs no download beyond the
# packages; prints one Markdown table and writes it to runs/check_gpu.md. Exit code 1 if an equality does not hold.
# Without a GPU `--tiny` tries the script itself.
set -euo pipefail
source "$(dirname "$0")/env.sh"
"$PYTHON" scripts/check_gpu.py "$@"
