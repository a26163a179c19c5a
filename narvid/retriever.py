"""The model behind a few functions: video files and sentences in, scores out.

    from narvid import Retriever
    model = Retriever.load("runs/x")
    scores = model.score(model.encode_queries(["a woman slices bread"]), model.encode_videos(["kitchen.mp4"]))

What it computes is what evaluation measures: the same frames, towers and functions. Here: from files to features. Not
here: many videos and their index (narvid/search), flags (run/settings.py), the exported folder (export.py).

Legend: B queries, V videos, K frames of a video and sentences of its narration, L words, D joint dimension.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from narvid import InputError, distributed
from narvid.data.datasets import Item, Split, collate
from narvid.data.frames import pick_frames, read_frames
from narvid.data.narrations import Narration, join, load_narrations
from narvid.data.videos import read_video
from narvid.evaluation import concatenate
from narvid.export import export, known_of
from narvid.fusion import Statistics
from narvid.methods import METHODS
from narvid.run.build import build_model, encoding_of
from narvid.run.exported import from_hub, load_model
from narvid.towers.architectures import find_model
from narvid.run.settings import ON_VAL, is_ours, named, parse_args

Sentences = Sequence[tuple[float, str] | Mapping]  # (seconds, text), or {"time": seconds, "text": text}


class Retriever:
    """A model that is ready to use; see `load`.

    model: the method (narvid/methods). flags: what it was built with. encoding: how evaluation encodes with it.
    narrated: whether it reads sentences.
    """

    def __init__(self, model: torch.nn.Module, flags: argparse.Namespace, device: torch.device,
                 source: Path | None = None, known: dict | None = None):
        """source: where the model was loaded from; known: what is known of its training (export.known_of)."""
        self.model, self.flags, self.device, self.source = model.to(device).eval(), flags, device, source
        self._known = known
        self.encoding = encoding_of(model, flags, distributed.World(0, 1, device))
        self.narrated = "narration" in METHODS[flags.method].reads(flags)

    @classmethod
    def load(cls, source: str | Path | None, *, towers: str = "ViT-B-32", pretrained: str | None = "openai",
             tokenizer: str | None = None, device: str | None = None, eval_precision: str = "fp32") -> Retriever:
        """source: a run's folder, its best.pt, an exported folder, or a released NarVid file; None: plain towers; or
        an exported folder that the Hugging Face hub has, "owner/model" or "hf-hub:owner/model@revision".

        towers, pretrained: of plain towers, as for towers.load_towers (a tag is downloaded); of a released file only
        `towers` counts, the other sources bring their own. tokenizer: folder of one that is not CLIP's, for any source.
        device: "cpu", "cuda", ...; None takes a GPU if there is one. eval_precision: as the trainer's flag of that
        name; in fp32 scores are evaluation's to 1e-5.
        InputError, one sentence, for what cannot be loaded. Nothing in the files is executed.
        """
        argv = ["--eval_only", "--output_dir", ".", "--num_workers", "0", "--eval_precision", eval_precision]
        source = source if source is None else from_hub(source) or source
        stored = {} if source is None else load_model(source)
        ours, known = is_ours(stored), known_of(stored)
        del stored  # weights, which are read once more when the model is built
        if source is None:
            try:
                longest = find_model(towers).config["text_cfg"].get("context_length", 77)
            except ValueError as error:
                raise InputError(str(error)) from error
            argv += ["--method", "zeroshot", "--clip_model", towers, "--max_words", str(min(64, longest))]
            argv += ["--clip_pretrained", pretrained] if pretrained else []
        else:
            argv += [f"--checkpoint={source}"] + ([] if ours else ["--clip_model", towers])
        argv += ["--tokenizer", tokenizer] if tokenizer else []
        try:
            flags = parse_args(argv)
        except SystemExit as error:  # a mistaken flag ends a command, a library must not
            raise InputError(str(error).removeprefix("error: ")) from error
        if flags.fusion_weight == ON_VAL:
            raise InputError(f"{source}: its fusion weight is still to be chosen on val; name the run's best.pt, "
                             "which holds the number")
        if "titles" in METHODS[flags.method].reads(flags):
            raise InputError(f"{source}: {named(flags)} reads titles of whole videos, which cannot be given here; "
                             "evaluate it with main_task_retrieval.py")
        here = distributed.start().device
        try:
            here = torch.empty(0, device=device or here).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: cannot be used here ({str(error).splitlines()[0]}); say cpu, or leave "
                             "it out") from error
        return cls(build_model(flags), flags, here, None if source is None else Path(source), known)

    @torch.no_grad()
    def encode_queries(self, texts: Sequence[str]) -> NamedTuple:
        """B texts (or one) -> the method's features of B queries (NarVid: model.Queries). InputError without a text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("there is no text to encode: give at least one")
        tokens, word_mask = (x.to(self.device) for x in self.encoding.tokenize(texts, self.encoding.max_words))
        with self.encoding.autocast():
            return concatenate([self.model.encode_queries(*part) for part in zip(
                tokens.split(self.encoding.batch_size), word_mask.split(self.encoding.batch_size))])

    def encode_videos(self, paths: Sequence[str | Path],
                      narrations: str | Path | Sequence[Sentences | None] | None = None) -> NamedTuple:
        """Video files -> the method's features of V videos (NarVid: model.Videos).

        A path is one whole video: of its frames, one a second, K are picked as in evaluation.
        narrations: a narration file (a video's id is its file name without the suffix), or for each path its sentences,
        (seconds, text) or {"time", "text"} each, None for a video without any. A sentence meets the frame of its time;
        a frame without one is masked. Without narrations videos differ in S_qv alone.
        InputError names the file that cannot be read, the video without a narration, the sentence that is none.
        """
        paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
        if not paths:
            raise InputError("there is no video to encode: give at least one path")
        if narrations is not None and not self.narrated:
            raise InputError("this model reads no narration: leave the narrations out")
        of_paths = _narrations(paths, narrations)
        parts = []
        for start in range(0, len(paths), self.encoding.batch_size):  # pixels of one batch are in memory at a time
            some = slice(start, start + self.encoding.batch_size)
            frames, sentences = zip(*(self._read(*one, narrations) for one in zip(paths[some], of_paths[some])))
            parts.append(self.encode_frames(frames, sentences))
        return concatenate(parts)

    def _read(self, path: Path, narration: Narration | None, source) -> tuple[Tensor, list[str | None]]:
        """A video's picked frames (k, 3, S, S), and the sentence of each."""
        clip = read_video(path)
        picked = pick_frames(len(clip.times), self.encoding.max_frames)
        frames = read_frames([BytesIO(clip.jpegs[k]) for k in picked], self.encoding.picture)
        if narration is None:
            return frames, [None] * len(picked)
        where = source if isinstance(source, (str, Path)) else "narrations"
        return frames, join(narration, [clip.times[k] for k in picked], clip.times, video=path.stem, path=where)

    @torch.no_grad()
    def encode_frames(self, frames: Sequence[Tensor], sentences: Sequence[list[str | None]]) -> NamedTuple:
        """Frames of V videos, (k, 3, S, S) uint8 in order, k from 1 to K, and their sentences or None -> as
        `encode_videos`.

        They are padded and masked as in evaluation. Not to be called from two threads at once.
        """
        narrations = list(sentences) if self.narrated else None
        split = Split([], np.zeros(0, int), [], Path(), [], narrations, [], 0)
        items = [Item(v, v, x, list(range(len(x)))) for v, x in enumerate(frames)]
        parts = []
        for start in range(0, len(items), self.encoding.batch_size):
            batch = collate(items[start:start + self.encoding.batch_size], split=split, with_queries=False,
                            tokenize=self.encoding.tokenize, max_words=self.encoding.max_words,
                            max_frames=self.encoding.max_frames)
            if self.narrated and not len(batch.sentences):  # the tower wants a text to read; the mask hides it
                batch = batch._replace(sentences=self.encoding.tokenize([""], self.encoding.max_words)[0])
            _, _, _, _, *inputs = batch.to(self.device)
            with self.encoding.autocast():
                parts.append(self.model.encode_videos(*inputs))
        return concatenate(parts)

    @torch.no_grad()
    def score(self, queries: NamedTuple, videos: NamedTuple,
              statistics: Statistics | None = None) -> dict[str, Tensor]:
        """Every query with every video -> {"video": S_qv, "narration": S_qn, "fused": Eq. 11}, each (B, V), on the CPU.

        A model without a narration has no "narration", and S_qv is its result. `fused` standardises with mean and
        standard deviation of these matrices, or with statistics handed over, ((mean, std) of S_qv, (mean, std) of S_qn)
        of fusion.matrix_statistics: a single query is no fair sample. A view whose deviation is 0 adds nothing.
        """
        scores = {view: s.float().cpu() for view, s in self.encoding.score(queries, videos).items()}
        *_, (_, fused) = self.model.combine(scores, weight=self.flags.fusion_weight, statistics=statistics)
        return {**scores, "fused": fused}

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder that `load` takes (narvid/export.py); InputError where that cannot be done."""
        export(folder, self.model, self.flags, self.source, self._known)


def _narrations(paths: list[Path], narrations) -> list[Narration | None]:
    """The narration of each path; `narrations` as in `encode_videos`."""
    if narrations is None:
        return [None] * len(paths)
    if isinstance(narrations, (str, Path)):
        of_video = load_narrations(narrations)
        for path in paths:
            if path.stem not in of_video:
                raise InputError(f"{narrations}: no narration for video {path.stem} ({path}); narrate it, or give "
                                 "lists of sentences, None for this one")
        return [of_video[path.stem] for path in paths]
    if len(narrations) != len(paths):
        raise InputError(f"{len(narrations)} narrations for {len(paths)} videos: give one for each path, or None")
    return [None if sentences is None else _narration(path, sentences) for path, sentences in zip(paths, narrations)]


def _narration(path: Path, sentences: Sentences) -> Narration:
    """Timed sentences, checked like a narration file's."""
    times, texts = [], []
    for number, sentence in enumerate(sentences, 1):
        try:
            time, text = (sentence["time"], sentence["text"]) if isinstance(sentence, Mapping) else sentence
            good = isinstance(text, str) and 0 <= (time := float(time)) < inf and (not times or time > times[-1])
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise InputError(f"{path}: sentence {number} of its narration is no (seconds, text) with rising seconds")
        times.append(time)
        texts.append(text)
    return Narration("", "", times, texts)
