"""What a search asks of a model: a Retriever's features and scores, vectors for stage one, and "more like this".

What is searched is what was measured: narvid/retriever.py encodes and scores as in evaluation. A method says by
`vectors` (narvid/methods/protocol.py) what of a video is compared with a query; nothing here asks which method it is.
Not here: an index, files of the user.

Legend: B queries, V videos (of a search: windows), K frames of a video and sentences of its narration, L words, D joint
dimension, S stage-one vectors of a video, W their width (D a view), P = S W. Masks are bool, True = real.
"""

from __future__ import annotations

import hashlib
from collections import namedtuple
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from narvid import InputError
from narvid.fusion import spreads
from narvid.methods.clip4clip import mean_pool
from narvid.methods.protocol import names_of
from narvid.model import Queries, Videos, place_frames
from narvid.retriever import Retriever
from narvid.run.same_run import OF_START
from narvid.run.settings import named
from narvid.search.stage_one import vectors_of

ViewStatistics = tuple[tuple[float, float], tuple[float, float] | None]  # (mean, std) of S_qv; of S_qn, if it is used
AnyQueries = tuple | dict[str, tuple]  # one for all views, or one for each
TEXTS = 64  # encoded at a time


class Embedder:
    """A Retriever as a search sees it.

    max_frames (K), picture: how frames are picked and read. views: keys of `score`, "video" and perhaps "narration".
    narration: whether sentences are read. weight: of S_qv in Eq. 11. settings: plain values that say which model this
    is, to be stored with an index. frames_alone: what to say where there is no narration, "" where none is read.
    """

    def __init__(self, retriever: Retriever, *, narration: bool | None = None):
        """narration False: sentences are masked and S_qv alone counts, whatever the model reads; None: as it reads.

        InputError for a method that cannot be searched with, and for a narration that the model does not read.
        """
        model, flags, where = retriever.model, retriever.flags, retriever.source or "plain CLIP"
        if not model.searchable(flags):
            raise InputError(f"{where}: {named(flags)} cannot be searched with; give another --checkpoint")
        if narration and not retriever.narrated:
            raise InputError(f"{where}: this model was trained without a narration; leave the captioner and the "
                             "narrations out")
        self.retriever, self.narration = retriever, retriever.narrated and narration is not False
        self.max_frames, self.picture = retriever.encoding.max_frames, retriever.encoding.picture
        self.views = ("video", "narration") if self.narration else ("video",)
        self.weight = flags.fusion_weight
        self.frames_alone = ""
        if retriever.narrated:
            self.frames_alone = f"no captioner and no narrations: frames alone are searched. {model.frames_alone}"
        own = names_of(model.add_flags) - model.loss_flags - model.unread(flags)
        self.settings = {name: getattr(flags, name) for name in (
            "method", "clip_model", "clip_pretrained", "tokenizer", "max_frames", "max_words", "recipe", "precision",
            "eval_precision", "fusion_weight")}
        self.settings |= {"checkpoint": retriever.source and str(retriever.source.resolve()),
                          "weights": weights_digest(model), "image_size": self.picture.size,
                          "picture": [*self.picture[1:3], *map(list, self.picture[3:])],
                          "dim": model.clip.dim, "narration": self.narration,
                          "flags": {name: getattr(flags, name) for name in sorted(own)}}

    @classmethod
    def load(cls, checkpoint: str | Path | None, *, clip_model: str = "ViT-B-32",
             clip_pretrained: str | None = "openai", tokenizer: str | None = None, narration: bool | None = None,
             device: str | None = None, eval_precision: str = "fp32") -> Embedder:
        """checkpoint, clip_model, clip_pretrained: as for Retriever.load, and the others; narration: as above."""
        retriever = Retriever.load(checkpoint, towers=clip_model, pretrained=clip_pretrained, tokenizer=tokenizer,
                                   device=device, eval_precision=eval_precision)
        return cls(retriever, narration=narration)

    def check(self, settings: dict, index: str | Path) -> None:
        """InputError unless this is the model that made an index with these settings (where its files lie is free).

        An index may be older than a setting or a flag; the digest of the weights is as old as the index.
        """
        here, there = ({**of, **of.get("flags", {}), "number format": number_format(of)}
                       for of in (self.settings, settings))
        names = [k for k in here if k not in (*OF_START, "flags", "eval_precision") and here[k] != there.get(k)
                 and (k in there or k == "weights")]
        if names:
            differences = ", ".join(f"{k} {_short(there.get(k))} there, {_short(here[k])} here" for k in names[:3])
            model = f"--checkpoint {settings['checkpoint']}" if settings.get("checkpoint") else "no --checkpoint"
            raise InputError(f"{index}: this index was made with another model ({differences}); give {model}, or make "
                             "another index")

    # ------------------------------------------------------------------------------------------------------- encoding

    def queries(self, texts: list[str]) -> NamedTuple:
        """Texts -> the method's features of B queries (NarVid: Queries)."""
        return self.retriever.encode_queries(texts)

    def text_vectors(self, texts: list[str]) -> np.ndarray:
        """Texts as the text tower has them, (n, D) float32 of length 1: the eos of each as a query."""
        parts = [self.queries(texts[start:start + TEXTS]).eos for start in range(0, len(texts), TEXTS)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu().numpy()

    def videos(self, frames: list[Tensor], sentences: list[list[str | None]] | None = None) -> NamedTuple:
        """V times 1 to K frames (k, 3, S, S) uint8, in order, and the sentence of each -> features of V videos.

        sentences None, or a None among them: there is no such sentence. Features of single frames (model.Videos) come
        with `look` (V, K, D), the frames as CLIP saw them: enhanced ones hold some of the narration, which a
        picture lacks. Not to be called from two threads at once.
        """
        given = sentences if self.narration and sentences is not None else [[None] * len(x) for x in frames]
        seen = []
        with self.retriever.model.clip.visual.register_forward_hook(lambda _, __, features: seen.append(features)):
            videos = self.retriever.encode_frames(frames, given)
        if not self.narration:
            videos = videos._replace(**{name: None for name in videos._fields if name.startswith("narration")})
        if not isinstance(videos, Videos):
            return videos
        return _features((*videos._fields, "look"))(*videos, place_frames(torch.cat(seen), videos.mask))

    def like(self, videos: NamedTuple) -> dict[str, NamedTuple]:
        """{view: queries that look for videos like these}: the frames ask the frames, the sentences the sentences.

        With `look`: the frames are CLIP's own on both sides, since a query may have no narration. Scored as a
        text, at both grains: the eos is the mean of the normalised real frames (sentences), these are the words, all of
        one weight. Nothing is filtered unless all the queries are single pictures, which look for one frame: with
        uniform weights on either side a video's twin has the highest score there is. Without: the means are compared.
        """
        means = self._means(videos)
        if not hasattr(videos, "look"):
            return {view: Queries(eos, None, None, None) for view, eos in means.items()}
        queries = {}
        for view, (features, mask) in self._compared(videos).items():
            weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
            some = mask.any(dim=1, keepdim=True)  # without a sentence one word of no weight stands in
            queries[view] = Queries(means[view], features, torch.where(some, mask, _first(mask)),
                                    weights.to(features.dtype))
        return queries

    def has_sentence(self, videos: NamedTuple) -> np.ndarray:
        """(V,) whether a video has a sentence that is read; without one only its frames can be scored."""
        if not self.narration:
            return np.zeros(len(videos[0]), dtype=bool)
        _, mask = self.retriever.model.vectors(videos)["narration"]
        return mask.reshape(len(mask), -1).any(dim=1).cpu().numpy()

    # -------------------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def score(self, queries: AnyQueries, videos: NamedTuple) -> dict[str, Tensor]:
        """Evaluation's score of all pairs, {view: (B, V)} in fp32 on the CPU; for queries of `like` theirs."""
        score = self.retriever.encoding.score
        if not isinstance(queries, dict):
            scores = score(queries, videos)
        elif not hasattr(videos, "look"):
            scores = {view: F.normalize(queries[view].eos, dim=-1) @ mean.T
                      for view, mean in self._means(videos).items()}
        else:
            score = self.retriever.model.unfiltered if _of_many_frames(queries) else score
            scores = {view: score(queries[view], Videos(x, None, mask, None))["video"]
                      for view, (x, mask) in self._compared(videos).items()}
        return {view: s.float().cpu() for view, s in scores.items()}

    @torch.no_grad()
    def filter_weights(self, queries: AnyQueries, videos: NamedTuple) -> dict[str, np.ndarray] | None:
        """What each query looks at, {view: (B, V, K)}, 0 where the filter drops; None where nothing is filtered."""
        kept = self.retriever.model.kept
        if not isinstance(queries, dict):
            weights = kept(queries, videos)
        elif not hasattr(videos, "look") or _of_many_frames(queries):
            return None
        else:
            weights = {view: kept(queries[view], Videos(x, None, mask, None))
                       for view, (x, mask) in self._compared(videos).items()}
            weights = {view: of["video"] for view, of in weights.items() if of}
        return {view: w.cpu().numpy() for view, w in weights.items()} if weights else None

    # ------------------------------------------------------------------------------------------------------ stage one

    def pool_videos(self, videos: NamedTuple) -> np.ndarray:
        """(V, P) float32: all stage-one vectors of a video, side by side; `vectors_of` takes them apart.

        Of a method that looks at single frames for texts a vector a frame, the normalised frame and the normalised
        sentence beside it (where there is none, the mean of the narration), all 0 in padding; for `like` the means of
        both views. The filter and the fine score look at single frames, so that a mean over them finds far fewer of the
        exact best (docs/scaling.md). Of other methods their pooled features, for both. A video without a sentence has 0
        in the narration's part.
        """
        vectors = [torch.cat([*self._means(videos).values()], dim=-1)]  # (V, W)
        views = self.retriever.model.vectors(videos)
        x, mask = views["video"]
        if x.ndim == 3:
            parts = []
            for view in self.views:
                x, real = views[view]
                parts.append(torch.where(real[..., None], F.normalize(x, dim=-1), mean_pool(x, real)[:, None]))
            vectors.insert(0, (torch.cat(parts, dim=-1) * mask[..., None]).flatten(1))
        return torch.cat(vectors, dim=1).float().cpu().numpy()

    def vectors_of(self, pooled: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """What `pool_videos` made, taken apart (stage_one.vectors_of)."""
        return vectors_of(pooled, self.settings["dim"], len(self.views), kind)

    def pool_queries(self, queries: AnyQueries, statistics: ViewStatistics,
                     narration_used: np.ndarray | None = None) -> np.ndarray:
        """(B, W) float32, whose product with a stage-one vector is Eq. 11 of its cosines, up to a constant.

        statistics: mean and standard deviation of S_qv, and of S_qn; the latter scales each view's part, as its weight
        does. narration_used (B,): whether it counts for a query, all if not given; without it the frames have all the
        weight.
        """
        parts = []
        weights = (self.weight, 1 - self.weight) if self.narration else (1.0,)
        for view, of_view, weight in zip(self.views, statistics, weights):
            scale = 0.0 if of_view is None else weight / (of_view[1] if spreads(*of_view) else 1.0)
            eos = (queries[view] if isinstance(queries, dict) else queries).eos
            parts.append(scale * F.normalize(eos.float(), dim=-1))
        vectors = torch.cat(parts, dim=1).cpu().numpy()
        if self.narration and self.weight and narration_used is not None and not narration_used.all():
            vectors[~narration_used] *= np.float32(1 / self.weight)
        return vectors

    def _means(self, videos: NamedTuple) -> dict[str, Tensor]:
        """{view: (V, D)} of length 1: what `like` compares."""
        return {view: mean_pool(x, mask) if x.ndim == 3 else F.normalize(x, dim=-1)
                for view, (x, mask) in self._compared(videos).items()}

    def _compared(self, videos: NamedTuple) -> dict[str, tuple[Tensor, Tensor]]:
        """{view: (x, mask)} of the method's `vectors`, with the frames as CLIP saw them where they are there."""
        views = self.retriever.model.vectors(videos)
        if hasattr(videos, "look"):
            views["video"] = (videos.look, videos.mask)
        return {view: views[view] for view in self.views}

    # -------------------------------------------------------------------------------------------------------- storing

    def pack(self, videos: NamedTuple) -> dict[str, np.ndarray | None]:
        """Features as arrays for the store, float32 or bool, V rows each."""
        return {name: None if x is None else x.cpu().numpy() for name, x in zip(videos._fields, videos)}

    def unpack(self, arrays: dict[str, np.ndarray | None]) -> NamedTuple:
        """What `pack` made -> features on the device."""
        fields = (x.astype(np.float32) if x is not None and x.dtype == np.float16 else x for x in arrays.values())
        return _features(tuple(arrays))(*(None if x is None else torch.as_tensor(x, device=self.retriever.device)
                                          for x in fields))


@lru_cache
def _features(names: tuple[str, ...]) -> type:
    """A NamedTuple of these fields, which any method's score reads by their names: an index keeps no types."""
    return namedtuple("Features", names)


def number_format(settings: dict) -> str:
    """In which an index's features were made; before it was a flag of evaluation, training's was taken."""
    if (chosen := settings.get("eval_precision", "train")) != "train":
        return chosen
    return "fp16 towers" if settings.get("recipe") == "reported" else str(settings.get("precision"))


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and values of all weights: the same for the same model, wherever its file lies."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_many_frames(queries: dict[str, Queries]) -> bool:
    """Whether any of the queries of `like` has more than one frame."""
    return bool((queries["video"].word_mask.sum(dim=1) > 1).any())


def _first(mask: Tensor) -> Tensor:
    """True in the first column alone."""
    return (torch.arange(mask.shape[1], device=mask.device) == 0).expand_as(mask)


def _short(value) -> str:
    """A setting in a message; of a digest the beginning."""
    return value[:12] if isinstance(value, str) else str(value)
