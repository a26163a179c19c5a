"""Zero-shot CLIP, App. D.1 and Table 9 of the NarVid paper: nothing is trained.

A video is the mean of its frames' CLIP features, its narration the mean of its sentences' end-token features; S_qv and
S_qn are their cosines with the query's eos, S_sum and S_fusion (Eq. 11) come from the evaluation as for every method.
Any of open_clip's ViTs and weights will do: --clip_model, --clip_pretrained.

The paper says "mean pooling" and no more. Here, as in CLIP4Clip, which its code builds on, each feature has length 1
before the mean. A frame without a sentence is left out of the mean of the narration.

Legend: B queries, V videos, K frames of a video and sentences of its narration, L words, M tokens of a sentence, U
distinct sentences of a batch, D joint dimension. Masks are bool, True = real.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from narvid.towers import load_released_towers
from narvid.methods.protocol import Method
from narvid.model import place_frames, widen
from narvid.methods.clip4clip import Queries, mean_pool


class Videos(NamedTuple):
    """What the score sees of V videos."""

    video: Tensor  # (V, D) of length 1
    narration: Tensor | None  # (V, D) of length 1; None where the narration is not used


class ZeroShot(Method, nn.Module):
    """The towers alone. It has no `loss`: the trainer only evaluates it."""

    trained = False

    frames_alone = ("For plain CLIP that loses nothing: in the paper it finds the right video first for 31.4 % of "
                    "MSR-VTT's queries by frames, for 27.3 % with a narration (Table 9)")

    @classmethod
    def views(cls, flags) -> tuple[str, ...]:
        """S_qn too, unless the narration is switched off."""
        return ("video", "narration") if flags.use_narration else ("video",)

    @classmethod
    def reads(cls, flags) -> set[str]:
        """The narration too, unless it is switched off."""
        return {"frames", "narration"} if flags.use_narration else {"frames"}

    @classmethod
    def searchable(cls, flags) -> bool:
        """A video is a vector a view."""
        return True

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup) -> None:
        """Whether there is a narration."""
        group.add_argument("--use_narration", action=argparse.BooleanOptionalAction, default=True,
                           help="score the narration too; off for a corpus without one")

    def __init__(self, towers: nn.Module, *, use_narration: bool):
        super().__init__()
        self.clip = towers
        self.use_narration = use_narration

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L) -> Queries; the mask is not needed, the eos feature sees the real words alone."""
        return Queries(widen(self.clip.encode_text(tokens, words=False)[0]))

    def encode_videos(self, frames: Tensor, mask: Tensor, sentences: Tensor | None, sentence_of_frame: Tensor | None,
                      narration_mask: Tensor | None) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos.

        sentences (U, M), sentence_of_frame (V, K) and narration_mask (V, K) as in NarVid; None without a narration.
        """
        video = place_frames(self.clip.encode_frames(frames[mask]), mask)  # (V, K, D)
        narration = None
        if self.use_narration:
            eos = widen(self.clip.encode_text(sentences, words=False)[0])  # (U, D)
            narration = mean_pool(eos[sentence_of_frame], narration_mask)
        return Videos(mean_pool(video, mask), narration)

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """{"video": (B, V), "narration": (B, V)}, cosines; one product each, so `block` is not needed."""
        eos = F.normalize(queries.eos, dim=-1)
        return {view: eos @ x.T for view, (x, _) in self.vectors(videos).items()}

    def vectors(self, videos: Videos) -> dict[str, tuple[Tensor, Tensor]]:
        """The pooled features; that of a narration without a sentence is 0."""
        views = {"video": videos.video, "narration": videos.narration}
        return {view: (x, (x != 0).any(dim=1)) for view, x in views.items() if x is not None}

    def load_release(self, state: dict, source: str) -> None:
        """The towers of any released checkpoint that keeps them under "clip."; what it trained on top is left out."""
        load_released_towers(self.clip, state.get("state_dict", state), source=source)
