"""How fast queries and videos are scored, beside the field's way and one matrix product of the same run.

  python scripts/bench_eval.py                                          1,000 queries x 1,000 videos, and how it grows
  python scripts/bench_eval.py --queries 27763 --videos 670 --only_ours      MSVD's test split: time, peak memory
  python scripts/bench_eval.py --queries 59800 --videos 2990 --only_ours     MSR-VTT's full one
  python scripts/bench_eval.py --training                               forward and backward of a batch of 64 pairs
  python scripts/bench_eval.py --device cuda --block 256                on a GPU, tiles of 256 x 256 pairs beside ours

The field's way: for every 64 x 64 block of queries and videos run co-attention and the temporal encoders again, pool
the frames query by query in a loop, pad the words to 64. It is measured on a sample of blocks and scaled to all. Every
round times the product of two 2048 x 2048 fp32 matrices (the unit), the sample and ours; the medians are compared, so
that a busy machine slows all alike. Features are random, queries resemble their video, 6 to 16 words a query.
Here: making features, the field's loop, timing. Not here: our scoring (narvid/similarity.py).
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from narvid.evaluation import table_of_matrices
from narvid.fusion import combine
from narvid.flags import Parser, command, positive
from narvid.metrics import text_to_video_ranks
from narvid.model import Heads, NarVidConfig, Queries, Videos
from narvid.progress import tqdm
from narvid.similarity import match

BLOCK, WORDS = 64, 64  # the field's: queries and videos of a block, words of a query after padding
UNIT = 2048  # side of the matrices
CHUNK = 1024  # queries that evaluation scores at a time
SHORTEST, LONGEST = 6, 16  # words of a query
TOLERANCE = 1e-5


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--queries", type=positive, default=1000, help="B (default %(default)s)")
    add("--videos", type=positive, default=1000, help="V (default %(default)s)")
    add("--frames", type=positive, default=12, help="K (default %(default)s)")
    add("--dim", type=positive, default=512, help="D, a multiple of 64 (default %(default)s)")
    add("--block", type=positive, default=128, help="also time `match` in tiles of this side (default %(default)s)")
    add("--sample", type=positive, default=2, help="blocks measured of the field's way (default %(default)s)")
    add("--rounds", type=positive, default=3, help="of every measurement (default %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of torch (default %(default)s)")
    add("--device", default="cpu", help="torch's name of it (default %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only_ours", action="store_true", help="time once and peak memory, metrics included")
    what.add_argument("--training", action="store_true", help="a training batch's scores and their gradients")
    args = parser.parse_args(argv)
    if args.dim % 64:
        parser.error(f"--dim {args.dim}: the heads are 64 wide, take a multiple of 64")
    return args


# --------------------------------------------------------------------------------------------------------- features


def make_videos(args: argparse.Namespace) -> Videos:
    """Features of V videos, not yet enhanced: frames and sentences scatter around a direction of the video's own."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.randn(args.videos, 1, args.dim, generator=generator)
    frames, narration = (topic + spread * torch.randn(args.videos, args.frames, args.dim, generator=generator)
                         for spread in (0.5, 1.0))
    mask = torch.ones(args.videos, args.frames, dtype=torch.bool)
    return to(Videos(frames, narration, mask, mask.clone()), args.device)


def make_queries(videos: Videos, first: int, count: int) -> Queries:
    """Queries first ... first + count - 1; query b asks for video b modulo V."""
    generator = torch.Generator().manual_seed(1 + first)
    device, dim = videos.frames.device, videos.frames.shape[-1]
    topic = videos.frames[torch.arange(first, first + count) % len(videos.frames)].mean(dim=1)
    topic = F.normalize(topic, dim=-1).cpu() * dim ** 0.5
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=generator)
    word_mask = torch.arange(LONGEST) < lengths
    words = 0.08 * topic[:, None] + torch.randn(count, LONGEST, dim, generator=generator)
    eos = 0.08 * topic + torch.randn(count, dim, generator=generator)
    weights = torch.randn(count, LONGEST, generator=generator).masked_fill(~word_mask, -torch.inf).softmax(dim=1)
    return to(Queries(eos, words, word_mask, weights), device)


def to(features: tuple, device: str | torch.device) -> tuple:
    """Queries or Videos on another device."""
    return type(features)(*(x.to(device) for x in features))


# --------------------------------------------------------------------------------------------------- the field's way


def field_block(heads: Heads, queries: Queries, videos: Videos) -> dict[str, Tensor]:
    """Scores of one block, everything in fp32; queries padded to WORDS, videos not yet enhanced -> (B, V) a view."""
    videos = heads.enhance(*videos)
    return {"video": field_view(queries, videos.frames, videos.mask),
            "narration": field_view(queries, videos.narration, videos.narration_mask)}


def field_view(queries: Queries, features: Tensor, mask: Tensor) -> Tensor:
    """One view (V, K, D): filter, pooling in a loop over queries, coarse and fine score."""
    frames = F.normalize(features, dim=-1)
    eos, words = F.normalize(queries.eos, dim=-1), F.normalize(queries.words, dim=-1)
    logits = torch.einsum("bd,vkd->bvk", eos, frames) / 0.1
    probability = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)  # (B, V, K)
    ranked, order = probability.sort(dim=-1, descending=True)
    dropped = ranked.cumsum(dim=-1) > 0.4
    dropped[..., 0] = False
    weights = probability.masked_fill(dropped.gather(-1, order.argsort(dim=-1)), 0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    pooled = torch.stack([(w[..., None] * frames).sum(dim=1) for w in weights])  # (B, V, D)
    coarse = torch.einsum("bd,bvd->bv", eos, F.normalize(pooled, dim=-1))
    similarity = torch.einsum("bld,vkd->blvk", words, frames)  # (B, L, V, K)
    similarity = similarity * queries.word_mask[:, :, None, None] * (weights > 0)[:, None]
    fine = torch.einsum("bl,blv->bv", queries.word_weights, similarity.amax(dim=3))
    fine = fine + (weights * similarity.amax(dim=1)).sum(dim=-1)
    return (coarse + fine / 2) / 2


def padded(queries: Queries) -> Queries:
    """The same queries with WORDS words."""
    more = WORDS - queries.words.shape[1]
    return Queries(queries.eos, F.pad(queries.words, (0, 0, 0, more)), F.pad(queries.word_mask, (0, more)),
                   F.pad(queries.word_weights, (0, more)))


def sample_of_blocks(args: argparse.Namespace) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks to measure, spread along the diagonal."""
    rows, columns = (max(1, n // BLOCK) for n in (args.queries, args.videos))
    starts = [(i * rows // args.sample * BLOCK, i * columns // args.sample * BLOCK) for i in range(args.sample)]
    return [(slice(b, b + BLOCK), slice(v, v + BLOCK)) for b, v in starts]


# --------------------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, in real time."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def rounds(ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each way; they take turns, the unit between any two. One turn before is not counted."""
    a = torch.randn(UNIT, UNIT, device=args.device)
    taken = {"unit": [], **{name: [] for name in ways}}
    for turn in tqdm(range(args.rounds + 1), unit="round", leave=False):
        for name, work in ways.items():
            parts = {"unit": seconds(lambda: a @ a, args.device), name: seconds(work, args.device)}
            for part in parts if turn else ():
                taken[part].append(parts[part])
    return {name: median(each) for name, each in taken.items()}


def compare(args: argparse.Namespace) -> None:
    """The field's way, ours, in given tiles, with bf16 products: seconds, ratios, whether the scores are the same."""
    heads = Heads(NarVidConfig(dim=args.dim, positions=max(77, args.frames))).eval().to(args.device)
    raw = make_videos(args)
    videos = heads.enhance(*raw)
    queries = padded(make_queries(videos, 0, args.queries))
    blocks = sample_of_blocks(args)
    inputs = [(Queries(*(x[rows] for x in queries)), Videos(*(x[columns] for x in raw)))
              for rows, columns in blocks]
    device_type = torch.device(args.device).type
    bf16 = partial(torch.autocast, device_type, dtype=torch.bfloat16)

    def score(products: Callable = contextlib.nullcontext, block: int | None = None) -> dict[str, Tensor]:
        with products():
            return match(queries, videos, block=block)

    took = rounds({"reference": lambda: [field_block(heads, *x) for x in inputs],
                   "enhance": lambda: heads.enhance(*raw), "ours": score,
                   f"ours, block {args.block}": partial(score, block=args.block),
                   "ours, bf16 products": partial(score, bf16)}, args)
    pairs = sum(len(q.eos) * len(v.mask) for q, v in inputs)
    took["reference"] *= args.queries * args.videos / pairs
    print(f"queries padded to {WORDS} words; reference: {len(blocks)} blocks of {BLOCK} x {BLOCK} measured, scaled to "
          f"{args.queries} x {args.videos}\n"
          f"\n{'':28} {'seconds':>9} {'x unit':>9}   reference is slower by")
    once = {"ours, features enhanced once": took["enhance"] + took["ours"]}
    for name, each in {**took, **once}.items():
        ratio = f"{took['reference'] / each:9.1f}" if name.startswith("ours") else ""
        print(f"{name:28} {each:9.3f} {each / took['unit']:9.1f}   {ratio}")

    scores = score()
    differences = torch.cat([(scores[view][at] - s).abs().flatten() for at, x in zip(blocks, inputs)
                             for view, s in field_block(heads, *x).items()])
    border = differences > TOLERANCE
    print(f"\nagainst the reference: {int(border.sum())} of {len(border)} pairs differ by more than {TOLERANCE:g} (the "
          f"filter's border falls otherwise in fp32), the others by {differences[~border].max().item():.1g} at most")
    truth = torch.arange(args.queries).numpy() % args.videos
    for view, s in score(bf16).items():
        ranks, other = (text_to_video_ranks(x.float().cpu().numpy(), truth) for x in (scores[view], s))
        print(f"bf16 products, {view}: the rank of {int((ranks != other).sum())} of {args.queries} queries changes, "
              f"R@1 {100 * (ranks == 1).mean():.1f} -> {100 * (other == 1).mean():.1f}, scores by "
              f"{(scores[view] - s).abs().max().item():.1g} at most")


def growth(args: argparse.Namespace) -> None:
    """Seconds of 1/4, 1/2 and all of the queries, then of the videos."""
    videos = make_videos(args)
    queries = make_queries(videos, 0, args.queries)
    names = {f"{n} x {args.videos}": (n, args.videos) for n in (args.queries // 4, args.queries // 2, args.queries)}
    names |= {f"{args.queries} x {n}": (args.queries, n) for n in (args.videos // 4, args.videos // 2)}
    took = rounds({name: partial(match, Queries(*(x[:b] for x in queries)), Videos(*(x[:v] for x in videos)))
                   for name, (b, v) in names.items()}, args)
    print(f"\n{'growth, queries x videos':28} {'seconds':>9} {'x unit':>9}   of the whole")
    for name in names:
        whole = took[f"{args.queries} x {args.videos}"]
        print(f"{name:28} {took[name]:9.3f} {took[name] / took['unit']:9.1f}   {took[name] / whole:9.2f}")


def only_ours(args: argparse.Namespace) -> None:
    """Seconds of the scoring, chunk by chunk as evaluation does it, and peak memory with fusion and metrics."""
    videos = make_videos(args)
    scores = {view: torch.zeros(args.queries, args.videos) for view in ("video", "narration")}
    took = 0.0
    for first in tqdm(range(0, args.queries, CHUNK), unit="chunk", leave=False):
        queries = make_queries(videos, first, min(CHUNK, args.queries - first))

        def score(queries=queries, first=first) -> None:
            for view, s in match(queries, videos).items():
                scores[view][first:first + len(s)] = s.cpu()

        took += seconds(score, args.device)
    truth = torch.arange(args.queries).numpy() % args.videos
    table = table_of_matrices(scores, truth, partial(combine, weight=0.5))
    print(f"{args.queries} x {args.videos}: {took:.1f} s of scoring, {1e6 * took / (args.queries * args.videos):.2f} s "
          f"for a million pairs; R@1 of S_fusion {table['S_fusion']['text_to_video']['R@1']:.1f}\n"
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB, fusion and ranks "
          f"included")
    if args.device.startswith("cuda"):
        print(f"peak memory on the GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")


def training(args: argparse.Namespace) -> None:
    """Seconds of the scores of 64 pairs, 32 words a query, and of their gradients."""
    args.videos = BLOCK
    videos, (eos, words, word_mask, word_weights) = make_videos(args), make_queries(make_videos(args), 0, BLOCK)
    queries = Queries(eos, words.repeat(1, 2, 1), word_mask.repeat(1, 2), word_weights.repeat(1, 2) / 2)
    leaves = [x.requires_grad_() for x in (queries.eos, queries.words, videos.frames, videos.narration)]

    def step() -> None:
        torch.autograd.grad(sum(s.square().sum() for s in match(queries, videos).values()), leaves)

    took = rounds({"forward and backward": step}, args)
    for name, each in took.items():
        print(f"{name:28} {each:9.4f} s {each / took['unit']:9.2f} x unit")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.device}, {args.threads} threads; K = {args.frames}, D = {args.dim}, {SHORTEST} to {LONGEST} words, "
          "both views")
    if args.training:
        training(args)
        return
    with torch.no_grad():
        if args.only_ours:
            only_ours(args)
        else:
            compare(args)
            growth(args)


if __name__ == "__main__":
    command(main)
