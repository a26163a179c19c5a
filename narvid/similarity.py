"""Everything between queries and videos: query-aware filter (Sec. 3.4) and multi-grained matching (Sec. 3.5, App. A).

Pure functions without parameters, used alike in training and evaluation; no device moves, no ranks, no loss.

Legend: B queries, V videos, K frames of a video (and sentences of its narration), L words of a query, D dimension.
Masks are bool, True = real. `temperature` divides. Below `filter_weights` queries are the last axis, so that every sum
and maximum over frames or words runs along contiguous memory; no tensor is as large as (B, V, D).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from narvid.model import Queries, Videos


def match(queries: Queries, videos: Videos, *, fine: bool = True, block: int | None = None,
          **filter_options) -> dict[str, Tensor]:
    """S_qv and S_qn of every query with every video (Sec. 3.5): the mean of the coarse and the fine score.

    queries, videos: as the model returns them; any B and V. Returns {"video": (B, V), "narration": (B, V)}, without
    "narration" where videos.narration is None. `fine=False` scores by the coarse cosine alone (CLIP4Clip; then
    queries.word_weights may be None). Pairs are scored in tiles, queries of like length together and cut to their
    longest, so that memory is bounded; `block` makes a tile block x block pairs, None chooses. The tiles do not change
    the result. Under autocast the products of the fine score, nearly all of the work, are in half precision; the filter
    stays in float64. filter_options: the keyword arguments of `filter_weights`, with its defaults and its ValueError.
    """
    views, dtype = views_of(videos), videos.frames.dtype
    places = torch.arange(1, queries.word_mask.shape[1] + 1, device=queries.word_mask.device)
    lengths, order = (queries.word_mask * places).amax(dim=1).sort(stable=True)  # (B,) place of the last real word
    lengths = lengths.clamp_min(1).tolist()
    high, wide = (block, block) if block else _tile_sides(lengths if fine else [1] * len(lengths), videos)
    tiles = []
    for start in range(0, len(order), high):
        rows = order[start:start + high]
        part = Queries(*(None if x is None else x[rows] for x in queries))
        tiles.append((rows, _QueryTile.of(part, dtype, fine, lengths[start:start + high][-1])))
    scores = {name: features.new_empty(len(order), len(mask)) for name, (features, mask) in views.items()}  # (B, V)
    for start in range(0, len(videos.mask), wide):
        columns = slice(start, start + wide)
        for name, (features, mask) in views.items():
            view = _View.of(features[columns], mask[columns])
            for rows, tile in tiles:
                scores[name][rows, columns] = _score(tile, view, **filter_options).T
    return scores


def kept(queries: Queries, videos: Videos, **filter_options) -> dict[str, Tensor]:
    """The filter's weights (Eq. 4) of frames and sentences for every query, as `match` uses them: to show or to count.

    Returns {"video": (B, V, K), "narration": (B, V, K)} in float64, without "narration" where videos.narration is
    None. filter_options: the keyword arguments of `filter_weights`, with its defaults.
    """
    eos, weights = F.normalize(queries.eos.double(), dim=-1), {}
    for name, (features, mask) in views_of(videos).items():
        cosine = torch.einsum("bd,vkd->bvk", eos, F.normalize(features.double(), dim=-1))
        weights[name] = filter_weights(cosine, mask, **filter_options)
    return weights


def views_of(videos: Videos) -> dict[str, tuple[Tensor, Tensor]]:
    """{"video": (frames, mask), "narration": (narration, its mask)}; without the latter where there is no narration."""
    views = {"video": (videos.frames, videos.mask)}
    if videos.narration is not None:
        views["narration"] = (videos.narration, videos.narration_mask)
    return views


def filter_weights(cosine: Tensor, mask: Tensor, *, method: str = "nucleus", p: float = 0.4, k: int | None = None,
                   temperature: float = 0.1, fidelity: str = "reported") -> Tensor:
    """Query-aware adaptive filtering (Sec. 3.4, Eq. 4): the weight of each frame for each query.

    cosine (B, V, K) of each query's eos with each frame (or sentence) of each video; mask (V, K). Returns (B, V, K),
    same dtype: 0 for dropped and padded frames; the K weights sum to 1 (all 0 for a video without one real frame).
    The weights are a softmax over the real frames of cosine / temperature; what is kept is then brought to sum 1 again.
    method: "nucleus" (the heaviest frames up to cumulative weight p, 0 to 1), "topk" (the k >= 1 heaviest), "none"
    (nothing is dropped) or "uniform" (every real frame counts alike: the module switched off, Table 3).
    fidelity: "paper" keeps the frame that carries the cumulative weight over p, "reported" drops it; rank 1 stays.
    ValueError for another method or fidelity, and for "topk" without k.
    """
    weights = _filter(cosine.double().permute(1, 2, 0), mask, method=method, p=p, k=k, temperature=temperature,
                      fidelity=fidelity)
    return weights.permute(2, 0, 1).to(cosine.dtype)


# ------------------------------------------------------------------------------------------------------- the filter


def _filter(cosine: Tensor, mask: Tensor, *, method: str = "nucleus", p: float = 0.4, k: int | None = None,
            temperature: float = 0.1, fidelity: str = "reported") -> Tensor:
    """`filter_weights` of cosine (V, K, B) in float64 -> (V, K, B).

    The border of the nucleus is a discontinuity: in float64 no layout of the sums moves a frame over it.
    """
    if method not in ("nucleus", "topk", "none", "uniform"):
        raise ValueError(f'method must be "nucleus", "topk", "none" or "uniform", not {method!r}')
    if method == "topk" and (k is None or k < 1):
        raise ValueError(f'method "topk" needs k >= 1, not {k!r}')
    if fidelity not in ("reported", "paper"):
        raise ValueError(f'fidelity must be "reported" or "paper", not {fidelity!r}')

    # Not -inf: a video without one real frame would turn into NaN here, in the value or in the gradient.
    padding = (~mask).double()[..., None] * torch.finfo(torch.float64).min  # (V, K, 1)
    logits = torch.add(padding, cosine, alpha=0 if method == "uniform" else 1 / temperature)  # (V, K, B)
    weights = logits.softmax(dim=1)
    if method == "nucleus":
        weights = weights * _keep(weights.detach(), *_nucleus(weights.detach(), p, fidelity))
    elif method == "topk":
        kept = _heaviest(weights.detach(), min(k, mask.shape[1]))
        weights = weights * _keep(weights.detach(), kept[-1], torch.full_like(kept[-1], len(kept)))
    some = mask.any(dim=1, keepdim=True)[..., None]  # (V, 1, 1)
    return weights * (some / weights.sum(dim=1, keepdim=True))


def _nucleus(weights: Tensor, p: float, fidelity: str) -> tuple[Tensor, Tensor]:
    """Sec. 3.4: weight of the last frame that the nucleus of weights (V, K, B) keeps, and how many it keeps; (V, B)."""
    frames = weights.shape[1]
    # The r heaviest of K carry r/K at least, so that no more than p K of them stay within p.
    most = frames if p >= 1 else int(p * frames + 1e-9) + (fidelity == "paper")
    last, *others = _heaviest(weights, max(1, most))
    cumulative, count = last, torch.ones_like(last)
    for weight in others:
        before, cumulative = cumulative, cumulative + weight
        inside = (before if fidelity == "paper" else cumulative) <= p
        if p >= 1:
            inside = torch.ones_like(inside)  # rounding must not carry the last frame over p = 1
        last = torch.where(inside, weight, last)
        count = count + inside
    return last, count


def _keep(weights: Tensor, last: Tensor, count: Tensor) -> Tensor:
    """1 for the `count` heaviest frames, down to weight `last`, else 0. weights (V, K, B), last and count (V, B)."""
    keep = weights.clone().ge_(last[:, None])  # 1 and 0 in float64: cheaper than bool, which would be widened again
    if (keep.sum(dim=1) > count).any():  # equal weights at the border: the earlier frames stay, as in a stable sort
        tied = weights == last[:, None]
        room = count - (weights > last[:, None]).sum(dim=1)
        keep = keep * (~tied | (tied.cumsum(dim=1) <= room[:, None]))
    return keep


def _heaviest(weights: Tensor, count: int) -> list[Tensor]:
    """The `count` largest of the K weights in descending order, (V, B) each; weights (V, K, B).

    A sorting network on whole (V, B) slices: torch.sort sorts the K numbers of each pair alone, several times slower.
    """
    slices = list(weights.unbind(dim=1))
    for a, b in _comparators(len(slices), count):
        slices[a], slices[b] = torch.maximum(slices[a], slices[b]), torch.minimum(slices[a], slices[b])
    return slices[:count]


@cache
def _comparators(n: int, count: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort of n places, less the comparisons that the first `count` places do not need."""
    powers = [2 ** i for i in range((n - 1).bit_length())]
    network = [(i, i + step) for run in powers for step in reversed(powers[:powers.index(run) + 1])
               for i in range(step % run, n - step)
               if (i - step % run) // step % 2 == 0 and i // (2 * run) == (i + step) // (2 * run)]
    needed, pruned = set(range(count)), []
    for pair in reversed(network):
        if needed & set(pair):
            needed |= set(pair)
            pruned.append(pair)
    return pruned[::-1]


# -------------------------------------------------------------------------------------------------------- the match


def _tile_sides(lengths: list[int], videos: Videos) -> tuple[int, int]:
    """Queries and videos of a tile, for queries of these lengths.

    A CPU wants the similarities of a tile to stay in its cache; a GPU wants enough of them to be worth its kernels.
    """
    similarities, queries = (2 ** 24, 256) if videos.frames.is_cuda else (2 ** 21, 128)
    queries = max(1, min(queries, len(lengths)))
    words = sum(lengths) / max(1, len(lengths))
    return queries, max(1, int(similarities / max(1, queries * words * videos.mask.shape[1])))


class _QueryTile(NamedTuple):
    """What is computed once for B queries and used with every video."""

    eos: Tensor  # (D, B) float64, of length 1
    words: Tensor | None  # (L, B, D) of length 1
    word_weights: Tensor | None  # (L, B)

    @classmethod
    def of(cls, queries: Queries, dtype: torch.dtype, fine: bool, length: int) -> _QueryTile:
        """The first `length` words of each query."""
        eos = F.normalize(queries.eos.double(), dim=-1).T.contiguous()
        if not fine:
            return cls(eos, None, None)
        rows = torch.arange(len(queries.words), device=queries.words.device)
        first = queries.words[rows, queries.word_mask.byte().argmax(dim=1)]  # (B, D)
        # A padded word repeats the first real one: no maximum over words sees it, and none needs a mask.
        words = torch.where(queries.word_mask[:, :length, None], queries.words[:, :length], first[:, None])
        words = F.normalize(words.to(dtype), dim=-1).transpose(0, 1).contiguous()
        return cls(eos, words, queries.word_weights[:, :length].to(dtype).T.contiguous())


class _View(NamedTuple):
    """What is computed once for the frames (or sentences) of V videos and used with every query."""

    mask: Tensor  # (V, K)
    unit: Tensor  # (V, K, D) of length 1
    unit64: Tensor  # the same in float64
    gram: Tensor  # (V, K, K) float64: products of a video's frames with each other

    @classmethod
    def of(cls, features: Tensor, mask: Tensor) -> _View:
        unit64 = F.normalize(features.double(), dim=-1)
        return cls(mask, F.normalize(features, dim=-1), unit64, unit64 @ unit64.transpose(1, 2))


def _score(queries: _QueryTile, view: _View, *, fidelity: str = "reported", **filter_options) -> Tensor:
    """Every query with every video of one view -> (V, B)."""
    cosine = view.unit64 @ queries.eos  # (V, K, B)
    weights = _filter(cosine, view.mask, fidelity=fidelity, **filter_options)

    # Coarse: cos(eos, sum_k w_k f_k). The numerator comes from the filter's own cosines, the norm of the pooled vector
    # from each video's Gram matrix.
    squared_norm = (weights * (view.gram @ weights)).sum(dim=1)
    coarse = (weights * cosine).sum(dim=1) / squared_norm.clamp_min(1e-24).sqrt()  # (V, B)
    dtype = view.unit.dtype
    if queries.words is None:
        return coarse.to(dtype)
    return (coarse.to(dtype) + _fine(queries.words, queries.word_weights, view.unit, weights.to(dtype), fidelity)) / 2


def _fine(words: Tensor, word_weights: Tensor, frames: Tensor, weights: Tensor, fidelity: str) -> Tensor:
    """Fine-grained score (App. A, Fig. 5b) of normalised words (L, B, D) and frames (V, K, D) -> (V, B).

    word_weights (L, B) and the filter's weights (V, K, B): 0 for padded words, padded and dropped frames.
    """
    kept = weights.detach().sign().to(frames.dtype)  # (V, K, B): 1 or 0
    best_word, best_frame = _Maxima.apply(words, frames, kept, fidelity)
    if fidelity == "reported":  # what is dropped or padded competes with similarity 0
        best_word, best_frame = best_word.clamp_min(0), best_frame.clamp_min(0)
    else:
        best_frame = best_frame * kept.amax(dim=1)[:, None]  # a video without one real frame scores 0
    words_to_frames = (word_weights * best_frame).sum(dim=1)  # s_W2F
    frames_to_words = (weights * best_word).sum(dim=1)  # s_F2W
    total = words_to_frames + frames_to_words
    return total / 2 if fidelity == "reported" else total


class _Maxima(torch.autograd.Function):
    """The two maxima over s = frames x words: over words (V, K, B), and over the kept frames (V, L, B).

    The gradient needs the places of the maxima. Autograd would keep s and its masked copy for that, memory that grows
    with the square of the batch; computing the product again costs less.
    """

    @staticmethod
    def forward(ctx, words: Tensor, frames: Tensor, kept: Tensor, fidelity: str) -> tuple[Tensor, Tensor]:
        """words (L, B, D), frames (V, K, D), kept (V, K, B) 1 or 0."""
        ctx.save_for_backward(words, frames, kept)
        ctx.fidelity = fidelity
        maxima = []
        for rows in _tiles(words, frames):
            s = torch.einsum("vkd,lbd->vklb", frames[rows], words)
            best_word = s.flatten(0, 1).amax(dim=1).view(kept[rows].shape)  # twice as fast on three axes
            maxima.append((best_word, _drop(s, kept[rows], fidelity).amax(dim=1)))
        return maxima[0] if len(maxima) == 1 else tuple(torch.cat(parts) for parts in zip(*maxima))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_word: Tensor, of_frame: Tensor):
        """The gradient of a maximum goes to its place; several equal maxima share it in equal parts."""
        words, frames, kept = ctx.saved_tensors
        to_words, to_frames = torch.zeros_like(words), torch.empty_like(frames)
        for rows in _tiles(words, frames):
            s = torch.einsum("vkd,lbd->vklb", frames[rows], words)
            there = (s == s.amax(dim=2, keepdim=True)).to(s.dtype)
            gradient = there * (of_word[rows] / there.sum(dim=2))[:, :, None]
            dropped = _drop(s, kept[rows], ctx.fidelity)
            there = (dropped == dropped.amax(dim=1, keepdim=True)).to(s.dtype)
            gradient += there * (of_frame[rows] / there.sum(dim=1))[:, None] * kept[rows][:, :, None]
            to_words += torch.einsum("vklb,vkd->lbd", gradient, frames[rows])
            to_frames[rows] = torch.einsum("vklb,lbd->vkd", gradient, words)
        return to_words, to_frames, None, None


def _tiles(words: Tensor, frames: Tensor) -> list[slice]:
    """Videos in parts of about 16 million similarities."""
    videos = max(1, 2 ** 24 // (frames.shape[1] * words.shape[0] * words.shape[1] + 1))
    return [slice(start, start + videos) for start in range(0, max(1, len(frames)), videos)]


def _drop(s: Tensor, kept: Tensor, fidelity: str) -> Tensor:
    """s (V, K, L, B), in place: a dropped frame's similarities become 0, or in "paper" too low to be a maximum."""
    kept = kept[:, :, None]
    return s.mul_(kept) if fidelity == "reported" else s.add_(kept - 1, alpha=4)
