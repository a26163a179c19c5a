"""A trained model, or plain CLIP, behind a few functions: texts and frames -> features, features -> scores.

The only file here that knows the trainer: the model is built by it, encodes as in evaluation and scores with
evaluation's own functions, so that what is searched is what was measured. No index, no files of the user.

Legend: B queries, V videos (of a search: windows), K frames of a video and sentences of its narration, L words, D joint
dimension, S stage-one vectors of a video, W their width (D a view), P = S W. Masks are bool, True = real.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from narvid import InputError, distributed
from narvid.methods import clip4clip, zeroshot
from narvid.methods.clip4clip import mean_pool
from narvid.data.datasets import Item, Split, collate, tokenize
from narvid.evaluation import Encoding, concatenate
from narvid.model import Queries, Videos, place_frames
from narvid.methods import METHODS
from narvid.run.build import build_model, encoding_of
from narvid.run.run_dir import load_checkpoint
from narvid.run.settings import is_ours, named, parse_args
from narvid.similarity import filter_weights, match


class NarVidVideos(NamedTuple):
    """model.Videos, and the frames as CLIP saw them: enhanced ones have heard the narration, which a picture lacks."""

    frames: Tensor  # (V, K, D)
    narration: Tensor | None  # (V, K, D)
    mask: Tensor  # (V, K)
    narration_mask: Tensor | None  # (V, K)
    look: Tensor  # (V, K, D)


FEATURES = {"narvid": NarVidVideos, "zeroshot": zeroshot.Videos, "clip4clip": clip4clip.Videos}  # the methods, too
BLOCK = 128  # side of the tiles of pairs that are scored at once, as in evaluation; bounds memory
ViewStatistics = tuple[tuple[float, float], tuple[float, float] | None]  # (mean, std) of S_qv; of S_qn, if it is heard
AnyQueries = tuple | dict[str, tuple]  # one for all views, or one for each


class Embedder:
    """What a search asks of a model.

    max_frames (K), image_size: how frames are picked and read. views: keys of `score`, "video" and perhaps "narration".
    narration: whether sentences are heard. weight: of S_qv in Eq. 11. settings: plain values that say which model this
    is, to be stored with an index.
    """

    def __init__(self, model: torch.nn.Module, encoding: Encoding, settings: dict, *, device: torch.device,
                 hears: bool):
        """hears: the model wants sentences, be they used or not."""
        self.model, self.encoding, self.settings, self.device = model.eval(), encoding, settings, device
        self.max_frames, self.image_size = encoding.max_frames, encoding.image_size
        self.narration, self.weight = settings["narration"], settings["fusion_weight"]
        self.views = ("video", "narration") if self.narration else ("video",)
        self._hears, self._matching, self._features = hears, settings["matching"], FEATURES[settings["method"]]

    @classmethod
    def load(cls, checkpoint: str | Path | None, *, clip_model: str = "ViT-B-32", clip_pretrained: str = "openai",
             narration: bool | None = None, device: str | None = None) -> Embedder:
        """checkpoint: a run's folder or best.pt, or a released NarVid file (of clip_model's architecture).

        None is plain CLIP, clip_model with the weights clip_pretrained (open_clip's tag, or a file). narration False:
        sentences are masked and S_qv alone counts, whatever the model was trained with; None: as it was trained.
        InputError for a file that is no checkpoint, or one of a method that cannot be searched with.
        """
        path = Path(checkpoint) if checkpoint is not None else None
        path = path / "best.pt" if path is not None and path.is_dir() else path
        argv = ["--eval_only", "--output_dir", "unused", "--num_workers", "0"]
        if path is None:
            argv += ["--method", "zeroshot", "--clip_model", clip_model, "--clip_pretrained", clip_pretrained]
            argv += ["--no-use_narration"] if narration is False else []
        else:
            ours = is_ours(load_checkpoint(path))
            argv += ["--checkpoint", str(path)] + ([] if ours else ["--clip_model", clip_model])
        try:
            args = parse_args(argv)
        except SystemExit as error:  # the trainer's flags end the process, a library must not
            raise InputError(str(error).removeprefix("error: ")) from error
        if not METHODS[args.method].searchable(args):
            raise InputError(f"{path}: {named(args)} cannot be searched with; give another --checkpoint")
        model = build_model(args)
        hears = "narration" in METHODS[args.method].reads(args)
        if narration and not hears:
            raise InputError(f"{path}: this model was trained without a narration; leave the captioner and the "
                             "narrations out")
        world = distributed.start()
        world = world._replace(device=torch.device(device)) if device else world
        encoding = encoding_of(model, args, world)
        settings = {name: getattr(args, name) for name in (
            "method", "clip_model", "max_frames", "max_words", "recipe", "precision", "fusion_weight")}
        settings |= {"checkpoint": None if path is None else str(path.resolve()), "weights": weights_digest(model),
                     "clip_pretrained": clip_pretrained, "image_size": encoding.image_size,
                     "dim": model.clip.config.embed_dim, "narration": hears and narration is not False,
                     "matching": None}
        if hasattr(model, "filter_options"):
            settings["matching"] = model.filter_options(args) | {"fine": "NM" in args.modules}
        return cls(model.to(world.device), encoding, settings, device=world.device, hears=hears)

    def check(self, settings: dict, index: str | Path) -> None:
        """InputError unless this is the model that made an index with these settings (where its files lie is free)."""
        names = [k for k in self.settings if k not in ("checkpoint", "clip_model", "clip_pretrained")
                 and self.settings[k] != settings.get(k)]
        if names:
            told = ", ".join(f"{k} {_short(settings.get(k))} there, {_short(self.settings[k])} here" for k in names[:3])
            model = f"--checkpoint {settings['checkpoint']}" if settings.get("checkpoint") else "no --checkpoint"
            raise InputError(f"{index}: this index was made with another model ({told}); give {model}, or make another "
                             "index")

    # ------------------------------------------------------------------------------------------------------- encoding

    @torch.no_grad()
    def queries(self, texts: list[str]) -> NamedTuple:
        """Texts -> the method's features of B queries (NarVid: Queries)."""
        tokens, word_mask = (x.to(self.device) for x in tokenize(texts, self.encoding.max_words))
        with self.encoding.autocast():
            return concatenate([self.model.encode_queries(t, m) for t, m in zip(
                tokens.split(self.encoding.batch_size), word_mask.split(self.encoding.batch_size))])

    @torch.no_grad()
    def videos(self, frames: list[Tensor], sentences: list[list[str | None]] | None = None) -> NamedTuple:
        """V times 1 to K frames (k, 3, S, S) uint8, in order, and the sentence of each -> features of V videos.

        sentences None, or a None among them: there is no such sentence. They are padded and masked as in evaluation.
        Not to be called from two threads at once.
        """
        told = sentences if self.narration and sentences is not None else [[None] * len(x) for x in frames]
        split = Split([], np.zeros(0, int), [], Path(), [], told if self._hears else None, [], 0)
        items = [Item(v, v, x, list(range(len(x)))) for v, x in enumerate(frames)]
        parts, seen = [], []
        with self.model.clip.visual.register_forward_hook(lambda _, __, features: seen.append(features)):
            for start in range(0, len(items), self.encoding.batch_size):
                batch = collate(items[start:start + self.encoding.batch_size], split=split, with_queries=False,
                                max_words=self.encoding.max_words, max_frames=self.max_frames)
                if self._hears and not len(batch.sentences):  # the tower wants a text to read; the mask hides it
                    batch = batch._replace(sentences=tokenize([""], self.encoding.max_words)[0])
                _, _, _, _, *inputs = batch.to(self.device)
                with self.encoding.autocast():
                    parts.append(self.model.encode_videos(*inputs))
        videos = concatenate(parts)
        if not isinstance(videos, Videos):
            return videos
        look = place_frames(torch.cat(seen), videos.mask)
        if not self.narration:  # ZeroShot has a flag for it
            videos = videos._replace(narration=None, narration_mask=None)
        return NarVidVideos(*videos, look)

    def like(self, videos: NamedTuple) -> dict[str, NamedTuple]:
        """{view: queries that look for videos like these}: the frames ask the frames, the sentences the sentences.

        NarVid: the frames are CLIP's own on both sides, since a query may have no narration to hear. Scored as a text,
        at both grains: the eos is the mean of the normalised real frames (sentences), these are the words, all of one
        weight. Nothing is filtered unless all the queries are single pictures, which look for one frame: with uniform
        weights on either side a video's twin has the highest score there is. Other methods compare pooled features.
        """
        means = self._means(videos)
        if not isinstance(videos, NarVidVideos):
            return {view: clip4clip.Queries(eos) for view, eos in means.items()}
        queries = {}
        for view, (features, mask) in self._views_of(videos, alike=True).items():
            weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
            some = mask.any(dim=1, keepdim=True)  # without a sentence one word of no weight stands in
            queries[view] = Queries(means[view], features, torch.where(some, mask, _first(mask)),
                                    weights.to(features.dtype))
        return queries

    def told(self, videos: NamedTuple) -> np.ndarray:
        """(V,) whether a video has a sentence that is heard; without one only its frames can be scored."""
        if not self.narration:
            return np.zeros(len(videos[0]), dtype=bool)
        has = videos.narration_mask if isinstance(videos, NarVidVideos) else videos.narration != 0
        return has.any(dim=1).cpu().numpy()

    # -------------------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def score(self, queries: AnyQueries, videos: NamedTuple) -> dict[str, Tensor]:
        """Evaluation's score of all pairs, {view: (B, V)} in fp32 on the CPU; for queries of `like` theirs."""
        if not isinstance(queries, dict):
            scores = self.encoding.score(queries, videos, block=BLOCK)
        elif not isinstance(videos, NarVidVideos):
            scores = {view: self.encoding.score(of_view, videos)[view] for view, of_view in queries.items()}
        else:
            options = self._matching | ({"method": "uniform"} if _of_many_frames(queries) else {})
            scores = {view: match(queries[view], Videos(features, None, mask, None), block=BLOCK, **options)["video"]
                      for view, (features, mask) in self._views_of(videos, alike=True).items()}
        return {view: s.float().cpu() for view, s in scores.items()}

    @torch.no_grad()
    def filter_weights(self, queries: AnyQueries, videos: NamedTuple) -> dict[str, np.ndarray] | None:
        """What each query looks at, {view: (B, V, K)}, 0 where the filter drops; None where nothing is filtered."""
        if self._matching is None or (isinstance(queries, dict) and _of_many_frames(queries)):
            return None
        options = {name: value for name, value in self._matching.items() if name != "fine"}
        weights = {}
        for view, (features, mask) in self._views_of(videos, alike=isinstance(queries, dict)).items():
            eos = F.normalize(_of_view(queries, view).eos.double(), dim=-1)
            cosine = torch.einsum("bd,vkd->bvk", eos, F.normalize(features.double(), dim=-1))
            weights[view] = filter_weights(cosine, mask, **options).cpu().numpy()
        return weights

    # ------------------------------------------------------------------------------------------------------ stage one

    def pool_videos(self, videos: NamedTuple) -> np.ndarray:
        """(V, P) float32: all stage-one vectors of a video, side by side; `vectors_of` takes them apart.

        NarVid: for texts a vector a frame, the normalised frame and the normalised sentence beside it (where there is
        none, the mean of the narration), all 0 in padding; for `like` the means of both views. The filter and the fine
        score look at single frames, so that a mean over them finds far fewer of the exact best (docs/scaling.md).
        Other methods: their pooled features, for both. A video without a sentence has 0 in the narration's part.
        """
        vectors = [torch.cat([*self._means(videos).values()], dim=-1)]  # (V, W)
        if isinstance(videos, NarVidVideos):
            parts = []
            for x, mask in self._views_of(videos).values():
                unit = F.normalize(x, dim=-1)
                parts.append(torch.where(mask[..., None], unit, mean_pool(x, mask)[:, None]))  # (V, K, D)
            vectors.insert(0, (torch.cat(parts, dim=-1) * videos.mask[..., None]).flatten(1))
        return torch.cat(vectors, dim=1).float().cpu().numpy()

    def vectors_of(self, pooled: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """What `pool_videos` made, (V, P) -> vectors for queries of a kind, "text" or "like", (V, S, W), and (V,)
        whether a video has a sentence.
        """
        width = len(self.views) * self.settings["dim"]
        vectors = pooled.reshape(len(pooled), -1, width)
        told = vectors[:, -1, self.settings["dim"]:].any(axis=1)
        if vectors.shape[1] > 1:
            vectors = vectors[:, -1:] if kind == "like" else vectors[:, :-1]
        return vectors, told

    def pool_queries(self, queries: AnyQueries, statistics: ViewStatistics) -> np.ndarray:
        """(B, W) float32, whose product with a stage-one vector is Eq. 11 of its cosines, up to a constant.

        statistics: mean and standard deviation of S_qv, and of S_qn; the latter scales each view's part, as its weight
        does.
        """
        parts = []
        weights = (self.weight, 1 - self.weight) if self.narration else (1.0,)
        for view, of_view, weight in zip(self.views, statistics, weights):
            std = of_view[1] if of_view else 0.0
            scale = weight / std if std > 0 else 0.0
            parts.append(scale * F.normalize(_of_view(queries, view).eos.float(), dim=-1))
        return torch.cat(parts, dim=1).cpu().numpy()

    def _means(self, videos: NamedTuple) -> dict[str, Tensor]:
        """{view: (V, D)} of length 1: what `like` compares."""
        if not isinstance(videos, NarVidVideos):
            return {view: getattr(videos, view) for view in self.views}
        return {view: mean_pool(*features) for view, features in self._views_of(videos, alike=True).items()}

    def _views_of(self, videos: NarVidVideos, *, alike: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """{view: features (V, K, D), mask (V, K)}; alike: those that `like` compares."""
        both = {"video": (videos.look if alike else videos.frames, videos.mask),
                "narration": (videos.narration, videos.narration_mask)}
        return {view: both[view] for view in self.views}

    # -------------------------------------------------------------------------------------------------------- storing

    def pack(self, videos: NamedTuple) -> dict[str, np.ndarray | None]:
        """Features as arrays for the store, float32 or bool, V rows each."""
        return {name: None if x is None else x.cpu().numpy() for name, x in zip(videos._fields, videos)}

    def unpack(self, arrays: dict[str, np.ndarray | None]) -> NamedTuple:
        """What `pack` made -> features on the device."""
        return self._features(**{name: None if x is None else torch.as_tensor(x, device=self.device)
                                 for name, x in arrays.items()})


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


def _of_view(queries: AnyQueries, view: str) -> NamedTuple:
    return queries[view] if isinstance(queries, dict) else queries


def _short(value) -> str:
    """A setting in a message; of a digest the beginning."""
    return value[:12] if isinstance(value, str) else str(value)
