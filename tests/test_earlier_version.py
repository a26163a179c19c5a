"""A run and a search index that commit a6be58c made go on, are measured and answer as they did there.

What is compared with stands in the archive, written by that commit (tests/data_a6be58c/README.md).
"""

import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import main_task_retrieval as trainer
from narvid import InputError, Retriever
from narvid.data.frames import Picture, frame_paths, read_frames
from narvid.flags import as_argv
from narvid.report import gallery, tables
from narvid.run.settings import build_parser
from narvid.search.__main__ import main as search
from narvid.search.embedding import Embedder
from narvid.search.engine import Engine
from narvid.search.store import Store

ARCHIVE = Path(__file__).with_name("data_a6be58c") / "made.tar.xz"
CLOSE = dict(rtol=1e-4, atol=1e-5)
QUERIES = ["very red turns blue", "green and then, after a while, white"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The archive's folder, which its relative paths start from, as the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def argv_of(run):
    """The command line of a run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    return as_argv({k: v for k, v in config.items() if v is not None}, "config.yaml", build_parser())


def test_the_killed_run_goes_on_to_the_same_end(home):
    shutil.copy(home / "killed" / "best.pt", home / "start.pt")  # built before last.pt replaces its weights
    trainer.main([*argv_of(home / "killed"), "--resume", "auto", "--output_dir", "killed"])
    resumed, expected = tiny.results(home / "killed"), tiny.results(home / "run")
    assert [r["metrics"] for r in resumed] == [r["metrics"] for r in expected] and len(resumed) == 3
    assert resumed[-1]["frames_kept"] == pytest.approx(expected[-1]["frames_kept"])
    one, two = (re.findall(r"epoch \d+ step .* loss (\S+)", (home / name / "log.txt").read_text())
                for name in ("killed", "run"))
    assert len(one) == 4 and [*map(float, one)] == pytest.approx([*map(float, two)], rel=1e-4)
    assert (home / "killed" / "ranks.csv").read_text() == (home / "run" / "ranks.csv").read_text()
    with np.load("killed/similarity.npz") as got, np.load("run/similarity.npz") as wanted:
        for view in ("S_qv", "S_qn"):
            np.testing.assert_allclose(got[view], wanted[view], rtol=1e-4, atol=1e-5)


def test_the_ended_run_is_evaluated_shown_and_listed(home, capsys):
    metrics = trainer.main(["--data_dir", "corpus", "--num_workers", "0", "--eval_only", "--checkpoint", "run/best.pt",
                            "--output_dir", "again"])
    assert metrics == tiny.results(home / "run")[-1]["metrics"]
    os.mkdir("runs")
    shutil.copytree("run", "runs/run")
    [run], said = tables.read_runs(Path("runs"))
    assert run.result["metrics"] == metrics and not said
    gallery.main(["--run", "run", "--out", "gallery", "--queries", "3"])
    assert "26 of 26 ranks of S_fusion are those of its ranks.csv" in capsys.readouterr().out


def test_the_retriever_scores_as_that_commit_did(home):
    model = Retriever.load("run", device="cpu")
    args = trainer.parse_args([*argv_of(home / "run"), "--checkpoint", "run/best.pt"])
    split = trainer.load_data(args, tiny.World(0, 1, torch.device("cpu")))["test"]
    frames = [read_frames(frame_paths(split.frames_dir, v, picks), Picture(32))
              for v, picks in zip(split.videos, split.picks)]
    scores = model.score(model.encode_queries(split.queries), model.encode_frames(frames, split.sentences))
    with np.load("run/similarity.npz") as wanted:
        for view, name in (("video", "S_qv"), ("narration", "S_qn")):
            np.testing.assert_allclose(scores[view].numpy(), wanted[name], rtol=1e-4, atol=1e-5)


def assert_same(answers, expected):
    """The same windows in the same order, with the same scores, frames and weights; `why` rounds them."""
    assert [(a["path"], a["window"], a["rank"]) for a in answers] == [(a["path"], a["window"], a["rank"])
                                                                      for a in expected]
    for answer, wanted in zip(answers, expected):
        for name in ("score", "s_video", "s_narration"):
            # a deviation that hardly spreads is divided by: 1e-5 of a cosine is more in the score
            assert answer[name] == (wanted[name] and pytest.approx(wanted[name], abs=1e-3)), name
        for frame, of in zip(answer["frames"], wanted["frames"], strict=True):
            assert (frame["number"], frame["time"], frame["sentence"]) == (of["number"], of["time"], of["sentence"])
            for name in ("frame_weight", "sentence_weight"):
                assert frame[name] == pytest.approx(of[name], abs=1e-4)
    assert answers[0]["why"] == expected[0]["why"]


def test_the_index_answers_as_it_did(home, capsys):
    expected = json.loads(Path("answers.json").read_text())
    Path("queries.txt").write_text("\n".join(QUERIES))
    search(["query", "index", "--queries", "queries.txt", "--json", "--moments", "--checkpoint", "run"])
    for line, wanted in zip(capsys.readouterr().out.splitlines(), expected["text"], strict=True):
        assert json.loads(line)["query"] == wanted["query"]
        assert_same(json.loads(line)["answers"], wanted["answers"])
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), tiny.COLOURS["red"]).save(picture, "PNG")
    with Store("index", read_only=True) as store:
        engine = Engine(store, Embedder.load("run", device="cpu"))
        for name, answers in (("like", engine.like_window(3, one_a_file=False)),
                              ("picture", engine.like_picture(picture.getvalue(), one_a_file=False))):
            assert_same([a._asdict() | {"frames": [f._asdict() for f in a.frames]} for a in answers], expected[name])


def test_the_index_is_brought_up_to_date(home, capsys):
    with sqlite3.connect("index/index.db") as database:
        for path, mtime in database.execute("SELECT path, mtime_ns FROM files"):
            os.utime(Path("videos", os.fsdecode(path)), ns=(mtime, mtime))
    shutil.copy("videos/clip0.mp4", "videos/clip9.mp4")
    search(["index", "videos", "--out", "index", "--checkpoint", "run", "--narrations", "narrations.jsonl",
            "--window", "4"])
    assert "1 files new, 0 changed, 0 removed, 4 as before" in capsys.readouterr().out


def test_without_its_model_one_sentence_says_what_to_do(home):
    with pytest.raises(SystemExit, match=r"error: /tmp/narvid_a6be58c/run/best.pt: the index's model is not there; say "
                                         "with --checkpoint where it lies"):
        search(["query", "index", "red"])
    with pytest.raises(InputError, match="made with another model .*weights"), Store("index", read_only=True) as store:
        stored = torch.load("run/best.pt", weights_only=True)
        stored["model"]["clip.logit_scale"] += 1
        torch.save(stored, "other.pt")
        Engine(store, Embedder.load("other.pt", device="cpu"))
