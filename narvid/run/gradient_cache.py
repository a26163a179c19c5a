"""The gradient of one loss over a whole batch with the memory of a few of its pairs (--micro_batch).

Gao et al. 2021 ("Scaling deep contrastive learning batch size under memory limited setup"): the loss needs features of
all pairs, and a feature's own graph only while its gradient passes through. No flags, no ranks, no model of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from narvid.data.datasets import Batch
from narvid.profiling import stage


def backward_in_parts(encode: Callable, loss_of: Callable, batch: Batch, size: int, no_sync: Callable, *,
                      reduce: bool) -> None:
    """Adds the gradient of loss_of(*encode(batch)) to the parameters, encoding `size` pairs at a time, each twice.

    1. Encode all without a graph. 2. The loss's gradient with respect to the features. 3. Encode part by part again and
    go on backward from there. Dropout is the same in 1 and 3: each part has a seed, drawn from the generator where it
    stands, so that two parts, of this call or of another, never share their noise.
    encode(Batch) -> queries, videos (NamedTuples of rows) and logit scale; loss_of takes these three. no_sync(): DDP's,
    a context without reduction over ranks; `reduce` ends with one reduction.
    """
    parts = batch.split(size)
    seeds = torch.randint(2 ** 63 - 1, (len(parts),)).tolist()

    def encode_part(k: int) -> tuple:
        torch.manual_seed(seeds[k])
        return encode(parts[k])

    def leaf(column: tuple) -> Tensor | None:
        return None if column[0] is None else torch.cat(column).requires_grad_(column[0].is_floating_point())

    with torch.no_grad():
        encoded = [encode_part(k) for k in range(len(parts))]
    queries, videos = (type(same[0])(*map(leaf, zip(*same))) for same in list(zip(*encoded))[:2])
    scale = encoded[0][2].clone().requires_grad_()
    loss = loss_of(queries, videos, scale)
    with stage("backward"):
        loss.backward()

    for k in range(len(parts)):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last and reduce else no_sync():
            of_queries, of_videos, of_scale = encode_part(k)
            pairs = [(x, whole.grad.split(size)[k]) for x, whole in zip([*of_queries, *of_videos], [*queries, *videos])
                     if x is not None and x.requires_grad and whole.grad is not None]
            pairs += [(of_scale, scale.grad)] if last else []
            if pairs:  # none where only the logit scale is trained
                with stage("backward"):
                    torch.autograd.backward(*zip(*pairs))
