"""Published tables with ours beside them: python scripts/eval_tables.py --help. The code is narvid/report/tables.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from narvid.flags import command
from narvid.report.tables import main

if __name__ == "__main__":
    command(main)
