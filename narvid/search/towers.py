"""Which towers an index takes where no checkpoint is named, and what they weigh; the reasons: docs/towers.md."""

from __future__ import annotations

import torch
from open_clip.pretrained import list_pretrained_tags_by_model

from narvid import InputError
from narvid.towers import build_towers, checked_model, config_of

ON_CPU = ("ViT-B-32", "laion2b_s34b_b79k")  # the least work a frame among those with a published figure for retrieval
ON_GPU = ("PE-Core-B-16", "meta")  # four times the work, and more found than by fine-tuned CLIP


def choose(clip_model: str | None, clip_pretrained: str | None, *, gpu: bool) -> tuple[str, str | None]:
    """open_clip's model and its weights, as named, or what stands for what is not named.

    A model that is named alone: OpenAI's weights, or its only ones; a file or a folder brings its own, if any.
    InputError where there are several.
    """
    if clip_model is None:
        name, own = ON_GPU if gpu and clip_pretrained is None else ON_CPU
        return name, clip_pretrained or own
    tags = list_pretrained_tags_by_model(clip_model)
    if clip_pretrained is not None or not tags:
        return clip_model, clip_pretrained
    if len(tags) > 1 and "openai" not in tags:
        raise InputError(f"--clip_model {clip_model}: say which weights with --clip_pretrained, {', '.join(tags)}")
    return clip_model, "openai" if "openai" in tags else tags[0]


def describe(name: str, pretrained: str | None) -> str:
    """One line: what is taken, and its weight before it is fetched. ValueError for what cannot be built."""
    model = checked_model(name)
    try:
        with torch.device("meta"):
            towers = build_towers(config_of(model, False, model.pictures or {}, None))
        number = sum(p.numel() for p in towers.parameters())
        size = f"{number / 1e6:,.0f} million parameters, {4 * number / 1e9:.1f} GB in memory"
    except ValueError:  # a text tower of the hub, whose config is not here yet
        size = "of unknown size"
    fetched = " (fetched once, unless they are in the cache)" if pretrained in list_pretrained_tags_by_model(
        name) else ""
    return f"the model is {name}, weights {pretrained or 'random'}{fetched}: {size}"
