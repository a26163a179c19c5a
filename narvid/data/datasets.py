"""From {train,val,test}.jsonl, frames and narrations to batches: one Split, one Dataset, one collate for every corpus.

Strings and paths end here; nothing below sees them. Which frames and which sentences is decided once, by the same
indices, when a split is loaded (a sentence belongs to a frame by its time).

Legend: B queries, V videos, K frames of a video and sentences of its narration, L words of a query, M tokens of a
sentence, U distinct sentences of a batch. Masks are bool, True = real.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from narvid import InputError
from narvid.data.features import Features
from narvid.data.frames import Picture, check_jpg, draw_frames, frame_paths, pick_frames, read_frames, spelling_among
from narvid.data.loader import SHARED_MEMORY, free_shared_memory
from narvid.data.narrations import Narration, join, with_speech
from narvid.files import read_json, read_json_lines
from narvid.parsing import is_blank
from narvid.progress import tqdm

AGAIN = "prepare the annotations again (data/prepare_<corpus>.py)"


class Split(NamedTuple):
    """One jsonl joined with its frames and sentences."""

    queries: list[str]  # B
    video_of_query: np.ndarray  # (B,) index into videos
    videos: list[str]  # V
    frames_dir: Path
    picks: list[list[int]]  # V lists of frame numbers: at most K, or all where every item draws its own K
    sentences: list[list[str | None]] | None  # V lists as long as picks; None: no sentence for this frame
    skipped: list[str]  # videos left out for want of a narration
    missing: int  # videos of the official split that the prepare script had to drop, in all splits together
    titles: list[list[str]] | None = None  # V lists of sentences about the whole video; they stand in for `sentences`
    pictures: str | None = None  # their number and a digest, for any number of ranks the same (run/build.py)
    features: Features | None = None  # of the feature cache; items and batches then hold them, not pixels and tokens


class Speech(NamedTuple):
    """A second narration file, of what is said, and what the text tower takes of both together."""

    said: Mapping[str, Narration]
    path: str | Path
    lengths: Callable  # texts -> tokens of each, before it is cut
    max_words: int


class Item(NamedTuple):
    """One query with its video in training, one video in evaluation."""

    item: int  # index of the query in training, of the video in evaluation
    video: int  # index of the video
    frames: Tensor  # (K_v, 3, H, W) uint8, or features (K_v, D)
    places: list[int]  # K_v: where these frames stand in split.picks[video], and their sentences in split.sentences


class Batch(NamedTuple):
    """What the loader yields; tensors for the model, `item` and `video` to know what they are."""

    item: Tensor  # (N,) index of the query in training, of the video in evaluation
    video: Tensor  # (N,) index of the video
    tokens: Tensor | None  # (B, L), or features (B, 1 + L, D), eos first; None in evaluation: queries are encoded apart
    word_mask: Tensor | None  # (B, L)
    frames: Tensor  # (V, K, 3, H, W) uint8, or features (V, K, D)
    mask: Tensor  # (V, K)
    sentences: Tensor | None  # (U, M) tokens, or features (U, 1, D): each distinct sentence once
    sentence_of_frame: Tensor | None  # (V, K) index into sentences; of a split with titles (V, T), its most titles
    narration_mask: Tensor | None  # (V, K), or (V, T)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))

    def split(self, size: int) -> list[Batch]:
        """A training batch in parts of at most `size` pairs, each with the sentences of its own videos alone."""
        parts = []
        for rows in torch.arange(len(self.video)).split(size):
            part = self._replace(**{name: x[rows] for name, x in self._asdict().items()
                                    if x is not None and name != "sentences"})
            if self.sentences is not None:
                used, number = part.sentence_of_frame.unique(return_inverse=True)
                part = part._replace(sentences=self.sentences[used], sentence_of_frame=number)
            parts.append(part)
        return parts


# ---------------------------------------------------------------------------------------------------------- loading


def load_split(path: str | Path, frames_dir: str | Path, frame_times: Mapping[str, list[float]], *,
               max_frames: int | None, narrations: Mapping[str, Narration] | None = None,
               narrations_path: str | Path = "", speech: Speech | None = None,
               missing_narration: str = "error") -> Split:
    """Read {"video", "query"} lines and pick at most `max_frames` frames a video, with the sentence of each.

    max_frames None: all of them, for a FrameDataset that draws. frame_times: video -> time in s of every extracted
    frame. narrations None: the narration is not used. speech: what is said beside it, a second source of sentences.
    missing_narration: "error" or "skip-video" for videos without a single sentence. InputError for everything amiss.
    """
    pairs = read_pairs(Path(path))
    skipped: set[str] = set()
    picks, sentences, index = [], [], {}
    for number, video, _ in pairs:
        if video in index or video in skipped:
            continue
        times = frame_times.get(video)
        if times is None:
            raise InputError(f"{path}:{number}: video {video} has no frames in {frames_dir}"
                             f"{spelling_among(frame_times)(video)}; extract them (scripts/extract_frames.py), or "
                             "prepare the annotations again with --drop_missing")
        picked = pick_frames(len(times), max_frames or len(times))
        if narrations is not None:
            of_frames = _join(narrations, video, times, picked, narrations_path, every=max_frames is None)
            if speech is not None:
                said = _join(speech.said, video, times, picked, speech.path, every=False)
                of_frames = with_speech(of_frames or [None] * len(picked), said or [None] * len(picked),
                                        speech.lengths, speech.max_words)
            if not any(of_frames):
                if missing_narration == "error":
                    raise InputError(f"{narrations_path}: no narration for video {video} ({path}:{number})"
                                     f"{spelling_among(narrations)(video)}; narrate it, or leave such videos out "
                                     "with --missing_narration skip-video")
                skipped.add(video)
                continue
            sentences.append(of_frames)
        index[video] = len(index)
        picks.append(picked)
    pairs = [(video, query) for _, video, query in pairs if video in index]
    if not pairs:
        raise InputError(f"{path}: no query is left, all {len(skipped)} videos lack a narration in {narrations_path}")
    return Split([query for _, query in pairs], np.array([index[video] for video, _ in pairs]), list(index),
                 Path(frames_dir), picks, sentences if narrations is not None else None, sorted(skipped),
                 _missing(Path(path).with_name("prepared.json")))


def _join(narrations: Mapping[str, Narration], video: str, times: list[float], picked: list[int],
          path: str | Path, *, every: bool) -> list[str | None]:
    """The sentences of the picked frames, which are `every` frame or some; [] for a video without a narration."""
    if video not in narrations:
        return []
    hint = "; --frame_sampling segments needs a sentence for every extracted frame, uniform for its picks alone"
    try:
        sentences = join(narrations[video], [times[i] for i in picked], times, video=video, path=path)
    except InputError as error:
        raise InputError(f"{error}{hint if every else ''}") from error
    found = [k for k, sentence in enumerate(sentences) if sentence is not None]
    # Failures leave just these frames by chance only where there are few ways to choose so many.
    if every and comb(len(picked), len(found)) > 5000 and found == pick_frames(len(picked), len(found)):
        raise InputError(f"{path}: video {video} has sentences for {len(found)} evenly picked ones of its "
                         f"{len(picked)} frames{hint}")
    return sentences


def read_queries(path: str | Path) -> list[str]:
    """The queries of a jsonl alone, without their videos."""
    return [query for _, _, query in read_pairs(Path(path))]


def _missing(prepared: Path) -> int:
    """How many videos the prepare script had to drop."""
    if not os.path.lexists(prepared):
        return 0
    missing = read_json(prepared, dict, advice=AGAIN).get("missing", [])
    if not isinstance(missing, list):
        raise InputError(f'{prepared}: its "missing" is no list; {AGAIN}')
    return len(missing)


def read_pairs(path: Path) -> list[tuple[int, str, str]]:
    """(line number, video, query) of each line."""
    pairs = []
    for number, entry in read_json_lines(path, advice=AGAIN):
        for key in ("video", "query"):
            if type(entry.get(key)) in (int, float):
                raise InputError(f'{path}:{number}: its "{key}" is the number {entry[key]}, not a text: write it in '
                                 "quotes, as the files are called")
            if not isinstance(entry.get(key), str) or is_blank(entry[key]):
                raise InputError(f'{path}:{number}: no "{key}"; a line is {{"video": id, "query": text}}')
        pairs.append((number, entry["video"], entry["query"]))
    if not pairs:
        raise InputError(f"{path}: is empty; {AGAIN}")
    return pairs


def check_frames(split: Split, videos: Sequence[int]) -> list[int]:
    """Look at the picked jpgs of some videos before training -> a digest of each video's, of 64 bits.

    InputError naming the first that is missing or not whole.
    """

    def check(v: int) -> int:
        digest = hashlib.blake2b(split.videos[v].encode(), digest_size=8)
        for path in frame_paths(split.frames_dir, split.videos[v], split.picks[v]):
            digest.update(check_jpg(path))
        return int.from_bytes(digest.digest(), "big")

    with ThreadPoolExecutor(8) as pool:  # for network file systems; a local disk would be as fast with one
        return list(tqdm(pool.map(check, videos), total=len(videos), desc="check frames", unit="video",
                         disable=len(videos) < 1000, leave=False))


# ------------------------------------------------------------------------------------------------------------ items


class FrameDataset(Dataset):
    """Item i: the picked frames of video `video_of_item[i]`, resized as `picture` says to size x size.

    Items are queries in training (video_of_item = split.video_of_query) and videos in evaluation (0..V-1). `cache`
    keeps decoded frames in memory shared by the loader's workers: V * K * 3 * size^2 bytes.

    segments: of a split with all frames, take one at random out of each of this many equal segments (draw_frames). The
    draw comes from (seed, epoch, item) alone, whatever worker or rank makes it; nothing else here is random.
    """

    def __init__(self, split: Split, video_of_item: np.ndarray, picture: Picture, *, cache: bool = False,
                 segments: int | None = None, seed: int = 0):
        self.split, self.video_of_item, self.picture = split, video_of_item, picture
        self.segments, self.seed = segments, seed
        self.epoch = torch.zeros((), dtype=torch.long)
        if free_shared_memory():  # else there are no workers, which outlive an epoch and must see it
            self.epoch.share_memory_()
        self.cached = None
        if cache and segments:
            raise InputError("--cache_frames keeps the same frames for all epochs and --frame_sampling segments draws "
                             "new ones: leave one of the two out")
        if cache:
            longest = max(map(len, split.picks))
            side = picture.size
            needed = len(split.videos) * longest * 3 * side**2
            if needed > free_shared_memory():
                raise InputError(f"--cache_frames needs {needed / 2**30:.1f} GiB of shared memory a process, more than "
                                 f"is free in {SHARED_MEMORY}; leave it out or enlarge that")
            self.cached = torch.empty(len(split.videos), longest, 3, side, side, dtype=torch.uint8).share_memory_()
            self.filled = torch.zeros(len(split.videos), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.video_of_item)

    @property
    def item_bytes(self) -> int:
        """Of the largest item's frames; 0 for features, which are small."""
        longest = self.segments or max(map(len, self.split.picks))
        return 0 if self.split.features else longest * 3 * self.picture.size**2

    def __getitem__(self, i: int) -> Item:
        video = int(self.video_of_item[i])
        picks = self.split.picks[video]
        places = self._draw(i, video) if self.segments else list(range(len(picks)))
        if self.split.features is not None:
            return Item(i, video, self.split.features.of_video(video)[places], places)
        if self.cached is not None and self.filled[video]:
            return Item(i, video, self.cached[video, :len(picks)], places)
        paths = frame_paths(self.split.frames_dir, self.split.videos[video], [picks[place] for place in places])
        frames = read_frames(paths, self.picture)
        if self.cached is not None:
            self.cached[video, :len(picks)] = frames
            self.filled[video] = True  # last: another worker may look at any moment
        return Item(i, video, frames, places)

    def _draw(self, i: int, video: int) -> list[int]:
        """The places of item i in this epoch, at least one of them with a sentence (load_split knows there is one)."""
        rng = np.random.default_rng([self.seed, int(self.epoch), i, 1])  # 1: else item 0 had the sampler's numbers
        while True:
            places = draw_frames(len(self.split.picks[video]), self.segments, rng)
            if self.split.sentences is None or any(self.split.sentences[video][place] for place in places):
                return places


def collate(items: list[Item], *, split: Split, tokenize: Callable, max_words: int, max_frames: int,
            with_queries: bool) -> Batch:
    """Items -> Batch. Frames are padded to max_frames and masked; tokenize(texts, max_words) as the towers' own."""
    item, video = torch.tensor([x.item for x in items]), torch.tensor([x.video for x in items])
    frames = items[0].frames.new_zeros(len(items), max_frames, *items[0].frames.shape[1:])  # (V, K, 3, H, W)
    mask = torch.zeros(len(items), max_frames, dtype=torch.bool)  # True = a real frame
    for row, x in enumerate(items):
        frames[row, :len(x.frames)] = x.frames
        mask[row, :len(x.frames)] = True
    tokens = word_mask = of_videos = sentences = sentence_of_frame = narration_mask = None
    if with_queries:
        queries = [split.queries[i] for i in item.tolist()]
        tokens, word_mask = split.features.of_queries(queries) if split.features else tokenize(queries, max_words)
    if split.titles is not None:
        of_videos = [split.titles[x.video] for x in items]
    elif split.sentences is not None:
        of_videos = [[split.sentences[x.video][place] for place in x.places] for x in items]
    if of_videos is not None:
        number: dict[str, int] = {}
        width = max_frames if split.titles is None else max(map(len, of_videos))
        sentence_of_frame = torch.zeros(len(items), width, dtype=torch.long)
        narration_mask = torch.zeros(len(items), width, dtype=torch.bool)  # True = a real sentence
        for row, texts in enumerate(of_videos):
            for k, sentence in enumerate(texts):
                if sentence is not None:
                    sentence_of_frame[row, k] = number.setdefault(sentence, len(number))
                    narration_mask[row, k] = True
        texts = list(number)
        sentences = split.features.of_sentences(texts) if split.features else tokenize(texts, max_words)[0]
    return Batch(item, video, tokens, word_mask, frames, mask, sentences, sentence_of_frame, narration_mask)
