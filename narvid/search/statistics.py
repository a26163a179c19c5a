"""What scores are compared with: mean and deviation for Eq. 11, and how high the answers to nonsense stand.

Here: which queries stand for yours, what is measured with them. Not here: how a score is put together (engine.py).

Legend: B queries, V videos (windows), n windows in hand.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from narvid import fusion
from narvid.files import read_lines
from narvid.search.embedding import Embedder, ViewStatistics
from narvid.search.speech import Speech
from narvid.search.rows import Window
from narvid.search.store import Store

SAMPLE = (256, 1024)  # queries and windows whose pairs make the statistics of Eq. 11
NEUTRAL = Path(__file__).with_name("neutral.txt")  # sentences of everyday videos, one a line
NONSENSE = 64  # made-up queries that no video answers
JUDGED_FROM = 50  # windows; among fewer the best of a row says little
SHARE = 0.5  # of nonsense that may stand higher than what is said to fit (docs/search.md: how it was chosen)


@torch.no_grad()
def compute_statistics(store: Store, embedder: Embedder, queries: list[str] | None,
                       seed: int = 0) -> dict[str, ViewStatistics]:
    """Mean and standard deviation of S_qv and S_qn (Eq. 11) over a seeded sample of queries times one of windows.

    {"text": of `queries`, else of the index's own sentences, else of neutral ones; "like": of windows as queries, those
    of the same file left out where there are others}. Windows without a sentence do not count for S_qn.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(store.all_windows())[:SAMPLE[1]]
    windows = store.windows(ids.tolist())
    videos = embedder.unpack(store.features(ids.tolist()))
    has_sentence, files = embedder.has_sentence(videos), np.array([window.file for window in windows])

    some = type(videos)(*(None if x is None else x[:SAMPLE[0]] for x in videos))
    other = files[:SAMPLE[0], None] != files[None]  # (B, n)
    other = other if other.any() else np.ones_like(other)
    both = has_sentence[:SAMPLE[0], None] & has_sentence[None]
    like = _measure(embedder.score(embedder.like(some), videos), other, other & both)
    encoded = embedder.queries(_some_queries(rng, store, embedder, queries, windows))
    all_pairs = np.ones((len(encoded[0]), len(ids)), dtype=bool)
    scores = embedder.score(encoded, videos)
    return {"text": _measure(scores, all_pairs, all_pairs & has_sentence[None]), "like": like}


@torch.no_grad()
def speech_statistics(store: Store, speech: Speech, embedder: Embedder, queries: list[str] | None,
                      seed: int = 0) -> list[tuple[float, float]] | None:
    """Mean and standard deviation of share and cosine (speech.py), over queries as above and windows in which something
    is said; None where nothing is.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(store.all_windows(has_speech=True))[:SAMPLE[1]].tolist()
    if not ids:
        return None
    chosen = _some_queries(rng, store, embedder, queries, store.windows(ids))
    fit = speech.fit(speech.ask(chosen, embedder.text_vectors(chosen)), ids)
    return [_moments(torch.from_numpy(x)) for x in fit]


def _some_queries(rng: np.random.Generator, store: Store, embedder: Embedder, queries: list[str] | None,
                  windows: list[Window]) -> list[str]:
    """SAMPLE of these queries, else of the sentences of these windows, else of neutral ones."""
    if not queries:
        queries = (sorted(_sentences(store, windows)) if embedder.narration else []) or read_lines(NEUTRAL)
    return [queries[i] for i in rng.permutation(len(queries))[:SAMPLE[0]]]


def of_text(statistics: dict[str, ViewStatistics]) -> bool:
    """Whether there are any of texts; an index of frames alone once took those of videos for both."""
    return statistics["text"] != statistics["like"]


def nonsense(seed: int = 0) -> list[str]:
    """Words of random letters, in sentences of 3 to 9: what no video shows."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))  # noqa: E731
    return [" ".join(word() for _ in range(rng.randint(3, 9))) for _ in range(NONSENSE)]


def height(fused: np.ndarray) -> float | None:
    """How high the best of a query's row of scores (n,) stands; None among too few.

    Half of it by the statistics of the index (a score is the sum of two views' deviations), half within the row itself:
    deviations above its median, by its own median deviation. A query that all windows answer alike has a low row.
    """
    if len(fused) < JUDGED_FROM:
        return None
    middle = np.median(fused)
    spread = 1.4826 * np.median(np.abs(fused - middle))  # 1.4826: the standard deviation of normal scores
    return float(fused.max() / 4 + (fused.max() - middle) / max(spread, 1e-6) / 2)


def _measure(scores: dict[str, Tensor], pairs: np.ndarray, has_sentence: np.ndarray) -> ViewStatistics:
    """Statistics of the scores of these pairs (B, n); of S_qn over those with a sentence, None where there is none."""
    def of(view: str, chosen: np.ndarray) -> tuple[float, float]:
        return _moments(scores[view][torch.from_numpy(chosen)])
    return of("video", pairs), of("narration", has_sentence) if "narration" in scores and has_sentence.any() else None


def _moments(scores: Tensor) -> tuple[float, float]:
    mean, std = fusion.matrix_statistics(scores)
    return mean, std * (std > 1e-3)  # copies of one picture differ less: to divide by that makes scores of millions


def _sentences(store: Store, windows: list[Window]) -> set[str]:
    """The sentences of these windows' picked frames."""
    picked: dict[int, set[int]] = {}
    for window in windows:
        picked.setdefault(window.file, set()).update(window.picks)
    return {frame.sentence for file, numbers in picked.items() for frame in store.frames(file)
            if frame.number in numbers and frame.sentence is not None}
