"""The two CLIP towers, through open_clip: frames -> (N, D), tokens -> eos (N, D) and words (N, T, D).

Lives here: which architectures are accepted, where weights come from and which activation they need, and running the
text tower on the words present. Not here: tokenising (datasets.py), anything NarVid adds (model.py), devices, ranks.

Legend: N frames or texts, T tokens of a text (start and end included), D joint dimension.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from narvid import InputError
from narvid.files import read_json
from narvid.profiling import stage

MANY_TEXTS = 128  # from so many on they are read in parts
ARCHIVE_KEYS = ("input_resolution", "context_length", "vocab_size")  # only OpenAI's own archives carry them


@dataclass(frozen=True)
class ClipConfig:
    """All that is needed to build the towers again without a flag or a download; plain values, kept in checkpoints."""

    embed_dim: int
    vision_cfg: dict
    text_cfg: dict
    quick_gelu: bool = False
    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
    # Of the heads' blocks that start from text blocks. The towers' own, but checkpoints from before this field lack it:
    # their blocks ran with QuickGELU over any towers, and go on so.
    temporal_quick_gelu: bool = True

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.vision_cfg.get("image_size", 224)

    @property
    def context_length(self) -> int:
        """Most tokens the text tower has positions for."""
        return self.text_cfg.get("context_length", 77)


def load_clip(name: str, pretrained: str | None = None, quick_gelu: bool | None = None, *,
              half: bool = False) -> CLIP:
    """The towers of open_clip's model `name` (or of a model config in a .json file), with weights where given.

    pretrained: an open_clip tag ("openai", "laion2b_s34b_b79k", ...), or a file: OpenAI's TorchScript archive, a state
    dict, or safetensors. OpenAI's weights need QuickGELU and look like those that do not: the tag or the archive's own
    extra keys decide; a bare state dict says nothing, then `quick_gelu` must be given.
    Raises ValueError with one sentence for what cannot be built or loaded.
    """
    architecture = _architecture(name)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    state, needs_quick_gelu = None, None
    if pretrained is not None and Path(pretrained).is_file():
        state, needs_quick_gelu = read_weights(pretrained)
        if needs_quick_gelu is None and quick_gelu is None and not architecture.get("quick_gelu"):
            raise ValueError(f"{pretrained}: nothing in this file tells whether its weights are for QuickGELU: "
                             "add --quick_gelu (OpenAI's, and what descends from them) or --no-quick_gelu (LAION's)")
    elif pretrained is not None:
        tag = get_pretrained_cfg(name, pretrained)
        if not tag:
            raise ValueError(f"--clip_pretrained {pretrained}: no such file, nor one of open_clip's weights for {name} "
                             f"({', '.join(list_pretrained_tags_by_model(name)) or 'it has none'})")
        try:
            state, _ = read_weights(download_pretrained(tag))
        except Exception as error:  # whatever the network or the hub's client raises: the user's next step is the same
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the weights {pretrained} of {name} could not be downloaded ({reason}); "
                             "give a file to --clip_pretrained instead") from error
        needs_quick_gelu = bool(tag.get("quick_gelu", False))
        mean, std = tuple(tag.get("mean") or mean), tuple(tag.get("std") or std)

    if needs_quick_gelu is not None and quick_gelu is not None and needs_quick_gelu != quick_gelu:
        raise ValueError(f"{pretrained} was trained with{'' if needs_quick_gelu else 'out'} QuickGELU; "
                         f"drop --{'' if quick_gelu else 'no-'}quick_gelu")
    chosen = next((x for x in (quick_gelu, needs_quick_gelu) if x is not None), architecture.get("quick_gelu", False))
    sizes = (architecture["embed_dim"], architecture["vision_cfg"], architecture["text_cfg"])
    config = ClipConfig(*sizes, chosen, mean, std, temporal_quick_gelu=chosen)
    towers = build_towers(config, half=half)
    if state is not None:
        load_weights(towers, state, source=pretrained)
    else:  # open_clip's N(0, 0.02) is made for 10^5 steps: with it, texts stay nearly alike for the first hundreds
        nn.init.normal_(towers.token_embedding.weight, std=0.3)
    return towers


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


def build_towers(config: ClipConfig, *, half: bool = False) -> CLIP:
    """open_clip's CLIP with random weights, and its `config`.

    ValueError unless it is a ViT with the plain causal text tower.
    `half` builds LayerNorms that compute in fp32 between fp16 weights (see optim.to_half).
    """
    settings = asdict(config)
    mean, std, _ = (settings.pop(name) for name in ("mean", "std", "temporal_quick_gelu"))
    towers = CLIP(**settings, cast_dtype=torch.float16 if half else None)
    plain = (isinstance(towers.visual, VisionTransformer) and towers.attn_mask is not None
             and towers.text_pool_type == "argmax" and isinstance(towers.text_projection, torch.nn.Parameter))
    if not plain:
        raise ValueError("the towers must be a ViT and a causal text transformer pooled at the end token, as OpenAI's "
                         "and LAION's ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14 are")
    towers.config = config
    towers.visual.conv1 = PatchProduct(towers.visual.conv1.weight)
    towers.register_buffer("pixel_mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
    towers.register_buffer("pixel_std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
    return towers


def compile_blocks(towers: CLIP, device: torch.device, *, backend: str = "inductor") -> None:
    """torch.compile for the residual blocks of both towers, in place: parameters keep their names.

    Block by block, because equal blocks share one compiled form and DDP, gradient checkpointing and the lengths around
    them stay plain Python. Sizes are symbolic from the start: with every new batch the number of texts and tokens
    changes. InputError where this machine lacks what the default backend builds with.
    """
    if backend == "inductor":
        _check_compiler(device)
    # A form each for frames or text, training or evaluation, the lowest block (whose input needs no gradient) or
    # another, frozen or not; beyond the limit torch would run blocks as they are.
    torch._dynamo.config.cache_size_limit = 32
    torch._dynamo.config.optimize_ddp = False  # would cut each block at DDP's bucket size; blocks are small enough
    for block in [*towers.visual.transformer.resblocks, *towers.transformer.resblocks]:
        block.compile(backend=backend, dynamic=True)


def _check_compiler(device: torch.device) -> None:
    """InputError unless inductor's C++ (on a CPU) or Triton's launchers (on a GPU) can be built here."""
    if device.type == "cuda":
        wanted, compilers = "gcc or clang", [os.environ.get("CC"), "gcc", "clang", "cc"]
    else:
        wanted, compilers = "g++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if not any(name and shutil.which(name) for name in compilers):
        raise InputError(f"--compile: torch.compile needs a C++ compiler and finds no {wanted} here; install it or "
                         "leave --compile out")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise InputError(f"--compile: torch.compile needs Python's headers and finds no Python.h in "
                         f"{sysconfig.get_path('include')}; install them (python3-dev) or leave --compile out")


@stage("towers")
def encode_frames(towers: CLIP, frames: Tensor) -> Tensor:
    """frames (N, 3, H, W) uint8 -> (N, D). Normalises here, so that the loader and the bus carry bytes.

    (N, D) are features already, of the feature cache, and go through as they are.
    """
    if frames.ndim == 2:
        return frames
    dtype = towers.visual.conv1.weight.dtype
    return towers.visual(((frames - towers.pixel_mean) / towers.pixel_std).to(dtype))


@stage("towers")
def encode_text(towers: CLIP, tokens: Tensor, *, words: bool = True) -> tuple[Tensor, Tensor | None]:
    """tokens (N, T), zero-padded after the end token -> eos (N, D) and every projected word (N, T, D).

    T may be anything up to the context length: positions and causal mask are cut, so the cost is that of the words
    present. What stands after the end token cannot reach it through the causal mask. `words=False` skips the words.
    What is floating is features already, eos and then words (N, 1 + T, D) of the feature cache.
    """
    if tokens.is_floating_point():
        return tokens[:, 0], tokens[:, 1:] if words else None
    end = tokens.argmax(dim=1)  # the end token has the largest id
    if words:
        projected = towers.ln_final(_read(towers, tokens)) @ towers.text_projection  # (N, T, D)
        return projected[torch.arange(len(tokens), device=end.device), end], projected
    if len(tokens) < MANY_TEXTS:
        return _eos(towers, tokens, end), None
    # The sentences of a batch in four parts of like length: less padding.
    order = end.argsort()
    lengths = (end[order] + 1).tolist()  # a GPU is waited for here, while it works on the frames
    size = -(-len(tokens) // 4)
    parts = [_eos(towers, tokens[some, :lengths[min(k * size + size, len(tokens)) - 1]], end[some])
             for k, some in enumerate(order.split(size))]
    return torch.cat(parts)[order.argsort()], None


def _eos(towers: CLIP, tokens: Tensor, end: Tensor) -> Tensor:
    """tokens (N, T), place of the end token (N,) -> (N, D)."""
    rows = torch.arange(len(tokens), device=tokens.device)
    return towers.ln_final(_read(towers, tokens)[rows, end]) @ towers.text_projection


def _read(towers: CLIP, tokens: Tensor) -> Tensor:
    """tokens (N, T) -> the text transformer's (N, T, width)."""
    length = tokens.shape[1]
    dtype = towers.transformer.get_cast_dtype()
    x = towers.token_embedding(tokens).to(dtype) + towers.positional_embedding[:length].to(dtype)
    return towers.transformer(x, attn_mask=towers.attn_mask[:length, :length])


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], bool | None]:
    """A weights file -> its state dict in fp32 with CLIP's keys, and whether it needs QuickGELU (None: not known).

    Takes TorchScript archives, safetensors and state dicts (bare or under "state_dict"; "module." is stripped).
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            state = load_file(path)
        elif _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own, torch over many lines
        raise ValueError(f"{path}: not a TorchScript archive, state dict or safetensors file, or a damaged one "
                         f"({type(error).__name__}); download it again or name another file") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    from_openai = any(key in state for key in ARCHIVE_KEYS)
    state = {key: value.float() for key, value in state.items() if key not in ARCHIVE_KEYS}
    return state, True if from_openai else None


def load_weights(module: torch.nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Strict loading that says in one sentence what does not fit (ValueError naming `source`)."""
    own = module.state_dict()
    differ = [key for key in own if key in state and state[key].shape != own[key].shape]
    if differ:
        key = differ[0]
        raise ValueError(f"{source}: weights of another shape: {key} is {tuple(state[key].shape)} in the file and "
                         f"{tuple(own[key].shape)} in the model ({len(differ)} differ); name the model they belong to")
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{source}: weights of another model: {len(missing)} are missing {missing[:3]}, "
                         f"{len(unknown)} are not known {unknown[:3]}")
    module.load_state_dict(state)


def load_released_towers(towers: CLIP, state: dict[str, Tensor], source: str | Path) -> None:
    """The towers out of a released retrieval checkpoint, which keeps them under "clip."; else as `load_weights`."""
    found = {key.removeprefix("clip."): value.float() for key, value in state.items() if key.startswith("clip.")}
    load_weights(towers, {key: value for key, value in found.items() if key not in ARCHIVE_KEYS}, source)


def _architecture(name: str) -> dict:
    """The open_clip model config of a name or a .json file."""
    if name.endswith(".json"):
        architecture = read_json(name, dict, advice="name a model config of open_clip")
    else:
        architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise ValueError(f"--clip_model {name}: open_clip knows no such model; say ViT-B-32, ViT-B-16, ViT-L-14, "
                         "or give a path to a model config in .json")
    absent = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in architecture]
    if absent:
        raise ValueError(f"--clip_model {name}: the model config has no {', '.join(absent)}")
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ValueError(f"--clip_model {name}: vision_cfg and text_cfg of the model config must be objects")
    # Known before anything is built; a tokenizer of its own would be fed CLIP's ids without a complaint.
    foreign = {"hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls"} & text.keys()
    if (foreign or text.get("pool_type", "argmax") != "argmax" or "timm_model_name" in vision
            or "multimodal_cfg" in architecture or architecture.get("custom_text")
            or not isinstance(vision.get("layers", 12), int)):
        raise ValueError(f"--clip_model {name}: only ViTs with the plain causal text tower are supported, as OpenAI's "
                         "and LAION's ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14 are")
    side, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    if not all(type(x) is int and x > 0 for x in (side, patch)) or side % patch:
        raise ValueError(f"--clip_model {name}: the image side {side} is no multiple of the patch side {patch}")
    if name.endswith(".json"):
        _check_builds(name, architecture)
    return architecture


def _check_builds(name: str, architecture: dict) -> None:
    """ValueError unless towers of this config can be built and read a picture and a text; nothing is computed."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    numbers = [architecture["embed_dim"], *vision.values(), *text.values()]
    if any(isinstance(x, (int, float)) and not 0 <= x <= 200_000 for x in numbers):
        raise ValueError(f"--clip_model {name}: the model config holds a number below 0 or above 200,000")
    if any(type(x.get("layers", 12)) is not int or not 0 < x.get("layers", 12) <= 1000 for x in (vision, text)):
        raise ValueError(f"--clip_model {name}: layers must be a whole number from 1 to 1,000")
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without a weight
            towers = CLIP(architecture["embed_dim"], vision, text, bool(architecture.get("quick_gelu")))
            towers.encode_image(torch.zeros(1, 3, vision.get("image_size", 224), vision.get("image_size", 224)))
            towers.encode_text(torch.zeros(1, text.get("context_length", 77), dtype=torch.long))
    except Exception as error:  # whatever the first wrong value leads to
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"--clip_model {name}: cannot be built ({type(error).__name__}: {reason}); name a model "
                         "config of open_clip") from error
    sizes = [x.numel() for x in towers.parameters()]
    if min(sizes) == 0 or sum(sizes) > 2e10:
        raise ValueError(f"--clip_model {name}: a layer has no weight, or there are too many ({sum(sizes):,} in all); "
                         "correct the model config")


def _is_torchscript(path: Path) -> bool:
    """torch.save and torch.jit.save both write zip files; only the second holds constants.pkl."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
