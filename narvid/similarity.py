"""Everything between queries and videos: query-aware filter (Sec. 3.4) and multi-grained matching (Sec. 3.5, App. A).

Pure functions without parameters, used alike in training and evaluation; no device moves, no ranks, no loss.

Legend: B queries, V videos, K frames of a video (and sentences of its narration), L words of a query, D dimension.
Masks are bool, True = real. `temperature` divides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Queries, Videos


def match(queries: Queries, videos: Videos, *, method: str = "nucleus", p: float = 0.4, k: int | None = None,
          temperature: float = 0.1, fidelity: str = "reported", fine: bool = True,
          block: int | None = None) -> dict[str, Tensor]:
    """S_qv and S_qn of every query with every video (Sec. 3.5): the mean of the coarse and the fine score.

    queries, videos: as the model returns them; any B and V. Returns {"video": (B, V), "narration": (B, V)}, without
    "narration" where videos.narration is None. `fine=False` scores by the coarse cosine alone (CLIP4Clip; then
    queries.word_weights may be None). `block` scores tiles of block x block pairs, queries of like length together, to
    bound memory to one (block, L, block, K) tensor; it does not change the result.
    The filter's arguments are those of `filter_weights`.
    """
    options = dict(method=method, p=p, k=k, temperature=temperature, fidelity=fidelity, fine=fine)
    views = {"video": _View.of(videos.frames, videos.mask)}
    if videos.narration is not None:
        views["narration"] = _View.of(videos.narration, videos.narration_mask)
    if block is None:
        return {name: _score(queries, view, **options) for name, view in views.items()}

    order = queries.word_mask.sum(dim=1).argsort(stable=True)
    scores = {name: view.unit.new_empty(len(order), len(view.mask)) for name, view in views.items()}  # (B, V)
    for rows in order.split(block) if len(order) else ():
        length = int(queries.word_mask[rows].sum(dim=1).max())  # real words come first: the rest is padding
        tile = Queries(queries.eos[rows], queries.words[rows, :length], queries.word_mask[rows, :length],
                       None if queries.word_weights is None else queries.word_weights[rows, :length])
        for start in range(0, len(videos.mask), block):
            columns = slice(start, start + block)
            for name, view in views.items():
                scores[name][rows, columns] = _score(tile, _View(*(x[columns] for x in view)), **options)
    return scores


def filter_weights(cosine: Tensor, mask: Tensor, *, method: str = "nucleus", p: float = 0.4, k: int | None = None,
                   temperature: float = 0.1, fidelity: str = "reported") -> Tensor:
    """Query-aware adaptive filtering (Sec. 3.4, Eq. 4): how much of each frame a query looks at.

    cosine (B, V, K) of eos and frame (or sentence); mask (V, K). Returns (B, V, K), same dtype: 0 for dropped and
    padded frames, rows sum to 1 (all 0 for a video without one real frame).
    method: "nucleus" (the likeliest frames up to cumulative weight p), "topk" (the k likeliest), "none" (softmax,
    nothing dropped) or "uniform" (the mean over real frames: the module switched off, Table 3).
    fidelity: "paper" keeps the frame that carries the cumulative weight over p, "reported" drops it; rank 1 stays.
    """
    if method not in ("nucleus", "topk", "none", "uniform"):
        raise ValueError(f'method must be "nucleus", "topk", "none" or "uniform", not {method!r}')
    if method == "topk" and (k is None or k < 1):
        raise ValueError(f'method "topk" needs k >= 1, not {k!r}')
    _check_fidelity(fidelity)

    # The border of the nucleus is a discontinuity: in float64 no layout of the sums moves a frame over it.
    logits = torch.zeros_like(cosine, dtype=torch.float64) if method == "uniform" else cosine.double() / temperature
    # Not -inf: a video without one real frame would turn into NaN here, in the value or in the gradient.
    weights = logits.masked_fill(~mask, torch.finfo(torch.float64).min).softmax(dim=-1) * mask  # (B, V, K)

    if method in ("nucleus", "topk"):
        ranked, order = weights.detach().sort(dim=-1, descending=True, stable=True)
        if method == "topk":
            keep_ranked = torch.arange(mask.shape[-1], device=mask.device).expand_as(ranked) < k
        else:
            cumulative = ranked.cumsum(dim=-1).clamp_max(1)  # rounding must not carry the last frame over p = 1
            before = F.pad(cumulative[..., :-1], (1, 0))  # mass of the frames ranked higher; 0 for rank 1
            keep_ranked = before <= p if fidelity == "paper" else (cumulative <= p) | (before == 0)
        keep = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, keep_ranked)
        weights = weights * keep
    return (weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-300)).to(cosine.dtype)


class _View(NamedTuple):
    """What every query needs of the frames (or sentences) of V videos; made once, whatever the number of tiles."""

    mask: Tensor  # (V, K)
    unit: Tensor  # (V, K, D) of length 1
    unit64: Tensor  # the same in float64
    gram: Tensor  # (V, K, K) float64: products of a video's frames with each other

    @classmethod
    def of(cls, features: Tensor, mask: Tensor) -> _View:
        unit64 = F.normalize(features.double(), dim=-1)
        return cls(mask, F.normalize(features, dim=-1), unit64, torch.einsum("vkd,vjd->vkj", unit64, unit64))


def _score(queries: Queries, view: _View, *, fidelity: str, fine: bool, **filter_options) -> Tensor:
    """Every query with every video of one view -> (B, V)."""
    cosine = torch.einsum("bd,vkd->bvk", F.normalize(queries.eos.double(), dim=-1), view.unit64)  # (B, V, K)
    weights = filter_weights(cosine, view.mask, fidelity=fidelity, **filter_options)

    # Coarse: cos(eos, sum_k w_k f_k). The numerator comes from the filter's own cosines, the norm of the pooled vector
    # from each video's Gram matrix, so that nothing of size (B, V, D) ever exists.
    squared_norm = torch.einsum("bvk,vkj,bvj->bv", weights, view.gram, weights)
    coarse = (weights * cosine).sum(dim=-1) / squared_norm.clamp_min(1e-24).sqrt()  # (B, V)
    coarse, dtype = coarse.to(view.unit.dtype), view.unit.dtype
    if not fine:
        return coarse
    words = F.normalize(queries.words.to(dtype), dim=-1)
    return (coarse + _fine(words, queries.word_mask, queries.word_weights.to(dtype), view.unit, weights.to(dtype),
                           fidelity)) / 2


def _fine(words: Tensor, word_mask: Tensor, word_weights: Tensor, frames: Tensor, weights: Tensor,
          fidelity: str) -> Tensor:
    """Fine-grained score (App. A, Fig. 5b) of normalised words (B, L, D) and frames (V, K, D) -> (B, V)."""
    similarity = torch.einsum("bld,vkd->blvk", words, frames)  # (B, L, V, K)
    kept = weights > 0  # (B, V, K)
    if fidelity == "reported":  # masked by multiplication: what is dropped or padded competes with similarity 0
        best_frame = (similarity * kept[:, None]).amax(dim=-1).clamp_min(0)  # (B, L, V)
        best_word = (similarity * word_mask[:, :, None, None]).amax(dim=1).clamp_min(0)  # (B, V, K)
    else:
        lowest = torch.finfo(similarity.dtype).min
        best_frame = similarity.masked_fill(~kept[:, None], lowest).amax(dim=-1)  # (B, L, V)
        best_frame = best_frame.masked_fill(~kept.any(dim=-1)[:, None], 0)  # a video without one real frame scores 0
        best_word = similarity.masked_fill(~word_mask[:, :, None, None], lowest).amax(dim=1)  # (B, V, K)
    words_to_frames = torch.einsum("bl,blv->bv", word_weights, best_frame)  # s_W2F
    frames_to_words = torch.einsum("bvk,bvk->bv", weights, best_word)  # s_F2W
    total = words_to_frames + frames_to_words
    return total / 2 if fidelity == "reported" else total


def _check_fidelity(fidelity: str) -> None:
    if fidelity not in ("reported", "paper"):
        raise ValueError(f'fidelity must be "reported" or "paper", not {fidelity!r}')
