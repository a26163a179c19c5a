#!/usr/bin/env bash
# Run the tests with the oldest and with the newest supported Python and packages, and print a table:
#     bash scripts/test_versions.sh [pytest arguments]
# Oldest: python3.10, or $PYTHON_OLDEST, with the lower ends of the ranges in requirements.txt. Newest: python3.13, or
# $PYTHON_NEWEST, with the newest packages that the ranges allow today. Both are set up in folders of their own,
# .venv-oldest and .venv-newest (about 6 GB each), and used again the next time. Ends with 1 where a test failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

rows=()
failed=0
for end in oldest newest; do
    if [ $end = oldest ]; then base=${PYTHON_OLDEST:-python3.10}; else base=${PYTHON_NEWEST:-python3.13}; fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: no Python 3.10 or newer answers to '$base'; let \$PYTHON_OLDEST and \$PYTHON_NEWEST name them" >&2
        exit 1
    fi
    home=.venv-$end
    [ -e $home/bin/python ] || "$base" -m venv $home
    echo "== $end: $($home/bin/python --version), packages"
    sed -E '/^#/d; s/>=([^,]+).*/==\1/' requirements.txt > $home/floors.txt
    wanted=requirements.txt
    [ $end = newest ] || wanted=$home/floors.txt
    $home/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -r $wanted
    $home/bin/python -m compileall -q -j 0 $home/lib >/dev/null 2>&1 || true # as in env.sh

    echo "== $end: tests"
    report=$home/tests.xml
    rm -f $report
    $home/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rfEs --junitxml=$report "$@" || failed=1
    [ -e $report ] || { echo "error: pytest ended before it wrote $report; see above" >&2; exit 1; }
    rows+=("$($home/bin/python - $end $report <<'PYTHON'
import sys
from importlib.metadata import version
from platform import python_version
from xml.etree import ElementTree

end, report = sys.argv[1:]
suite = ElementTree.parse(report).getroot().find("testsuite")
broken = int(suite.get("failures")) + int(suite.get("errors"))
skipped = int(suite.get("skipped"))
counts = [int(suite.get("tests")) - broken - skipped, broken, skipped, round(float(suite.get("time")))]
versions = [python_version(), *map(version, ("torch", "open_clip_torch", "av"))]
print(f"| {' | '.join(map(str, [end, *versions, *counts]))} |")
PYTHON
    )")
done

echo
echo "| | Python | torch | open_clip | av | passed | failed | skipped | seconds |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
printf '%s\n' "${rows[@]}"
exit $failed
