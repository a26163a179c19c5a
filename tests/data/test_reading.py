"""Reading at training time: pixels against open_clip's own transform, frames drawn from segments, the start-up check.

B queries, V videos, K frames of a video. What a frame folder must look like is in test_frames.py.
"""

import json
import random
from functools import partial
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from test_resume import assert_same

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid import InputError
from narvid.data.datasets import FrameDataset, check_frames, collate, load_split
from narvid.towers.tokenizer import Tokenizer
from narvid.data.loader import PairSampler, make_loader
from narvid.data.frames import Picture, draw_frames, read_frames
from narvid.data.narrations import Narration
from scripts import bench_frames

# ---- pixels ----

SIZES = [(455, 256), (256, 455), (398, 224), (224, 398), (320, 240), (641, 359), (224, 224), (97, 61), (20, 31)]


@pytest.fixture(scope="module")
def towers():
    vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 1, "head_width": 64}
    return clip.build_towers(clip.ClipConfig(64, vision, tiny.CLIP["text_cfg"]))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_pixels_are_those_of_open_clips_transform(tmp_path, towers, size):
    noise = np.random.default_rng(size[0]).integers(0, 256, (9, 16, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "0.jpg", quality=95)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    theirs = open_clip.image_transform(224, is_train=False, mean=mean, std=std)(Image.open(tmp_path / "0.jpg"))
    pixels = read_frames([tmp_path / "0.jpg"], Picture(224))
    as_bytes = 255 * (theirs * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))
    assert torch.equal(pixels[0], as_bytes.round().to(torch.uint8)) and (as_bytes - as_bytes.round()).abs().max() < 1e-3
    seen = []
    hook = towers.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    towers.encode_frames(pixels)
    hook.remove()
    assert (seen[0][0] - theirs).abs().max() < 1e-6


# ---- frames drawn from segments ----


@pytest.mark.parametrize(("n", "k"), [(5, 4), (12, 4), (30, 12), (13, 12), (7, 1)])
def test_one_frame_of_each_segment_and_every_frame_at_times(n, k):
    rng = np.random.default_rng(0)
    drawn = np.array([draw_frames(n, k, rng) for _ in range(200)])  # (200, k)
    low, high = np.arange(k) * n / k, (np.arange(k) + 1) * n / k
    assert ((drawn > low - 1) & (drawn < high)).all()  # borders that fall into a frame are rounded down
    assert all(a < b for row in drawn.tolist() for a, b in pairwise(row))
    assert set(drawn.flatten().tolist()) == set(range(n))


def test_all_frames_where_there_are_no_more_than_places():
    assert [draw_frames(n, 4, None) for n in (1, 3, 4)] == [[0], [0, 1, 2], [0, 1, 2, 3]]


def narrate(texts):
    return Narration("test", "", [float(k) for k in range(len(texts))], texts)


LENGTHS = {"long": 23, "exact": 4, "short": 2}  # frames of each video
TIMES = {video: [float(k) for k in range(n)] for video, n in LENGTHS.items()}
NARRATIONS = {video: narrate([f"grey {k}" for k in range(n)]) for video, n in LENGTHS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Frame k of each video is as grey as 10 k; its sentence is "grey k"; four queries a video."""
    folder = tmp_path_factory.mktemp("greys")
    pairs = [{"video": video, "query": f"query {q}"} for q in range(4) for video in LENGTHS]
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for video, n in LENGTHS.items():
        (folder / "frames" / video).mkdir(parents=True)
        for k in range(n):
            Image.new("L", (32, 32), 10 * k).save(folder / "frames" / video / f"{k:05d}.jpg", quality=95)
    return folder


def load(folder, narrations=NARRATIONS, max_frames=None):
    return load_split(folder / "train.jsonl", folder / "frames", TIMES, max_frames=max_frames, narrations=narrations,
                      narrations_path="n.jsonl")


def drawing(split, seed=3):
    return FrameDataset(split, split.video_of_query, Picture(32), segments=4, seed=seed)


def batches_of(split, num_workers, epochs=3):
    """The batches of some epochs of a loader as the trainer builds it."""
    dataset, sampler = drawing(split), PairSampler(12, 4, rank=0, world_size=1, seed=3)
    to_batch = partial(collate, split=split, tokenize=Tokenizer({}), max_words=16, max_frames=4, with_queries=True)
    loader, batches = make_loader(dataset, to_batch, sampler, num_workers=num_workers), []
    for epoch in range(epochs):
        sampler.set(epoch, 0)
        dataset.epoch.fill_(epoch)
        batches += list(loader)
    return batches


def test_sentences_follow_the_drawn_frames(folder):
    """The brightness of a frame and its sentence say the same number; a short video keeps all its frames."""
    lengths = []
    for batch in batches_of(load(folder), 0):
        assert torch.equal(batch.mask, batch.narration_mask)
        for row, k in batch.mask.nonzero().tolist():
            want, _ = Tokenizer({})([f"grey {round(batch.frames[row, k].float().mean().item() / 10)}"], 16)
            assert torch.equal(batch.sentences[batch.sentence_of_frame[row, k]][: want.shape[1]], want[0])
        lengths += zip(batch.video.tolist(), batch.mask.sum(dim=1).tolist())
    assert set(lengths) == {(0, 4), (1, 4), (2, 2)}


def test_any_number_of_workers_gives_the_same_batches(folder):
    for one, other in zip(batches_of(load(folder), 0), batches_of(load(folder), 2), strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y)


def test_a_draw_comes_from_seed_epoch_and_item_alone(folder):
    split = load(folder)
    dataset = drawing(split)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = [dataset[i].places for i in range(0, 12, 3)]  # four queries of the long video
    assert first == [dataset[i].places for i in range(0, 12, 3)] == [drawing(split)[i].places for i in range(0, 12, 3)]
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    dataset.epoch.fill_(1)
    second = [dataset[i].places for i in range(0, 12, 3)]
    other = [drawing(split, seed=4)[i].places for i in range(0, 12, 3)]
    assert len({str(places) for places in first + second + other}) > 9  # of 12; each is one of 6 x 6 x 6 x 5


def test_a_missing_sentence_is_masked_and_no_item_lacks_all(folder):
    narrations = {**NARRATIONS, "long": narrate(["grey 0", *[" "] * 21, "grey 22"])}
    split = load(folder, narrations)
    dataset = drawing(split)
    for epoch in range(10):
        dataset.epoch.fill_(epoch)
        batch = collate([dataset[0]], split=split, tokenize=Tokenizer({}), max_words=16, max_frames=4,
                        with_queries=True)
        greys = (batch.frames[0].float().mean(dim=(1, 2, 3)) / 10).round().int()
        assert batch.narration_mask.any() and batch.narration_mask[0].tolist() == [g in (0, 22) for g in greys.tolist()]


def test_sentences_of_the_picks_alone_are_enough_for_uniform_only(folder):
    narrations = {**NARRATIONS, "long": Narration("test", "", [0.0, 7.0, 14.0, 22.0], ["a", "b", "c", "d"])}
    assert load(folder, narrations, max_frames=4).sentences[0] == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="long.*--frame_sampling segments needs a sentence for every extracted frame"):
        load(folder, narrations)


def test_the_start_looks_at_every_frame_that_may_be_drawn(folder):
    (folder / "frames" / "long" / "00001.jpg").rename(folder / "away.jpg")  # not among the uniform four
    check_frames(load(folder, max_frames=4), range(3))
    with pytest.raises(InputError, match=r"00001\.jpg cannot be read"):
        check_frames(load(folder), range(3))
    (folder / "away.jpg").rename(folder / "frames" / "long" / "00001.jpg")


# ---- the trainer ----


def test_a_broken_run_with_segments_ends_like_the_unbroken_one(corpus, tmp_path, monkeypatch):
    """Broken within the second epoch and continued with another number of workers."""
    flags = ("--batch_size", 16, "--max_frames", 3, "--save_every", 1, "--select_on", "last")
    segments = ("--frame_sampling", "segments")
    metrics = trainer.main(tiny.flags(corpus, tmp_path / "whole", *flags, *segments))
    again = tiny.flags(corpus, tmp_path / "run", *flags, *segments, "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", partial(break_off, "epoch 2, step 2", trainer.train_step))
        with pytest.raises(KeyboardInterrupt):
            trainer.main(again)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["global_step"] == 3
    assert trainer.main([*again, "--num_workers", "1"]) == metrics
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "run"))
        assert_same(a | {"args": None}, b | {"args": None}, name)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(trainer, "train_step", partial(break_off, "epoch 1, step 2", trainer.train_step))
        trainer.main(tiny.flags(corpus, tmp_path / "uniform", *flags))
    assert tiny.losses(tmp_path / "uniform") != tiny.losses(tmp_path / "whole")[:1]  # other frames were seen


def break_off(when, step, *args):
    """A train_step that does not come back from the step named."""
    if args[4] == when:
        raise KeyboardInterrupt
    return step(*args)


def test_cached_frames_and_segments_exclude_each_other(corpus, tmp_path):
    with pytest.raises(SystemExit, match="error: --cache_frames .*segments.*leave one"):
        trainer.main(tiny.flags(corpus, tmp_path / "run", "--frame_sampling", "segments", "--cache_frames"))
    assert not (tmp_path / "run").exists()


# ---- the benchmark ----


def test_benchmark_runs(corpus, tmp_path, capsys):
    size = ["--size", "32", "--num_workers", "0"]
    bench_frames.main(["--frames", str(corpus / "frames"), "--rounds", "1", "--max_videos", "4", *size])
    bench_frames.main(["--startup", "10", "--corpus", str(tmp_path / "fake"), *size])
    out = capsys.readouterr().out
    assert out.count("read_frames, one packed file") == 2 and "180 pairs of 9 videos" in out
    with pytest.raises(SystemExit, match="error: .*index.jsonl is missing"):
        bench_frames.main(["--frames", str(tmp_path)])


def test_packed_files_give_the_same_pixels(corpus, tmp_path):
    paths = [str(path) for path in sorted((corpus / "frames" / "train1").glob("*.jpg"))]
    ways = bench_frames.ways_of_reading(paths, 32, tmp_path / "packed")
    theirs = (255 * ways[bench_frames.REFERENCE](paths)).round().to(torch.uint8)
    for name in ("read_frames, folders", "read_frames, one packed file"):
        assert torch.equal(ways[name](paths), theirs)
