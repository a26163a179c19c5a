"""The two towers of an image-text model of open_clip: any pair that it builds, behind one class.

Here: building them from a config that a checkpoint keeps, and loading weights. The class is pair.py. Not here: names,
folders and downloads (architectures.py), files of weights (weights.py), texts (tokenizer.py), anything that a method
adds, devices, ranks.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from timm.models import is_model
from torch import nn

from narvid.towers.architectures import (ClipConfig, Model, config_of, exists_with_quick_gelu, find_model, find_weights,
                                         note_on_pictures)
from narvid.towers.compiling import compile_blocks
from narvid.towers.pair import BlockForm, PatchProduct, Towers
from narvid.towers.weights import ARCHIVE_KEYS, load_released_towers, load_towers_weights, load_weights, read_weights

__all__ = ["ARCHIVE_KEYS", "BlockForm", "ClipConfig", "PatchProduct", "Towers", "build_towers", "checked_model",
           "compile_blocks", "config_of", "load_released_towers", "load_towers", "load_weights", "read_weights"]


def load_towers(name: str, pretrained: str | None = None, *, quick_gelu: bool | None = None,
                tokenizer: str | None = None, half: bool = False) -> Towers:
    """The towers of open_clip's model `name`, of a model config in .json or of a folder with open_clip_config.json.

    pretrained: an open_clip tag ("openai", "laion2b_s34b_b79k", "webli", ...), a folder, or a file: OpenAI's archive, a
    state dict, or safetensors; None: a folder's own weights, else random ones. OpenAI's weights need QuickGELU and look
    like those that do not: the tag or the archive's own extra keys decide; where a bare state dict leaves it open,
    `quick_gelu` must be given. tokenizer: folder of a tokenizer that is not CLIP's; without it towers load and only
    `tokenize` asks for it. half: LayerNorms that compute in fp32 between fp16 weights (recipe "reported").
    A tag's weights are downloaded once, unless they are in the cache.
    Raises ValueError with one sentence for what cannot be built or loaded.
    """
    model = checked_model(name)
    weights = find_weights(model, pretrained)
    state, needs_quick_gelu = None, weights.quick_gelu
    if weights.path is not None:
        state, of_file = read_weights(weights.path)
        needs_quick_gelu = of_file if needs_quick_gelu is None else needs_quick_gelu
        if needs_quick_gelu is None and quick_gelu is None and exists_with_quick_gelu(model):
            raise ValueError(f"{weights.path}: nothing in this file tells whether its weights are for QuickGELU: add "
                             "--quick_gelu (OpenAI's, and what descends from them) or --no-quick_gelu (LAION's)")
    if needs_quick_gelu is not None and quick_gelu is not None and needs_quick_gelu != quick_gelu:
        raise ValueError(f"{pretrained} was trained with{'' if needs_quick_gelu else 'out'} QuickGELU; "
                         f"drop --{'' if quick_gelu else 'no-'}quick_gelu")
    chosen = next((x for x in (quick_gelu, needs_quick_gelu) if x is not None), model.config.get("quick_gelu", False))
    pictures = weights.pictures or model.pictures
    if state is not None and pictures is None:
        note_on_pictures(model)
    config = config_of(model, bool(chosen), pictures or {}, tokenizer or model.tokenizer)
    towers = build_towers(config, half=half)
    if state is not None:
        load_towers_weights(towers, state, source=weights.path)
        scale = math.exp(towers.logit_scale.item())
        towers.config = replace(config, scale_limit=scale if scale > 100.01 else 100.0)
    elif not config.text_cfg.get("hf_model_name"):
        # open_clip's N(0, 0.02) is made for 10^5 steps: with it, texts stay nearly alike for the first hundreds
        nn.init.normal_(towers.of_text.token_embedding.weight, std=0.3)
    return towers


def checked_model(name: str) -> Model:
    """What a name stands for; a user's own config is tried, without memory for weights. ValueError in one sentence."""
    model = find_model(name)
    if name not in open_clip.list_models():
        _check_builds(name, config_of(model, bool(model.config.get("quick_gelu")), model.pictures or {}, None))
    return model


def build_towers(config: ClipConfig, *, half: bool = False) -> Towers:
    """Towers with random weights. ValueError where a text tower of the Hugging Face hub cannot be fetched.

    `half` builds LayerNorms that compute in fp32 between fp16 weights (see optim.to_half).
    """
    vision = config.vision_cfg | ({"timm_model_pretrained": False} if "timm_model_name" in config.vision_cfg else {})
    text = config.text_cfg | ({"hf_model_pretrained": False} if config.text_cfg.get("hf_model_name") else {})
    if "timm_model_name" in vision and not is_model(vision["timm_model_name"]):
        raise ValueError(f"timm, which builds this image tower, knows no {vision['timm_model_name']}; install the "
                         "newest timm, or name another --clip_model")
    try:
        return Towers((CustomTextCLIP if config.custom_text else CLIP)(
            config.embed_dim, vision, text, config.quick_gelu, cast_dtype=torch.float16 if half else None), config)
    except (OSError, ImportError) as error:  # of transformers: no such folder, no network
        raise ValueError(f"the text tower needs the config of {text.get('hf_model_name')}, which could not be fetched "
                         f"from the hub ({(str(error).splitlines() or [''])[0][:200]}); name another --clip_model"
                         ) from error


def _check_builds(name: str, config: ClipConfig) -> None:
    """ValueError unless towers of this config can be built and read a picture and a text; nothing is computed."""
    vision, text = config.vision_cfg, config.text_cfg
    numbers = [config.embed_dim, *vision.values(), *text.values()]
    if any(isinstance(x, (int, float)) and not 0 <= x <= 300_000 for x in numbers):
        raise ValueError(f"--clip_model {name}: the model config holds a number below 0 or above 300,000")
    layers = [text.get("layers", 12), *([vision.get("layers", 12)] if not isinstance(vision.get("layers"), list)
                                        else vision["layers"])]
    if any(type(x) is not int or not 0 < x <= 1000 for x in layers):
        raise ValueError(f"--clip_model {name}: layers must be a whole number from 1 to 1,000")
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without a weight
            towers = build_towers(config)
            frames = towers.encode_frames(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
            eos, words = towers.encode_text(torch.zeros(1, config.context_length, dtype=torch.long))
        if not frames.shape == eos.shape == (1, config.embed_dim) or words.shape[-1] != config.embed_dim:
            raise ValueError(f"frames are {frames.shape[-1]} wide, texts {eos.shape[-1]} and words {words.shape[-1]}")
    except Exception as error:  # whatever the first wrong value leads to
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"--clip_model {name}: cannot be built ({type(error).__name__}: {reason}); name a model "
                         "config of open_clip") from error
    sizes = [x.numel() for x in towers.parameters()]
    if min(sizes) == 0 or sum(sizes) > 2e10:
        raise ValueError(f"--clip_model {name}: a layer has no weight, or there are too many ({sum(sizes):,} in all); "
                         "correct the model config")
