#!/usr/bin/env bash
# Set up what is missing, run lint and the tests, and list what was skipped and why: bash scripts/test.sh [pytest arguments]
# The page tests want a browser: as root on Debian it is installed, elsewhere they run where chromium or chrome is.
set -euo pipefail
source "$(dirname "$0")/env.sh"

if ! command -v chromium chromium-browser google-chrome >/dev/null && [ "$(id -u)" = 0 ] &&
    grep -qsx 'ID=debian' /etc/os-release; then
    echo "== installing chromium, for the page tests"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 120 apt-get -qq update && timeout 300 apt-get -qq install --no-install-recommends chromium; } \
        </dev/null >/dev/null 2>&1 || echo "   apt-get has none to give: the page tests are skipped"
fi
echo "== lint"
"$PYTHON" -m flake8
echo "== tests"
export OMP_NUM_THREADS=1 # two processes of one thread are faster here than one of two
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs "$@"
