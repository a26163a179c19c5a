"""--feature_cache: heads trained from features are those trained from pixels; nothing stale is read, nothing lost.

On one CPU the two agree bit for bit here. That is not promised: a matrix product may round otherwise with another
number of rows, and the cache encodes in other batches than training does. Hence the tolerances.
"""

import errno
import itertools
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main_task_retrieval as trainer
from narvid import InputError, distributed
from narvid.data import datasets
from narvid.run import feature_cache
from narvid.data.datasets import FrameDataset, collate
from narvid.data.frames import Picture
from narvid.towers.tokenizer import Tokenizer
from narvid.data.features import Store
from narvid.run.feature_cache import with_features

ALONE = distributed.World(0, 1, torch.device("cpu"))
FROZEN = ("--freeze_towers", "--save_similarity", "--select_on", "last", "--epochs", 1, "--batch_size", 8)


def prepare(argv):
    """The flags of a run -> (args, splits, model, the arguments of with_features behind the folder)."""
    args = trainer.parse_args([*map(str, argv)])
    trainer.seed_everything(args)
    splits = trainer.load_data(args, ALONE)
    model = trainer.build_model(args)
    return args, splits, model, (model.clip, trainer.encoding_of(model, args, ALONE))


def entries(cache):
    """{kind: keys} of the only sub-folder."""
    [folder] = cache.iterdir()
    return {kind: set(Store(folder, kind).place) for kind in feature_cache.KINDS}


@pytest.fixture(scope="module")
def start(corpus, weights, tmp_path_factory):
    """argv of a run with frozen towers."""
    return tiny.flags(corpus, tmp_path_factory.mktemp("run") / "none", "--checkpoint", weights, *FROZEN)


@pytest.fixture(scope="module")
def prepared(start):
    """prepare(start); not to be changed."""
    return prepare(start)


@pytest.fixture(scope="module")
def filled(prepared, tmp_path_factory):
    """A cache of all that the runs of `start` need -> (folder, splits that read it)."""
    cache = tmp_path_factory.mktemp("cache")
    _, splits, _, rest = prepared
    return cache, with_features(splits, cache, *rest, ALONE)


def train(corpus, weights, run, *more):
    """A run -> (loss parts of every step, gradients of the first, test metrics)."""
    parts, gradients, real_step = [], {}, trainer.train_step

    def step(model, *rest):
        taken = real_step(model, *rest)
        parts.append(taken[0])
        if not gradients:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        metrics = trainer.main(tiny.flags(corpus, run, "--checkpoint", weights, *FROZEN, *more))
    return parts, gradients, metrics


# ---- the same training ----


def test_a_run_from_features_is_the_run_from_pixels(corpus, weights, filled, tmp_path, monkeypatch):
    parts, gradients, metrics = train(corpus, weights, tmp_path / "pixels")
    assert len(parts) == 4
    monkeypatch.setattr(datasets, "read_frames", None)  # no pixel is read, of no split
    more = ("--feature_cache", filled[0], "--num_workers", 1)
    parts_2, gradients_2, metrics_2 = train(corpus, weights, tmp_path / "features", *more)
    assert metrics_2 == metrics
    for ours, theirs in zip(parts_2, parts, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = (np.load(tmp_path / name / "similarity.npz") for name in ("pixels", "features"))
    assert all(np.allclose(one[name], other[name], atol=1e-5) for name in ("S_qv", "S_qn"))

    state = torch.load(tmp_path / "features/best.pt", weights_only=True)["model"]
    trained = {name for name in state if not name.startswith("clip.")} | {"clip.logit_scale"}
    assert gradients_2.keys() == trained and gradients.keys() == trained
    for name, gradient in gradients_2.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-6)
        # A softmax does not see what all its inputs have in common: these gradients are 0 but for rounding.
        assert gradient.any() or name.endswith((".key.bias", "word_weight_mlp.2.bias")), name


METHODS = {"narvid": (), "bf16": ("--precision", "bf16"), "fp16 weights": ("--recipe", "reported"),
           "segments": ("--frame_sampling", "segments", "--max_frames", 3),
           "clip4clip": ("--method", "clip4clip"), "clip2video": ("--method", "clip2video"),
           "cap4video": ("--method", "cap4video", "--titles", "narrations.jsonl")}
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.mark.parametrize("more", METHODS.values(), ids=METHODS)
def test_every_method_makes_the_same_of_features(corpus, tmp_path, monkeypatch, more):
    monkeypatch.chdir(corpus)
    args, splits, model, rest = prepare([*tiny.flags(corpus, tmp_path / "run"), "--freeze_towers", *more,
                                         "--eval_precision", "train"])
    dtype = torch.float16 if args.recipe == "reported" else getattr(torch, TYPES[args.precision])
    close = 1e-5 if dtype == torch.float32 else 3e-2  # a step of bf16 is 1/128
    model.eval()
    made = []
    for split in (splits["train"], with_features({"train": splits["train"]}, tmp_path, *rest, ALONE)["train"]):
        segments = args.max_frames if args.frame_sampling == "segments" else None
        dataset = FrameDataset(split, split.video_of_query, Picture(tiny.SIDE), segments=segments)
        batch = collate([dataset[i] for i in range(0, 39, 3)], split=split, tokenize=Tokenizer({}),
                        max_words=args.max_words, max_frames=args.max_frames, with_queries=True)
        with trainer.autocast(args, ALONE.device), torch.no_grad():
            queries, videos, _ = model(*batch[2:])
        made.append([*queries, *videos])
    assert batch.frames.dtype == batch.tokens.dtype == dtype and batch.frames.ndim == 3
    words = batch.word_mask
    for ours, theirs in zip(made[1], made[0], strict=True):
        if theirs is not None and theirs.shape[:2] == words.shape:  # of padded words nothing is kept
            ours, theirs = ours[words], theirs[words]
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_two_processes_fill_one_cache_and_train_from_it(corpus, weights, filled, tmp_path):
    flags = ("--dropout", 0, "--feature_cache")
    alone, _, _ = train(corpus, weights, tmp_path / "alone", *flags, filled[0])
    argv = tiny.flags(corpus, tmp_path / "run", "--checkpoint", weights, *FROZEN, *flags, tmp_path / "cache")
    ranks = tiny.start_ranks(2, trainer.main, argv, log=tmp_path / "log")
    assert [tiny.wait(rank) for rank in ranks] == [0, 0], (tmp_path / "log.0").read_text()
    assert tiny.losses(tmp_path / "run") == pytest.approx([sum(parts.values()) for parts in alone], abs=2e-4)
    assert entries(tmp_path / "cache") == entries(filled[0])
    assert len(list(tmp_path.glob("cache/*/eos-*.pt"))) == 2  # either has written its share


# ---- what is stored ----


def test_entries_are_what_the_towers_give(prepared, filled):
    _, splits, model, _ = prepared
    for name, split in filled[1].items():
        pixels = FrameDataset(splits[name], np.arange(len(split.videos)), Picture(tiny.SIDE))
        for video in range(len(split.videos)):
            expected = model.clip.encode_frames(pixels[video].frames)
            torch.testing.assert_close(split.features.of_video(video), expected, rtol=1e-5, atol=1e-5)
    split = filled[1]["train"]
    texts = sorted(set(split.queries), key=len)[::9]
    tokens, mask = Tokenizer({})(texts, 24)
    both, mask_2 = split.features.of_queries(texts)
    assert torch.equal(mask, mask_2)
    end = mask.sum(dim=1)
    assert torch.equal(both[:, 0], both[torch.arange(len(texts)), end])  # of these towers the last word is the eos
    assert not both[:, 1:][~mask].any()
    store = pickle.loads(pickle.dumps(split.features.words))  # what a worker gets that is not forked
    assert len(pickle.dumps(split.features.words)) < 1000 and torch.equal(store[texts[0]], both[0, :end[0] + 1])


def test_other_weights_words_and_formats_have_folders_of_their_own(start, filled, tmp_path):
    cache = shutil.copytree(filled[0], tmp_path / "cache")
    before = set(cache.rglob("*"))
    _, splits, model, (towers, encoding) = prepare(start)
    few = {"test": splits["test"]}
    with torch.no_grad():
        towers.logit_scale.add_(1)  # is trained, and changes no feature
    with_features(few, cache, towers, encoding, ALONE)
    assert set(cache.rglob("*")) == before
    with torch.no_grad():
        towers.visual.proj[0, 0] += 1e-3
    with_features(few, cache, towers, encoding, ALONE)
    with_features(few, cache, towers, encoding._replace(max_words=20), ALONE)
    bf16 = encoding._replace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    with_features(few, cache, towers, bf16, ALONE)
    assert len(list(cache.iterdir())) == 4


def test_a_jpg_written_anew_is_encoded_anew(corpus, start, filled, tmp_path):
    cache = shutil.copytree(filled[0], tmp_path / "cache")
    frames = shutil.copytree(corpus / "frames", tmp_path / "frames")
    _, splits, model, rest = prepare([*start, "--frames", frames])
    before = entries(cache)
    with_features(splits, cache, *rest, ALONE)
    assert entries(cache) == before  # a copy with its times is the same

    video = splits["test"].videos[3]
    Image.new("RGB", (tiny.SIDE, tiny.SIDE), (1, 200, 3)).save(frames / video / "00000.jpg")
    features = with_features(splits, cache, *rest, ALONE)["test"].features
    [new] = entries(cache)["frames"] - before["frames"]
    assert new.split()[0] == video
    pixels = FrameDataset(splits["test"], np.arange(4), Picture(tiny.SIDE))[3].frames
    torch.testing.assert_close(features.of_video(3), model.clip.encode_frames(pixels), rtol=1e-5, atol=1e-5)


# ---- interrupted, refused ----


def fill_and_die(argv, cache, moment):
    """Fill with a file for every few entries; killed before the n-th of them gets its name."""
    feature_cache.SECONDS, feature_cache.FRAMES, feature_cache.TEXTS = -1, 20, 10
    count, real_replace = itertools.count(), os.replace

    def replace(source, target):
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(source, target)

    os.replace = replace
    _, splits, _, rest = prepare(argv)
    with_features(splits, cache, *rest, ALONE)


@pytest.mark.parametrize("moment, left", [(4, [12, 38, 71]), (17, [0, 0, 21])])
def test_a_killed_filling_goes_on_where_it_was(start, prepared, filled, tmp_path, monkeypatch, moment, left):
    cache = tmp_path / "cache"
    assert tiny.wait(tiny.start(fill_and_die, start, cache, moment, log=tmp_path / "log")) == -signal.SIGKILL
    missing = {kind: keys - entries(cache)[kind] for kind, keys in entries(filled[0]).items()}
    assert [len(keys) for keys in missing.values()] == left
    filled_in, real = [], feature_cache._fill
    monkeypatch.setattr(feature_cache, "_fill", lambda *some: filled_in.append(some[1]) or real(*some))
    _, splits, _, rest = prepared
    with_features(splits, cache, *rest, ALONE)
    assert {kind: {key for key, _ in of_kind} for kind, of_kind in filled_in[0].items()} == missing
    assert entries(cache) == entries(filled[0])
    for kind in feature_cache.KINDS:
        ours, theirs = (Store(*folder.iterdir(), kind) for folder in (cache, filled[0]))
        for key in theirs.place:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


REFUSALS = {"the disk is full; make room": lambda patch: patch.setattr(torch, "save", full_disk),
            "its disk has 0.00 left; make room": lambda patch: patch.setattr(
                shutil, "disk_usage", lambda _: SimpleNamespace(free=0)),
            "one folder that all of them see": lambda patch: patch.setattr(
                feature_cache, "agree", lambda error, _: error),
            "cannot be written: Not a directory": None}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_stops_the_filling_is_said_in_one_sentence(prepared, tmp_path, monkeypatch, words):
    _, splits, _, rest = prepared
    cache, world = tmp_path / "cache", ALONE
    if REFUSALS[words]:
        REFUSALS[words](monkeypatch)
    else:
        cache.write_text("")
    if "all of them" in words:
        world = world._replace(size=2)  # the other process writes to a disk of its own
    with pytest.raises(InputError) as error:
        with_features({"test": splits["test"]}, cache, *rest, world)
    assert words in str(error.value) and str(cache) in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_file_is_named(prepared, filled, tmp_path):
    cache = shutil.copytree(filled[0], tmp_path / "cache")
    [path] = cache.glob("*/eos-*.pt")
    path.write_bytes(path.read_bytes()[:500])
    _, splits, _, rest = prepared
    with pytest.raises(InputError, match=f"{path}: .*damaged.*delete it"):
        with_features(splits, cache, *rest, ALONE)


WRONG = {"add --freeze_towers": (), "--no-cache_frames": ("--freeze_towers", "--cache_frames"),
         "--method internvideo": ("--freeze_towers", "--method", "internvideo"),
         "--linear_patch 3d": ("--freeze_towers", "--method", "clip4clip", "--linear_patch", "3d"),
         "--stage titles": ("--freeze_towers", "--method", "cap4video", "--stage", "titles")}


@pytest.mark.parametrize("words", WRONG)
def test_flags_that_features_cannot_serve_are_refused(corpus, tmp_path, words):
    with pytest.raises(SystemExit, match=f"^error: .*feature_cache.*{words}|^error: .*{words}.*feature_cache"):
        trainer.parse_args(["--data_dir", str(corpus), "--output_dir", str(tmp_path), "--feature_cache", "cache",
                            *WRONG[words]])
    assert not Path("cache").exists()
