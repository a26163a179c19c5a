"""What is done to similarity matrices at test time: fusion (Eq. 11), dual softmax (DSL), QB-Norm.

Pure functions of (B, V) tensors: B queries, V videos. `scale` multiplies. DSL and QB-Norm look at more than one query
at a time, so their results stand in columns of their own and are never mixed with plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Statistics = tuple[tuple[float, float], tuple[float, float]]


def matrix_statistics(similarity: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation of the whole matrix, in float64 (mu and sigma of Eq. 11)."""
    values = similarity.double()
    return values.mean().item(), values.std(correction=0).item()


def spreads(mean: float, std: float) -> bool:
    """Whether a standard deviation may be divided by: it is more than a thousandth of the mean's size.

    Below lie copies of one picture; what tells them apart is near to rounding, and would be made as large as all else.
    """
    return std > abs(mean) / 1000


def fuse(s_video: Tensor, s_narration: Tensor, weight: float = 0.5, statistics: Statistics | None = None) -> Tensor:
    """S_fusion of Eq. 11, weighted: 2 * (weight * z(S_qv) + (1 - weight) * z(S_qn)); weight 0.5 is the paper's.

    s_video, s_narration (B, V) -> (B, V). z standardises with the matrix's own mean and standard deviation, or with
    given `statistics` ((mean, std) of S_qv, (mean, std) of S_qn) where the matrix is too small (one query).
    A view that hardly spreads (see `spreads`) ranks nothing and becomes zeros. ValueError for a weight outside [0, 1]
    and for views of different shapes.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], not {weight}")
    if s_video.shape != s_narration.shape:
        raise ValueError(f"the two views differ in shape: {tuple(s_video.shape)} and {tuple(s_narration.shape)}")
    of_video, of_narration = statistics or (matrix_statistics(s_video), matrix_statistics(s_narration))
    return 2 * (weight * _standardise(s_video, *of_video) + (1 - weight) * _standardise(s_narration, *of_narration))


def combine(scores: dict[str, Tensor], weight: float,
            statistics: Statistics | None = None) -> Iterator[tuple[str, Tensor]]:
    """The four matrices of Table 10, (B, V) each, one at a time; S_qv alone where there is no narration view.

    scores {"video": S_qv, "narration": S_qn}; weight and statistics as in `fuse`. Yields (name, matrix); the last
    is the method's result. Methods with other views bring a `combine` of their own.
    """
    yield "S_qv", scores["video"]
    if "narration" in scores:
        yield "S_qn", scores["narration"]
        yield "S_sum", scores["video"] + scores["narration"]
        yield "S_fusion", fuse(scores["video"], scores["narration"], weight, statistics)


def dsl(similarity: Tensor, scale: float, over: str) -> Tensor:
    """Dual softmax (Cheng et al. 2021): similarity * softmax(scale * similarity). (B, V) -> (B, V).

    over="queries" normalises each video's column over the queries (for text-to-video), over="videos" each query's row
    over the videos (for video-to-text). Applied to each view's cosines, before they are standardised. Use float64:
    in float32 all that lies far below the best becomes equal, and of equal scores the worst rank counts. ValueError for
    another `over`.
    """
    if over not in ("queries", "videos"):
        raise ValueError(f'over must be "queries" or "videos", not {over!r}')
    return similarity * (scale * similarity).softmax(dim=0 if over == "queries" else 1)


def qb_norm(similarity: Tensor, querybank: Tensor, *, beta: float = 20.0, k: int = 1) -> Tensor:
    """QB-Norm with the dynamic inverted softmax (Bogolin et al. 2022), for text-to-video.

    similarity (B, V) of the test queries, querybank (N, V) of N other queries (training ones) with the same videos.
    A query whose best video is among the k best of any bank query is ranked by exp(beta * s) over the bank's sum of
    exp(beta * s) for that video; every other query keeps its row. Returns (B, V); its rows are therefore not
    comparable with each other. ValueError where the bank scores another number of videos.
    beta = 20 is meant for cosines. Use float64, for the same reason as in `dsl`.
    """
    if querybank.ndim != 2 or querybank.shape[1] != similarity.shape[1]:
        raise ValueError(f"the querybank scores {querybank.shape[-1]} videos, the test matrix {similarity.shape[1]}")
    activation = torch.zeros(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    activation[querybank.topk(min(k, querybank.shape[1]), dim=1).indices.flatten()] = True  # (V,)
    hubbed = activation[similarity.argmax(dim=1)]  # (B,)
    # exp(beta s) / sum exp(beta bank) as one exponential: each of the two alone may overflow.
    inverted = (beta * similarity - (beta * querybank).logsumexp(dim=0)).exp()  # (B, V)
    return torch.where(hubbed[:, None], inverted, similarity)


def _standardise(similarity: Tensor, mean: float, std: float) -> Tensor:
    return (similarity - mean) / std if spreads(mean, std) else torch.zeros_like(similarity)
