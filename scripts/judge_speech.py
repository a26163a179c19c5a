"""What is speech worth to a search? Ranks of queries that only speech answers, and of others, with it and without it.

  python scripts/make_demo_speech.py --out demo
  mkdir spoken
  cut -d'"' -f4 demo/test.jsonl | sort -u | xargs -I{} cp demo/videos/{}.mp4 demo/subtitles/{}.srt spoken
  python -m narvid.search index spoken --out spoken_index --checkpoint runs/demo --narrations demo/narrations.jsonl
  python scripts/judge_speech.py spoken_index demo/spoken/test.jsonl demo/test.jsonl

A row a way to rank, a column a file of queries: R@1, R@10 and median rank of the query's video among all files of the
index, ties against it. Alone: by the share of the query's words that are said, or by the cosine of the text tower
(narvid/search/speech.py); files that say nothing come last.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from narvid import InputError
from narvid.files import read_json_lines
from narvid.flags import Parser, command
from narvid.search.__main__ import open_engine
from narvid.search.engine import Engine, fuse
from narvid.search.speech import counted
from narvid.search.store import Store


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX")
    add("queries", type=Path, nargs="+", metavar="FILE", help="JSON lines of {\"video\", \"query\"}")
    add("--checkpoint", metavar="RUN", help="where the index's model lies by now")
    return parser.parse_args(argv)


def ways_of(engine: Engine, texts: list[str], ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, scores (B, n)) of each way to rank the n windows for B texts."""
    store, embedder = engine.store, engine.embedder
    videos, queries = embedder.unpack(store.features(ids)), embedder.queries(texts)
    both = torch.from_numpy(np.broadcast_to(embedder.has_sentence(videos), (len(texts), len(ids))).copy())
    seen = fuse(embedder.score(queries, videos), both, embedder.weight, store.statistics["text"]).numpy()
    fit = engine.speech.fit(engine.speech.ask(texts, queries.eos.float().cpu().numpy()), ids)  # share, cosine
    statistics = store.fact("speech_statistics")
    words, tower = (np.nan_to_num(counted(fit[i:i + 1], statistics[i:i + 1])) for i in (0, 1))
    yield "without speech", seen
    yield "with its words", seen + words
    yield "with the text tower", seen + tower
    yield "with both (what a search does)", seen + words + tower
    yield "words alone", np.nan_to_num(fit[0], nan=-np.inf)
    yield "text tower alone", np.nan_to_num(fit[1], nan=-np.inf)


def ranks_of(scores: np.ndarray, file_of: np.ndarray, wanted: list[int]) -> np.ndarray:
    """Ranks (B,) of the wanted files, each as good as its best window (n,)."""
    files, place = np.unique(file_of, return_inverse=True)
    best = np.full((len(scores), len(files)), -np.inf)
    np.maximum.at(best, (slice(None), place), scores)
    own = best[np.arange(len(scores)), np.searchsorted(files, wanted)]
    return (best >= own[:, None]).sum(axis=1)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = parse_args(argv)
    with Store(args.index, read_only=True) as store:
        if store.fact("speech_statistics") is None:
            raise InputError(f"{args.index}: nothing is said in it; index files with subtitles")
        engine, ids = open_engine(store, args.checkpoint), store.all_windows()
        windows, id_of = store.windows(ids), {Path(file.path).stem: file.id for file in store.files()}
        table: dict[str, list[str]] = {}
        for path in args.queries:
            entries = [entry for _, entry in read_json_lines(path)]
            if unknown := next((entry["video"] for entry in entries if entry["video"] not in id_of), None):
                raise InputError(f"{path}: {unknown} is no video of {args.index}")
            file_of, wanted = np.array([w.file for w in windows]), [id_of[entry["video"]] for entry in entries]
            for name, scores in ways_of(engine, [entry["query"] for entry in entries], ids):
                ranks = ranks_of(scores, file_of, wanted)
                table.setdefault(name, []).append(f"{np.mean(ranks <= 1):6.1%} {np.mean(ranks <= 10):6.1%} "
                                                  f"{np.median(ranks):6.1f}")
        files, said = store.speech.count()
        print(f"{len(id_of)} files, {len(ids)} windows; {said} utterances in {files} files")
        print(f"{'R@1, R@10, median rank':31}  " + "  ".join(f"{str(path)[-22:]:22}" for path in args.queries))
        for name, cells in table.items():
            print(f"{name:31}  " + "  ".join(f"{cell:22}" for cell in cells))


if __name__ == "__main__":
    command(main)
