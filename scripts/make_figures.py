"""Figures from finished runs: python scripts/make_figures.py --help. The code is narvid/report/figures.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from narvid.flags import command
from narvid.report.figures import main

if __name__ == "__main__":
    command(main)
