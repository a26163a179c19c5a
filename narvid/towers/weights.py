"""Files with the weights of image-text models: reading each form, and loading that says what does not fit.

Not here: which model a file is of (architectures.py), what is computed (the package itself).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

ARCHIVE_KEYS = ("input_resolution", "context_length", "vocab_size")  # only OpenAI's own archives carry them
# What no score here depends on: SigLIP's bias cancels in softmax cross-entropy and in ranks; CoCa's decoder writes
# captions; position ids are numbers from 0 on.
UNUSED = ("logit_bias", "text_decoder.", "text.transformer.embeddings.position_ids")


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


def load_towers_weights(towers: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """A state dict of open_clip's, or of a form that open_clip converts, into Towers; ValueError as `load_weights`."""
    try:
        state = convert_state_dict(towers, dict(state))
    except Exception as error:  # whatever a key leads to that the conversion expects and the file has not
        raise ValueError(f"{source}: weights of another model ({type(error).__name__} while they were converted); name "
                         "the model they belong to") from error
    if towers.config.custom_text:
        state = convert_to_custom_text_state_dict(state)
    state = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())  # a vector of one in some files
    load_weights(towers, state, source)


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
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


def load_released_towers(towers: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """The towers out of a released retrieval checkpoint, which keeps them under "clip."; else as `load_weights`."""
    found = {key.removeprefix("clip."): value.float() for key, value in state.items() if key.startswith("clip.")}
    load_weights(towers, {key: value for key, value in found.items() if key not in ARCHIVE_KEYS}, source)


def _is_torchscript(path: Path) -> bool:
    """torch.save and torch.jit.save both write zip files; only the second holds constants.pkl."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
