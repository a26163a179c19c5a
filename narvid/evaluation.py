"""Evaluation: encode every query and every video once, score in blocks, fuse, rank, print the table.

The same functions as in training do the scoring; the work is shared among ranks. No flags, no files here.

Legend: B queries, V videos, K frames, D joint dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from narvid import fusion
from narvid.data.datasets import FrameDataset, Split, collate
from narvid.data.frames import Picture
from narvid.data.loader import make_loader
from narvid.distributed import World, agree, collect, join_columns, share, together, total
from narvid.metrics import NAMES, NDCG, retrieval_metrics, text_to_video_ranks
from narvid.progress import tqdm


WEIGHTS = [i / 20 for i in range(21)]  # of S_qv in S_fusion, where one is chosen


class Encoding(NamedTuple):
    """How a split is turned into features: everything the trainer's flags say about it."""

    picture: Picture
    tokenize: Callable  # (texts, max_words) -> tokens (N, T), word_mask (N, T): the towers' Tokenizer
    max_words: int
    max_frames: int
    batch_size: int  # videos, or queries, at a time
    num_workers: int
    autocast: Callable  # () -> context manager for the towers and heads
    score: Callable  # (queries, videos) -> {view: (B, V)}
    views: tuple[str, ...]  # the keys of what it returns


@torch.no_grad()
def encode_videos(model, split: Split, encoding: Encoding, world: World) -> NamedTuple:
    """This rank's share of the split's videos -> the method's features of them (NarVid: Videos), in their order.

    No rank ever holds all videos: the queries travel, and they are smaller.
    """
    mine = share(len(split.videos), world)
    dataset = FrameDataset(split, np.arange(len(split.videos)), encoding.picture)
    batches = [list(mine)[i:i + encoding.batch_size] for i in range(0, len(mine), encoding.batch_size)]
    to_batch = partial(collate, split=split, tokenize=encoding.tokenize, max_words=encoding.max_words,
                       max_frames=encoding.max_frames, with_queries=False)
    loader = make_loader(dataset, to_batch, batches, num_workers=encoding.num_workers)
    parts = []
    for batch in tqdm(loader, desc="encode videos", unit="batch", leave=False, disable=world.rank > 0):
        batch = batch.to(world.device)
        with encoding.autocast():
            parts.append(model.encode_videos(batch.frames, batch.mask, batch.sentences, batch.sentence_of_frame,
                                             batch.narration_mask))
    return concatenate(parts)


@torch.no_grad()
def score_queries(model, queries: list[str], videos: NamedTuple, encoding: Encoding,
                  world: World) -> dict[str, Tensor]:
    """Every query once, with all videos -> {view: (B, V)}, fp32 on rank 0's CPU; elsewhere {}.

    videos: this rank's share, of `encode_videos`. Encoding the queries is shared too, and each scores all of them.
    """
    tokens, word_mask = encoding.tokenize(queries, encoding.max_words)
    scores = {view: torch.zeros(len(queries), len(videos[0])) for view in encoding.views}
    order = word_mask.sum(dim=1).argsort(stable=True)  # queries of like length together: little padding
    # Several batches go to one `score`, which prepares the videos anew in every call.
    for rows in tqdm(order.split(16 * encoding.batch_size), desc="score queries", unit="chunk", leave=False,
                     disable=world.rank > 0):
        encoded = _encode_queries(model, tokens[rows], word_mask[rows], encoding, world)
        for view, part in encoding.score(encoded, videos).items():  # in fp32, as in training
            scores[view][rows] = part.float().cpu()
    finite = all(part.isfinite().all() for part in scores.values())
    error = None if finite else ("the scores are not finite, the weights have diverged: lower the learning rates, or "
                                 "evaluate an earlier checkpoint")
    agree(error, world)
    return join_columns(scores, world)


def score_split(model, split: Split, encoding: Encoding, world: World) -> tuple[NamedTuple, dict[str, Tensor]]:
    """This rank's videos, and rank 0's {view: (B, V)}."""
    with together(world):  # a frame that is broken inside is found by one rank
        videos = encode_videos(model, split, encoding, world)
    return videos, score_queries(model, split.queries, videos, encoding, world)


def _encode_queries(model, tokens: Tensor, word_mask: Tensor, encoding: Encoding, world: World) -> NamedTuple:
    """tokens, word_mask (B, L) -> the method's features of these queries on every rank; each encodes its share."""
    # The same on all ranks, whatever their shares; some towers read their texts in full length.
    length = tokens.shape[1] if encoding.tokenize.whole else int(word_mask.sum(dim=1).max())
    mine = share(len(tokens), world)
    rows = torch.arange(mine.start, mine.stop) if mine else torch.zeros(1, dtype=torch.long)  # no tower takes nothing
    with encoding.autocast():
        encoded = concatenate([model.encode_queries(*(x[some, :length].to(world.device) for x in (tokens, word_mask)))
                               for some in rows.split(encoding.batch_size)])
    return type(encoded)(*(None if x is None else collect(x[:len(mine)], len(tokens), world) for x in encoded))


def concatenate(parts: list[NamedTuple]) -> NamedTuple:
    """Features of batches -> those of all, field by field."""
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))


@torch.no_grad()
def frames_kept(model, queries: list[str], videos: NamedTuple, encoding: Encoding, world: World) -> dict[str, float]:
    """Table 4's numbers in parentheses: how many frames, and sentences, the filter keeps of a video, mean over pairs.

    Of at most 1,000 queries, evenly taken, with every video; {} for a method without a filter. videos: this rank's.
    """
    queries = queries[::-(-len(queries) // 1000)]
    kept: dict[str, int] = {}
    for start in range(0, len(queries), encoding.batch_size):
        tokens, word_mask = encoding.tokenize(queries[start:start + encoding.batch_size], encoding.max_words)
        with encoding.autocast():
            encoded = model.encode_queries(tokens.to(world.device), word_mask.to(world.device))
        for view, weights in (model.kept(encoded, videos) or {}).items():
            kept[view] = kept.get(view, 0) + int((weights > 0).sum())
    pairs = total(len(queries) * len(videos[0]), world)
    return {view: total(count, world) / pairs for view, count in kept.items()}


@torch.no_grad()
def show_kept(model, texts: list[str], split: Split, videos: NamedTuple, scores: dict[str, Tensor],
              encoding: Encoding, world: World, combine: Callable, *, top: int = 3) -> str:
    """For each text the best `top` videos, and what of them the filter keeps: frame numbers and sentences with weights.

    videos: this rank's share; scores {view: (B, V)}: those of the split, whose statistics Eq. 11 takes. All ranks call
    it; the text is rank 0's.
    """
    statistics = None
    if "narration" in scores:
        statistics = tuple(fusion.matrix_statistics(scores[view]) for view in ("video", "narration"))
    of_texts = score_queries(model, texts, videos, encoding, world)
    lines = []
    for row, text in enumerate(texts):
        encoded = _encode_queries(model, *encoding.tokenize([text], encoding.max_words), encoding, world)
        kept = {view: weights[0].T.cpu() for view, weights in (model.kept(encoded, videos) or {}).items()}  # (K, V)
        kept = join_columns(kept, world) if kept else {}
        if world.rank > 0:
            continue
        *_, (name, fused) = combine({view: s[row:row + 1] for view, s in of_texts.items()}, statistics=statistics)
        lines.append(f"{text}:" + ("" if kept else " (this model has no filter)"))
        for place, video in enumerate(fused[0].argsort(descending=True, stable=True)[:top].tolist(), 1):
            lines.append(f"{place:>3}. {split.videos[video]}  {name} {fused[0, video]:.3f}")
            for view, weights in kept.items():
                shown = split.picks[video] if view == "video" else split.sentences[video]
                lines += [f"{'':5}{weight:4.0%} {'frame ' if view == 'video' else ''}{what}"
                          for weight, what in zip(weights[:, video].tolist(), shown) if weight > 0]
    return "\n".join(lines)


def table_of_matrices(scores: dict[str, Tensor], video_of_query: np.ndarray, combine: Callable, *,
                      ndcg: bool = False) -> dict[str, dict]:
    """{"S_qv" | "S_qn" | "S_sum" | "S_fusion": both directions' metrics}; combine(scores) yields (name, matrix)."""
    return {name: retrieval_metrics(s.numpy(), video_of_query, ndcg=ndcg) for name, s in combine(scores)}


def choose_weight(scores: dict[str, Tensor], video_of_query: np.ndarray, combine: Callable) -> float:
    """The weight of Eq. 11 under which the last matrix finds most on these scores, of WEIGHTS.

    Text-to-video R@1 decides, of equal ones R@5, then R@10, then the one nearest to 0.5. scores: of a split that is not
    reported. combine(scores, weight=...) yields (name, matrix).
    """
    def worth(weight: float) -> tuple:
        *_, (_, fused) = combine(scores, weight=weight)
        ranks = text_to_video_ranks(fused.numpy(), video_of_query)
        return *(int((ranks <= k).sum()) for k in (1, 5, 10)), -abs(weight - 0.5)

    return max(WEIGHTS, key=worth)


def with_dsl(scores: dict[str, Tensor], video_of_query: np.ndarray, combine: Callable, scale: float, *,
             ndcg: bool = False) -> dict[str, dict]:
    """The same table after DSL on each view: over queries for text-to-video, over videos for video-to-text."""
    directions = {"text_to_video": "queries", "video_to_text": "videos"}
    tables = {direction: table_of_matrices({view: fusion.dsl(s.double(), scale, over) for view, s in scores.items()},
                                           video_of_query, combine, ndcg=ndcg)
              for direction, over in directions.items()}
    return {name: {direction: tables[direction][name][direction] for direction in directions}
            for name in tables["text_to_video"]}


def with_qb_norm(scores: dict[str, Tensor], bank: dict[str, Tensor], video_of_query: np.ndarray,
                 combine: Callable, *, ndcg: bool = False) -> dict[str, dict]:
    """Text-to-video after QB-Norm of each matrix; `bank` holds other queries' scores of the same videos.

    The bank is fused with the statistics of the test matrices, and S_fusion brought back to the spread of S_qv's
    cosines, for which QB-Norm's beta is made.
    """
    statistics, table = None, {}
    if "narration" in scores:
        statistics = tuple(fusion.matrix_statistics(scores[view]) for view in ("video", "narration"))
    both = [{view: s.double() for view, s in matrices.items()} for matrices in (scores, bank)]
    for (name, s), (_, of_bank) in zip(*(combine(matrices, statistics=statistics) for matrices in both)):
        spread = statistics[0][1] if name == "S_fusion" and statistics else 1.0
        normed = fusion.qb_norm(spread * s, spread * of_bank)
        measured = retrieval_metrics(normed.numpy(), video_of_query, ndcg=ndcg)
        table[name] = {"text_to_video": measured["text_to_video"]}
    return table


def format_table(metrics: dict[str, dict], title: str) -> str:
    """The metrics as a table of fixed width: a row a matrix, both directions side by side."""
    first = next(iter(metrics.values()))
    directions = [d for d in ("text_to_video", "video_to_text") if d in first]
    columns = {name: max(7, len(name) + 1) for name in (*NAMES, NDCG) if name in first[directions[0]]}
    head = " | ".join(f"{d.replace('_', '-'):^{sum(columns.values()) - 1}}" for d in directions)
    names = " | ".join("".join(f"{c:>{size}}" for c, size in columns.items())[1:] for _ in directions)
    width = max(9, *(len(name) + 1 for name in metrics))
    lines = [title, f"{'':{width}}| {head}", f"{'':{width}}| {names}"]
    for name, result in metrics.items():
        cells = ["".join(f"{result[d][c]:{size}.1f}" for c, size in columns.items())[1:] for d in directions]
        lines.append(f"{name:{width}}| " + " | ".join(cells))
    return "\n".join(lines)


def show(result: dict) -> str:
    """The tables of one result."""
    what = f"{result['split']}: {result['queries']} queries, {result['videos']} videos"
    what += f"; epoch chosen on {result['select_on']}"
    if "epoch" in result:  # of steps inside an epoch that has not ended; 0 behind an epoch's last
        what += f" (after epoch {result['epoch']}" + (f" and {result['step']} steps)" if result["step"] else ")")
    if result["videos_without_narration"]:
        what += f"; {result['videos_without_narration']} more have no narration"
    if result["videos_missing"]:
        what += f"; {result['videos_missing']} videos of the corpus (all splits) were missing when it was prepared"
    if "fusion_weight" in result:
        what += f"; fusion weight {result['fusion_weight']:g}"
        what += f", chosen on {result['fusion_weight_on']}" if "fusion_weight_on" in result else ""
    if "frames_kept" in result:
        what += "; the filter keeps a mean of " + ", ".join(
            f"{mean:.2f} ({view})" for view, mean in result["frames_kept"].items())
    titles = {"metrics": what, "dsl": "after DSL", "qb_norm": "after QB-Norm"}
    return "\n\n".join(format_table(result[key], title) for key, title in titles.items() if key in result)


def selection_score(result: dict) -> float:
    """Text-to-video R@1 of the method's result, the last matrix of the table."""
    return list(result["metrics"].values())[-1]["text_to_video"]["R@1"]
