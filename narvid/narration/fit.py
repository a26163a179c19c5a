"""How well sentences fit their frames: pure functions of features, and of texts where no model is needed.

Legend: N sentences, V videos, F frames (of the videos that are judged), D joint dimension.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 1024  # sentences that are compared with the frames of other videos in one product


class Fit(NamedTuple):
    """Of each sentence (N,), float32. A rank says how many frames fit better; its share of them is 0.5 at chance.

    NaN where there is nothing to compare with: a video of one frame, or one video alone.
    """

    cosine: Tensor  # with its own frame
    rank_in_video: Tensor  # share of the other frames of its video that fit it better, equal ones counting half
    margin_in_video: Tensor  # its cosine less the mean one with these
    rank_among_others: Tensor  # the same of frames of other videos
    margin_among_others: Tensor  # what is called its fit


def fit(sentences: Tensor, frames: Tensor, frame_of_sentence: Tensor, video_of_frame: Tensor,
        pool: Tensor | None = None) -> Fit:
    """sentences (N, D), frames (F, D), frame_of_sentence (N,), video_of_frame (F,) -> Fit.

    pool (P,): the numbers of the frames that stand for other videos [all]; those of a sentence's own video never count.
    Rows need no unit length.
    """
    sentences, frames = F.normalize(sentences.float(), dim=-1), F.normalize(frames.float(), dim=-1)
    pool = torch.arange(len(frames)) if pool is None else pool
    own_video = video_of_frame[frame_of_sentence]  # (N,)
    of_video = defaultdict(list)
    for number, video in enumerate(video_of_frame.tolist()):
        of_video[video].append(number)
    columns: list[list[Tensor]] = []
    for rows in torch.arange(len(sentences)).split(AT_ONCE):
        own = frame_of_sentence[rows]
        cosine = (sentences[rows] * frames[own]).sum(dim=-1)  # (n,)
        # The frames of a sentence's own video, padded to the most that one has; the mask is True where real.
        lists = [of_video[video] for video in own_video[rows].tolist()]
        width = max(map(len, lists))
        inside = torch.tensor([numbers + [-1] * (width - len(numbers)) for numbers in lists])  # (n, width)
        of_inside = torch.einsum("nd,nkd->nk", sentences[rows], frames[inside.clamp(min=0)])
        among = sentences[rows] @ frames[pool].T  # (n, P)
        columns.append([cosine,
                        *_compare(cosine, of_inside, (inside >= 0) & (inside != own[:, None])),
                        *_compare(cosine, among, video_of_frame[pool][None, :] != own_video[rows][:, None])])
    return Fit(*(torch.cat(parts) for parts in zip(*columns)))


def _compare(own: Tensor, others: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """own (n,), others (n, m) -> share of the masked others that are larger, and own less their mean; (n,) each.

    Copies of one picture differ by rounding, so what is nearer than 1e-6 is equal and counts half.
    """
    apart = others - own[:, None]
    better = (apart > 1e-6).float() + 0.5 * (apart.abs() <= 1e-6).float()
    count = mask.sum(dim=1).float()  # 0 / 0 is NaN: nothing to compare with
    return (better * mask).sum(dim=1) / count, own - (others * mask).sum(dim=1) / count


def spread_in_video(sentences: Tensor, video_of_sentence: Tensor) -> dict[int, float]:
    """Video -> how much its sentences differ: mean of 1 - cosine over pairs; one sentence alone has none.

    sentences (N, D), video_of_sentence (N,). 0: all the same.
    """
    sentences, spread = F.normalize(sentences.float(), dim=-1), {}
    rows_of = defaultdict(list)
    for row, video in enumerate(video_of_sentence.tolist()):
        rows_of[video].append(row)
    for video, rows in rows_of.items():
        if (n := len(rows)) > 1:
            total = sentences[rows].sum(dim=0).square().sum().item()  # n and every ordered pair's cosine
            spread[video] = max(0.0, 1 - (total - n) / (n * (n - 1)))
    return spread


def area_under_roc(score: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive one scores higher than another one, equal scores counting half; NaN without both kinds."""
    score, positive = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    values, place = np.unique(score, return_inverse=True)
    size = np.bincount(place, minlength=len(values))
    middle = np.cumsum(size) - (size - 1) / 2  # the mean rank of equal scores, counted from 1
    return float((middle[place][positive].sum() - n * (n + 1) / 2) / (n * m))


# ---- texts ----


def plain(text: str) -> str:
    """White space and case make no difference between two sentences."""
    return " ".join(text.split()).casefold()


def repeated_across(texts_of: Iterable[Sequence[str]]) -> float:
    """Share of all sentences that stand in another video too; one list of sentences a video."""
    texts_of = [[plain(text) for text in texts] for texts in texts_of]
    videos_with = Counter(text for texts in texts_of for text in set(texts))
    every = [text for texts in texts_of for text in texts]
    return sum(videos_with[text] > 1 for text in every) / max(len(every), 1)


def scripts(texts: Iterable[str]) -> list[tuple[str, float]]:
    """(script, share of all letters), the most frequent first: the first word of a letter's Unicode name, lower case.

    It tells writing systems apart, not the languages that share one; Han letters are "cjk".
    """
    count: Counter[str] = Counter()
    for text in texts:
        count.update(name for letter in text if letter.isalpha() and (name := _script(letter)))
    total = sum(count.values())
    return [(name, n / total) for name, n in count.most_common()]


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "unknown").split()[0].split("-")[0].lower()
