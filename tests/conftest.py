"""What every test shares: the checkout on the path, one thread, and the tiny corpus with its weights (tiny.py)."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
# Tests of one folder use helpers that stand in tests of another.
sys.path[:0] = [str(folder) for folder in (HERE.parent, HERE, *sorted(HERE.glob("[a-z]*/")))]
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_collection_modifyitems(items):
    """What takes longest first, file by file, so that no process is left alone with it at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A --data_dir with frames, narrations and clip.json; read only."""
    import tiny  # not for those tests that need no trainer

    return tiny.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory, corpus) -> Path:
    """A checkpoint of all modules, its weights from numpy: the same with every version of torch."""
    import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("weights") / "start.pt", corpus)
