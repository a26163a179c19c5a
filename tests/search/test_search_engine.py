"""narvid.search's embedding, stage one and engine: what is searched is what evaluation measures, and an answer is the
best of what may be an answer.

The index is written by hand, from a tiny corpus: a file a test video, a window a file unless a test says otherwise.
"""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main_task_retrieval as trainer
from narvid import InputError, Retriever, evaluation, fusion
from narvid.methods import METHODS, clip4clip
from narvid.distributed import World
from narvid.data.frames import Picture, frame_paths, read_frames
from narvid.data.videos import read_video
from narvid.files import read_lines
from narvid.search import engine as engines
from narvid.search import stage_one
from narvid.search.answers import Seen, in_words
from narvid.search.embedding import Embedder
from narvid.search.engine import Engine, compute_statistics, measure_level
from narvid.search.parts import Part, parse, sentence
from narvid.search.stage_one import StageOne
from narvid.search.statistics import NEUTRAL, height, nonsense
from narvid.search.store import Store
from narvid.towers import load_towers

WORLD = World(0, 1, torch.device("cpu"))
QUERIES = ["very red turns blue", "green and then, after a while, white", "black pink", "something brown becomes red"]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    """The tiny NarVid with flags that say how it is evaluated; p keeps more than one frame."""
    folder = tmp_path_factory.mktemp("run")
    stored = torch.load(tiny.write_checkpoint(folder / "start.pt", corpus / "wide.json"), weights_only=True)
    stored["args"] |= {"max_frames": 6, "max_words": 24, "precision": "fp32", "filter_p": 0.9, "fusion_weight": 0.6}
    (folder / "start.pt").unlink()
    torch.save(stored, path := folder / "best.pt")
    return path


@pytest.fixture(scope="module")
def measured(corpus, checkpoint):
    """What evaluation makes of the test split: (split, videos, scores, encoding)."""
    args = trainer.parse_args(tiny.flags(corpus, "unused", "--clip_model", corpus / "wide.json", "--eval_only",
                                         "--checkpoint", checkpoint, "--eval_batch_size", 4))
    model = trainer.build_model(args)
    split = trainer.load_data(args, WORLD)["test"]
    encoding = trainer.encoding_of(model.eval(), args, WORLD)
    videos = evaluation.encode_videos(model, split, encoding, WORLD)
    return split, videos, evaluation.score_queries(model, split.queries, videos, encoding, WORLD), encoding


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint.parent, device="cpu")


@pytest.fixture(scope="module")
def alone(checkpoint):
    """The same model without a narration."""
    return Embedder.load(checkpoint, narration=False, device="cpu")


def pictures(split, size=tiny.SIDE):
    return [read_frames(frame_paths(split.frames_dir, video, picks), Picture(size))
            for video, picks in zip(split.videos, split.picks)]


def put(store, embedder, path, frames, sentences, *, seconds=None, windows=None):
    """One file, its frames a second apart; windows: lists of frame numbers, one of all if not given."""
    windows = windows or [list(range(len(frames)))]
    given = [None] * len(frames) if sentences is None else sentences
    videos = embedder.videos([frames[numbers] for numbers in windows], [[given[n] for n in w] for w in windows])
    store.put_file(path, 1, 1, seconds or float(len(frames)), "",
                   [(n, float(n), b"jpg", sentence) for n, sentence in enumerate(given)],
                   [(float(w[0]), float(w[-1] + 1), w) for w in windows], embedder.pack(videos),
                   embedder.pool_videos(videos))


def new_store(folder, embedder, **settings):
    return Store(folder, create={**embedder.settings, "videos": "/nowhere", "window": 4.0, "fps": 1.0,
                                 "short_side": tiny.SIDE, **settings})


@pytest.fixture(scope="module")
def index(measured, embedder, tmp_path_factory):
    """All test videos with their sentences and the statistics of the whole matrix."""
    split, _, scores, _ = measured
    store = new_store(tmp_path_factory.mktemp("index") / "i", embedder)
    for name, frames, sentences in zip(split.videos, pictures(split), split.sentences):
        put(store, embedder, f"{'even' if int(name[4:]) % 2 == 0 else 'odd'}/{name}.mp4", frames, sentences)
    store.statistics = compute_statistics(store, embedder, None) | {
        "text": tuple(fusion.matrix_statistics(scores[view]) for view in ("video", "narration"))}
    return store


def name(answer):
    return Path(answer.path).stem


def assert_ranked(answers, expected, names):
    """In the order of the expected scores (V,), but for neighbours closer than rounding."""
    place = {video: expected[v].item() for v, video in enumerate(names)}
    for answer in answers:
        assert answer.score == pytest.approx(place[name(answer)], abs=2e-4)
    ranked = [place[name(answer)] for answer in answers]
    assert all(a > b - 1e-4 for a, b in zip(ranked, ranked[1:]))
    assert [answer.rank for answer in answers] == list(range(1, len(answers) + 1))


# --------------------------------------------------------------------------------------------------- the embedder


def test_features_and_scores_are_evaluations(measured, embedder):
    split, expected, scores, _ = measured
    videos = embedder.videos(pictures(split), split.sentences)
    assert torch.equal(videos.mask, expected.mask) and torch.equal(videos.narration_mask, expected.narration_mask)
    for name, mask in ("frames", videos.mask), ("narration", videos.narration_mask):  # nothing reads what is masked
        torch.testing.assert_close(getattr(videos, name)[mask], getattr(expected, name)[mask], **CLOSE)
    got = embedder.score(embedder.queries(split.queries), videos)
    assert list(got) == ["video", "narration"]
    for view in got:
        torch.testing.assert_close(got[view], scores[view], **CLOSE)
    assert (embedder.views, embedder.narration, embedder.max_frames, embedder.weight) == (tuple(got), True, 6, 0.6)


def test_what_is_packed_comes_back(measured, embedder):
    split, *_ = measured
    videos = embedder.videos(pictures(split)[:3], split.sentences[:3])
    again = embedder.unpack(embedder.pack(videos))
    assert again._fields == videos._fields and all(torch.equal(a, b) for a, b in zip(again, videos))


def test_without_a_narration_no_sentence_counts(measured, alone, embedder):
    """Frames alone: no sentence, however given, moves a bit; the frames equal those of a video without a narration."""
    split, *_ = measured
    frames = pictures(split)[:4]
    videos = alone.videos(frames, [["red and green"] * len(x) for x in frames])
    without = embedder.videos(frames)
    assert videos.narration is None and alone.views == ("video",)
    assert not embedder.has_sentence(without).any() and not alone.has_sentence(videos).any()
    assert torch.equal(videos.frames, without.frames)
    queries = alone.queries(QUERIES)
    assert list(alone.score(queries, videos)) == ["video"]
    expected = embedder.score(queries, without)["video"]
    torch.testing.assert_close(alone.score(queries, videos)["video"], expected, **CLOSE)
    narrated = embedder.videos(frames, split.sentences[:4])
    assert not torch.allclose(narrated.frames, without.frames, atol=1e-3)


def test_stage_one_vectors_are_frames_and_sentences_of_length_one(measured, embedder):
    split, *_ = measured
    videos = embedder.videos(pictures(split)[:5], split.sentences[:4] + [[None] * len(split.picks[4])])
    pooled = embedder.pool_videos(videos)
    vectors, has_sentence = embedder.vectors_of(pooled, "text")
    dim = vectors.shape[2] // 2
    assert has_sentence.tolist() == [True] * 4 + [False]
    assert np.array_equal(vectors.any(axis=2), videos.mask.numpy())
    lengths = np.linalg.norm(vectors.reshape(-1, 2, dim), axis=2).reshape(*vectors.shape[:2], 2)
    assert lengths[..., 0][videos.mask] == pytest.approx(1, abs=1e-5)
    assert lengths[:4, :, 1][videos.mask[:4]] == pytest.approx(1, abs=1e-5)  # a frame's own, or the narration's mean
    assert not vectors[4, :, dim:].any()
    means, _ = embedder.vectors_of(pooled, "like")  # with these the coarse score of `like` is exact
    assert means.shape == (5, 1, 2 * dim)
    coarse = clip4clip.mean_pool(videos.look, videos.mask)
    torch.testing.assert_close(torch.from_numpy(means[:, 0, :dim]), coarse, **CLOSE)
    queries = embedder.queries(QUERIES)
    statistics = ((0.1, 0.2), (0.3, 0.05))
    got = embedder.pool_queries(queries, statistics) @ vectors[0, 0]
    eos = torch.nn.functional.normalize(queries.eos, dim=-1).numpy()
    expected = 0.6 / 0.2 * eos @ vectors[0, 0, :dim] + 0.4 / 0.05 * eos @ vectors[0, 0, dim:]
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("flags, searched", [(["--head", "meanP"], False), (["--head", "tightTransf"], None)], ids=str)
def test_clip4clip_is_searched_but_for_its_tight_head(flags, searched, corpus, measured, tmp_path):
    split, *_ = measured
    argv = [*tiny.flags(corpus, "unused")[:4], "--output_dir", "unused", "--method", "clip4clip", *flags]
    args = trainer.parse_args([*argv, "--max_frames", "6", "--precision", "fp32"])
    model = trainer.build_model(args)
    state = {"model": model.state_dict(), "clip_config": vars(model.clip.config), "args": vars(args)}
    torch.save(state, tmp_path / "best.pt")
    if searched is None:
        with pytest.raises(InputError, match="clip4clip --head tightTransf cannot be searched with"):
            Embedder.load(tmp_path)
        return
    found = Embedder.load(tmp_path, device="cpu")
    store = new_store(tmp_path / "i", found)
    for video, frames in zip(split.videos, pictures(split)):
        put(store, found, f"{video}.mp4", frames, None)
    store.statistics = compute_statistics(store, found, QUERIES)
    answers = Engine(store, found).search(QUERIES[:1], top=3)[0]
    scores = found.score(found.queries(QUERIES[:1]), found.videos(pictures(split)))["video"][0]
    assert [name(answer) for answer in answers] == [split.videos[v] for v in scores.argsort(descending=True)[:3]]
    assert answers[0].s_narration is None
    assert sum(seen.frame_weight for seen in answers[0].frames) == pytest.approx(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain CLIP of a weights file."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.json").write_text(json.dumps(tiny.CLIP | {"quick_gelu": True}))
    towers = load_towers(str(folder / "clip.json"))
    torch.save(towers.state_dict(), folder / "weights.pt")
    return Embedder.load(None, clip_model=str(folder / "clip.json"), clip_pretrained=str(folder / "weights.pt"),
                         device="cpu")


def test_plain_clip_is_searched_by_its_pooled_features(plain, measured, tmp_path):
    split, *_ = measured
    embedder = plain
    assert embedder.settings["method"] == "zeroshot" and embedder.settings["checkpoint"] is None
    store = new_store(tmp_path / "i", embedder)
    for video, frames, sentences in zip(split.videos, pictures(split), split.sentences):
        put(store, embedder, f"{video}.mp4", frames, sentences if video != "test3" else None)
    store.statistics = compute_statistics(store, embedder, None)
    given = [s if v != "test3" else [None] * len(s) for v, s in zip(split.videos, split.sentences)]
    scores = embedder.score(embedder.queries(QUERIES), embedder.videos(pictures(split), given))
    both = torch.tensor([v != "test3" for v in split.videos]).expand(len(QUERIES), -1)
    expected = engines.fuse(scores, both, 0.5, store.statistics["text"])
    for b, answers in enumerate(Engine(store, embedder).search(QUERIES, top=20)):
        assert len(answers) == len(split.videos)
        assert_ranked(answers, expected[b], split.videos)


def test_the_wrong_model_is_refused(index, alone, plain, embedder):
    with pytest.raises(InputError, match=r"made with another model \(method narvid there, zeroshot here, .*"
                                         r"give --checkpoint .*run"):
        Engine(index, plain)
    with pytest.raises(InputError, match="narration True there, False here"):
        Engine(index, alone)
    embedder.check(embedder.settings | {"checkpoint": "/moved/best.pt"}, "index")  # the same, wherever it lies


def test_an_index_is_searched_in_the_number_format_it_was_made_in(checkpoint, embedder):
    """Indexes older than the flag were made in training's."""
    stored = torch.load(checkpoint, weights_only=True)
    stored["args"]["precision"] = "bf16"
    torch.save(stored, path := checkpoint.with_name("bf16.pt"))
    now, then = (Embedder.load(path, device="cpu", eval_precision=which) for which in ("fp32", "train"))
    older = {name: value for name, value in then.settings.items() if name not in ("eval_precision", "flags")}
    then.check(older, "index")
    with pytest.raises(InputError, match="number format bf16 there, fp32 here"):
        now.check(older, "index")
    embedder.check({name: value for name, value in embedder.settings.items() if name != "eval_precision"}, "index")
    assert torch.equal(now.queries(QUERIES).eos, embedder.queries(QUERIES).eos)
    assert not torch.allclose(then.queries(QUERIES).eos, embedder.queries(QUERIES).eos, atol=1e-5)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is neither a run's folder with a best.pt nor an exported model"):
        Embedder.load(tmp_path)


# ------------------------------------------------------------------------------------------------------ the engine


def test_every_query_of_the_split_is_ranked_as_in_evaluation(measured, index, embedder):
    split, _, scores, _ = measured
    expected = fusion.fuse(scores["video"], scores["narration"], 0.6)
    for b, answers in enumerate(Engine(index, embedder).search(split.queries, top=len(split.videos))):
        assert len(answers) == len(split.videos)
        assert_ranked(answers, expected[b], split.videos)
        v = split.videos.index(name(answers[0]))
        assert answers[0].s_video == pytest.approx(scores["video"][b, v].item(), abs=1e-5)
        assert answers[0].s_narration == pytest.approx(scores["narration"][b, v].item(), abs=1e-5)


def test_an_answer_shows_what_the_filter_kept(measured, index, embedder):
    split, videos, *_ = measured
    answers = Engine(index, embedder).search(QUERIES, top=11)
    weights = embedder.filter_weights(embedder.queries(QUERIES), videos)
    for b, found in enumerate(answers):
        for answer in found:
            v = split.videos.index(name(answer))
            assert [seen.sentence for seen in answer.frames] == split.sentences[v]
            n = len(answer.frames)
            assert [seen.frame_weight for seen in answer.frames] == pytest.approx(weights["video"][b, v, :n], abs=1e-4)
            assert sum(seen.sentence_weight for seen in answer.frames) == pytest.approx(1)
            assert not any(seen.sentence_weight for seen in answer.frames if seen.sentence is None)
            best = max(answer.frames, key=lambda seen: seen.frame_weight)
            assert n == 1 or f"the frame at {best.time:.1f} s counts most" in answer.why and "sentences" in answer.why


def test_few_candidates_are_scored_exactly(index, embedder):
    every = Engine(index, embedder).search(QUERIES, top=11)
    score_of = [{answer.window: answer.score for answer in answers} for answers in every]
    few = Engine(index, embedder, candidates=4)
    found = few.search(QUERIES, top=11)
    stage = few.stages["text"]._now.index
    near = stage.nearest(embedder.pool_queries(embedder.queries(QUERIES), index.statistics["text"]), 4)
    for b, answers in enumerate(found):
        assert {answer.window for answer in answers} == set(near[b].tolist()) and len(answers) == 4
        assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)
        for answer in answers:
            assert answer.score == pytest.approx(score_of[b][answer.window], abs=1e-5)
    assert few.search(QUERIES, top=11, exact=True) == every


def test_queries_that_share_what_they_read_are_answered_as_each_alone(index, embedder, monkeypatch):
    few, found = Engine(index, embedder, candidates=4), {}
    for shared in (0, 100):  # each query's candidates by themselves, and all queries' at once
        monkeypatch.setattr("narvid.search.engine.SHARED", shared)
        found[shared] = few.search(QUERIES, top=11)
    alone = [few.search([query], top=11)[0] for query in QUERIES]
    for together in found.values():
        for answers, own in zip(together, alone, strict=True):
            assert [(a.window, a.words, a.more) for a in answers] == [(a.window, a.words, a.more) for a in own]
            assert [a.score for a in answers] == pytest.approx([a.score for a in own], abs=1e-5)


def test_filters_leave_out_before_anything_is_ranked(index, embedder):
    """Six videos are even, more than there are candidates; stage one must still look among the odd ones."""
    few = Engine(index, embedder, candidates=2)
    for answers in few.search(QUERIES, folder="odd", top=11):
        assert len(answers) == 2 and all(answer.path.startswith("odd/") for answer in answers)
    lengths = {file.id: file.seconds for file in index.files()}
    for answers in few.search(QUERIES, min_seconds=3, max_seconds=5, top=11):
        assert answers and all(3 <= lengths[answer.file] <= 5 for answer in answers)
    assert few.search(QUERIES, folder="od") == [[]] * len(QUERIES)  # a folder, not the beginning of a name


def test_of_windows_that_overlap_the_better_is_an_answer(measured, embedder, tmp_path):
    split, *_ = measured
    frames = torch.cat(pictures(split))[:12]
    store = new_store(tmp_path / "i", embedder)
    windows = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    put(store, embedder, "long.mp4", frames[:10], ["a picture of red"] * 10, windows=windows)
    put(store, embedder, "other.mp4", frames[10:], ["a picture of red"] * 2, windows=[[0, 1]])
    store.statistics = compute_statistics(store, embedder, QUERIES)
    engine = Engine(store, embedder)
    scores = embedder.score(embedder.queries(QUERIES), embedder.unpack(store.features([1, 2, 3, 4])))
    fused = engines.fuse(scores, torch.ones(len(QUERIES), 4, dtype=bool), 0.6, store.statistics["text"])
    for b, answers in enumerate(engine.search(QUERIES, one_a_file=False)):
        of_long = [answer for answer in answers if answer.path == "long.mp4"]
        assert of_long[0].window == 1 + fused[b].argmax().item()
        spans = sorted((answer.start, answer.end) for answer in of_long)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        assert (of_long[0].end - of_long[0].start, len(answers) - len(of_long)) == (4, 1)
    like = engine.like_window(2)
    assert {answer.window for answer in like} == {4, 5}  # without itself, 1 and 3, which overlap it


def test_an_answer_is_a_file_with_its_further_moments(measured, embedder, tmp_path):
    split, *_ = measured
    store = new_store(tmp_path / "i", embedder)
    frames = torch.cat(pictures(split))
    windows = [[0, 1], [1, 2], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    put(store, embedder, "long.mp4", frames[:12], ["a picture of red"] * 12, windows=windows)
    for video in range(4):
        put(store, embedder, f"{video}.mp4", frames[12 + 2 * video:14 + 2 * video], ["a picture of blue"] * 2)
    store.statistics = compute_statistics(store, embedder, QUERIES)
    engine = Engine(store, embedder)
    apart = engine.search(QUERIES, one_a_file=False)
    for alone, answers in zip(apart, engine.search(QUERIES)):
        assert [a.path for a in answers] == list(dict.fromkeys(a.path for a in alone)) and answers.total == 5
        [of_long] = [a for a in answers if a.path == "long.mp4"]
        others = [a for a in alone if a.path == "long.mp4"]
        assert (of_long.window, of_long.score) == (others[0].window, others[0].score)
        scores = store.all_windows()
        groups = engine._groups([sentence(QUERIES[apart.index(alone)])])
        fused = engine._score(groups, scores, store.statistics, None)[0].fused[0]
        near = np.median(fused) + 0.5 * (fused.max() - np.median(fused))
        expected = [a.window for a in others[1:] if a.score >= near]
        assert [m.window for m in of_long.moments] == expected and of_long.more == len(expected)
        assert all(m.frame in store.windows([m.window])[0].picks for m in of_long.moments)
    for first, some in zip(engine.search(QUERIES, top=5), engine.search(QUERIES, top=2, skip=2)):
        assert some == first[2:4] and [a.rank for a in some] == [3, 4] and some.total == 5


def test_an_abandoned_search_ends(index, embedder):
    asked = []
    with pytest.raises(engines.Abandoned):
        Engine(index, embedder).search(QUERIES, wanted=lambda: asked.append(1))
    assert len(asked) == 1


def test_what_fits_stands_higher_than_nonsense(measured, index, embedder, monkeypatch):
    for read_in in ("statistics", "engine"):
        monkeypatch.setattr(f"narvid.search.{read_in}.JUDGED_FROM", 5)
    level = measure_level(index, embedder)
    heights = [a.height for a in Engine(index, embedder).rows(nonsense())]
    assert len(heights) == 64 and level == pytest.approx(np.quantile(heights, 0.5))
    try:
        for said, at in ((True, -1e9), (False, 1e9), (None, None)):
            index.set_fact("level", at)
            assert {answers.fits for answers in Engine(index, embedder).search(QUERIES)} == {said}
    finally:
        index.set_fact("level", None)
    assert height(np.zeros(4)) is None
    row = np.concatenate([np.linspace(-1, 1, 201), [3.0]])  # half of the deviations lie below about 0.5
    assert height(row) == pytest.approx(3 / 4 + 3 / (1.4826 * 0.5) / 2, rel=0.03)


@pytest.mark.parametrize("frames, end, words", [
    ([(0, 0.1, 0, "a"), (2, 0.7, 0.2, "red  "), (4, 0.2, 0, "b")], 6, "0:02 to 0:04: red"),
    ([(0, 0.4, 0, None), (30, 0.4, 0, None), (60, 0.1, 0, None)], 90, "0:00 to 1:00"),
    ([(3599, 0.4, 0.4, "x"), (3601, 0.4, 0.4, "x")], 3605.5, "59:59 to 1:00:05: x")])
def test_an_answer_in_words(frames, end, words):
    frames = [Seen(n, time, sentence, *weights) for n, (time, *weights, sentence) in enumerate(frames)]
    assert in_words(frames, end) == words


def test_windows_without_a_sentence_are_scored_by_their_frames(measured, embedder, tmp_path, monkeypatch):
    split, *_ = measured
    store = new_store(tmp_path / "i", embedder)
    without = {"test1", "test5", "test7"}
    for video, frames, sentences in zip(split.videos, pictures(split), split.sentences):
        put(store, embedder, f"{video}.mp4", frames, None if video in without else sentences)
    statistics = store.statistics = compute_statistics(store, embedder, QUERIES)
    ids = store.all_windows()
    given = embedder.has_sentence(embedder.unpack(store.features(ids)))
    scores = embedder.score(embedder.queries(QUERIES), embedder.unpack(store.features(ids)))["narration"][:, given]
    assert statistics["text"][1] == pytest.approx(fusion.matrix_statistics(scores), abs=1e-5)
    mean, std = statistics["text"][0]
    for candidates in (100, 3):
        for answers in Engine(store, embedder, candidates=candidates).search(QUERIES, top=11):
            alone = [answer for answer in answers if name(answer) in without]
            assert len(alone) == 3 and len(answers) == min(11, 3 + candidates)
            for answer in alone:
                assert answer.s_narration is None and "sentences" not in answer.why
                assert answer.score == pytest.approx(2 * (answer.s_video - mean) / std, abs=1e-4)
                assert all(seen.sentence is None and seen.sentence_weight == 0 for seen in answer.frames)


def test_an_index_of_frames_alone(measured, alone, tmp_path):
    split, *_ = measured
    store = new_store(tmp_path / "i", alone)
    for video, frames in zip(split.videos, pictures(split)):
        put(store, alone, f"{video}.mp4", frames, None)
    store.statistics = compute_statistics(store, alone, None)
    neutral = alone.score(alone.queries(read_lines(NEUTRAL)), alone.videos(pictures(split)))["video"]
    assert store.statistics["text"][0] == pytest.approx(fusion.matrix_statistics(neutral), rel=0.2)  # 256 of them
    assert store.statistics["text"] != store.statistics["like"] and store.statistics["text"][1] is None
    scores = alone.score(alone.queries(QUERIES), alone.videos(pictures(split)))["video"]
    for candidates in (100, 3):
        engine = Engine(store, alone, candidates=candidates)
        for b, answers in enumerate(engine.search(QUERIES, top=11)):
            assert len(answers) == min(11, candidates)
            assert all(answer.s_narration is None for answer in answers)
            expected = [scores[b, split.videos.index(name(answer))].item() for answer in answers]
            assert expected == sorted(expected, reverse=True) == pytest.approx([a.s_video for a in answers], abs=1e-5)
    store.statistics = dict.fromkeys(("text", "like"), store.statistics["like"])  # as an older version left it
    for answers in Engine(store, alone).search(QUERIES):
        assert [a.score for a in answers] == [a.s_video for a in answers] and answers.fits is None
        assert "cosine" in answers[0].why and "deviation" not in answers[0].why


# ----------------------------------------------------------------------------------------- queries of several parts


def jpeg_of(split, v, k=0):
    return Path(frame_paths(split.frames_dir, split.videos[v], [split.picks[v][k]])[0]).read_bytes()


def test_a_query_scores_the_weighted_sum_of_its_parts_own_scores(measured, index, embedder):
    """Each with the statistics of its kind; the weights with a plus have the sum 1."""
    split, *_ = measured
    engine, videos = Engine(index, embedder), embedder.unpack(index.features(index.all_windows().tolist()))
    picture, window = engine.see_picture(jpeg_of(split, 0)), int(index.all_windows()[2])
    parts = [Part(2.0, "text", QUERIES[0]), Part(-1.5, "text", QUERIES[1]), Part(1.0, "picture", picture),
             Part(-0.5, "window", window)]
    own = []
    for part in parts:
        of = {"text": lambda p: embedder.queries([p.value]), "picture": lambda p: embedder.like(p.value),
              "window": lambda p: embedder.like(embedder.unpack(index.features([p.value])))}[part.kind](part)
        heard = torch.from_numpy(embedder.has_sentence(videos) & (part.kind != "picture"))[None]
        own.append(engines.fuse(embedder.score(of, videos), heard, 0.6,
                                index.statistics["text" if part.kind == "text" else "like"])[0])
    expected = sum(part.weight / 3 * s for part, s in zip(parts, own))
    [answers] = engine.search([parts], top=11)
    assert len(answers) == len(split.videos) - 1 and answers.fits is None  # without the window that was asked for
    assert_ranked(answers, expected, split.videos)
    assert len({round(answer.score, 4) for answer in answers}) > 5
    alone, other = (engine.search([query], top=11)[0] for query in (QUERIES[0], [Part(5.0, "text", QUERIES[0])]))
    assert alone == other == engine.search([parse(f'"{QUERIES[0]}"')], top=11)[0]  # to the last bit


def test_what_explains_an_answer_are_the_parts_that_are_looked_for(measured, index, embedder):
    split, *_ = measured
    engine, minus = Engine(index, embedder), Part(-1.0, "text", QUERIES[1])
    both = [Part(1.0, "text", QUERIES[0]), Part(3.0, "text", QUERIES[2])]
    single = [{a.window: a for a in engine.search([part.value], top=11)[0]} for part in both]
    [answers] = engine.search([[*both, minus]], top=11)
    for answer in answers:
        assert sum(seen.frame_weight for seen in answer.frames) == pytest.approx(1)
        first, second = (of[answer.window] for of in single)
        for seen, one, two in zip(answer.frames, first.frames, second.frames):
            assert seen.frame_weight == pytest.approx(0.25 * one.frame_weight + 0.75 * two.frame_weight)
            assert seen.sentence_weight == pytest.approx(0.25 * one.sentence_weight + 0.75 * two.sentence_weight)
        assert f'"{QUERIES[2]}": its frames lie' in answer.why and f'minus "{QUERIES[1]}": its frames' in answer.why
    [mixed] = engine.search([[both[0], Part(1.0, "picture", engine.see_picture(jpeg_of(split, 0)))]], top=11)
    for answer in mixed:  # the picture hears nothing: the sentences are weighed by the text alone
        assert sum(seen.sentence_weight for seen in answer.frames) == pytest.approx(1)
        assert "the picture: its frames lie" in answer.why and "the picture: its frames and" not in answer.why


def test_candidates_of_several_parts_hold_the_exact_best(measured, index, embedder):
    """Parts of a kind make one vector, of both kinds are united: what is found scores as exactly, the best is in."""
    split, *_ = measured
    engine, every = Engine(index, embedder, candidates=5), Engine(index, embedder)
    picture = engine.see_picture(jpeg_of(split, 1))
    for parts in ([Part(1.0, "text", QUERIES[0]), Part(-0.5, "text", QUERIES[1])],
                  [Part(1.0, "text", QUERIES[0]), Part(0.7, "picture", picture)],
                  [Part(-0.3, "text", QUERIES[2]), Part(1.0, "picture", picture), Part(0.5, "window", 3)]):
        [found], [exact] = (engine.search([parts], exact=exact, top=11) for exact in (False, True))
        assert exact == every.search([parts], top=11)[0]
        score_of = {answer.window: answer.score for answer in exact}
        assert 4 <= len(found) <= 10
        assert [a.score for a in found] == pytest.approx([score_of[a.window] for a in found], abs=1e-5)
        assert found[0].window == exact[0].window
        union = {a.window for a in found}
        assert [a.window for a in exact if a.window in union] == [a.window for a in found]
    # with as many candidates as windows the two ways agree in full; what a minus pushes down is not cut off first
    most = Engine(index, embedder, candidates=len(split.videos) - 1)
    parts = [Part(1.0, "text", QUERIES[0]), Part(-1.0, "picture", picture)]
    [found], [exact] = (most.search([parts], exact=exact, top=11) for exact in (False, True))
    assert [a.window for a in found] == [a.window for a in exact[:len(found)]] and len(found) >= 10


def test_a_picture_weighs_in_stage_one_what_it_weighs_in_a_score(index, embedder):
    """Without a narration all of Eq. 11's weight is the frames', so beside a window its vector is longer."""
    window = embedder.like(embedder.unpack(index.features([1])))
    statistics = ((0.1, 0.2), (0.3, 0.05))
    with_, without = (embedder.pool_queries(window, statistics, np.array([used])) for used in (True, False))
    dim = with_.shape[1] // 2
    assert without[0, :dim] == pytest.approx(with_[0, :dim] / 0.6)


def test_parts_of_an_index_without_statistics_of_texts_are_added_as_cosines(measured, alone, tmp_path):
    split, *_ = measured
    store = new_store(tmp_path / "i", alone, narration=False)
    for video, frames in zip(split.videos, pictures(split)):
        put(store, alone, f"{video}.mp4", frames, None)
    like = compute_statistics(store, alone, None)["like"]
    store.statistics = {"text": like, "like": like}  # as an older version left it
    engine = Engine(store, alone)
    picture = engine.see_picture(jpeg_of(split, 0))
    [answers] = engine.search([[Part(1.0, "text", QUERIES[0]), Part(1.0, "picture", picture)]], top=11)
    assert [a.score for a in answers] == pytest.approx([a.s_video for a in answers])
    assert "cosine" in answers[0].why and "deviation" not in answers[0].why


# -------------------------------------------------------------------------------------------------- more like this


def test_like_a_window_leaves_itself_out_and_finds_its_twin_first(measured, embedder, tmp_path):
    split, *_ = measured
    store = new_store(tmp_path / "i", embedder)
    for copy in ("one", "two"):
        for video, frames, sentences in [*zip(split.videos, pictures(split), split.sentences)][:6]:
            put(store, embedder, f"{copy}/{video}.mp4", frames, sentences)
    store.statistics = compute_statistics(store, embedder, None)
    for candidates in (100, 5):
        engine = Engine(store, embedder, candidates=candidates)
        for window in store.windows(store.all_windows("one").tolist()):
            answers = engine.like_window(window.id, top=3)
            assert window.id not in [answer.window for answer in answers]
            assert answers[0].path == window.path.replace("one/", "two/")
            assert answers[0].s_narration is not None
            assert ("all its frames count alike" in answers[0].why) and answers[0].s_video == pytest.approx(1, abs=1e-5)
    with pytest.raises(KeyError):
        engine.like_window(99)


def test_like_a_picture(measured, index, embedder, monkeypatch):
    """A video's only frame finds it, though a picture has no sentence; what is no picture is refused."""
    split, *_ = measured
    engine = Engine(index, embedder)
    lone = [v for v, picks in enumerate(split.picks) if len(picks) == 1]
    for v in lone:
        data = Path(frame_paths(split.frames_dir, split.videos[v], [0])[0]).read_bytes()
        answers = engine.like_picture(data, top=11)
        assert name(answers[0]) == split.videos[v] and answers[0].s_video == pytest.approx(1, abs=1e-5)
        assert all(answer.s_narration is None for answer in answers) and len(answers) == 11
    assert lone
    long = max(range(len(split.picks)), key=lambda v: len(split.picks[v]))  # several frames: the filter picks the one
    data = Path(frame_paths(split.frames_dir, split.videos[long], [split.picks[long][2]])[0]).read_bytes()
    [found] = [answer for answer in engine.like_picture(data, top=11) if name(answer) == split.videos[long]]
    weights = [seen.frame_weight for seen in found.frames]
    assert weights[2] == max(weights) > 1.01 / len(weights)
    huge = io.BytesIO()
    Image.new("1", (50, 50)).save(huge, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice that is refused
    for data in (b"", b"no picture", huge.getvalue()):
        with pytest.raises(InputError, match="the picture cannot be read"):
            engine.like_picture(data)


def test_like_a_clip(measured, embedder, tmp_path):
    """A video file finds the window that its first seconds are; what is no video is refused."""
    split, *_ = measured
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = tiny.SIDE
        for frame in torch.cat(pictures(split))[:6]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy().copy(), "rgb24")))
        container.mux(stream.encode())
    store = new_store(tmp_path / "i", embedder)
    jpegs = read_video(tmp_path / "clip.mp4", fps=1.0, short_side=tiny.SIDE).jpegs
    frames = read_frames([io.BytesIO(jpeg) for jpeg in jpegs], Picture(tiny.SIDE))
    assert len(frames) == 6  # two windows of 4 s
    put(store, embedder, "later.mp4", frames[2:], ["a picture of red"] * 4)
    put(store, embedder, "first.mp4", frames[:4], ["a picture of red"] * 4)
    put(store, embedder, "other.mp4", pictures(split)[-1], split.sentences[-1])
    answers = Engine(store, embedder).like_clip(tmp_path / "clip.mp4")
    assert [answers[0].path, len(answers)] == ["first.mp4", 3] and answers[0].s_video == pytest.approx(1, abs=1e-5)
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="no.mp4"):
        Engine(store, embedder).like_clip(tmp_path / "no.mp4")


# ------------------------------------------------------------------------------------- stage one, a changing store


def test_stage_one_finds_the_nearest_windows(monkeypatch):
    """Of both kinds; with a filter; a window of several vectors counts once."""
    rng = np.random.default_rng(0)
    n, width = 3000, 256
    vectors = rng.standard_normal((n, 3, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors[::2, 2] = 0  # padding
    ids, given = 7 * np.arange(n), np.arange(n) % 5 > 0
    queries = vectors[100:120, 1] + 0.05 * rng.standard_normal((20, width)).astype(np.float32)
    best = np.where(vectors.any(axis=2), np.einsum("bw,nsw->bns", queries, vectors), -9).max(axis=2)  # (B, n)
    for flat in (10**9, 0):
        monkeypatch.setattr(stage_one, "FLAT", flat)
        blocks = [(ids[i:i + 700], vectors[i:i + 700], given[i:i + 700]) for i in range(0, n, 700)]
        stage = StageOne.make(blocks, vectors[::5].reshape(-1, width), 3 * n)
        assert type(stage.index).__name__ == ("IndexIDMap" if flat else "IndexIVFRaBitQ")
        assert stage.index.ntotal == vectors.any(axis=2).sum()
        for found in stage.nearest(queries, 50), stage.nearest(queries, 50, ids % 2 == 0):
            assert all(len(set(row.tolist())) == len(row) <= 50 for row in found)
        assert all(row[0] == 7 * (100 + b) for b, row in enumerate(stage.nearest(queries, 50)))
        inside = np.arange(n) < 90
        for b, row in enumerate(stage.nearest(queries, 90, inside)):
            assert set(row.tolist()) == set((7 * np.arange(90)).tolist())
            assert best[b, row[:30] // 7].mean() > best[b, row[60:] // 7].mean() + 0.01


def test_a_changed_store_is_noticed(measured, embedder, tmp_path, monkeypatch):
    split, *_ = measured
    store = new_store(tmp_path / "i", embedder)
    frames = pictures(split)
    for video in range(8):
        put(store, embedder, f"{split.videos[video]}.mp4", frames[video], split.sentences[video])
    store.statistics = compute_statistics(store, embedder, QUERIES)
    made = []
    make = stage_one.make_stage_one
    monkeypatch.setattr(stage_one, "make_stage_one", lambda *args: made.append(1) or make(*args))
    engine = Engine(store, embedder, candidates=3)
    assert len(engine.search(QUERIES[:1], top=20)[0]) == 3 and len(made) == 1

    put(store, embedder, "added.mp4", frames[8], split.sentences[8])  # few new ones: candidates of every query
    assert "added.mp4" in [answer.path for answer in engine.search(QUERIES[:1], top=20)[0]]
    assert len(Engine(store, embedder, candidates=3).search(QUERIES[:1], top=20)[0]) == 4 and len(made) == 1  # kept
    for path in ("added.mp4", f"{split.videos[0]}.mp4", f"{split.videos[1]}.mp4"):
        store.remove_file(path)
        for answers in engine.search(QUERIES, top=20):
            assert path not in [answer.path for answer in answers] and len(answers) >= 3
    for copy in range(4):  # more than that: made again
        put(store, embedder, f"copy{copy}.mp4", frames[9], split.sentences[9])
    assert len(engine.search(QUERIES[:1], top=20)[0]) == 3 and len(made) == 2
    for count, ending in enumerate(("faiss", "npz"), 3):
        (tmp_path / "i" / f"stage_one_text.{ending}").write_bytes(b"torn")
        assert len(Engine(store, embedder, candidates=3).search(QUERIES[:1], top=20)[0]) == 3 and len(made) == count
    assert not list((tmp_path / "i").glob(".*stage_one*"))


def test_an_empty_index_and_one_whose_first_run_goes_on(measured, embedder, tmp_path):
    split, *_ = measured
    store = new_store(tmp_path / "i", embedder)
    engine = Engine(store, embedder)
    assert engine.search(QUERIES) == [[]] * len(QUERIES) and engine.search([]) == []
    put(store, embedder, "one.mp4", pictures(split)[0], split.sentences[0])
    assert store.statistics is None
    [[answer]] = engine.search(QUERIES[:1])
    assert answer.path == "one.mp4" and np.isfinite(answer.score)


def test_statistics_come_of_a_sample(measured, index, embedder):
    """Of the given queries times all windows where those are few; of the index's sentences where none are given."""
    split, _, scores, _ = measured
    got = compute_statistics(index, embedder, split.queries)["text"]
    for view, expected in zip(("video", "narration"), got):
        assert fusion.matrix_statistics(scores[view]) == pytest.approx(expected, abs=1e-5)
    sentences = sorted({s for given in split.sentences for s in given if s is not None})
    videos = embedder.unpack(index.features(index.all_windows()))
    own = embedder.score(embedder.queries(sentences), videos)
    got = compute_statistics(index, embedder, None)
    for view, expected in zip(("video", "narration"), got["text"]):
        assert fusion.matrix_statistics(own[view]) == pytest.approx(expected, abs=1e-5)
    like = embedder.score(embedder.like(videos), videos)
    other = ~torch.eye(len(split.videos), dtype=torch.bool)
    for view, expected in zip(("video", "narration"), got["like"]):
        assert fusion.matrix_statistics(like[view][other]) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------- every searchable method

SEARCHED = [("narvid", "--modules"), ("narvid", "--modules", "NM"), ("narvid", "--fidelity", "paper"),
            ("clip4clip", "--head", "meanP"), ("zeroshot", "--no-use_narration")]


@pytest.mark.parametrize("form", [*SEARCHED, *((method,) for method in METHODS)], ids=" ".join)
def test_what_a_method_answers_is_enough_for_a_search(form, corpus, measured, tmp_path):
    """Indexed, stored, found by a text as its own score ranks, by a window and by a picture; or refused at the start.

    A method added to METHODS is looked at here.
    """
    split, *_ = measured
    args = trainer.parse_args(["--method", form[0], "--clip_model", str(corpus / "clip.json"), "--max_frames", "6",
                               "--output_dir", "unused", "--num_workers", "0", "--precision", "fp32", *form[1:]])
    torch.manual_seed(0)
    retriever = Retriever(trainer.build_model(args), args, WORLD.device)
    if not METHODS[form[0]].searchable(args):
        with pytest.raises(InputError, match="cannot be searched with; give another --checkpoint"):
            Embedder(retriever)
        return
    found = Embedder(retriever)
    given = split.sentences if found.narration else [None] * len(split.videos)
    store = new_store(tmp_path / "i", found)
    for video, frames, sentences in zip(split.videos, pictures(split), given):
        put(store, found, f"{video}.mp4", frames, sentences)
    store.statistics = compute_statistics(store, found, QUERIES)
    found.check(store.settings, "i")
    scores = retriever.score(retriever.encode_queries(QUERIES),
                             retriever.encode_frames(pictures(split), [t or [None] * 6 for t in given]),
                             store.statistics["text"])
    for candidates in (1000, 5):  # all, and those that stage one finds
        engine = Engine(store, found, candidates=candidates)
        for b, answers in enumerate(engine.search(QUERIES, top=len(split.videos))):
            best = scores["fused" if found.narration else "video"][b].argmax()
            assert name(answers[0]) == split.videos[best] or candidates == 5
            for seen in (seen for answer in answers for seen in answer.frames):
                assert 0 <= seen.frame_weight <= 1 and 0 <= seen.sentence_weight <= 1
    window = store.all_windows()[2]
    answers = Engine(store, found).like_window(int(window), top=20)
    assert len(answers) == len(split.videos) - 1 and all(np.isfinite(answer.score) for answer in answers)
    picture = io.BytesIO()
    Image.fromarray(pictures(split)[0][0].permute(1, 2, 0).numpy()).save(picture, "PNG")
    assert len(Engine(store, found).like_picture(picture.getvalue(), top=20)) == len(split.videos)

    mute = Embedder(retriever, narration=False)
    videos = mute.unpack(mute.pack(mute.videos(pictures(split))))
    for queries in (mute.queries(QUERIES), mute.like(videos)):
        assert list(mute.score(queries, videos)) == ["video"] and not mute.has_sentence(videos).any()
    assert mute.pool_videos(videos).shape[1] % mute.settings["dim"] == 0
