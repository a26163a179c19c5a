"""Is one run better than another? python scripts/compare_runs.py --help. See narvid/report/comparison.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from narvid.flags import command
from narvid.report.comparison import main

if __name__ == "__main__":
    command(main)
