"""Cap4Video (Wu et al., CVPR 2023): whole-video sentences ("titles") beside the frames, in two branches and two stages.

Stage video: the frames ask the titles once (co-attention), pass the temporal encoder, and are matched with the query's
words by weighted word-token interaction. Stage titles: query and pooled titles, by cosine; the video branch stands
still. The result adds the raw cosines, 0.73 video + 0.27 titles. NarVid compares with it in Tables 1 and 2.

One checkpoint holds both branches. Stage 2 goes on from that of stage 1, towers frozen, and evaluates both:
    python main_task_retrieval.py --config P.yaml --output_dir R1
    python main_task_retrieval.py --config P.yaml --output_dir R2 --stage titles --freeze_towers --checkpoint R1/best.pt
Both branches share the text blocks and embeddings, frozen in stage 2 (the release copies the blocks and freezes the
copy); final LayerNorm and projection are the title branch's own. It is built in both stages and keeps CLIP's there
until stage 2, which starts from them in the release, too. So there is no second text tower: the branch holds 6 D^2
weights in each of its two layers and D x text width in the projection, 3.4 million at D = 512 (14 MB in fp32).

Departures from the release. Masks exclude: there, padded words and frames compete with similarity 0, and titles are
attended to and averaged without a mask. All ranks' pairs are negatives, with their whole gradient. In stage 2 the logit
scale goes on from stage 1's, the embeddings stay frozen whatever --freeze_layers says, and the branch's projection is
fp32 under --recipe reported too. The epoch of stage 2 is chosen by the weighted sum, there by the title score. The
extra training pair that each video gets from its best title in stage 1 is made beforehand, by narvid/data/titles.py.

Not here: reading titles (titles.py). In stage titles the loader still reads the frames, which evaluation needs.

Legend: B queries, V videos, K frames, L words of a query, D joint dimension; of titles: T slots a video, M tokens of
one, U distinct ones in the batch. Masks are bool, True = real.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narvid import InputError
from narvid.flags import positive, share
from narvid.losses import nce
from narvid.methods.protocol import Method
from narvid.model import CoAttentionStream, TemporalEncoder, init_linear, place_frames, widen
from narvid.towers import Towers

TITLE_LAYERS = 2
POSITIONS = 77  # of the temporal encoder, as many as CLIP's text tower has


class Queries(NamedTuple):
    """What scoring sees of B queries; None where the stage does not train with it."""

    words: Tensor | None  # (B, L, D)
    word_mask: Tensor | None  # (B, L); start and end token count as words
    word_weights: Tensor | None  # (B, L), rows sum to 1
    eos: Tensor | None  # (B, D), of the title branch


class Videos(NamedTuple):
    """What scoring sees of V videos; None where the stage does not train with it."""

    frames: Tensor | None  # (V, K, D), enhanced
    mask: Tensor | None  # (V, K)
    frame_weights: Tensor | None  # (V, K), rows sum to 1
    titles: Tensor | None  # (V, D), pooled


# --------------------------------------------------------------------------------------------------- the two branches


class TitleBranch(nn.Module):
    """Stage 2: titles -> one feature a video, in a text space of its own (final LayerNorm and projection)."""

    def __init__(self, towers: Towers, dim: int, max_titles: int):
        super().__init__()
        self.clip = nn.Module()  # by this name it is trained at the towers' rate
        self.clip.ln_final = deepcopy(towers.ln_final)
        self.clip.text_projection = deepcopy(towers.text_projection)
        self.positions = nn.Parameter(0.02 * torch.randn(max_titles, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, dim // 64, dim_feedforward=dim, dropout=0.0, batch_first=True)
            for _ in range(TITLE_LAYERS))  # post-LN, ReLU
        self.apply(init_linear)

    def encode(self, towers: Towers, tokens: Tensor) -> Tensor:
        """Texts through the shared blocks: tokens (N, M) -> eos (N, D)."""
        head = self.clip.ln_final, self.clip.text_projection.to(towers.text_projection.dtype)
        return widen(towers.encode_text(tokens, words=False, head=head)[0])

    def pool(self, titles: Tensor, mask: Tensor) -> Tensor:
        """titles (V, T, D), mask (V, T) -> (V, D), the mean over real titles; 0 for a video without one."""
        padding = ~mask & mask.any(dim=1, keepdim=True)  # no key at all would be NaN
        x = titles + self.positions[:titles.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)


class Cap4Video(Method, nn.Module):
    """The towers, the video branch and the title branch; `stage` says which of the two is trained."""

    max_frames = POSITIONS
    loss_flags = frozenset({"titles"})  # files, which may lie elsewhere next time

    @classmethod
    def views(cls, flags) -> tuple[str, ...]:
        """There is no title score before stage 2."""
        return ("video",) if flags.stage == "video" else ("video", "titles")

    @classmethod
    def reads(cls, flags) -> set[str]:
        """Titles in place of a narration."""
        return {"frames", "titles"}

    @classmethod
    def features_suffice(cls, flags) -> bool:
        """The title branch has a LayerNorm and a projection of its own inside the text tower."""
        return flags.stage == "video"

    @classmethod
    def unread(cls, flags) -> set[str]:
        """Scores are added with --title_weight, which stage video does not need."""
        return {"fusion_weight"} | ({"title_weight"} if flags.stage == "video" else set())

    @staticmethod
    def add_flags(group) -> None:
        """This method's own flags."""
        group.add_argument("--stage", choices=["video", "titles"], default="video",
                           help="the branch to train; titles needs --checkpoint of a stage video, and --freeze_towers")
        group.add_argument("--titles", nargs="+", metavar="FILE",
                           help="Cap4Video's files of titles, or a narration file, whose distinct sentences then are "
                                "the titles [data_dir/titles.json]")
        group.add_argument("--max_titles", type=positive, default=30, help="T: titles of a video at most")
        group.add_argument("--title_weight", type=share, default=0.27,
                           help="of the title score in the result; the release's 0.27 was chosen on the 1k-A test set")
        group.add_argument("--temporal_layers", type=positive, default=4, help="blocks of the frames' temporal encoder")
        group.add_argument("--dropout", type=share, default=0.1, help="in co-attention")

    def __init__(self, towers: Towers, *, stage: str, titles: list[str] | None, max_titles: int,
                 title_weight: float, temporal_layers: int, dropout: float):
        """titles: the files, for the loader alone."""
        super().__init__()
        towers.require_openai("--method cap4video")
        dim = towers.dim
        if dim % 64:
            raise ValueError(f"the joint dimension must be a multiple of 64 (heads of 64), not {dim}")
        self.clip, self.stage, self.title_weight = towers, stage, title_weight
        # One stream of the two-stream block: of its outcome only the frames are used, so its keys and values are the
        # titles', and the titles' own questions are not built.
        self.co_attention = CoAttentionStream(dim, dropout).apply(init_linear)
        self.temporal = TemporalEncoder(dim, temporal_layers, POSITIONS)
        self.temporal.start_from_text_tower(towers)
        self.word_weight_mlp, self.frame_weight_mlp = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)).apply(init_linear) for _ in range(2))
        self.titles = TitleBranch(towers, dim, max_titles)
        self.register_buffer("video_is_trained", torch.tensor(False))
        for name, parameter in self.named_parameters():
            if not name.startswith("clip."):  # the towers are the trainer's: --freeze_layers, --freeze_towers
                parameter.requires_grad_(name.startswith("titles.") == (stage == "titles"))

    # ---- features ----

    def forward(self, tokens: Tensor, word_mask: Tensor, frames: Tensor, mask: Tensor, titles: Tensor,
                title_of_slot: Tensor, title_mask: Tensor) -> tuple[Queries, Videos, Tensor]:
        """A training batch -> features and logit scale; arguments as in `encode_queries` and `encode_videos`.

        Stage titles leaves the frames alone: nothing of the video branch is trained. InputError where stage titles was
        not set up as one.
        """
        scale = self.clip.logit_scale.exp()
        if self.stage == "video":
            self.video_is_trained.fill_(True)
            return (self.encode_queries(tokens, word_mask),
                    self.encode_videos(frames, mask, titles, title_of_slot, title_mask), scale)
        if not self.video_is_trained:
            raise InputError("--stage titles goes on from a run of --stage video: name its best.pt with --checkpoint")
        if self.clip.text_projection.requires_grad:
            raise InputError("--stage titles trains the title branch alone: add --freeze_towers")
        pooled = self.pool_titles(titles, title_of_slot, title_mask)
        return (Queries(None, None, None, self.titles.encode(self.clip, tokens)),
                Videos(None, None, None, pooled), scale)

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L), word_mask (B, L) -> Queries; eos only in stage titles."""
        _, words = self.clip.encode_text(tokens)
        words = widen(words)
        eos = self.titles.encode(self.clip, tokens) if self.stage == "titles" else None
        return Queries(words, word_mask, item_weights(self.word_weight_mlp, words, word_mask), eos)

    def encode_videos(self, frames: Tensor, mask: Tensor, titles: Tensor, title_of_slot: Tensor,
                      title_mask: Tensor) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos; pooled titles only in stage titles.

        titles (U, M): the distinct titles of the batch, each encoded once; title_of_slot (V, T) says which of them a
        video has, best first; title_mask (V, T).
        """
        video = place_frames(self.clip.encode_frames(frames[mask]), mask)  # (V, K, D)
        eos, _ = self.clip.encode_text(titles, words=False)  # (U, D)
        video = self.enhance(video, widen(eos)[title_of_slot], mask, title_mask)
        pooled = self.pool_titles(titles, title_of_slot, title_mask) if self.stage == "titles" else None
        return Videos(video, mask, item_weights(self.frame_weight_mlp, video, mask), pooled)

    def enhance(self, frames: Tensor, titles: Tensor, mask: Tensor, title_mask: Tensor) -> Tensor:
        """frames (V, K, D), titles (V, T, D), masks (V, K), (V, T) -> frames (V, K, D) that know titles and order."""
        slots = max(mask.shape[1], title_mask.shape[1])  # the stream takes two sequences of one length
        padded = (F.pad(x, (0, 0, 0, slots - x.shape[1])) for x in (frames, titles))
        answered = self.co_attention(*padded, self.co_attention, F.pad(title_mask, (0, slots - title_mask.shape[1])))
        return self.temporal(widen(answered[:, :mask.shape[1]]), mask)

    def pool_titles(self, titles: Tensor, title_of_slot: Tensor, title_mask: Tensor) -> Tensor:
        """titles (U, M) tokens, title_of_slot (V, T), title_mask (V, T) -> (V, D)."""
        return widen(self.titles.pool(self.titles.encode(self.clip, titles)[title_of_slot], title_mask))

    # ---- scores, loss, result ----

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """{"video": (B, V), "titles": (B, V)} cosines of the branches that both arguments carry; any B and V."""
        scores = {}
        if videos.frames is not None:
            scores["video"] = word_token_interaction(queries, videos, block=block)
        if videos.titles is not None:
            scores["titles"] = F.normalize(queries.eos, dim=-1) @ F.normalize(videos.titles, dim=-1).T  # (B, V)
        return scores

    def loss(self, similarity: dict[str, Tensor], scale: Tensor, exclude: Tensor | None) -> dict[str, Tensor]:
        """Symmetric cross-entropy of the branch in training."""
        return {f"nce_{view}": nce(s, scale, exclude) for view, s in similarity.items()}

    def combine(self, scores: dict[str, Tensor], weight: float, statistics=None) -> Iterator[tuple[str, Tensor]]:
        """S_qv and, after stage 2, S_titles and their sum weighted with --title_weight; (B, V) each.

        `weight` and `statistics` belong to Eq. 11, which the method does not use.
        """
        yield "S_qv", scores["video"]
        if "titles" in scores:
            yield "S_titles", scores["titles"]
            yield "S_weighted", (1 - self.title_weight) * scores["video"] + self.title_weight * scores["titles"]


# --------------------------------------------------------------------------------------------- word-token interaction


def item_weights(mlp: nn.Module, items: Tensor, mask: Tensor) -> Tensor:
    """What each word or frame counts: items (N, L, D), mask (N, L) -> (N, L), rows sum to 1 (0 without a real one)."""
    logits = widen(mlp(items)).squeeze(-1)  # (N, L)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim=1) * mask


def word_token_interaction(queries: Queries, videos: Videos, *, block: int | None = None) -> Tensor:
    """Weighted sums over words of each one's best frame, and over frames of each one's best word; their mean, (B, V).

    Scored in tiles of block x block pairs (128 where None), so that only a (block, L, block, K) tensor exists.
    """
    words, frames = F.normalize(queries.words, dim=-1), F.normalize(videos.frames, dim=-1)
    side = block or 128
    return torch.cat([torch.cat([
        _interaction(*of_queries, *of_videos)
        for of_videos in zip(*(x.split(side) for x in (frames, videos.mask, videos.frame_weights)))], dim=1)
        for of_queries in zip(*(x.split(side) for x in (words, queries.word_mask, queries.word_weights)))])


def _interaction(words: Tensor, word_mask: Tensor, word_weights: Tensor, frames: Tensor, mask: Tensor,
                 frame_weights: Tensor) -> Tensor:
    """One tile of normalised words (B, L, D) and frames (V, K, D) -> (B, V)."""
    similarity = torch.einsum("bld,vkd->blvk", words, frames)  # (B, L, V, K)
    lowest = torch.finfo(similarity.dtype).min
    best_frame = similarity.masked_fill(~mask, lowest).amax(dim=-1)  # (B, L, V)
    best_frame = best_frame.masked_fill(~mask.any(dim=-1), 0)  # a video without one real frame scores 0
    best_word = similarity.masked_fill(~word_mask[:, :, None, None], lowest).amax(dim=1)  # (B, V, K)
    of_words = torch.einsum("bl,blv->bv", word_weights, best_frame)
    return (of_words + torch.einsum("vk,bvk->bv", frame_weights, best_word)) / 2
