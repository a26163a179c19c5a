"""Seeds and values of flags in one command: bash scripts/sweep.sh --help. See narvid/report/sweep.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from narvid.flags import command
from narvid.report.sweep import main

if __name__ == "__main__":
    command(main)
