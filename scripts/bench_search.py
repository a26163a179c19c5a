"""What a search finds and what it costs as the index grows: recall of stage one, latency, memory.

  python scripts/bench_search.py --videos 1000
  python scripts/bench_search.py --videos 100000
  python scripts/bench_search.py --videos 1000000 --queries 20          half an hour and more
  python scripts/bench_search.py --index INDEX --queries_file test.jsonl    recall on a real index, features as they are
  python scripts/bench_search.py --videos 1000 --engine milvus:/tmp/bench.db      the same in Milvus, into a new index

Recall: the share of the exact best (1, and 10) windows that are among stage one's candidates. The exact ranking scores
every video, block by block, with evaluation's own function. Nothing is held whole but stage one's index: a video's
features are drawn from (seed, number) alone, whenever they are needed, and drawing is not timed.
--engine: windows, features and vectors lie in that engine, stage one is its, and features are read from it.
Timed for a query: stage one; reading the candidates' features, from an index of --stored windows on this disk, most of
it in the page cache (without CLIP's own frames, a third of a real row); stage two, their scores. Encoding
the query, which does not grow, is not in it. With --index the processor time of a query of a long file, all in all.

What is drawn, where there is no index. A direction in a space of RANK dimensions for each of TOPICS topics; a video has
EVENTS events, each partly its topic's and partly its own; a frame is its event with a little noise, a sentence with
more; both are put into D dimensions, where noise from a pool is added, and brought to length 1. A query names the
events of a video: its eos lies between them, each word near one. The spreads of the cosines are printed; they resemble
those of the demo's trained model, which --index prints.
Here: drawing, exact ranking, timing. Not here: stage one and stage two (narvid/search).

Legend: B queries, V videos, K frames and sentences, L words, D joint dimension.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from narvid import InputError
from narvid.data.datasets import read_queries
from narvid.flags import Parser, command, positive
from narvid.fusion import matrix_statistics
from narvid.model import Queries, Videos
from narvid.progress import tqdm
from narvid.search.embedding import Embedder
from narvid.search.engine import CANDIDATES, Engine, fuse
from narvid.search.stage_one import TRAINING, StageOne, candidates_of, files_of
from narvid.search.opening import in_engine, open_store
from narvid.search.rows import EVERY
from narvid.search.store import Store
from narvid.similarity import match

RANK, TOPICS, EVENTS, WORDS = 11, 300, 2, 12
OF_TOPIC = 0.3  # share of an event's variance that its topic makes
SCATTER = np.float32([0.2, 0.5])[:, None, None]  # of frames and of sentences around their event, a dimension of RANK
QUERY_SCATTER, WORD_SCATTER = 0.3, 0.8
SPREAD, POOL = 0.35, 20_000  # length of the noise in D dimensions, where the rest has about 1; how much of it is drawn
BLOCK = 500  # videos drawn and scored at a time
COUNTS = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
BEST = 10
Near = Callable[[np.ndarray, int], list[np.ndarray]]  # (vectors (B, W), count) -> ids for each
MATCHING = {"p": 0.4}  # the paper's filter


class Drawn:
    """Videos and queries from a seed."""

    def __init__(self, args: argparse.Namespace):
        rng = np.random.default_rng(args.seed)
        self.k, self.d, self.seed = args.frames, args.dim, args.seed
        self.topics = rng.standard_normal((TOPICS, RANK), dtype=np.float32)
        self.lift = rng.standard_normal((RANK, args.dim), dtype=np.float32) / np.float32((RANK * args.dim) ** 0.5)

        # A pool: as many normal numbers as there are features would take longer than all else.
        self.noise = rng.standard_normal((POOL, args.dim), dtype=np.float32) * np.float32(SPREAD / args.dim ** 0.5)
        self.ids = np.arange(args.videos)
        self.asked = rng.choice(args.videos, args.queries, replace=False)
        self.encoded = self.queries(self.asked)

    def score(self, queries: Queries, videos: Videos) -> dict[str, torch.Tensor]:
        """Evaluation's, {view: (B, V)}."""
        return match(queries, videos, **MATCHING)

    def vectors(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Stage one's: ids (n,), vectors (n, K, 2 D), has_sentence (n,) bool, as Embedder.pool_videos makes them."""
        for start in range(0, len(self.ids), BLOCK):
            ids = self.ids[start:start + BLOCK]
            videos = self.videos(ids)
            yield ids, torch.cat([videos.frames, videos.narration], dim=2).numpy(), np.ones(len(ids), dtype=bool)

    def stage_one_queries(self, statistics: tuple) -> np.ndarray:
        """(B, 2 D), as Embedder.pool_queries makes them."""
        return torch.cat([self.encoded.eos / std for _, std in statistics], dim=1).numpy()

    def videos(self, numbers: np.ndarray) -> Videos:
        """These videos' features, (V, K, D) a view."""
        latent, rows = np.empty((len(numbers), 2, self.k, RANK), np.float32), np.empty((len(numbers), 2, self.k), int)
        for i, number in enumerate(numbers):
            rng, events = self._events(number)
            scatter = rng.standard_normal((2, self.k, RANK), dtype=np.float32)
            latent[i] = events[np.arange(self.k) * EVENTS // self.k] + SCATTER * scatter
            rows[i] = rng.integers(len(self.noise), size=(2, self.k))
        frames, narration = torch.from_numpy(self._lifted(latent, rows)).unbind(dim=1)
        mask = torch.ones(len(numbers), self.k, dtype=torch.bool)
        return Videos(frames, narration, mask, mask)

    def queries(self, numbers: np.ndarray) -> Queries:
        """One query for each of these videos; it names all of its events."""
        parts = []
        for number in numbers:
            events = self._events(number)[1]
            rng = np.random.default_rng([self.seed, number, 1])
            clean = np.vstack([events.mean(axis=0) * EVENTS ** 0.5, events[np.arange(WORDS) % EVENTS]])
            scatter = np.array([QUERY_SCATTER] + [WORD_SCATTER] * WORDS, np.float32)[:, None]
            latent = clean.astype(np.float32) + scatter * rng.standard_normal(clean.shape, dtype=np.float32)
            parts.append(self._lifted(latent, rng.integers(len(self.noise), size=len(clean))))
        features = torch.from_numpy(np.stack(parts))  # (B, 1 + L, D)
        mask = torch.ones(len(numbers), WORDS, dtype=torch.bool)
        return Queries(features[:, 0], features[:, 1:], mask, mask / WORDS)

    def _events(self, number: int) -> tuple[np.random.Generator, np.ndarray]:
        rng = np.random.default_rng([self.seed, number, 0])
        own = rng.standard_normal((EVENTS, RANK), dtype=np.float32)
        topic = self.topics[rng.integers(TOPICS)]
        return rng, np.float32(OF_TOPIC ** 0.5) * topic + np.float32((1 - OF_TOPIC) ** 0.5) * own

    def _lifted(self, latent: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(..., RANK) and rows of the noise (...) -> (..., D) of length 1."""
        x = latent @ self.lift
        x += self.noise[rows]
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Real:
    """An index that is there, and a file of queries."""

    def __init__(self, args: argparse.Namespace):
        self.store = Store(args.index, read_only=True)
        checkpoint = self.store.settings["checkpoint"]
        if checkpoint is None:
            raise InputError(f"{args.index}: is of plain CLIP; this measures an index of a trained model")
        self.embedder = Embedder.load(checkpoint, narration=self.store.settings["narration"], device="cpu")
        self.embedder.check(self.store.settings, args.index)
        self.ids = self.store.all_windows()
        self.queries = read_queries(args.queries_file)
        self.encoded = self.embedder.queries(self.queries)
        self.score = self.embedder.score

    def vectors(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Stage one's."""
        for ids, pooled in self.store.pooled(BLOCK):
            yield ids, *self.embedder.vectors_of(pooled, "text")

    def stage_one_queries(self, statistics: tuple) -> np.ndarray:
        """(B, W)."""
        return self.embedder.pool_queries(self.encoded, statistics)

    def videos(self, ids: np.ndarray) -> Videos:
        """Features of these windows."""
        return self.embedder.unpack(self.store.features(ids.tolist()))


# --------------------------------------------------------------------------------------------------------- measuring


def spreads(source: Drawn | Real) -> str:
    """Cosines of frames with each other and with queries, of 1,000 videos: mean and standard deviation."""
    videos = source.videos(source.ids[:: max(1, len(source.ids) // 1000)][:1000])
    mask = videos.mask
    unit = torch.nn.functional.normalize(videos.frames, dim=-1)
    eos = torch.nn.functional.normalize(source.encoded.eos, dim=-1)
    within = torch.einsum("vkd,vjd->vkj", unit, unit)
    pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)
    one = torch.stack([x[m][0] for x, m in zip(unit, mask)])
    between = (one @ one.T)[~torch.eye(len(one), dtype=torch.bool)]
    parts = {"frames of a video": within[pairs], "frames of two": between, "query and frame": eos @ unit[mask].T}
    return "cosines: " + ", ".join(f"{name} {x.mean():.2f} +- {x.std():.2f}" for name, x in parts.items())


def measure_statistics(source: Drawn | Real) -> tuple:
    """Eq. 11's, of all queries with at most 1,000 videos."""
    some = np.random.default_rng(0).permutation(source.ids)[:1000]
    scores = source.score(source.encoded, source.videos(np.sort(some)))
    return tuple(matrix_statistics(s) for s in scores.values())


def clustered(vectors: np.ndarray, count: int) -> np.ndarray:
    """(n, S, W) -> (n, count, W): `count` means of a window's vectors (k-means, ten rounds, begun at vectors evenly
    spread over it); vectors of zeros are none.
    """
    real = vectors.any(axis=2)  # (n, S)
    first = (np.arange(count) * real.sum(axis=1)[:, None] / count).astype(int)
    means = np.take_along_axis(vectors, first[..., None], axis=1)  # (n, count, W)
    for _ in range(10):
        near = np.einsum("nsw,ncw->nsc", vectors, means) - (means**2).sum(axis=2)[:, None] / 2
        own = (near.argmax(axis=2)[..., None] == np.arange(count)) & real[..., None]  # (n, S, count)
        means = np.einsum("nsw,nsc->ncw", vectors, own) / np.maximum(own.sum(axis=1), 1)[..., None]
    return means.astype(np.float32)


def make(source: Drawn | Real, count: int | None) -> StageOne:
    """Stage one's index, as the engine makes it; count: of so many vectors a window, means of its frames'."""

    def pooled(vectors: np.ndarray) -> np.ndarray:
        return vectors if count is None or count >= vectors.shape[1] else clustered(vectors, count)

    first = next(source.vectors())[1]
    wanted = np.random.default_rng(0).permutation(source.ids)[:max(1, TRAINING // first.shape[1])]
    if isinstance(source, Drawn):
        videos = source.videos(wanted)
        sample = torch.cat([videos.frames, videos.narration], dim=2).numpy()
    else:
        sample = source.embedder.vectors_of(source.embedder.pool_videos(source.videos(wanted)), "text")[0]
    sample = pooled(sample)
    sample = sample[sample.any(axis=2)]
    blocks = tqdm(source.vectors(), "stage one", -(-len(source.ids) // BLOCK), unit="block", leave=False)
    return StageOne.make(((ids, pooled(x), has) for ids, x, has in blocks), sample,
                         round(len(sample) / len(wanted) * len(source.ids)))


@torch.no_grad()
def exact_best(source: Drawn | Real, statistics: tuple) -> np.ndarray:
    """The ids of the best windows for each query, (B, BEST), best first; every window is scored."""
    rows = len(source.encoded.eos)
    best, of = np.full((rows, BEST), -np.inf), np.zeros((rows, BEST), int)
    for start in tqdm(range(0, len(source.ids), BLOCK), "exact", unit="block", leave=False):
        ids = source.ids[start:start + BLOCK]
        scores = source.score(source.encoded, source.videos(ids))
        fused = fuse(scores, torch.ones(rows, len(ids), dtype=torch.bool), 0.5, statistics).numpy()
        best, of = np.hstack([best, fused]), np.hstack([of, np.broadcast_to(ids, fused.shape)])
        order = np.argsort(-best, axis=1, kind="stable")[:, :BEST]
        best, of = np.take_along_axis(best, order, 1), np.take_along_axis(of, order, 1)
    return of


def recall(source: Drawn | Real, near: Near, vectors: np.ndarray, best: np.ndarray) -> None:
    """Print, for each number of candidates, how much of the exact best they hold."""
    print(f"{'candidates':>10} {'exact best':>11} {f'best {BEST}':>9}")
    for count in [n for n in COUNTS if n < len(source.ids)]:
        found = [np.isin(row, ids) for row, ids in zip(best, near(vectors, count))]
        print(f"{count:>10} {np.mean([x[0] for x in found]):>10.1%} {np.mean(found):>9.1%}")


@torch.no_grad()
def latency(source: Drawn | Real, near_to: Near, vectors: np.ndarray, args: argparse.Namespace,
            store: Store | None) -> None:
    """Print seconds a query: stage one, reading, stage two; median and 95th percentile. store: what is read, if made
    already.
    """
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        store = store or stored(source, Path(folder) / "index", args.stored)
        ids = store.all_windows()
        rng = np.random.default_rng(0)
        for b in tqdm(range(len(vectors)), "latency", leave=False):
            start = time.perf_counter()
            near = near_to(vectors[b:b + 1], args.candidates)[0]
            first = time.perf_counter()
            arrays = store.features(rng.permutation(ids)[:len(near)].tolist())
            read = time.perf_counter()
            videos = Videos(**{name: torch.as_tensor(arrays[name]) for name in Videos._fields})
            source.score(Queries(*(x[b:b + 1] for x in source.encoded)), videos)
            taken.append((first - start, read - first, time.perf_counter() - read))
    table = 1e3 * np.array(taken)
    print(f"{len(near)} candidates, ms a query: median, 95th percentile")
    for name, column in zip(("stage one", "reading", "stage two", "together"), (*table.T, table.sum(axis=1))):
        print(f"{name:>10} {np.median(column):>9.1f} {np.percentile(column, 95):>9.1f}")


def answering(source: Real, count: int = 1000) -> None:
    """Print what a query of a long file costs in one process: encoding, search, ten answers with their reasons."""
    engine, texts = Engine(source.store, source.embedder), list(islice(cycle(source.queries), count))
    engine.search(texts[:1])  # reads or makes stage one
    start = time.process_time()
    engine.search(texts)
    taken = 1e3 * (time.process_time() - start) / count
    print(f"{count:,} queries, ten answers each: {taken:.1f} ms of processor time a query")


def stored(source: Drawn, index: str | Path, count: int) -> Store:
    """A real index that holds some of the drawn videos; with stage one's vectors, where they are kept in an engine."""
    store = open_store(index, create={"dim": source.d, "narration": True})
    for start in tqdm(range(0, min(count, len(source.ids)), BLOCK), "storing", unit="block", leave=False):
        videos = source.videos(source.ids[start:start + BLOCK])
        n, pooled = len(videos.mask), np.zeros((len(videos.mask), 1), np.float32)
        if in_engine(index):
            pooled = torch.cat([videos.frames, videos.narration], dim=2)
            pooled = torch.cat([pooled, pooled.mean(dim=1, keepdim=True)], dim=1).flatten(1).numpy()
        store.put_file(f"{start}.mp4", 1, 1, 1.0, "", [(0, 0.0, b"", None)], [(0.0, 1.0, [0])] * n,
                       {name: x.numpy() for name, x in videos._asdict().items()}, pooled)
    return store


def near_in_engine(store: Store) -> Near:
    """Stage one of an engine; its windows are numbered from 1 in the order in which they were stored."""

    def near(vectors: np.ndarray, count: int) -> list[np.ndarray]:
        stage = store.candidates(None, "text", count)
        stage.refresh()
        return [ids - 1 for ids in stage.nearest(vectors, EVERY)]

    return near


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--videos", type=positive, default=1000, help="V, drawn (default %(default)s)")
    add("--queries", type=positive, default=50, help="B, drawn (default %(default)s)")
    add("--frames", type=positive, default=12, help="K (default %(default)s)")
    add("--dim", type=positive, default=512, help="D (default %(default)s)")
    add("--seed", type=int, default=0, help="of all that is drawn (default %(default)s)")
    add("--candidates", type=positive, default=CANDIDATES, help="of the latencies (default %(default)s)")
    add("--stored", type=positive, default=5000, help="windows in the index that is read (default %(default)s)")
    add("--vectors", type=positive, help="of stage one, a window: so many means of its frames' (default: one a frame)")
    add("--index", help="a real index instead")
    add("--queries_file", help="jsonl with the queries of --index")
    add("--engine", help="milvus:URI of a new index, in place of FAISS and a folder")
    args = parser.parse_args(argv)
    if bool(args.index) != bool(args.queries_file):
        parser.error("--index and --queries_file belong together")
    if args.engine and (args.index or args.vectors or not in_engine(args.engine)):
        parser.error("--engine is milvus:URI, for drawn videos, without --vectors")
    if args.queries > args.videos:
        parser.error("--queries: at most as many as --videos")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        source = Real(args) if args.index else Drawn(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{len(source.ids):,} windows, {len(source.encoded.eos)} queries, {torch.get_num_threads()} threads\n"
          f"{spreads(source)}")
    statistics = measure_statistics(source)
    start, vectors, store = time.perf_counter(), source.stage_one_queries(statistics), None
    if args.engine:
        try:
            store = stored(source, args.engine, args.videos)
        except InputError as error:
            sys.exit(f"error: {error}")
        near, what = near_in_engine(store), f"{args.engine}: {store.milvus.index}, {store.count():,} windows"
        if os.path.isdir(folder := store.place.uri):
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            what += f", {size / 2**20:,.1f} MiB with features"
    else:
        stage = make(source, args.vectors)
        near = lambda vectors, count: candidates_of(stage, vectors, count, None)  # noqa: E731
        with tempfile.TemporaryDirectory() as folder:
            stage.save(Path(folder), "text")
            size = sum(path.stat().st_size for path in files_of(Path(folder), "text"))
        what = f"{type(stage.index).__name__}, {stage.index.ntotal:,} vectors, {size / 2**20:,.1f} MiB"
    print(f"stage one: {what}, made in {time.perf_counter() - start:,.0f} s (drawing or reading them included)",
          flush=True)
    latency(source, near, vectors, args, getattr(source, "store", store))
    if args.index:
        answering(source)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)
    recall(source, near, vectors, exact_best(source, statistics))
    if store is not None:
        store.close()


if __name__ == "__main__":
    command(main)
