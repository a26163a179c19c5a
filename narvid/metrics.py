"""Similarity and ground truth in, metrics out; and whether a difference is more than luck. numpy only, no files.

B queries, V videos. R@K, the share of queries whose own video is among the first K, and nDCG@10 stand in percent
(higher is better); MdR and MnR are the median and the mean rank (1 is best).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NAMES = ("R@1", "R@5", "R@10", "MdR", "MnR")  # of what is computed from ranks, in the order of tables
NDCG = "nDCG@10"  # stands behind them where it is asked for


def retrieval_metrics(similarity: np.ndarray, video_of_query: np.ndarray, *,
                      ndcg: bool = False) -> dict[str, dict[str, float]]:
    """Both directions of retrieval.

    similarity (B, V), higher is more alike; video_of_query (B,) the index of each query's video, any number of queries
    a video. Returns {"text_to_video": {"R@1", "R@5", "R@10", "MdR", "MnR"}, "video_to_text": {...}}; ndcg adds
    "nDCG@10", where one candidate is right: 1 / log2(1 + rank) up to rank 10, 0 beyond, mean.
    Of equal scores the worst rank counts: it is the number of candidates that score at least as high as the right one.
    Video-to-text (many captions a video): each video's best caption competes with every other video's best caption;
    a video without a caption is a candidate for queries but has no query of its own.
    NaN, an empty matrix, a wrong shape or an index out of range raise ValueError.
    """
    similarity, video_of_query = _checked(similarity, video_of_query)
    return {"text_to_video": summarise(text_to_video_ranks(similarity, video_of_query), ndcg=ndcg),
            "video_to_text": summarise(video_to_text_ranks(similarity, video_of_query), ndcg=ndcg)}


def text_to_video_ranks(similarity: np.ndarray, video_of_query: np.ndarray) -> np.ndarray:
    """Rank of each query's own video among all videos, from 1. (B, V), (B,) -> (B,) int."""
    right = similarity[np.arange(len(similarity)), video_of_query]
    return (similarity >= right[:, None]).sum(axis=1)


def video_to_text_ranks(similarity: np.ndarray, video_of_query: np.ndarray) -> np.ndarray:
    """Rank of each captioned video's own best caption among every captioned video's best caption, from 1.

    (B, V), (B,) -> (number of captioned videos,) int, in the order of their index.
    """
    order = np.argsort(video_of_query, kind="stable")
    captioned, first = np.unique(video_of_query[order], return_index=True)
    best = np.maximum.reduceat(similarity[order], first, axis=0)[:, captioned]  # (captions of video u, asking video v)
    return (best >= np.diagonal(best)).sum(axis=0)


def summarise(ranks: np.ndarray, *, ndcg: bool = False) -> dict[str, float]:
    """Ranks from 1 (N,) -> R@1, R@5, R@10 in percent, median and mean rank, and nDCG@10 where it is asked for."""
    result = {f"R@{k}": float(100 * np.mean(ranks <= k)) for k in (1, 5, 10)}
    result |= {"MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks))}
    return result | ({NDCG: float(100 * np.mean((ranks <= 10) / np.log2(1 + ranks)))} if ndcg else {})


class Difference(NamedTuple):
    """The second minus the first, in the unit of what was compared."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided: twice the share of samples in which the sign changes


def paired_bootstrap(a: np.ndarray, b: np.ndarray, video_of_query: np.ndarray, *, samples: int = 10_000,
                     seed: int = 0) -> Difference:
    """Is the second better than the first on the same queries, or is it chance in the choice of test videos and seeds?

    a, b (seeds, B): a value of every query under every training seed; 100 where its rank is 1, else 0, compares R@1.
    Each sample draws videos with all their queries (captions of one video are not independent), the same ones for both
    sides, and, where there are several, each side's seeds. One seed says nothing about the variation between seeds.
    """
    a, b = np.atleast_2d(a).astype(float), np.atleast_2d(b).astype(float)
    if a.shape[1] != b.shape[1] or a.shape[1] != len(video_of_query):
        raise ValueError(f"the two sides have {a.shape[1]} and {b.shape[1]} queries, the ground truth "
                         f"{len(video_of_query)}: a paired comparison needs the same ones")
    rng = np.random.default_rng(seed)
    _, group = np.unique(video_of_query, return_inverse=True)
    size = np.bincount(group)
    sums = [np.stack([np.bincount(group, weights=row) for row in x]) for x in (a, b)]  # (seeds, videos) each
    differences = []
    for start in range(0, samples, 500):  # draws of (500, videos) at a time
        n = min(500, samples - start)
        draws = rng.multinomial(len(size), np.full(len(size), 1 / len(size)), size=n)  # (n, videos) how often each
        means = []
        for s in sums:
            seeds = rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=n) / len(s)  # (n, seeds)
            means.append(((draws @ s.T) * seeds).sum(axis=1) / (draws @ size))
        differences.append(means[1] - means[0])
    differences = np.concatenate(differences)
    low, high = np.percentile(differences, (2.5, 97.5))
    p = min(1.0, 2 * min(np.mean(differences <= 0), np.mean(differences >= 0)))
    return Difference(float(b.mean() - a.mean()), float(low), float(high), float(max(p, 1 / samples)))


def _checked(similarity: np.ndarray, video_of_query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    similarity, video_of_query = np.asarray(similarity), np.asarray(video_of_query)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must be a non-empty (queries, videos) matrix, not {similarity.shape}")
    if video_of_query.shape != similarity.shape[:1] or not np.issubdtype(video_of_query.dtype, np.integer):
        raise ValueError(f"video_of_query must hold one integer for each of the {len(similarity)} queries, "
                         f"not {video_of_query.dtype} {video_of_query.shape}")
    if video_of_query.min() < 0 or video_of_query.max() >= similarity.shape[1]:
        raise ValueError(f"video_of_query must lie in 0..{similarity.shape[1] - 1}, "
                         f"not {video_of_query.min()}..{video_of_query.max()}")
    bad = np.isnan(similarity)
    if bad.any():
        raise ValueError(f"similarity has {bad.sum()} NaN values, the first at (query, video) "
                         f"{tuple(int(i) for i in np.argwhere(bad)[0])}: the model diverged or a feature is missing")
    return similarity, video_of_query
