"""What every test shares: the checkout on the path, one thread, and the tiny corpus with its weights (tiny.py)."""

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest

gc.disable()  # until all is imported: nothing of it is garbage, and looking takes a quarter of the time
HERE = Path(__file__).resolve().parent
# Tests of one folder use helpers that stand in tests of another.
sys.path[:0] = [str(folder) for folder in (HERE.parent, HERE, *sorted(HERE.glob("[a-z]*/")))]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and of the processes that tests start


def pytest_collection_modifyitems(items):
    """What takes longest first, file by file, so that no process is left alone with it at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """All is imported, and what is there now stays to the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def tmp_path(tmp_path, request):
    """pytest's, emptied when the test has passed: of all tests it would be 5 GB. The folder itself stays, so that no
    other test gets its name, by which things are remembered.
    """
    failed = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == failed:
        for path in tmp_path.iterdir():
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A --data_dir with frames, narrations and clip.json; read only."""
    import tiny  # not for those tests that need no trainer

    return tiny.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory, corpus) -> Path:
    """A checkpoint of all modules, its weights from numpy: the same with every version of torch."""
    import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("weights") / "start.pt", corpus / "clip.json")
