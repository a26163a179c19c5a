"""The pair of towers as a module: frames -> (N, D); tokens -> eos (N, D) and words (N, T, D).

A parameter has the name that it has in open_clip's model, so weights of either fit the other. Not here: building and
loading (the package itself), texts (tokenizer.py).

Legend: N frames or texts, T tokens of a text (special ones included), D joint dimension.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from narvid.data.frames import Picture
from narvid.profiling import stage
from narvid.towers.architectures import ClipConfig
from narvid.towers.tokenizer import Tokenizer

MANY_TEXTS = 128  # from so many on they are read in parts
LAYER = re.compile(r"\.(?:layer|layers|block|blocks)\.(\d+)\.")  # of a Hugging Face text tower


class BlockForm(NamedTuple):
    """Form of a transformer block of the heads: that of the text tower's blocks, from which they start."""

    heads: int
    hidden: int  # width of the feed-forward layer
    activation: str  # "quick_gelu", "gelu", "gelu_tanh"


class PatchProduct(nn.Module):
    """CLIP's patch convolution as the matrix product it is (kernel = stride, no bias); same weight, same name.

    On CPUs the backward of torch's bf16 convolution costs more than a whole block; on GPUs the two are alike.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # (width, 3, p, p)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> (N, width, H / p, W / p)."""
        p = self.weight.shape[-1]
        n, channels, rows, columns = x.shape[0], x.shape[1], x.shape[2] // p, x.shape[3] // p
        patches = x.view(n, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)  # (N, rows, columns, 3, p, p)
        return F.linear(patches.flatten(3), self.weight.flatten(1)).permute(0, 3, 1, 2)


class Towers(nn.Module):
    """Both towers of an open_clip model and its logit scale, with that model's names of parameters.

    config: what they were built from; tokenizer: texts -> tokens; picture: how a frame becomes their input.
    cuts_text: whether a text may be read without what stands behind its end, as causal towers do; others read the
    whole context length, and padding counts.
    """

    def __init__(self, model: CLIP | CustomTextCLIP, config: ClipConfig):
        super().__init__()
        self.config = config
        for name, parameter in model._parameters.items():
            if name != "logit_bias":  # no score here depends on it
                self.register_parameter(name, parameter)
        for name, module in model.named_children():
            self.add_module(name, module)
        if not config.custom_text:
            self.register_buffer("attn_mask", model.attn_mask, persistent=False)
            if model.text_projection is None:
                self.text_projection = None
        if isinstance(self.visual, VisionTransformer):
            self.visual.conv1 = PatchProduct(self.visual.conv1.weight)
        for name, values in (("pixel_mean", config.mean), ("pixel_std", config.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)
        self.tokenizer = Tokenizer(config.text_cfg, config.tokenizer, config.tokenizer_digest)
        self.pool, self.cuts_text = self.tokenizer.pool, not self.tokenizer.whole
        if self.pool == "cls":  # CoCa: a class token behind the padding
            self.text.output_tokens = True

    # ---- what they are ----

    @property
    def dim(self) -> int:
        """D, of frames, texts and words."""
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        """Most tokens of a text."""
        return self.config.context_length

    @property
    def picture(self) -> Picture:
        """Size, resizing, interpolation, mean and standard deviation of what the image tower is given."""
        config = self.config
        return Picture(config.image_size, config.resize, config.interpolation, tuple(config.mean), tuple(config.std))

    @property
    def of_text(self) -> nn.Module:
        """The module that holds the text tower's parts: open_clip's CLIP has them beside the image tower."""
        return self.text if self.config.custom_text else self

    @property
    def like_openai(self) -> bool:
        """A ViT of open_clip's own and a causal text tower with a projection, pooled at the end token."""
        return (isinstance(self.visual, VisionTransformer) and not self.config.custom_text and self.pool == "argmax"
                and self.attn_mask is not None and isinstance(self.text_projection, nn.Parameter))

    def require_openai(self, what: str) -> None:
        """ValueError in one sentence unless `like_openai`, for `what` reaches into towers of that form."""
        if not self.like_openai:
            raise ValueError(f"{what} needs towers of OpenAI's form, a ViT and a causal text tower pooled at the end "
                             "token: ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, ... of OpenAI, LAION, DFN or MetaCLIP")

    def blocks(self) -> list[nn.Module]:
        """The residual blocks of both towers, where both are stacks of such; else []."""
        trunk = getattr(self.visual, "trunk", None)
        image = self.visual.transformer.resblocks if isinstance(self.visual, VisionTransformer) else getattr(
            trunk, "blocks", ())
        text = getattr(getattr(self.of_text, "transformer", None), "resblocks", ())
        return [*image, *text] if len(image) and len(text) else []

    def text_blocks(self) -> list[nn.Module]:
        """The text tower's blocks, where the heads' transformer blocks can start from them: of their form, D wide."""
        blocks = [] if self.pool == "hub" else list(self.of_text.transformer.resblocks)
        fit = all(type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity) for block in blocks)
        return blocks if fit and blocks and self.of_text.ln_final.normalized_shape[0] == self.dim else []

    def block_form(self) -> BlockForm:
        """Of the blocks above; where there are none, heads of 64, four times as wide inside, QuickGELU."""
        blocks = self.text_blocks()
        if not blocks:
            return BlockForm(self.dim // 64, 4 * self.dim, "quick_gelu")
        tanh = (self.config.text_cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
        return BlockForm(blocks[0].attn.num_heads, blocks[0].mlp.c_fc.out_features,
                         "quick_gelu" if self.config.temporal_quick_gelu else "gelu_tanh" if tanh else "gelu")

    def depths(self) -> dict[str, tuple[int, int]]:
        """Parameter's name -> its depth in its tower, and the depth of what stands behind the last block.

        0: what comes before the first block (embeddings, patches, a stem); n: block n; as deep as the last number:
        final LayerNorm, pooling, projection. The logit scale belongs to none.
        """
        image = self._image_depths()
        of_text = {name: self._text_depth(name) for name, _ in self.named_parameters()
                   if name != "logit_scale" and not name.startswith("visual.")}
        tops = [max((x for x in depths.values() if x is not None), default=0) + 1 for depths in (image, of_text)]
        return {name: (top if depth is None else depth, top)
                for depths, top in zip((image, of_text), tops) for name, depth in depths.items()}

    def _image_depths(self) -> dict[str, int | None]:
        """None: behind the last block."""
        if hasattr(self.visual, "trunk"):
            layers = group_parameters(self.visual.trunk, self.visual.trunk.group_matcher(coarse=False), reverse=True)
            last, known = max(layers.values()), any(".blocks." in f".{name}" for name in layers)
            behind = last if known else last + 1  # timm counts a ViT's final norm as one more layer
            layers = {f"trunk.{name}": depth if depth < behind else None for name, depth in layers.items()}
            layers |= {name: 0 for name in layers if name.startswith("trunk.norm_pre.")}  # older ones: as the final one
            return {f"visual.{name}": layers.get(name) for name, _ in self.visual.named_parameters()}
        if isinstance(self.visual, ModifiedResNet):
            stages = {f"layer{n}": n for n in range(1, 5)} | {"attnpool": None}
            return {f"visual.{name}": stages.get(name.split(".")[0], 0) for name, _ in self.visual.named_parameters()}
        inputs = ("conv1.", "class_embedding", "positional_embedding", "ln_pre.")
        return {f"visual.{name}": int(name.split(".")[2]) + 1 if ".resblocks." in name else
                0 if name.startswith(inputs) else None for name, _ in self.visual.named_parameters()}

    def _text_depth(self, name: str) -> int | None:
        """As `_image_depths`."""
        if ".resblocks." in name:
            return int(name.split(".resblocks.")[1].split(".")[0]) + 1
        if found := LAYER.search(name):  # of a Hugging Face tower
            return int(found[1]) + 1
        return 0 if "embed" in name or name.endswith("cls_emb") else None

    # ---- how they are run ----

    def train(self, mode: bool = True) -> Towers:
        """As nn.Module's, but for BatchNorms: they keep the statistics they came with, or ranks and batches differ."""
        super().train(mode)
        for module in self.visual.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks keep their inputs alone and compute again in backward. ValueError where a tower cannot do so."""
        if enable and isinstance(self.visual, ModifiedResNet):
            raise ValueError("--grad_checkpointing: a ResNet image tower has no such blocks; leave it out")
        try:
            getattr(self.visual, "trunk", self.visual).set_grad_checkpointing(enable)
        except Exception as error:  # whatever timm's models raise that have none
            if enable:
                raise ValueError(f"--grad_checkpointing: this image tower cannot do it ({error}); leave it "
                                 "out") from error
        if self.pool == "hub":
            if enable:
                self.text.set_grad_checkpointing()
        else:
            self.of_text.transformer.grad_checkpointing = enable

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Keep the logit scale where CLIP's training does, at most 100, or where the weights came with more."""
        self.logit_scale.clamp_(max=math.log(self.config.scale_limit))

    def tokenize(self, texts: list[str], max_words: int) -> tuple[Tensor, Tensor]:
        """N texts -> tokens (N, T) long, word_mask (N, T) bool, True = counts as a word; T is at most max_words.

        What counts as a word, and when T is the context length: Tokenizer. ValueError if there is no tokenizer.
        """
        return self.tokenizer(texts, max_words)

    @stage("towers")
    def encode_frames(self, frames: Tensor) -> Tensor:
        """frames (N, 3, S, S) uint8, S = picture.size -> (N, D). Normalised here, so that the loader carries bytes.

        Features (N, D), which the feature cache holds, are returned as they are.
        """
        if frames.ndim == 2:
            return frames
        weight = self.visual.conv1.weight if isinstance(self.visual, VisionTransformer) else next(
            self.visual.parameters())
        features = self.visual(((frames - self.pixel_mean) / self.pixel_std).to(weight.dtype))
        return features[0] if isinstance(features, tuple) else features  # CoCa's has tokens besides

    @stage("towers")
    def encode_text(self, tokens: Tensor, words: bool = True, *,
                    head: tuple[nn.Module, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens (N, T), padded as the tokenizer pads -> eos (N, D) and every projected word (N, T, D).

        Where `cuts_text`, T may be anything up to the context length: positions and causal mask are cut, so the cost is
        that of the words present, and what stands after the end token cannot reach it. Else T is the context length
        (ValueError). `words=False` returns None for the words. head: another final LayerNorm and projection than the
        tower's own. Floating numbers (N, 1 + T, D), eos and then words as the feature cache holds them, are returned as
        they are.
        """
        if tokens.is_floating_point():
            return tokens[:, 0], tokens[:, 1:] if words else None
        if not self.cuts_text and tokens.shape[1] != self.context_length:
            raise ValueError(f"this text tower reads its padding too: {self.context_length} tokens a text are needed, "
                             f"not {tokens.shape[1]}")
        if self.pool in ("hub", "cls"):
            return self._encode_whole(tokens, words)
        norm, projection = head or (self.of_text.ln_final, self.of_text.text_projection)
        place = self._place(tokens)
        if words:
            projected = _project(norm(self._read(tokens)), projection)  # (N, T, D)
            return projected[torch.arange(len(tokens), device=place.device), place], projected

        def eos(tokens: Tensor, place: Tensor) -> Tensor:
            rows = torch.arange(len(tokens), device=tokens.device)
            return _project(norm(self._read(tokens)[rows, place]), projection)  # (N, D)

        if len(tokens) < MANY_TEXTS or not self.cuts_text:
            return eos(tokens, place), None
        # The sentences of a batch in four parts of like length: less padding.
        order = place.argsort()
        lengths = (place[order] + 1).tolist()  # a GPU is waited for here, while it works on the frames
        size = -(-len(tokens) // 4)
        parts = [eos(tokens[some, :lengths[min(k * size + size, len(tokens)) - 1]], place[some])
                 for k, some in enumerate(order.split(size))]
        return torch.cat(parts)[order.argsort()], None

    def _place(self, tokens: Tensor) -> Tensor:
        """tokens (N, T) -> where a text's feature stands, (N,)."""
        if self.pool == "argmax":
            return tokens.argmax(dim=1)  # the end token has the largest id
        if self.pool == "eos":
            return (tokens == self.tokenizer.end_id).int().argmax(dim=1)
        return torch.full_like(tokens[:, 0], 0 if self.pool == "first" else tokens.shape[1] - 1)

    def _read(self, tokens: Tensor) -> Tensor:
        """tokens (N, T) -> the text transformer's (N, T, width)."""
        text, length = self.of_text, tokens.shape[1]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
        return text.transformer(x, attn_mask=None if text.attn_mask is None else text.attn_mask[:length, :length])

    def _encode_whole(self, tokens: Tensor, words: bool) -> tuple[Tensor, Tensor | None]:
        """Of CoCa and of Hugging Face text towers, which make their own masks of the padding."""
        if self.pool == "cls":
            eos, hidden = self.text(tokens)
            return eos, _project(self.text.ln_final(hidden), self.text.text_projection) if words else None
        real = (tokens != self.text.config.pad_token_id).long()
        hidden = self.text.transformer(input_ids=tokens, attention_mask=real)
        eos = self.text.proj(self.text.pooler(hidden, real))
        return eos, self.text.proj(hidden.last_hidden_state) if words else None


def _project(x: Tensor, projection: Tensor | nn.Module | None) -> Tensor:
    """(..., width) -> (..., D)."""
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection
