"""CLIP4Clip (Luo et al., Neurocomputing 2022): CLIP on frames, a head over time, one score a pair; MMAction2's too.

The paper's similarity calculator has three types, here four heads:
- meanP, parameter-free: the mean over the frames.
- seqLSTM, seqTransf, sequential: an LSTM, or positions and transformer blocks, over the frames, plus the frames
  themselves, then the mean. seqTransf is the first row of NarVid's Table 3: `--method narvid --modules` scores alike.
- tightTransf, tight: a transformer reads the query and a video's frames together and gives their logit. It is the one
  head without cosine, logit scale and video vector: every pair costs a transformer, in search too.
The first three bring each frame to length 1, take the mean over the real ones and its cosine with the query's eos.
MMAction2's CLIP4Clip is meanP over frames of any length: `--no-normalize_frames`.
--linear_patch 3d: patches are convolved over three neighbouring frames, starting as the 2-d convolution.

Departures from the release:
- Padded keys are excluded with -inf, not with -1e6.
- tightTransf takes its negatives from the whole batch, where the release takes those of one process; the pairs are
  scored in tiles and computed again in backward, so that memory stays that of one tile.
- 3d: the kernel is trained at CLIP's rate and all else frozen as in 2d; in the release a slip of the name test then
  freezes nothing. With fp16 towers this kernel stays fp32.

Legend: B queries, V videos, K frames, L words, D joint dimension, N real frames of all videos. Masks are bool, True =
real.
"""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narvid import InputError, losses
from narvid.towers import ARCHIVE_KEYS, BlockForm, PatchProduct, Towers, load_weights
from narvid.flags import positive
from narvid.methods.protocol import Method
from narvid.model import NarVidConfig, TemporalEncoder, init_linear, place_frames, widen

HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")
TILE = 32  # side of the square of pairs that tightTransf scores at once: 3 GiB in training at D 512, K 12, 4 blocks


class Queries(NamedTuple):
    """What the score sees of B queries."""

    eos: Tensor  # (B, D)


class Videos(NamedTuple):
    """What the score sees of V videos."""

    video: Tensor  # (V, D) of length 1; for tightTransf the frames (V, K, D)
    mask: Tensor  # (V, K)


def mean_pool(x: Tensor, mask: Tensor, *, normalize: bool = True) -> Tensor:
    """The mean over real frames, brought to length 1; `normalize` brings each frame to length 1 before.

    x (V, K, D), mask (V, K) -> (V, D); zeros for a video without one real frame.
    """
    if normalize:
        x = F.normalize(x, dim=-1)
    return F.normalize((x * mask[:, :, None]).sum(dim=1), dim=-1)  # length 1: the sum does for the mean


class PairTransformer(nn.Module):
    """tightTransf: the query's eos feature stands before the frames as token 0 and gathers what makes the logit."""

    def __init__(self, dim: int, layers: int, form: BlockForm | None = None, dropout: float = 0.1):
        super().__init__()
        self.encoder = TemporalEncoder(dim, layers, NarVidConfig.positions, form)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dense = nn.Linear(dim, dim)
        self.logit = nn.Linear(dim, 1)
        self.apply(init_linear)

    def forward(self, eos: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """eos (B, D), frames (V, K, D), mask (V, K) -> logits (B, V)."""
        b, v, d = len(eos), len(frames), eos.shape[-1]
        x = torch.cat([eos[:, None, None].expand(b, v, 1, d), frames.expand(b, *frames.shape)], dim=2)  # (B, V, 1+K, D)
        padding = F.pad(~mask, (1, 0)).expand(b, -1, -1)  # (B, V, 1+K) True = no key; the query always is one
        h = self.dropout(x.flatten(0, 1) + self.encoder.positions[:x.shape[2]])
        for block in self.encoder.blocks:
            h = block(h, padding.flatten(0, 1))
        h = self.dense(self.norm(h[:, 0]))  # (B * V, D)
        return self.logit(h * torch.sigmoid(1.702 * h)).view(b, v)


class CLIP4Clip(Method, nn.Module):
    """The towers and one of the four heads."""

    max_frames = NarVidConfig.positions

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup) -> None:
        """The head and what it is made of."""
        group.add_argument("--head", choices=HEADS, default="seqTransf",
                           help="over the frames: mean, LSTM, transformer; or a transformer over query and frames")
        group.add_argument("--temporal_layers", type=positive, default=4, help="blocks of seqTransf and tightTransf")
        group.add_argument("--linear_patch", choices=["2d", "3d"], default="2d",
                           help="3d: patches see the frames before and after")
        group.add_argument("--normalize_frames", action=argparse.BooleanOptionalAction, default=True,
                           help="bring each frame to length 1 before the mean; MMAction2 does not")

    @classmethod
    def score_has_parameters(cls, flags) -> bool:
        """tightTransf is trained on pairs."""
        return flags.head == "tightTransf"

    @classmethod
    def features_suffice(cls, flags) -> bool:
        """A 3-d patch kernel is trained on pixels."""
        return flags.linear_patch == "2d"

    @classmethod
    def searchable(cls, flags) -> bool:
        """tightTransf has no vector of a video."""
        return flags.head != "tightTransf"

    @classmethod
    def unread(cls, flags) -> set[str]:
        """meanP and seqLSTM have no blocks, tightTransf no mean."""
        unread = super().unread(flags) | ({"temporal_layers"} if not flags.head.endswith("Transf") else set())
        return unread | ({"normalize_frames"} if flags.head == "tightTransf" else set())

    def __init__(self, towers: Towers, *, head: str, temporal_layers: int,
                 linear_patch: str, normalize_frames: bool):
        """Heads start from the text tower's positions and first blocks, where it is as wide as the joint dimension."""
        super().__init__()
        dim = towers.dim
        if head.endswith("Transf") and dim % 64:
            raise ValueError(f"--head {head}: the joint dimension must be a multiple of 64 (heads of 64), not {dim}")
        self.clip = towers
        self.head, self.linear_patch, self.normalize_frames = head, linear_patch, normalize_frames
        if head == "seqLSTM":
            self.temporal = nn.LSTM(dim, dim, batch_first=True)  # PyTorch's own initial weights, as in the release
        elif head == "seqTransf":
            self.temporal = TemporalEncoder(dim, temporal_layers, NarVidConfig.positions, towers.block_form())
            self.temporal.start_from_text_tower(towers)
        elif head == "tightTransf":
            self.pairs = PairTransformer(dim, temporal_layers, towers.block_form())
            self.pairs.encoder.start_from_text_tower(towers)
        if linear_patch == "3d":
            towers.require_openai("--linear_patch 3d")
            kernel = towers.visual.conv1.weight.detach()  # (width, 3, p, p)
            zeros = torch.zeros_like(kernel)
            # Three frames as nine channels make a 2-d product of the 3-d convolution. Under a name of its own, because
            # --freeze_layers freezes conv1, and a frozen kernel would stay the 2-d one.
            towers.visual.conv2 = PatchProduct(nn.Parameter(torch.cat([zeros, kernel, zeros], dim=1)))
            towers.visual.conv1 = nn.Identity()

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L) -> Queries; the mask is not needed, the eos feature sees the real words alone."""
        return Queries(widen(self.clip.encode_text(tokens, words=False)[0]))

    def encode_videos(self, frames: Tensor, mask: Tensor, sentences: None = None, sentence_of_frame: None = None,
                      narration_mask: None = None) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos; no narration is used.

        Raises InputError for more frames than tightTransf has positions for.
        """
        if self.head == "tightTransf" and mask.shape[1] >= NarVidConfig.positions:
            raise InputError(f"--max_frames {mask.shape[1]}: --head tightTransf has {NarVidConfig.positions} positions "
                             f"and the query takes one; take {NarVidConfig.positions - 1} frames or fewer")
        x = place_frames(self._encode_frames(frames, mask), mask)  # (V, K, D)
        if self.head == "tightTransf":
            return Videos(x, mask)
        if self.head == "seqLSTM":
            x = x + self.temporal(x)[0]  # padding stands behind the last real frame, and an LSTM does not look ahead
        elif self.head == "seqTransf":
            x = self.temporal(x, mask)
        return Videos(mean_pool(x, mask, normalize=self.normalize_frames), mask)

    def _encode_frames(self, frames: Tensor, mask: Tensor) -> Tensor:
        """The real frames of (V, K, 3, H, W) -> (N, D)."""
        if self.linear_patch == "2d":
            return self.clip.encode_frames(frames[mask])
        visual = self.clip.visual
        x = (frames[mask] - self.clip.pixel_mean) / self.clip.pixel_std  # (N, 3, H, W)
        video, slot = mask.nonzero(as_tuple=True)  # (N,) each
        # True where row n + 1 is the frame after row n's in the same video.
        follows = ((video.diff() == 0) & (slot.diff() == 1))[:, None, None, None]
        # What is no real frame counts as zero, a padded one like those beyond the ends, so padding leaks nowhere.
        nothing = torch.zeros_like(x[:1])
        before, after = torch.cat([nothing, x[:-1] * follows]), torch.cat([x[1:] * follows, nothing])
        patches = visual.conv2(torch.cat([before, x, after], dim=1))  # (N, width, H / p, W / p)
        return visual(patches.to(visual.proj.dtype))

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """{"video": (B, V)}: cosines, or tightTransf's logits; `block` is the side of that head's tiles of pairs."""
        if self.head != "tightTransf":
            return {"video": F.normalize(queries.eos, dim=-1) @ videos.video.T}
        side = block or TILE
        columns = list(zip(videos.video.split(side), videos.mask.split(side)))
        rows = [torch.cat([self._score_tile(eos, *of_videos) for of_videos in columns], dim=1)
                for eos in queries.eos.split(side)]
        return {"video": torch.cat(rows)}

    def vectors(self, videos: Videos) -> dict[str, tuple[Tensor, Tensor]]:
        """The pooled frames, of the heads that have them."""
        return {"video": (videos.video, videos.mask.any(dim=1))}

    def _score_tile(self, eos: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # keeps the tile's inputs alone, and computes it again in backward
            return checkpoint(self.pairs, eos, frames, mask, use_reentrant=False)
        return self.pairs(eos, frames, mask)

    def loss(self, similarity: dict[str, Tensor], scale: Tensor, exclude: Tensor | None) -> dict[str, Tensor]:
        """{"nce_video": scalar}: symmetric cross-entropy of scaled cosines, or of tightTransf's logits as they are."""
        if self.head == "tightTransf":
            # 0 * scale: in DDP every parameter needs a gradient, the scale's is zero.
            return {"nce_video": losses.nce(similarity["video"], 1.0, exclude) + 0 * scale}
        return {"nce_video": losses.nce(similarity["video"], scale, exclude)}

    def load_release(self, state: dict, source: str) -> None:
        """A checkpoint of CLIP4Clip's own code (any head), or MMAction2's; ValueError naming what does not fit."""
        state = {key: value.float() for key, value in state.get("state_dict", state).items()
                 if isinstance(value, Tensor) and key.removeprefix("clip.") not in ARCHIVE_KEYS}
        if self.head == "seqLSTM":
            state.pop("frame_position_embeddings.weight", None)  # built by the release and never used
        if self.linear_patch == "3d" and "clip.visual.conv2.weight" in state:
            state.pop("clip.visual.conv1.weight", None)  # likewise
            kernel = state["clip.visual.conv2.weight"]  # (width, 3, 3 frames, p, p)
            state["clip.visual.conv2.weight"] = kernel.transpose(1, 2).flatten(1, 2)
        renamed = {}
        for key, value in state.items():
            for pattern, name in _RELEASED_NAMES:
                key = re.sub(f"^{pattern}", name, key)
            renamed[key] = value
        load_weights(self, renamed, source=source)


_RELEASED_NAMES = [
    (r"lstm_visual\.", "temporal."),
    (r"frame_position_embeddings\.weight", "temporal.positions"),
    (r"transformerClip\.resblocks\.", "temporal.blocks."),
    (r"cross\.embeddings\.position_embeddings\.weight", "pairs.encoder.positions"),
    (r"cross\.transformer\.resblocks\.", "pairs.encoder.blocks."),
    (r"cross\.pooler\.ln_pool\.", "pairs.norm."),
    (r"cross\.pooler\.dense\.", "pairs.dense."),
    (r"similarity_dense\.", "pairs.logit."),
]
