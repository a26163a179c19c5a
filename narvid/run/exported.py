"""What a model is loaded from: a checkpoint's file, a run's folder, or an exported model, which is a folder of

  config.json         flags, sizes of the towers, what the weights are of, and their digest
  model.safetensors   the weights
  README.md           what this model is, for people (narvid/export.py writes it)
  tokenizer/          its text tower's, where that is not CLIP's

An exported model may also lie on the Hugging Face hub. Loading executes nothing that stands in any of them. Here: these
forms. Not here: what a checkpoint's file holds (main_task_retrieval.py), building a model (build.py).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from narvid import InputError
from narvid.files import list_folder, read_json, read_parts, write_json, write_text, writing
from narvid.run.run_dir import load_checkpoint
from narvid.towers import ClipConfig

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TOKENIZER = "tokenizer"
FORM = 1  # of config.json; rises when an older reader would misread it
AGAIN = "export the model again, or fetch the whole folder again"
HUB = "hf-hub:"  # before owner/model, with @ and a revision behind it where it is not the newest


def load_model(path: str | Path) -> dict:
    """A checkpoint's file, a run's folder or an exported model -> as `load_checkpoint`; InputError for what is none."""
    path = Path(path)
    if not path.is_dir():
        return load_checkpoint(path)
    if (path / "best.pt").exists():
        return load_checkpoint(path / "best.pt")
    if (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return read_exported(path)
    raise InputError(f"{path}: is neither a run's folder with a best.pt nor an exported model with {CONFIG} and "
                     f"{WEIGHTS}; name one of these, or a file")


def from_hub(source: str | Path) -> Path | None:
    """`hf-hub:owner/model[@revision]`, or `owner/model` where no such folder is here -> the fetched folder, else None.

    The files of an exported model are fetched and nothing else; InputError for what the hub does not have.
    """
    name = str(source)
    plain = not name.startswith(HUB)
    if plain and (Path(name).exists() or Path(name).parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
                  or Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt")):
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{name}: a model of the hub needs pip install huggingface_hub; or name a folder") from error
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None,
                                      allow_patterns=[CONFIG, WEIGHTS, CARD, f"{TOKENIZER}/*.json"]))
    except Exception as error:  # of the hub's client, of its transport, of the disk
        said = str(error).strip().splitlines() or [""]
        nothing = "is not on this disk, and the hub gives no such model" if plain else "the hub gives no such model"
        raise InputError(f"{name}: {nothing} ({type(error).__name__}: {said[0][:200]}); name a run's folder, an "
                         "exported folder, or owner/model as the hub has it") from error


def write_exported(folder: str | Path, state: dict[str, Tensor], config: dict, card: str, tokenizer=None) -> None:
    """An exported model, in place of one that stood there; InputError where the folder holds anything else.

    config: "flags", "towers", "epoch", "step", "data", "training", "result"; what is not known is None. tokenizer:
    towers.tokenizer.Tokenizer; one that is not CLIP's goes along.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {*list_folder(folder)} - {CONFIG, WEIGHTS, CARD, TOKENIZER}):
        raise InputError(f"{folder}: holds something else than an exported model; name an empty or a new folder")
    with writing(folder / WEIGHTS, binary=True) as file:
        file.write(save({name: value.cpu().contiguous() for name, value in state.items()}))
    write_text(folder / CARD, card)
    if tokenizer is not None and tokenizer.source:
        tokenizer.load().save_pretrained(folder / TOKENIZER)
    write_json(folder / CONFIG, {"form": FORM, **config, "sha256": _digest(folder / WEIGHTS)})  # last: all is there


def read_exported(folder: str | Path) -> dict:
    """An exported model as a run's checkpoint: "model", "clip_config", "args", what is known of place and data."""
    folder = Path(folder)
    config = read_config(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors' own kinds, and the file system's
        reason = "is missing" if not (folder / WEIGHTS).exists() else f"is damaged ({str(error).splitlines()[0]})"
        raise InputError(f"{folder / WEIGHTS}: {reason}; {AGAIN}") from error
    if _digest(folder / WEIGHTS) != config["sha256"]:
        raise InputError(f"{folder / WEIGHTS}: is not the file that {CONFIG} was written for; {AGAIN}")
    if (folder / TOKENIZER).is_dir():
        config["towers"]["tokenizer"] = str(folder / TOKENIZER)
    known = {name: config[name] for name in ("epoch", "step") if config[name] is not None}
    return {"model": state, "clip_config": config["towers"], "args": config["flags"],
            "identity": {"data": config["data"]}, "training": config.get("training"), **known}


def read_config(folder: Path) -> dict:
    """config.json, its names and their types checked."""
    path = folder / CONFIG
    config = read_json(path, dict, advice=AGAIN)
    if config.get("form") != FORM:
        raise InputError(f"{path}: is of form {str(config.get('form'))[:20]}, this version reads form {FORM}; install "
                         "the version of narvid that wrote it, or export the model again")
    wanted = {"flags": dict, "towers": dict, "epoch": (int, type(None)), "step": (int, type(None)),
              "data": (dict, type(None)), "training": (dict, type(None)), "result": (dict, type(None)),
              "sha256": str}
    config.setdefault("training", None)  # versions before wrote none
    if wrong := [name for name, kind in wanted.items() if name not in config or not isinstance(config[name], kind)]:
        raise InputError(f"{path}: its {wrong[0]} is missing or of another kind; {AGAIN}")
    if not all(isinstance(config["flags"].get(name), str) for name in ("method", "clip_model")):
        raise InputError(f"{path}: its flags name no method and clip_model; {AGAIN}")
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= config["towers"].keys() <= {f.name for f in fields(ClipConfig)}:
        raise InputError(f"{path}: its towers are not described as this version does; {AGAIN}")
    return config


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for part in read_parts(path, advice=AGAIN):
        digest.update(part)
    return digest.hexdigest()
