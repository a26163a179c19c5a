"""Videos in which nothing moves: a run of windows that show the same is one answer, and no score is out of bounds."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_frames import make_clip

from narvid.search import engine as engines
from narvid.search.build import update
from narvid.search.embedding import Embedder
from narvid.search.engine import Engine
from narvid.search.reading import join_alike
from narvid.search.store import Store


@pytest.fixture(scope="module")
def stills(weights, tmp_path_factory):
    """Four slides in half an hour beside a short clip, searched by frames alone: (videos, store, engine)."""
    folder = tmp_path_factory.mktemp("stills")
    (folder / "v").mkdir()
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = (220, 30, 30), (30, 160, 60), (30, 60, 220)
    make_clip(folder / "v" / "slides.mp4", [0, 4, 1800, 1803], paint=picture, size=(64, 48))
    make_clip(folder / "v" / "short.mp4", [i / 10 for i in range(40)], paint=picture, size=(64, 48))
    embedder = Embedder.load(weights, narration=False, device="cpu")
    assert update(folder / "v", folder / "i", embedder).windows == 2
    store = Store(folder / "i", read_only=True)
    return folder / "v", store, Engine(store, embedder)


def test_each_video_is_one_answer(stills):
    _, store, engine = stills
    slides, short = store.windows(sorted(store.all_windows(), key=lambda n: -store.windows([n])[0].end))
    assert (slides.start, slides.end) == (0, pytest.approx(1803.5, abs=0.6)) and short.end == pytest.approx(4, abs=0.1)
    for answers in [*engine.search(["very red turns blue", "green"]), engine.like_window(int(short.id))]:
        assert len({answer.path for answer in answers}) == len(answers)


def test_no_score_is_out_of_bounds(stills):
    """All pairs of copies of one picture are alike; a text lies far from them all."""
    _, store, engine = stills
    (_, spread), _ = store.statistics["like"]
    assert spread == 0
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, "PNG")
    for answers in (*engine.search(["very red turns blue"]), engine.like_picture(file.getvalue())):
        assert len(answers) == 2 and all(abs(answer.score) < 10 for answer in answers)
        assert [a.s_video for a in answers] == sorted((a.s_video for a in answers), reverse=True)
    assert "0.0 standard deviations" in answers[0].why  # the picture's


def test_stage_one_ranks_as_stage_two_where_nothing_spreads(stills):
    _, store, engine = stills
    queries = engine.embedder.queries(["very red turns blue", "green"])
    flat, usual = ((0.9, 0.0), None), ((0.9, 1.0), None)
    assert np.array_equal(engine.embedder.pool_queries(queries, flat), engine.embedder.pool_queries(queries, usual))
    scores = {"video": torch.tensor([[0.2, 0.3]])}
    fused = engines.fuse(scores, torch.zeros(1, 2, dtype=torch.bool), 0.5, flat)
    assert fused[0].tolist() == pytest.approx([-1.4, -1.2])


def test_a_run_of_windows_that_show_the_same():
    windows = [(0, 30, [0, 1]), (15, 45, [1]), (30, 60, [1]), (45, 75, [1, 1]), (60, 90, [1, 2]), (75, 99, [3])]
    runs = [(0, 30, [0, 1]), (15, 75, [1]), (60, 90, [1, 2]), (75, 99, [3])]
    assert join_alike(windows, lambda n: n) == runs
    sentences = {0: "a", 1: "b", 2: "c", 3: "c"}
    assert join_alike(windows, lambda n: ("one picture", sentences[n])) == runs  # the sentences differ
    assert join_alike(windows, lambda n: "one picture") == [(0, 99, [0, 1])]
