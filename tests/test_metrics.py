"""narvid.metrics against reference.py and against hand-worked cases: ties, many captions, videos without one.

similarity (B, V): B queries, V videos; video_of_query (B,) says which video is right.
"""

import numpy as np
import pytest
import reference

from narvid.metrics import paired_bootstrap, retrieval_metrics

NAMES = {"R@1", "R@5", "R@10", "MdR", "MnR"}


def assert_metrics(got, want):
    assert set(got) == {"text_to_video", "video_to_text"}
    for direction in got:
        assert set(got[direction]) == NAMES
        assert got[direction] == pytest.approx(want[direction], abs=1e-9), direction


@pytest.mark.parametrize("levels", [3, 20, None])  # how many different scores: few make many ties
@pytest.mark.parametrize("seed", range(8))
def test_against_the_reference(seed, levels):
    rng = np.random.default_rng(seed)
    B, V = rng.integers(1, 40), rng.integers(1, 25)
    similarity = rng.normal(size=(B, V)) if levels is None else rng.integers(0, levels, (B, V)) / levels
    video_of_query = rng.integers(0, V, B)
    for array in (similarity, similarity.astype(np.float32)):
        assert_metrics(retrieval_metrics(array, video_of_query), reference.retrieval_metrics(array, video_of_query))


@pytest.mark.parametrize("levels", [4, None])
@pytest.mark.parametrize("seed", range(4))
def test_ndcg_against_the_reference(seed, levels):
    rng = np.random.default_rng(seed)
    B, V = 30, rng.integers(2, 40)
    similarity = rng.normal(size=(B, V)) if levels is None else rng.integers(0, levels, (B, V)) / levels
    video_of_query = rng.integers(0, V, B)
    got = retrieval_metrics(similarity, video_of_query, ndcg=True)
    captioned = sorted(set(video_of_query.tolist()))
    best = {v: similarity[video_of_query == v].max(axis=0) for v in captioned}  # of a video's captions, for each video
    wanted = {"text_to_video": [reference.ndcg_at_10(s, v) for s, v in zip(similarity, video_of_query)],
              "video_to_text": [reference.ndcg_at_10([best[u][v] for u in captioned], captioned.index(v))
                                for v in captioned]}
    for direction, values in wanted.items():
        assert got[direction]["nDCG@10"] == pytest.approx(np.mean(values), abs=1e-9)
        assert {k: v for k, v in got[direction].items() if k != "nDCG@10"} == retrieval_metrics(
            similarity, video_of_query)[direction]


def test_ndcg_by_hand():
    """Ranks 1, 3 and 11 of 11 candidates: 1, 1/2, and nothing beyond the tenth place."""
    similarity = np.zeros((3, 11))
    similarity[0, 0] = 1
    similarity[1] = [0, 0.5, 1, 1, *[0] * 7]
    similarity[2] = [*[1] * 2, 0, *[1] * 8]
    got = retrieval_metrics(similarity, np.arange(3), ndcg=True)["text_to_video"]
    assert got["nDCG@10"] == pytest.approx(50) and got["R@10"] == pytest.approx(200 / 3)


def test_by_hand_one_caption_a_video():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.1, 0.7, 0.4]])
    # rows: 1; 0.8 and 0.6 are better: 3; 0.7 is better: 2. columns: 1; 0.7 is better: 2; 0.6 is better: 2
    third = 100 / 3
    text = {"R@1": third, "R@5": 100, "R@10": 100, "MdR": 2, "MnR": 2}
    video = {"R@1": third, "R@5": 100, "R@10": 100, "MdR": 2, "MnR": 5 / 3}
    got = retrieval_metrics(similarity, np.arange(3))
    assert_metrics(got, {"text_to_video": text, "video_to_text": video})


def test_by_hand_many_captions_ties_and_a_video_without_a_caption():
    """Queries 0 and 1 describe video 0; nobody describes video 3, which still is a candidate for every query."""
    similarity = np.array(
        [
            [0.9, 0.1, 0.2, 0.0],  # video 0: rank 1
            [0.3, 0.5, 0.6, 0.3],  # video 0: 0.5, 0.6 and the tie with video 3 count against it: rank 4
            [0.7, 0.7, 0.1, 0.0],  # video 1: the tie counts against it: rank 2
            [0.4, 0.2, 0.6, 0.5],  # video 2: rank 1
        ]
    )
    # best captions of videos 0, 1, 2: video 0: 0.9, 0.7, 0.4 -> 1; video 1: 0.5, 0.7, 0.2 -> 1; 2: 0.6, 0.1, 0.6 -> 2
    text = {"R@1": 50, "R@5": 100, "R@10": 100, "MdR": 1.5, "MnR": 2}
    video = {"R@1": 200 / 3, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 4 / 3}
    got = retrieval_metrics(similarity, np.array([0, 0, 1, 2]))
    assert_metrics(got, {"text_to_video": text, "video_to_text": video})


def test_a_constant_matrix_scores_nothing():
    """Ties count against: everything equal puts the right one last, never first."""
    got = retrieval_metrics(np.zeros((12, 12)), np.arange(12))
    for direction in got.values():
        assert direction == pytest.approx({"R@1": 0, "R@5": 0, "R@10": 0, "MdR": 12, "MnR": 12})


def test_a_perfect_matrix():
    video_of_query = np.repeat(np.arange(7), 3)
    got = retrieval_metrics(np.eye(7)[video_of_query], video_of_query)
    for direction in got.values():
        assert direction == pytest.approx({"R@1": 100, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 1})


def test_one_caption_a_video_is_the_same_both_ways():
    similarity = np.random.default_rng(0).normal(size=(30, 30))
    got, turned = (retrieval_metrics(s, np.arange(30)) for s in (similarity, similarity.T))
    assert got["text_to_video"] == pytest.approx(turned["video_to_text"])
    assert got["video_to_text"] == pytest.approx(turned["text_to_video"])


def test_order_of_queries_and_of_videos_does_not_matter():
    rng = np.random.default_rng(1)
    similarity, video_of_query = rng.integers(0, 9, (25, 10)).astype(float), rng.integers(0, 10, 25)
    rows, columns = rng.permutation(25), rng.permutation(10)
    new_place = np.argsort(columns)
    moved = retrieval_metrics(similarity[rows][:, columns], new_place[video_of_query][rows])
    assert_metrics(moved, retrieval_metrics(similarity, video_of_query))


def test_random_scores_are_at_chance():
    """More queries than videos: R@1 is 1 in 50, not more."""
    similarity = np.random.default_rng(2).normal(size=(2000, 50))
    got = retrieval_metrics(similarity, np.arange(2000) // 40)["text_to_video"]
    assert got["R@1"] == pytest.approx(2, abs=1)
    assert got["MnR"] == pytest.approx(25.5, abs=1)


SQUARE = np.eye(3)
WRONG = {
    "NaN": (np.where(SQUARE == 1, np.nan, 0), np.arange(3)),
    "one NaN off the right places": (np.where(np.arange(9).reshape(3, 3) == 1, np.nan, SQUARE), np.arange(3)),
    "fewer indices than queries": (SQUARE, np.arange(2)),
    "more indices than queries": (SQUARE, np.array([0, 1, 2, 0])),
    "index past the last video": (SQUARE, np.array([0, 1, 3])),
    "negative index": (SQUARE, np.array([0, 1, -1])),
    "similarity of one axis": (np.arange(3.0), np.arange(3)),
    "similarity of three axes": (np.zeros((3, 3, 1)), np.arange(3)),
    "index of two axes": (SQUARE, np.arange(3)[:, None]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_refused(wrong):
    with pytest.raises(ValueError):
        retrieval_metrics(*WRONG[wrong])


# ------------------------------------------------------------------------------------------------ paired bootstrap


def slow_bootstrap(a, b, video_of_query, samples, rng):
    """The same by drawing: videos with all their queries, and seeds, one sample at a time."""
    videos = np.unique(video_of_query)
    differences = []
    for _ in range(samples):
        drawn = rng.choice(videos, len(videos))
        queries = np.concatenate([np.flatnonzero(video_of_query == v) for v in drawn])
        of_a, of_b = (x[rng.choice(len(x), len(x))][:, queries].mean() for x in (a, b))
        differences.append(of_b - of_a)
    return np.array(differences)


@pytest.mark.parametrize("seeds", [(1, 1), (3, 2)])
def test_bootstrap_against_drawing_one_by_one(seeds):
    rng = np.random.default_rng(3)
    video_of_query = rng.integers(0, 60, 150)
    a, b = 100.0 * (rng.random((seeds[0], 150)) < 0.4), 100.0 * (rng.random((seeds[1], 150)) < 0.5)
    found = paired_bootstrap(a, b, video_of_query, samples=4000)
    slow = slow_bootstrap(a, b, video_of_query, 4000, rng)
    assert found.mean == pytest.approx(b.mean() - a.mean())
    spread = slow.std()
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, (2.5, 97.5)), abs=0.15 * spread)
    assert found.p == pytest.approx(2 * min((slow <= 0).mean(), (slow >= 0).mean()), abs=0.03)


def test_bootstrap_counts_videos_not_captions():
    """Twenty identical captions of each video say no more than one."""
    rng = np.random.default_rng(0)
    a, b = 100.0 * (rng.random(80) < 0.3), 100.0 * (rng.random(80) < 0.4)
    one = paired_bootstrap(a, b, np.arange(80), samples=1000)
    assert paired_bootstrap(a.repeat(20), b.repeat(20), np.arange(80).repeat(20), samples=1000) == pytest.approx(one)


def test_bootstrap_of_equal_runs_finds_nothing_and_of_unlike_ones_all():
    hits = 100.0 * (np.random.default_rng(1).random(200) < 0.5)
    assert paired_bootstrap(hits, hits, np.arange(200), samples=500) == (0, 0, 0, 1)
    assert paired_bootstrap(0 * hits, 0 * hits + 100, np.arange(200), samples=500) == (100, 100, 100, 1 / 500)
    with pytest.raises(ValueError, match="the same ones"):
        paired_bootstrap(hits, hits[1:], np.arange(200))
