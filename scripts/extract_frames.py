"""Videos -> a frame folder: python scripts/extract_frames.py --help. The code is narvid/data/extraction.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from narvid.flags import command
from narvid.data.extraction import main

if __name__ == "__main__":
    command(main)
