"""InternVideo (Wang et al. 2022), its text-video retrieval model: CLIP with a global video decoder.

The image tower runs over every frame by itself. A copy of each of its last four blocks' outputs becomes the keys of one
decoder layer: a depth-wise 3x3x3 convolution adds position and neighbouring frames to the patch tokens of the copy, and
one video token asks all tokens of all frames. The token, mixed per channel with the mean of the frames' class tokens,
goes through CLIP's last LayerNorm and projection; the score is its cosine with the query's eos feature.

Departures from the release, which is described in its code and not by an equation:
- Padded frames are no keys, no part of the mean, and zeros to the convolution, so a video's feature does not depend on
  --max_frames. The release encodes and attends them as pictures of the mean colour: --unmasked_padding.
- A text tower cut to the words present: attention is causal and the feature that of the end token, so what follows it
  cannot matter (the release must be fed all 77 positions).
- Optimiser and number format are the trainer's; the release: BertAdam, all in fp32, one rate for all (lr = clip_lr).
- DSL of video-to-text is a softmax over the videos for every corpus; the release's adds nothing on MSVD and VATEX.

CLIP's last LayerNorm and projection are held by the decoder, as in the release, which never averages them with CLIP's.

Legend: B queries, V videos, K frames, L words, D joint dimension, N real frames of all videos, S tokens of a frame
(class token and patches), C width of the image tower. Masks are bool, True = real.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narvid import losses
from narvid.towers import load_weights
from narvid.flags import share
from narvid.methods.protocol import Method
from narvid.model import widen

TAPS = 4  # blocks of the image tower, from the last one down, that feed the decoder


class Queries(NamedTuple):
    """What the score sees of B queries."""

    eos: Tensor  # (B, D)


class Videos(NamedTuple):
    """What the score sees of V videos."""

    video: Tensor  # (V, D)


class DecoderLayer(nn.Module):
    """One step of the video token: cross-attention to all tokens of all frames, then a feed-forward; pre-LN.

    At first the identity, because both output projections start at zero.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.dpe = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        nn.init.xavier_uniform_(self.mlp["c_fc"].weight)
        for zero in (self.dpe.bias, self.attn.out_proj.weight, *self.mlp["c_proj"].parameters()):
            nn.init.zeros_(zero)

    def forward(self, token: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """token (V, 1, C), frames (V, K, S, C), mask (V, K) -> token (V, 1, C)."""
        # Only patches have a place in the picture; the class tokens stay what they are.
        patches = frames[:, :, 1:].unflatten(2, self.grid).permute(0, 4, 1, 2, 3)  # (V, C, K, rows, columns)
        positions = self.dpe(patches).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (V, K, S - 1, C)
        keys = self.ln_3((frames + F.pad(positions, (0, 0, 1, 0))).flatten(1, 2))  # (V, K S, C)
        padding = ~mask.repeat_interleave(frames.shape[2], dim=1)  # (V, K S), True = no key
        token = token + self.attn(self.ln_1(token), keys, keys, key_padding_mask=padding, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(token))
        return token + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class Decoder(nn.Module):
    """Block outputs of all frames -> one feature a video, through the image tower's last LayerNorm and projection."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        blocks = visual.transformer.resblocks
        width, heads = len(visual.class_embedding), blocks[0].attn.num_heads
        self.token = nn.Parameter(torch.zeros(width))
        self.balance = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, visual.grid_size) for _ in blocks[-TAPS:])
        self.ln_post, self.proj = visual.ln_post, visual.proj
        visual.ln_post, visual.proj = nn.Identity(), None

    def forward(self, taps: Iterable[Tensor], mask: Tensor) -> Tensor:
        """taps: for each layer the frames' tokens (V, K, S, C), zeros where padded; mask (V, K) -> (V, D)."""
        token = self.token.expand(len(mask), 1, -1)  # (V, 1, C)
        for layer, frames in zip(self.layers, taps):
            token = layer(token, frames, mask)
        mean = (frames[:, :, 0] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)  # (V, C)
        share_of_mean = self.balance.sigmoid()
        # The LayerNorm once, after the mean: CLIP4Clip's frame features are normalised one by one, before it.
        return self.ln_post((1 - share_of_mean) * token[:, 0] + share_of_mean * mean) @ self.proj  # (V, D)


class InternVideo(Method, nn.Module):
    """The towers and the decoder."""

    @classmethod
    def features_suffice(cls, flags) -> bool:
        """The decoder reads the image tower's last blocks."""
        return False

    @classmethod
    def averages_clip(cls, flags) -> bool:
        """As the release evaluates some corpora."""
        return flags.merge_clip > 0

    @staticmethod
    def add_flags(group) -> None:
        """The flags of --method internvideo: the constructor's keyword arguments."""
        switch = argparse.BooleanOptionalAction
        group.add_argument("--merge_clip", type=share, default=0.0,
                           help="weight of --clip_pretrained's towers in an average with a released --checkpoint's")
        group.add_argument("--unmasked_padding", action=switch, default=False,
                           help="as the release: padded frames count, as pictures of the mean colour")
        group.add_argument("--freeze_output", action=switch, default=False,
                           help="as the release: do not train projection, last LayerNorm, video token and balance")

    def __init__(self, towers: nn.Module, *, merge_clip: float = 0.0,
                 unmasked_padding: bool = False, freeze_output: bool = False):
        super().__init__()
        towers.require_openai("--method internvideo")
        self.clip, self.decoder = towers, Decoder(towers.visual)
        self.merge_clip, self.unmasked_padding = merge_clip, unmasked_padding
        if freeze_output:
            for name, parameter in self.decoder.named_parameters():
                parameter.requires_grad_(name.startswith("layers."))

    def encode_queries(self, tokens: Tensor, word_mask: Tensor) -> Queries:
        """tokens (B, L), word_mask (B, L) -> Queries."""
        return Queries(widen(self.clip.encode_text(tokens, words=False)[0]))

    def encode_videos(self, frames: Tensor, mask: Tensor, sentences: Tensor | None = None,
                      sentence_of_frame: Tensor | None = None, narration_mask: Tensor | None = None) -> Videos:
        """frames (V, K, 3, H, W) uint8, mask (V, K) -> Videos; the narration's arguments are not read."""
        count = int(mask.sum())  # N
        pixels = (frames[mask] - self.clip.pixel_mean) / self.clip.pixel_std  # (N, 3, H, W)
        if self.unmasked_padding:  # one blank picture for all padded places; zero is the mean colour
            pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
        taps = self.clip.visual.forward_intermediates(
            pixels.to(self.clip.visual.conv1.weight.dtype), indices=len(self.decoder.layers), intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True)
        place = torch.full_like(mask, count, dtype=torch.long)  # (V, K): row 0 to N - 1, or N where padded
        place[mask] = torch.arange(count, device=mask.device)

        def spread(class_token: Tensor, patches: Tensor) -> Tensor:
            """(N, 1, C), (N, S - 1, C) -> (V, K, S, C); where padded the blank picture's tokens, or zeros."""
            tokens = widen(torch.cat([class_token, patches], dim=1))  # (N, S, C)
            return (tokens if self.unmasked_padding else F.pad(tokens, (0, 0, 0, 0, 0, 1)))[place]

        spreads = (spread(*tap) for tap in zip(taps["image_intermediates_prefix"], taps["image_intermediates"]))
        return Videos(widen(self.decoder(spreads, mask | self.unmasked_padding)))

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """Cosines {"video": (B, V)}; one product, so `block` is not read."""
        return {"video": F.normalize(queries.eos, dim=-1) @ F.normalize(videos.video, dim=-1).T}

    def loss(self, similarity: dict[str, Tensor], scale: Tensor, exclude: Tensor | None) -> dict[str, Tensor]:
        """Symmetric cross-entropy over the global batch, as in the release."""
        return {"nce_video": losses.nce(similarity["video"], scale, exclude)}

    def load_release(self, state: dict, source: str) -> None:
        """Weights as released: pre-trained (under "state_dict") or fine-tuned (bare), averaged with CLIP's where asked.

        With `merge_clip` = a, the towers become a * (what they hold: --clip_pretrained) + (1 - a) * the file; what the
        decoder holds is the file's. Raises ValueError naming `source` where the file does not fit.
        """
        loaded = _from_release(state, source)
        _check_sizes(self, loaded, source)
        own = self.state_dict()
        for key in own.keys() & loaded.keys():
            if self.merge_clip and key.startswith("clip.") and own[key].shape == loaded[key].shape:
                loaded[key] = torch.lerp(loaded[key], own[key].to(loaded[key]), self.merge_clip)
        load_weights(self, loaded, source=source)


# ------------------------------------------------------------------------------------------------ released weights

# First parts of the names that the retrieval model has; a pre-training file may hold other heads besides.
_OF_TOWERS = {"visual", "visual_proj", "visual_ln_post", "transformer", "token_embedding", "positional_embedding",
              "ln_final", "text_projection", "logit_scale"}
_RENAMED = (("visual.transformer.temporal_cls_token", "token"), ("visual.transformer.balance", "balance"),
            ("visual_ln_post.", "ln_post."), ("visual.ln_post.", "ln_post."), ("visual_proj", "proj"),
            ("visual.proj", "proj"))


def _from_release(state: dict, source: str) -> dict[str, Tensor]:
    """A released file's content -> fp32 tensors under the names and in the shapes of InternVideo's state dict."""
    pretrained = "state_dict" in state
    state = state["state_dict"] if pretrained else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source}: holds no state dict of tensors; give one of InternVideo's released files")
    loaded = {}
    for key, value in state.items():
        key = key.removeprefix("module.").replace("clip.", "")
        # A leftover of masked language modelling that nothing reads; and pre-training's other heads.
        if key == "text_mask_embedding" or (pretrained and key.split(".")[0] not in _OF_TOWERS):
            continue
        if key == "visual.conv1.weight" and value.ndim == 5 and value.shape[2] == 1:
            value = value.squeeze(2)  # a 3-D convolution of one frame
        if key == "visual.transformer.temporal_cls_token":
            value = value.flatten()
        loaded[_our_name(key)] = value.float()
    return loaded


def _our_name(key: str) -> str:
    """The release's name, without "clip." -> ours."""
    for theirs, ours in _RENAMED:
        if key.startswith(theirs):
            return f"decoder.{ours}{key.removeprefix(theirs)}"
    for kind, inside in (("dpe", "dpe."), ("dec", "")):
        prefix = f"visual.transformer.{kind}."
        if key.startswith(prefix):
            layer, _, rest = key.removeprefix(prefix).partition(".")
            return f"decoder.layers.{layer}.{inside}{rest}"
    return f"clip.{key}"


def _check_sizes(model: InternVideo, loaded: dict[str, Tensor], source: str) -> None:
    """ValueError where the file is of another method or of another size, before a list of shapes says it worse."""
    anchors = ("visual.conv1.weight", "visual_proj", "visual.transformer.temporal_cls_token")
    missing = [key for key in anchors if _our_name(key) not in loaded]
    if missing:
        raise ValueError(f"{source}: these are not the weights of InternVideo's retrieval model, {missing[0]} is "
                         "missing; name another --checkpoint or another --method")
    (width, *_, patch), joint = loaded["clip.visual.conv1.weight"].shape, loaded["decoder.proj"].shape[-1]
    if patch == 32:  # it has B/16's width, by which the release tells its models apart
        raise ValueError(f"{source}: weights of a ViT-B/32, for which there is no InternVideo retrieval model; its "
                         "released ones are ViT-L/14 and ViT-B/16")
    (own_width, *_, own_patch), own_joint = model.clip.visual.conv1.weight.shape, model.decoder.proj.shape[-1]
    if (width, patch, joint) != (own_width, own_patch, own_joint):
        raise ValueError(f"{source}: weights of a ViT of width {width}, patches of {patch} pixels and joint dimension "
                         f"{joint}, where --clip_model has {own_width}, {own_patch} and {own_joint}; say ViT-L-14 or "
                         "ViT-B-16, whichever the file is of")
