"""A model of ours in the mteb benchmark: its video retrieval tasks, measured with the exact score, not with one vector.

    import mteb
    from narvid.mteb import SearchModel
    mteb.evaluate(SearchModel.load("runs/x"), mteb.get_tasks(tasks=["MSRVTTT2V"]))

Needs mteb (pip install -e ".[mteb]", Python 3.11 or newer). It calls `index` with a task's corpus, then `search` with
all its queries; either side may be the videos. Scores are `Retriever.score`'s `fused`, with the statistics of the
task's whole matrix.
Here: mteb's SearchProtocol over a Retriever. Not here: encoding and scores (retriever.py).

Legend: B queries, V videos.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from narvid import InputError
from narvid.data.narrations import Narration, load_narrations
from narvid.evaluation import concatenate
from narvid.files import writing
from narvid.progress import tqdm
from narvid.retriever import Retriever
from narvid.run.settings import named


class Side(NamedTuple):
    """One side of a task, encoded."""

    ids: list[str]
    of_videos: bool
    features: NamedTuple


class SearchModel:
    """A Retriever as mteb wants a search model: `index`, `search`, `mteb_model_meta`.

    narrations: {id of the corpus or of the queries: its narration}; mteb's tasks have no sentences of frames. A video
    that is not in it has none, and without any S_qv alone tells videos apart.
    """

    def __init__(self, retriever: Retriever, narrations: Mapping[str, Narration] | None = None):
        if narrations and not retriever.narrated:
            raise InputError("this model reads no narration: leave the narrations out")
        self.retriever, self.narrations = retriever, narrations or {}
        self._corpus: Side | None = None

    @classmethod
    def load(cls, source: str | Path | None, *, narrations: str | Path | None = None, **options) -> SearchModel:
        """source and options as for Retriever.load; narrations: a narration file whose videos are the task's ids."""
        return cls(Retriever.load(source, **options), load_narrations(narrations) if narrations else None)

    @property
    def mteb_model_meta(self):
        """What mteb writes beside its results: the method, the size, a digest of the weights."""
        from mteb.models.model_meta import ModelMeta

        model, flags = self.retriever.model, self.retriever.flags
        digest = hashlib.blake2b(digest_size=8)
        for name, weights in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        source = self.retriever.source
        return ModelMeta.create_empty({
            "name": f"narvid/{source.resolve().name if source else Path(flags.clip_model).stem}",
            "revision": digest.hexdigest(), "n_parameters": sum(p.numel() for p in model.parameters()),
            "max_tokens": flags.max_words, "embed_dim": model.clip.dim, "framework": ["PyTorch"],
            "modalities": ["video", "text"], "model_type": ["late-interaction"],
            "experiment_kwargs": {"method": named(flags).removeprefix("--method "), "max_frames": flags.max_frames,
                                  "narrations": len(self.narrations)}})

    def index(self, corpus, *, task_metadata=None, hf_split=None, hf_subset=None, encode_kwargs=None, num_proc=None,
              **_) -> None:
        """Encode the corpus, a dataset of `id` and `video` or `text`; what was indexed before is forgotten."""
        self._corpus = self._encode(corpus, "the corpus")

    def search(self, queries, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, task_metadata=None,
               hf_split=None, hf_subset=None, encode_kwargs=None, num_proc=None, **_) -> dict[str, dict[str, float]]:
        """{query: {item of the corpus: score}}, the best `top_k`, of `top_ranked` where it names the candidates."""
        if self._corpus is None:
            raise InputError("nothing is indexed: call `index` with the corpus first")
        corpus, asked = self._corpus, self._encode(queries, "the queries")
        if corpus.of_videos == asked.of_videos:
            raise InputError("one side of a task must be videos and the other one texts; both are "
                             f"{'videos' if asked.of_videos else 'texts'}")
        texts, videos = (corpus, asked) if asked.of_videos else (asked, corpus)
        scores = self.retriever.score(texts.features, videos.features)["fused"]  # (B, V)
        scores = scores.T if asked.of_videos else scores
        column = {item: at for at, item in enumerate(corpus.ids)}
        found = {}
        for query, row in zip(asked.ids, scores.tolist()):
            candidates = corpus.ids if top_ranked is None else top_ranked.get(query, ())
            best = sorted(candidates, key=lambda item: -row[column[item]])[:top_k]
            found[query] = {item: row[column[item]] for item in best}
        return found

    def _encode(self, dataset, what: str) -> Side:
        """A dataset with `id` and either `video` or `text`."""
        columns = {"video", "text"} & {*dataset.column_names}
        if len(columns) != 1:
            raise InputError(f"{what}: columns {', '.join(dataset.column_names)}; this model takes items of either "
                             "`video` or `text`")
        ids = [str(item) for item in dataset["id"]]
        if columns == {"text"}:
            return Side(ids, False, self.retriever.encode_queries(list(dataset["text"])))
        return Side(ids, True, self._encode_videos(dataset, ids))

    def _encode_videos(self, dataset, ids: list[str]) -> NamedTuple:
        """The files behind a `video` column, decoded as everywhere here; audio is left aside."""
        from datasets import Video

        files = dataset.select_columns(["video"]).cast_column("video", Video(decode=False))
        size, parts = self.retriever.encoding.batch_size, []
        for start in tqdm(range(0, len(ids), size), desc="encode videos", unit="batch"):
            with tempfile.TemporaryDirectory() as folder:
                some = range(start, min(start + size, len(ids)))
                paths = [_as_file(files[i]["video"], Path(folder, f"{i}"), ids[i]) for i in some]
                narrations = [_timed(self.narrations.get(ids[i])) for i in some] if self.narrations else None
                parts.append(self.retriever.encode_videos(paths, narrations))
        return concatenate(parts)


def _as_file(video: dict, where: Path, name: str) -> Path:
    """{"path", "bytes"} of an undecoded video -> a file: the one that is there, or its bytes in `where`."""
    if video["bytes"] is None:
        if not (video["path"] and Path(video["path"]).is_file()):
            raise InputError(f"video {name}: its file {video['path']} is not there; load the task's data again")
        return Path(video["path"])
    where = where.with_suffix(Path(video["path"] or "").suffix or ".mp4")
    with writing(where, binary=True) as file:
        file.write(video["bytes"])
    return where


def _timed(narration: Narration | None) -> list[tuple[float, str]] | None:
    return None if narration is None else [*zip(narration.times, narration.sentences)]
