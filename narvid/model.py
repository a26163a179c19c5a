"""The paper's model, top to bottom: co-attention (Eq. 2), temporal encoders (Eq. 3), word weights, NarVid.

Everything with a parameter that is not CLIP lives here, and nothing that sees a query and a video at once: the model
returns features, never a similarity (that is similarity.py). No devices, no ranks, no paths.

Legend: B queries, V videos, K frames of a video and sentences of its narration (one a frame), L words of a query,
M tokens of a sentence, D joint dimension. Masks are bool, True = real.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narvid.towers import BlockForm, Towers, load_released_towers, load_weights

MODULES = ("NM", "CMI", "QAF", "CVH")  # Table 3: narration matching, cross-modal interaction, filtering, hard negatives


class Queries(NamedTuple):
    """Features of B queries, as similarity.py takes them."""

    eos: Tensor  # (B, D), the text tower's feature of the whole query: with CLIP, that of its end token
    words: Tensor  # (B, L, D), the text tower's feature of each token
    word_mask: Tensor  # (B, L) bool; start and end token count as words
    word_weights: Tensor | None  # (B, L), rows sum to 1; None where fine matching is off


class Videos(NamedTuple):
    """Enhanced features of V videos, as similarity.py takes them."""

    frames: Tensor  # (V, K, D)
    narration: Tensor | None  # (V, K, D); None where narration matching is off
    mask: Tensor  # (V, K) bool
    narration_mask: Tensor | None  # (V, K) bool; False also where a real frame has no sentence


@dataclass(frozen=True)
class NarVidConfig:
    """Sizes of what NarVid adds to CLIP. `modules` are Table 3's; what is off is not built.

    dim: D, a multiple of 64. positions: the most frames of a video. temperature divides the word weights' logits (App.
    B.2). temporal_layers, positions and dropout are not in the paper: they are the values of the released code and of
    CLIP4Clip. ValueError for another dim, and for CMI or CVH without NM.
    """

    dim: int
    modules: tuple[str, ...] = MODULES
    temporal_layers: int = 4
    positions: int = 77
    dropout: float = 0.1
    temperature: float = 0.1
    block: BlockForm | None = None  # of the temporal encoders: the text tower's, from which they start; None: OpenAI's

    def __post_init__(self):
        if self.dim % 64:
            raise ValueError(f"the joint dimension must be a multiple of 64 (heads of 64), not {self.dim}")
        for module in ("CMI", "CVH"):
            if module in self.modules and "NM" not in self.modules:
                raise ValueError(f"module {module} works on the narration and needs NM")


# ---------------------------------------------------------------------------------------------------- co-attention


class CoAttentionStream(nn.Module):
    """One side of the co-attention block: its projections, output and feed-forward; post-LN."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_attention = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, other: Tensor, other_stream: CoAttentionStream, other_mask: Tensor) -> Tensor:
        """x (V, K, D) attends to other (V, K, D), projected by its own stream; other_mask (V, K) -> (V, K, D)."""
        heads = (other.shape[0], other.shape[1], -1, 64)
        query, key, value = (y.view(heads).transpose(1, 2) for y in (
            self.query(x), other_stream.key(other), other_stream.value(other)))  # (V, heads, K, 64)
        some = other_mask.any(dim=1)[:, None, None]  # (V, 1, 1)
        answer = F.scaled_dot_product_attention(
            query, key, value, attn_mask=(other_mask[:, None] | ~some)[:, None],
            dropout_p=self.dropout.p if self.training else 0.0)
        # Without one sentence attention adds 0: a softmax over no key would be NaN.
        answer = answer.transpose(1, 2).flatten(2) * some
        x = self.norm_attention(x + self.dropout(self.out(answer)))
        return self.norm_feed_forward(x + self.dropout(self.feed_forward(x)))


class CoAttention(nn.Module):
    """Eq. 2: one two-stream block after ViLBERT; frames attend to the narration, the narration to the frames."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.frames = CoAttentionStream(dim, dropout)
        self.narration = CoAttentionStream(dim, dropout)
        self.apply(init_linear)

    def forward(self, frames: Tensor, narration: Tensor, mask: Tensor, narration_mask: Tensor) -> tuple[Tensor, Tensor]:
        """frames, narration (V, K, D); masks (V, K) -> both enhanced (V, K, D)."""
        return (self.frames(frames, narration, self.narration, narration_mask),
                self.narration(narration, frames, self.frames, mask))


# ------------------------------------------------------------------------------------------------ temporal encoders


class TemporalBlock(nn.Module):
    """Pre-LN transformer block; names as in CLIP, whose text blocks it takes. form None: as in OpenAI's towers."""

    def __init__(self, dim: int, form: BlockForm | None = None):
        super().__init__()
        heads, hidden, self.activation = form or BlockForm(dim // 64, 4 * dim, "quick_gelu")
        self.ln_1 = nn.LayerNorm(dim, eps=1e-12)  # CLIP4Clip's eps: 1e-5 moves released checkpoints' logits
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, hidden), "c_proj": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (V, K, D), padding (V, K) True = no key -> (V, K, D)."""
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        if self.activation == "quick_gelu":
            return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))
        return x + self.mlp["c_proj"](F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none"))

    def start_from(self, towers: Towers, layer: int) -> None:
        """Copy the text tower's block of that number, and its activation: the weights are made for it."""
        self.load_state_dict(towers.text_blocks()[layer].state_dict())
        self.activation = towers.block_form().activation


class TemporalEncoder(nn.Module):
    """Eq. 3: learned positions, blocks, and the input as residual (CLIP4Clip's seqTransf)."""

    def __init__(self, dim: int, layers: int, positions: int, form: BlockForm | None = None):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(positions, dim))
        self.blocks = nn.ModuleList(TemporalBlock(dim, form) for _ in range(layers))
        self.apply(init_linear)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (V, K, D), mask (V, K) -> (V, K, D)."""
        # A softmax over no key would be NaN. Nobody reads the rows of a video without one real frame.
        padding = ~mask & mask.any(dim=1, keepdim=True)
        h = x + self.positions[:x.shape[1]]
        for block in self.blocks:
            h = block(h, padding)
        return x + h

    def start_from_text_tower(self, towers: Towers) -> bool:
        """Copy the text tower's positions and first blocks, as CLIP4Clip does; False where it has none that fit."""
        blocks = towers.text_blocks()
        if not blocks:
            return False
        with torch.no_grad():
            positions = towers.of_text.positional_embedding
            n = min(len(self.positions), len(positions))
            self.positions[:n] = positions[:n]
        for layer, block in enumerate(self.blocks[:len(blocks)]):
            block.start_from(towers, layer)
        return True


# ------------------------------------------------------------------------------------------------------------- heads


class Heads(nn.Module):
    """All that NarVid adds to CLIP: co-attention, temporal encoders, word weights; of these, what `modules` need."""

    def __init__(self, config: NarVidConfig):
        super().__init__()
        self.config = config
        dim, temporal = config.dim, (config.dim, config.temporal_layers, config.positions, config.block)
        # Eq. 3 prints one temporal encoder. Frames and sentences have one each, as in the released model.
        self.temporal_frames = TemporalEncoder(*temporal)
        if "CMI" in config.modules:
            self.co_attention = CoAttention(dim, config.dropout)
            self.temporal_narration = TemporalEncoder(*temporal)
        if "NM" in config.modules:
            self.word_weight_mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)).apply(init_linear)

    def co_attend(self, frames: Tensor, narration: Tensor, mask: Tensor,
                  narration_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 2. frames, narration (V, K, D); masks (V, K) -> both (V, K, D)."""
        return self.co_attention(frames, narration, mask, narration_mask)

    def enhance(self, frames: Tensor, narration: Tensor | None, mask: Tensor, narration_mask: Tensor | None) -> Videos:
        """Eqs. 2-3: CLIP features (V, K, D), masks (V, K) -> Videos; no query takes part, so it runs once per video."""
        if "CMI" in self.config.modules:
            frames, narration = self.co_attend(frames, narration, mask, narration_mask)
            narration = self.temporal_narration(narration, narration_mask)
        return Videos(self.temporal_frames(frames, mask), narration, mask, narration_mask)

    def word_weights(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """App. A: weights of words in the fine score. words (B, L, D), word_mask (B, L) -> (B, L), rows sum to 1."""
        logits = widen(self.word_weight_mlp(words)).squeeze(-1) / self.config.temperature  # (B, L)
        return logits.masked_fill(~word_mask, -torch.inf).softmax(dim=1).to(words.dtype)

    def start_from_text_tower(self, towers: Towers) -> bool:
        """Start the temporal encoders from the text tower; False (nothing done) where it has no blocks that fit."""
        encoders = [m for m in self.children() if isinstance(m, TemporalEncoder)]
        return all([encoder.start_from_text_tower(towers) for encoder in encoders])


class NarVid(nn.Module):
    """The towers and the heads: tokens and pixels -> Queries and Videos."""

    def __init__(self, clip: Towers, config: NarVidConfig):
        super().__init__()
        self.clip = clip
        self.heads = Heads(config)

    def forward(self, tokens: Tensor, word_mask: Tensor, frames: Tensor, mask: Tensor, sentences: Tensor | None,
                sentence_of_frame: Tensor | None, narration_mask: Tensor | None) -> tuple[Queries, Videos, Tensor]:
        """A training batch -> features and logit scale; arguments as in `encode_queries` and `encode_videos`."""
        return (self.encode_queries(tokens, word_mask),
                self.encode_videos(frames, mask, sentences, sentence_of_frame, narration_mask),
                self.clip.logit_scale.exp())

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L), word_mask (B, L) -> Queries."""
        fine = "NM" in self.heads.config.modules
        eos, words = self.clip.encode_text(tokens)
        eos, words = widen(eos), widen(words)
        return Queries(eos, words, word_mask, self.heads.word_weights(words, word_mask) if fine else None)

    def encode_videos(self, frames: Tensor, mask: Tensor, sentences: Tensor | None, sentence_of_frame: Tensor | None,
                      narration_mask: Tensor | None) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos.

        sentences (U, M): the distinct sentences of the batch, each encoded once; sentence_of_frame (V, K) says which of
        them stands beside each frame; narration_mask (V, K). All three None where narration matching is off.
        """
        video = place_frames(self.clip.encode_frames(frames[mask]), mask)  # the real frames only
        narration = None
        if "NM" in self.heads.config.modules:
            eos, _ = self.clip.encode_text(sentences, words=False)  # (U, D)
            narration = widen(eos)[sentence_of_frame]  # (V, K, D)
        return self.heads.enhance(video, narration, mask, narration_mask)

    def load_release(self, state: dict[str, Tensor], source: str) -> None:
        """Load a released checkpoint: CLIP under "clip.", the heads under the released code's names.

        ValueError names `source` and what is missing or of another shape.
        """
        load_released_towers(self.clip, state, source=source)
        load_weights(self.heads, heads_from_release(state, source=source).state_dict(), source=source)


def place_frames(features: Tensor, mask: Tensor) -> Tensor:
    """Features (N, D) of the N real frames, put where mask (V, K) is True -> (V, K, D) in fp32 or wider; else zeros."""
    features = widen(features)
    placed = features.new_zeros(*mask.shape, features.shape[-1])
    placed[mask] = features
    return placed


# ------------------------------------------------------------------------------------------------ released weights


def heads_from_release(state_dict: dict[str, Tensor], *, source: str = "released checkpoint") -> Heads:
    """Heads in eval mode from a released NarVid checkpoint; the shapes of its weights tell the sizes.

    CLIP's keys and the parameters that the released code builds but never uses are ignored. Raises ValueError naming
    `source` and what is missing or of another shape.
    """
    state = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        for pattern, replacement in _RELEASED_NAMES:
            renamed, hit = re.subn(f"^{pattern}", replacement, key)
            if hit:
                state[renamed] = value
                break
    anchors = ("temporal_frames.positions", "word_weight_mlp.0.weight")
    if any(key not in state for key in anchors):
        raise ValueError(f"{source}: no released NarVid checkpoint, frame_position_embeddings.weight or "
                         "text_weight_fc.0.weight is missing")
    positions, dim = state[anchors[0]].shape
    blocks = {key.split(".")[2] for key in state if key.startswith("temporal_frames.blocks.")}
    heads = Heads(NarVidConfig(dim=dim, temporal_layers=len(blocks), positions=positions))
    dtype = state[anchors[1]].dtype
    heads = heads.to(dtype if dtype == torch.float64 else torch.float32)
    load_weights(heads, state, source=source)
    return heads.eval()


_BLOCK = r"co_connetion_transformer_model_block\.0\."  # spelled so in the released code
_RELEASED_NAMES = [
    *[(_BLOCK + pattern.format(n=n, v=v), f"co_attention.{stream}.{name}")
      for stream, n, v in (("frames", 1, "v"), ("narration", 2, "t"))
      for pattern, name in ((r"biattention\.(query|key|value){n}\.", r"\1."), (r"biOutput\.dense{n}\.", "out."),
                            (r"biOutput\.LayerNorm{n}\.", "norm_attention."),
                            (r"{v}_intermediate\.dense\.", "feed_forward.0."),
                            (r"{v}_output\.dense\.", "feed_forward.2."),
                            (r"{v}_output\.LayerNorm\.", "norm_feed_forward."))],
    (r"frame_position_embeddings\.weight", "temporal_frames.positions"),
    (r"caption_position_embeddings\.weight", "temporal_narration.positions"),
    (r"transformerClip\.resblocks\.", "temporal_frames.blocks."),
    (r"transformerCaption\.resblocks\.", "temporal_narration.blocks."),
    (r"text_weight_fc\.", "word_weight_mlp."),
]


def widen(x: Tensor) -> Tensor:
    """Half precision -> fp32: towers may compute in fp16 or bf16; softmaxes, similarity.py and losses.py do not."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def init_linear(module: nn.Module) -> None:
    """CLIP4Clip's initialisation: N(0, 0.02), biases 0 (attention's packed projections included)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
