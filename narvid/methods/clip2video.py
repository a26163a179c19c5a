"""CLIP2Video (Fang, Xiong, Xu, Chen: "CLIP2Video: Mastering Video-Text Retrieval via Image CLIP", arXiv:2106.11097).

Two scores of a query and a video. Global: the temporal difference block (TDB) puts between every two neighbouring
frames a token made of their difference; a transformer over all tokens, the frames' outputs averaged; cosine with the
query's eos. Alignment: in the temporal alignment block (TAB) centers shared by words and frames collect residuals of
either side, after NetVLAD; cosine of what they collected. Result and loss are w * global + (1 - w) * alignment.
Here: the blocks, the losses, the released weights' names. Not here: the towers (towers.py), data, metrics.

The full model as the released code computes it, with four departures. 1. Where lengths differ, the release gives heads
of one video the attention mask of another, so its scores depend on the batch; here each video has its own mask. 2. The
release shows its blocks the difference between the last frame and the padding; here both frames of a difference must be
real, so padding changes nothing. Neither touches videos with all their frames. 3. A video with one frame, or one coarse
frame in TAB, has no real difference: its padded ones then attend each other, as under the release's -1e6, not to a NaN,
and no frame sees them. 4. Negatives come from the batch of all processes, in the release from each process' own part.

Legend: B queries, V videos, K frames, L words, T tokens of either side, C centers, N rows, D joint dimension. Masks are
bool, True = real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narvid.towers import ARCHIVE_KEYS, load_weights
from narvid.flags import positive, share
from narvid.fusion import Statistics
from narvid.losses import nce
from narvid.methods.protocol import Method
from narvid.model import NarVidConfig, TemporalBlock, init_linear, place_frames, widen


class Queries(NamedTuple):
    """What is scored of B queries, unit vectors."""

    eos: Tensor  # (B, D)
    aligned: Tensor  # (B, D)


class Videos(NamedTuple):
    """What is scored of V videos, unit vectors."""

    pooled: Tensor  # (V, D)
    aligned: Tensor  # (V, D)


class CLIP2Video(Method, nn.Module):
    """The towers, the temporal difference block (TDB) and the temporal alignment block (TAB)."""

    max_frames = NarVidConfig.positions

    @classmethod
    def views(cls, flags) -> tuple[str, ...]:
        """Both scores of a pair."""
        return "global", "alignment"

    @staticmethod
    def add_flags(group) -> None:
        """The flags of this method; the published models have 5 centers, 7 for VATEX."""
        group.add_argument("--centers", type=positive, default=5, help="centers shared by words and frames")
        group.add_argument("--center_weight", type=share, default=0.5,
                           help="w: weight of the global loss, 1 - w of the alignment loss")
        group.add_argument("--temporal_layers", type=positive, default=4, help="blocks over frames and differences")

    def __init__(self, towers: nn.Module, *, centers: int, center_weight: float,
                 temporal_layers: int):
        """Heads start from the text tower's positions and first blocks where it is as wide as D, else from N(0, 0.02).

        Raises ValueError where D is no multiple of 64, the width of a head.
        """
        super().__init__()
        dim = towers.dim
        if dim % 64:
            raise ValueError(f"the joint dimension must be a multiple of 64 (heads of 64), not {dim}")
        self.center_weight = center_weight
        self.positions = nn.Parameter(0.02 * torch.randn(NarVidConfig.positions, dim))  # of TDB, twice, and of TAB
        self.types = nn.Parameter(0.02 * torch.randn(2, dim))  # 0: a difference, 1: a frame
        form = towers.block_form()
        self.difference_block = TemporalBlock(dim, form)
        self.difference_norm = nn.LayerNorm(dim)  # eps 1e-5, the blocks' own have 1e-12
        self.temporal_blocks = nn.ModuleList(TemporalBlock(dim, form) for _ in range(temporal_layers))
        self.alignment_block = TemporalBlock(dim, form)
        self.weight_centers = nn.Parameter(64 ** -0.5 * torch.randn(centers, dim))  # who collects a token
        self.embedding_centers = nn.Parameter(64 ** -0.5 * torch.randn(centers, dim))  # what it is measured from
        self.apply(init_linear)
        self.clip = towers  # after the initialisation of the heads: it must not touch the towers
        self._start_from_text_tower()

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L), word_mask (B, L) -> Queries. The start token is not aligned, the end token is."""
        eos, words = (widen(x) for x in self.clip.encode_text(tokens))
        not_start = torch.arange(words.shape[1], device=words.device) > 0  # (L,)
        return Queries(F.normalize(eos, dim=-1), self.align(words, word_mask & not_start))

    def encode_videos(self, frames: Tensor, mask: Tensor, sentences: Tensor | None = None,
                      sentence_of_frame: Tensor | None = None, narration_mask: Tensor | None = None) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos; sentences are not looked at."""
        video = place_frames(self.clip.encode_frames(frames[mask]), mask)  # (V, K, D)
        return self.enhance(video, mask)

    def enhance(self, frames: Tensor, mask: Tensor) -> Videos:
        """CLIP's features (V, K, D), mask (V, K) -> Videos."""
        x, padding = self.difference_tokens(frames, mask)
        for block in self.temporal_blocks:
            x = block(x, padding)  # (V, 2 K - 1, D)
        enhanced = F.normalize(x[:, ::2] + frames, dim=-1)  # (V, K, D)
        pooled = F.normalize((enhanced * mask[..., None]).sum(dim=1), dim=-1)  # (V, D); the mean's divisor drops out

        # TAB sees the frames, and every second one again through the same difference block.
        coarse, coarse_mask = frames[:, ::2], mask[:, ::2]
        again = self.alignment_block(*self.difference_tokens(coarse, coarse_mask))[:, ::2] + coarse  # (V, K / 2, D)
        return Videos(pooled, self.align(torch.cat([frames, again], dim=1), torch.cat([mask, coarse_mask], dim=1)))

    def difference_tokens(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """TDB. frames (V, K, D), mask (V, K) -> tokens (V, 2 K - 1, D), True where they are no key (V, 2 K - 1).

        The tokens are frame, difference to the next, frame, ..., with positions (a difference has that of the frame
        before it) and types.
        """
        between = mask[:, 1:] & mask[:, :-1]  # (V, K - 1)
        positions = self.positions[:frames.shape[1]]
        differences = frames.diff(dim=1)  # (V, K - 1, D)
        if differences.shape[1]:  # attention refuses to look at nothing
            differences = self.difference_block(differences + positions[1:], _no_key(between))
            differences = 2 * self.difference_norm(differences).sigmoid() - 1  # in (-1, 1)
        tokens = torch.stack([frames + positions + self.types[1],
                              F.pad(differences, (0, 0, 0, 1)) + positions + self.types[0]], dim=2)  # (V, K, 2, D)
        seen = torch.stack([mask, F.pad(between, (0, 1))], dim=2)
        return tokens.flatten(1, 2)[:, :-1], _no_key(seen.flatten(1, 2)[:, :-1])

    def align(self, x: Tensor, mask: Tensor) -> Tensor:
        """TAB. Tokens of either side (N, T, D), mask (N, T) -> what the centers collect, unit vectors (N, D)."""
        with torch.autocast(x.device.type, enabled=False):  # its softmax has no temperature
            shares = (x @ self.weight_centers.T).softmax(dim=-1) * mask[..., None]  # (N, T, C)
            collected = torch.einsum("ntc,ntd->ncd", shares, x)
            collected = collected - shares.sum(dim=1)[..., None] * self.embedding_centers  # (N, C, D)
            return F.normalize(F.normalize(collected, dim=-1).mean(dim=1), dim=-1)

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """Both cosines, {"global": (B, V), "alignment": (B, V)}; one product each, so `block` is not needed."""
        return {"global": queries.eos @ videos.pooled.T, "alignment": queries.aligned @ videos.aligned.T}

    def loss(self, similarity: dict[str, Tensor], scale: Tensor | float,
             exclude: Tensor | None = None) -> dict[str, Tensor]:
        """w * symmetric cross-entropy of the global scores, (1 - w) * that of the alignment scores."""
        weights = {"global": self.center_weight, "alignment": 1 - self.center_weight}
        return {f"nce_{view}": w * nce(similarity[view], scale, exclude) for view, w in weights.items()}

    def combine(self, scores: dict[str, Tensor], weight: float,
                statistics: Statistics | None = None) -> Iterator[tuple[str, Tensor]]:
        """Both scores and weight * global + (1 - weight) * alignment, all (B, V); the last is the method's result.

        The release has one number for the weights of losses and scores. Nothing is standardised here.
        """
        yield "S_global", scores["global"]
        yield "S_alignment", scores["alignment"]
        yield "S_fusion", weight * scores["global"] + (1 - weight) * scores["alignment"]

    def load_release(self, state: dict[str, Tensor], source: str) -> None:
        """A released checkpoint's state dict (without "module.") into this model; every key of it has its place.

        Raises ValueError with one sentence that names `source` where a size or a name differs.
        """
        blocks = {key.split(".")[2] for key in state if key.startswith("transformerClip.resblocks.")}
        for flag, released, own in (("--centers", len(state.get("weight_center", ())), len(self.weight_centers)),
                                    ("--temporal_layers", len(blocks), len(self.temporal_blocks))):
            if released not in (0, own):
                raise ValueError(f"{source}: has {released} where the model has {own}: give {flag} {released}")
        renamed = {}
        for key, value in state.items():
            for released, name in _RELEASED_NAMES.items():
                if key.startswith(released):
                    key = name + key.removeprefix(released)
                    break
            if key.removeprefix("clip.") not in ARCHIVE_KEYS:
                renamed[key] = value
        load_weights(self, renamed, source=source)

    def _start_from_text_tower(self) -> None:
        """Positions, types and blocks from CLIP's text tower, where the widths are alike."""
        text_blocks = self.clip.text_blocks()
        if not text_blocks:
            return
        positions = self.clip.of_text.positional_embedding
        with torch.no_grad():
            count = min(len(positions), len(self.positions))
            self.positions[:count] = positions[:count]
            self.types[:] = positions[:2]
        blocks = self.temporal_blocks[:len(text_blocks)]
        for layer, block in [*enumerate(blocks), (0, self.difference_block), (0, self.alignment_block)]:
            block.start_from(self.clip, layer)


def _no_key(seen: Tensor) -> Tensor:
    """The complement (N, T), but where nothing is seen: a softmax over no key would be NaN, there everything is."""
    return ~seen & seen.any(dim=1, keepdim=True)


_RELEASED_NAMES = {  # how a name starts there -> here; "clip." stays
    "frame_position_embeddings.weight": "positions",
    "type_position_embeddings.weight": "types",
    "frame2t_attention.resblocks.0.": "difference_block.",
    "trans_layernorm.": "difference_norm.",
    "transformerClip.resblocks.": "temporal_blocks.",
    "actionClip.resblocks.0.": "alignment_block.",
    "weight_center": "weight_centers",
    "emb_center": "embedding_centers",
}
