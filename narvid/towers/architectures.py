"""Which model a name, a .json file or a folder stands for, its weights, how its pictures are made; all as plain values.

Not here: building and loading (the package itself), what stands in weights files (weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import open_clip
from open_clip.pretrained import (download_pretrained, download_pretrained_from_hf, get_pretrained_cfg,
                                  list_pretrained_tags_by_model)

from narvid import InputError
from narvid.files import read_json
from narvid.progress import remark

ADVICE = ("say ViT-B-32, ViT-B-16, ViT-L-14, PE-Core-B-16, ViT-B-16-SigLIP2, ..., or give a path to a model config in "
          ".json or to a folder with open_clip_config.json")
CONFIG = "open_clip_config.json"
HUB = "hf-hub:"
LIKE_OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "resize_mode": "shortest",
               "interpolation": "bicubic"}


class Model(NamedTuple):
    """What a name stands for."""

    name: str
    config: dict  # open_clip's: embed_dim, vision_cfg, text_cfg and perhaps custom_text, quick_gelu, ...
    pictures: dict | None  # keys of LIKE_OPENAI; None: nothing says it
    folder: Path | None  # with weights, and perhaps with a tokenizer

    @property
    def tokenizer(self) -> str | None:
        """The folder, where it holds a tokenizer."""
        return str(self.folder) if self.folder and (self.folder / "tokenizer_config.json").exists() else None


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
    # What follows is that of OpenAI's towers, as in checkpoints from before these fields.
    custom_text: bool = False  # the text tower's weights lie under "text."
    resize: str = "shortest"
    interpolation: str = "bicubic"
    scale_limit: float = 100.0  # the logit scale is kept below; more where the weights came with more (SigLIP)
    tokenizer: str | None = None  # folder or name on the hub; None: the one that text_cfg names, or CLIP's
    tokenizer_digest: str | None = None

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        side = self.vision_cfg.get("image_size", 224)
        return side[0] if isinstance(side, (list, tuple)) else side

    @property
    def context_length(self) -> int:
        """Most tokens the text tower has positions for."""
        return self.text_cfg.get("context_length", 77)


def config_of(model: Model, quick_gelu: bool, pictures: dict, tokenizer: str | None) -> ClipConfig:
    """What towers of this model are built from; pictures: keys of architectures.LIKE_OPENAI, {} for OpenAI's."""
    own = model.config
    return ClipConfig(
        own["embed_dim"], own["vision_cfg"], own["text_cfg"], quick_gelu, temporal_quick_gelu=quick_gelu,
        custom_text=bool(own.get("custom_text") or own["text_cfg"].get("hf_model_name")), tokenizer=tokenizer,
        **{ours: pictures[theirs] for ours, theirs in (("mean", "mean"), ("std", "std"), ("resize", "resize_mode"),
                                                       ("interpolation", "interpolation")) if theirs in pictures})


def find_model(name: str) -> Model:
    """`name`: open_clip's, a model config in .json, a folder with open_clip_config.json, or hf-hub:owner/model.

    ValueError with one sentence for what is none of these.
    """
    folder = pictures = None
    if name.startswith(HUB):
        folder = _fetched(name)
    elif Path(name).is_dir():
        folder = Path(name)
    if folder is not None:
        if not (folder / CONFIG).exists():
            raise InputError(f"--clip_model {name}: is a folder without {CONFIG}; {ADVICE}")
        whole = read_json(folder / CONFIG, dict, advice="name a folder as the hub has it for open_clip's models")
        config, pictures = whole.get("model_cfg", whole), whole.get("preprocess_cfg") or {}
    elif name.endswith(".json"):
        config = read_json(name, dict, advice="name a model config of open_clip")
    else:
        config, pictures = open_clip.get_model_config(name), _pictures_of_tags(name)
        if config is None:
            raise ValueError(f"--clip_model {name}: open_clip knows no such model; {ADVICE}")
    _check(name, config)
    return Model(name, config, pictures and _pictures(name, pictures), folder)


class Weights(NamedTuple):
    """Where weights lie, and what is known of them."""

    path: Path | None  # None: random ones
    pictures: dict | None  # that they were trained with; None: as the model's
    quick_gelu: bool | None  # that they were trained with; None: the file tells, or nothing


def find_weights(model: Model, pretrained: str | None) -> Weights:
    """`pretrained`: a file, a folder, or a tag, which is downloaded; None: the folder's of the model, or none."""
    if pretrained is None:
        return Weights(model.folder and _in_folder(model.folder), None, None)
    if Path(pretrained).is_dir():
        pictures = None
        if Path(pretrained, CONFIG).exists():
            pictures = _pictures(pretrained, read_json(Path(pretrained, CONFIG), dict).get("preprocess_cfg") or {})
        return Weights(_in_folder(Path(pretrained)), pictures, None)
    if Path(pretrained).is_file():
        return Weights(Path(pretrained), None, None)
    tag = get_pretrained_cfg(model.name, pretrained)
    if not tag:
        raise ValueError(f"--clip_pretrained {pretrained}: no such file, nor one of open_clip's weights for "
                         f"{model.name} ({', '.join(list_pretrained_tags_by_model(model.name)) or 'it has none'})")
    try:
        path = download_pretrained(tag)
    except Exception as error:  # whatever the network or the hub's client raises: the user's next step is the same
        raise ValueError(f"the weights {pretrained} of {model.name} could not be downloaded ({_first_line(error)}); "
                         "give a file to --clip_pretrained instead") from error
    return Weights(Path(path), _pictures(pretrained, tag), bool(tag.get("quick_gelu", False)))


def exists_with_quick_gelu(model: Model) -> bool:
    """Whether weights of this model may need QuickGELU, so that a file that does not tell leaves a question open."""
    if model.config.get("quick_gelu"):
        return False  # the name has answered it
    if model.name in open_clip.list_models():
        tags = (get_pretrained_cfg(model.name, tag) for tag in list_pretrained_tags_by_model(model.name))
        return f"{model.name}-quickgelu" in open_clip.list_models() or any(tag.get("quick_gelu") for tag in tags)
    text = model.config["text_cfg"]  # of a file or a folder: those of the families that have both forms
    return model.folder is None and not model.config.get("custom_text") and not {
        "hf_model_name", "act_kwargs", "no_causal_mask"} & text.keys()


def _pictures_of_tags(name: str) -> dict | None:
    """What all tagged weights of a model agree on; None where they differ, or there are none."""
    tags = {tag: _pictures(tag, get_pretrained_cfg(name, tag)) for tag in list_pretrained_tags_by_model(name)}
    different = {str(pictures) for pictures in tags.values()}
    if len(different) == 1:
        return next(iter(tags.values()))
    return None


def note_on_pictures(model: Model) -> None:
    """Remark that weights from a file may want other pictures than those they will get."""
    tags = {tag: get_pretrained_cfg(model.name, tag) for tag in list_pretrained_tags_by_model(model.name)}
    other = [tag for tag, of in tags.items() if _pictures(tag, of) != LIKE_OPENAI]
    if other:
        remark(f"{model.name}: nothing says how the pictures of these weights are made; as for OpenAI's (shortest "
               f"side, then a crop), not as for {', '.join(other)}: if they are these, name a folder with {CONFIG}")


def _pictures(name: str, said: dict) -> dict:
    """The keys of LIKE_OPENAI out of a preprocessing config, checked."""
    pictures = {key: said[key] if said.get(key) is not None else default for key, default in LIKE_OPENAI.items()}
    for key in ("mean", "std"):
        value = pictures[key]
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
        if len(value) != 3 or not all(type(x) in (int, float) and 0 <= x <= 1 for x in value) or (
                key == "std" and 0 in value):
            raise ValueError(f"{name}: its {key} of the pictures, {value}, is no three numbers from 0 to 1")
        pictures[key] = tuple(map(float, value))
    if pictures["resize_mode"] not in ("shortest", "squash") or pictures["interpolation"] not in ("bicubic",
                                                                                                  "bilinear"):
        raise ValueError(f"{name}: pictures are resized by {pictures['resize_mode']}, {pictures['interpolation']}; "
                         "here shortest and squash, bicubic and bilinear are known")
    return pictures


def _in_folder(folder: Path) -> Path:
    """The weights of a folder: open_clip's own names first, then the only safetensors file there."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{folder}: holds {len(found) or 'no'} files of weights, none of them called "
                         "open_clip_model.safetensors; fetch the whole folder again, or name the file")
    return found[0]


def _fetched(name: str) -> Path:
    """The folder of a model on the hub, fetched unless it lies in the cache."""
    owner_and_model = name.removeprefix(HUB)
    try:
        folder = Path(download_pretrained_from_hf(owner_and_model, filename=CONFIG)).parent
        download_pretrained_from_hf(owner_and_model)
    except Exception as error:  # whatever the network or the hub's client raises
        raise ValueError(f"--clip_model {name}: could not be fetched from the hub ({_first_line(error)}); give the "
                         f"path of a folder with {CONFIG} instead") from error
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _check(name: str, config: dict) -> None:
    """ValueError for a config that says nothing of towers; whether they can be built is tried by who builds them."""
    absent = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if absent:
        raise ValueError(f"--clip_model {name}: the model config has no {', '.join(absent)}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ValueError(f"--clip_model {name}: vision_cfg and text_cfg of the model config must be objects")
    side = vision.get("image_size", 224)
    if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    if isinstance(side, list):
        raise ValueError(f"--clip_model {name}: its pictures are {side}; only square ones are supported")
    patch = 1 if "timm_model_name" in vision or isinstance(vision.get("layers"), list) else vision.get("patch_size", 16)
    if not all(type(x) is int and x > 0 for x in (side, patch)) or side % patch:
        raise ValueError(f"--clip_model {name}: the image side {side} is no multiple of the patch side {patch}")
