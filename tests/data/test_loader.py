"""The loader where shared memory is small: Docker gives a container 64 MiB, in which workers would wait for ever."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from narvid import InputError
from narvid.data import loader
from narvid.data.datasets import FrameDataset, Split
from narvid.data.frames import Picture
from narvid.data.loader import PairSampler, make_loader

MIB = 2**20


class Pictures(torch.utils.data.Dataset):
    """20 items of 1 MiB."""

    item_bytes = MIB

    def __len__(self):
        return 20

    def __getitem__(self, item):
        return torch.full((MIB,), item, dtype=torch.uint8)


@pytest.mark.parametrize("free, ranks, fit", [(64, 1, 4), (36, 1, 4), (35, 1, 3), (20, 1, 2), (11, 1, 0), (0, 1, 0),
                                              (64, 2, 3), (float("inf"), 8, 4)])
def test_as_many_workers_as_have_room(monkeypatch, capsys, free, ranks, fit):
    """Batches of 4 MiB: two for each worker, and one in use."""
    monkeypatch.setattr(loader, "free_shared_memory", lambda: free * MIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    of_training = PairSampler(20, 8, rank=0, world_size=2, seed=0)
    for sampler in (of_training, [[0, 1], [2, 3, 4, 5]]):
        made = make_loader(Pictures(), torch.stack, sampler, num_workers=4)
        assert made.num_workers == fit
        said = capsys.readouterr().err
        assert ("--shm-size" in said and f"{fit} workers are used" in said) == (fit < 4)
    assert make_loader(Pictures(), torch.stack, of_training, num_workers=0).num_workers == 0
    assert not capsys.readouterr().err


def test_every_batch_comes_from_a_small_disk(monkeypatch):
    """The sentence is true: with the workers that are left, all batches arrive, and they are the same."""
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * MIB))
    batches = [[0, 1], [2, 3], [4, 5]]
    some = make_loader(Pictures(), torch.stack, batches, num_workers=4)
    assert some.num_workers == 2
    assert [batch[:, 0].tolist() for batch in some] == batches


def test_shared_memory_that_may_not_be_written_is_not_used(monkeypatch, tmp_path, capsys):
    """A container with a read-only root and nothing at /dev/shm: one process without workers needs none."""
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda self: 1 / 0)
    split = Split(["a"], np.array([0]), ["v"], tmp_path, [[0]], None, [], 0)
    dataset = FrameDataset(split, split.video_of_query, Picture(8))
    made = make_loader(dataset, list, PairSampler(1, 1, rank=0, world_size=1, seed=0), num_workers=4)
    assert len(made) == 1 and made.num_workers == 0 and "0 workers are used" in capsys.readouterr().err
    with pytest.raises(InputError, match="--cache_frames needs"):
        FrameDataset(split, split.video_of_query, Picture(8), cache=True)
