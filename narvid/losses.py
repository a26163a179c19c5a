"""The training objective (Sec. 3.6.1, App. D.2): NCE, cross-view hard negatives, rank hinge, hard-negative NCE.

Pure functions of similarity matrices; no parameters, no ranks. All matrices are (B, B), pair (i, i) is the positive,
S is the mean of coarse and fine cosines, never multiplied by the logit scale except where `scale` is an argument.
`exclude` (B, B) bool marks pairs that are neither positive nor negative (another caption of the same video).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nce(similarity: Tensor, scale: Tensor | float, exclude: Tensor | None = None) -> Tensor:
    """L_qv or L_qn of Eq. 5: symmetric cross-entropy of scale * S. similarity (B, B) -> scalar.

    Excluded pairs leave the denominators. The paper prints no temperature; the released code, like CLIP4Clip, learns
    one (`scale` = exp(logit_scale)). ValueError where the matrix is not square.
    """
    logits = _mask_pairs(scale * _square(similarity), exclude)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def hard_negatives(s_video: Tensor, s_narration: Tensor, lam: float,
                   exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H_i and H_i^T of Eqs. 6-7: the negatives that are hard in at least one of the two views.

    Returns (of_queries, of_videos), both (B, B) bool: rows of the first are queries, rows of the second are videos.
    j is hard for i where S(i, j) > S(i, i) - lam * sigma_i, j != i; sigma_i is the standard deviation of row i (of the
    transposed matrix in the second). Excluded pairs are never hard.
    """
    of_queries = _hard(s_video, lam) | _hard(s_narration, lam)
    of_videos = _hard(s_video.T, lam) | _hard(s_narration.T, lam)
    if exclude is not None:
        of_queries, of_videos = of_queries & ~exclude, of_videos & ~exclude.T
    return of_queries, of_videos


def cross_view_hard_negative(s_video: Tensor, s_narration: Tensor, *, lam: float, eta: float,
                             exclude: Tensor | None = None) -> dict[str, Tensor]:
    """L_CVH of Eqs. 8-9, one scalar for each view: {"hard_video", "hard_narration"}; their sum is L_CVH.

    lam (lambda) says which negatives are hard, eta * lam * sigma_i by how much the positive must win over them.

    Eq. 8 is printed with its sign turned (it would push positives down); this is the hinge of the released code,
    max(0, S(i, j) - S(i, i) + eta * lam * sigma_i). The transposed direction uses its own sigma.
    """
    of_queries, of_videos = hard_negatives(s_video, s_narration, lam, exclude)

    def view(s: Tensor) -> Tensor:
        return (_hinge(s, of_queries, eta * lam) + _hinge(s.T, of_videos, eta * lam)) / 2

    return {"hard_video": view(s_video), "hard_narration": view(s_narration)}


def hard_negative_nce(s_video: Tensor, s_narration: Tensor, *, lam: float, scale: Tensor | float,
                      exclude: Tensor | None = None) -> dict[str, Tensor]:
    """L_NCE^H of Eq. 12 as printed: the denominators run over the united hard negatives alone, without the positive.

    Returns {"hard_video", "hard_narration"}; each carries the last factor 1/2 of Eq. 12, so their sum is L_NCE^H.
    A query or video without hard negatives contributes 0.
    """
    of_queries, of_videos = hard_negatives(s_video, s_narration, lam, exclude)

    def direction(logits: Tensor, hard: Tensor) -> Tensor:
        some = hard.any(dim=1)
        # Rows without hard negatives are left out before the logsumexp: -inf there would make their gradient NaN.
        denominator = logits[some].masked_fill(~hard[some], -torch.inf).logsumexp(dim=1)
        return (denominator - logits.diagonal()[some]).sum() / len(logits)

    def view(s: Tensor) -> Tensor:
        return (direction(scale * s, of_queries) + direction(scale * s.T, of_videos)) / 2

    return {"hard_video": view(s_video) / 2, "hard_narration": view(s_narration) / 2}


def _sigma(s: Tensor) -> Tensor:
    """Standard deviation of each row (B,): unbiased, positive included, with gradient (the margin is learned too)."""
    if len(s) == 1:
        return s.new_zeros(1)  # a batch of one has no negatives, and no unbiased deviation
    variance = s.var(dim=1)
    # sqrt has an infinite slope at 0: a constant row gets sigma 0 and gradient 0.
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)


def _hard(s: Tensor, lam: float) -> Tensor:
    s = _square(s).detach()
    hard = s > (s.diagonal() - lam * _sigma(s))[:, None]
    return hard & ~torch.eye(len(s), dtype=torch.bool, device=s.device)


def _hinge(s: Tensor, hard: Tensor, margin: float) -> Tensor:
    """Rank hinge summed over each row's hard negatives, mean over rows."""
    violation = F.relu(s - s.diagonal()[:, None] + margin * _sigma(s)[:, None])  # (B, B)
    return (violation * hard).sum() / len(s)


def _mask_pairs(logits: Tensor, exclude: Tensor | None) -> Tensor:
    if exclude is None:
        return logits
    positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(exclude & ~positive, -torch.inf)


def _square(similarity: Tensor) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"a training similarity is (B, B), positives on its diagonal, not {tuple(similarity.shape)}")
    return similarity
