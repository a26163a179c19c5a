"""Look at real weights before they are used: python -m narvid.towers check NAME --pretrained W, and check-release FILE.

`check` compares towers with open_clip's own model and tokenizer, which are built and loaded beside them, and measures
what a frame costs. `check-release` reads a released NarVid checkpoint: which keys it holds, and whether it scores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from narvid import InputError
from narvid.data.frames import read_frames
from narvid.flags import Parser, command
from narvid.towers import ARCHIVE_KEYS, Towers, load_towers, read_weights

SENTENCES = ["a dog", "two people cook a meal in a small kitchen", "the last goal of the match, seen from behind",
             "a man explains how the engine of an old car is taken apart, cleaned and put together again"]
AGREE = 1e-3  # cosines: weights in fp32 agree to 1e-5, those that open_clip keeps in half precision to less


def main(argv: list[str] | None = None) -> None:
    """The commands."""
    parser = Parser(prog="python -m narvid.towers", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="compare towers with open_clip's own model, and time them")
    one.add_argument("name", help="open_clip model name, .json, or a folder with open_clip_config.json")
    one.add_argument("--pretrained", help="open_clip tag, weights file or folder; none: a folder's own, or random ones")
    one.add_argument("--tokenizer", help="folder of the tokenizer, where it is not CLIP's [from the hub]")
    one.add_argument("--quick_gelu", action="store_true", default=None,
                     help="the weights are for QuickGELU; for a file that does not tell")
    two = commands.add_parser("check-release", help="what a released NarVid checkpoint holds, and whether it scores")
    two.add_argument("file", help="the released checkpoint")
    two.add_argument("--clip_model", help="open_clip name of its towers, if none of ViT-B-32, ViT-B-16, ViT-L-14")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            sys.exit(not check(args.name, args.pretrained, args.tokenizer, args.quick_gelu))
        sys.exit(not check_release(args.file, args.clip_model))
    except ValueError as error:
        raise InputError(str(error)) from error


def check(name: str, pretrained: str | None, tokenizer: str | None, quick_gelu: bool | None) -> bool:
    """Print how far these towers are from open_clip's and what a frame costs -> whether they agree."""
    torch.manual_seed(0)
    towers = load_towers(name, pretrained, quick_gelu=quick_gelu, tokenizer=tokenizer).eval()
    theirs, transform = _open_clips(name, pretrained, towers)
    length = "cut to the words present" if towers.cuts_text else "always all of them"
    print(f"{name}: {sum(p.numel() for p in towers.parameters()) / 1e6:.0f} M parameters, D {towers.dim}, reads "
          f"{towers.context_length} tokens, {length}; pictures {towers.picture.size} x {towers.picture.size}, "
          f"{towers.picture.resize}, {towers.picture.interpolation}")
    good = _compare_frames(towers, theirs, transform)
    try:
        tokens, mask = towers.tokenize(SENTENCES, towers.context_length)
    except ValueError as error:
        print(f"texts: not compared, {error}")
        return good
    whole = F.pad(tokens, (0, towers.context_length - tokens.shape[1]), value=towers.tokenizer.pad_id)
    with torch.no_grad():
        ours, want = towers.encode_text(tokens, words=False)[0], _pooled(theirs.encode_text(whole))
    print(f"texts: {mask.sum(dim=1).tolist()} words; {_said(ours, want)}")
    return good and _agree(ours, want)


def _open_clips(name: str, pretrained: str | None, towers: Towers):
    """open_clip's own model with these weights, and its transform."""
    options = {"force_quick_gelu": True} if towers.config.quick_gelu else {}
    if Path(name).is_dir():
        name, pretrained = f"local-dir:{name}", None
    elif name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if pretrained and Path(pretrained).is_dir():
        raise InputError(f"--pretrained {pretrained}: is a folder; give it as the model's name, so that open_clip "
                         "reads it too")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained, **options)
    if pretrained is None and not name.startswith(("local-dir:", "hf-hub:")):
        known = model.state_dict()
        model.load_state_dict(known | {key: value for key, value in towers.state_dict().items() if key in known})
        print("no weights were named: random ones, the same on both sides")
    return model.eval(), transform


def _compare_frames(towers: Towers, theirs: torch.nn.Module, transform) -> bool:
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize((640, 360)) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k:05d}.jpg") for k in range(4)]
        for picture, path in zip(smooth, paths):
            picture.save(path, quality=95)
        frames = read_frames(paths, towers.picture)
        pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        ours, want = towers.encode_frames(frames), _pooled(theirs.encode_image(pixels))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        for frame in frames:
            towers.encode_frames(frame[None])
        seconds = (time.perf_counter() - start) / len(frames)
        torch.set_num_threads(threads)
    print(f"frames: {_said(ours, want)}; {seconds:.3f} s a frame on one core, fp32")
    return _agree(ours, want)


def _pooled(features: torch.Tensor | tuple) -> torch.Tensor:
    return features[0] if isinstance(features, tuple) else features


def _said(ours: torch.Tensor, want: torch.Tensor) -> str:
    cosine = F.cosine_similarity(ours, want).min().item()
    return (f"cosine with open_clip's at least {cosine:.6f}" if _agree(ours, want) else
            f"NOT open_clip's, cosine {cosine:.6f}")


def _agree(ours: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((1 - F.cosine_similarity(ours, want)).max() < AGREE)


def check_release(file: str, name: str | None = None) -> bool:
    """Print what a released NarVid file holds -> whether two texts and noise score; ValueError where it is none."""
    from narvid.model import heads_from_release  # the heads stand above the towers
    from narvid.retriever import Retriever

    state, _ = read_weights(file)
    of_clip = [key for key in state if key.startswith("clip.")]
    unread = [key for key in of_clip if key.removeprefix("clip.") in ARCHIVE_KEYS]
    print(f"{file}: {len(state)} tensors, {len(of_clip)} of CLIP ({len(unread)} of them unread), "
          f"{len(state) - len(of_clip)} of the heads")
    heads = heads_from_release(state, source=file)
    kernel = state.get("clip.visual.conv1.weight")
    if kernel is None:
        raise InputError(f"{file}: has heads and no towers (clip.visual.conv1.weight); name another file")
    names = {(768, 32): "ViT-B-32", (768, 16): "ViT-B-16", (1024, 14): "ViT-L-14"}
    name = name or names.get((kernel.shape[0], kernel.shape[-1]))
    if name is None:
        raise InputError(f"{file}: a ViT {kernel.shape[0]} wide with patches of {kernel.shape[-1]} pixels is none of "
                         f"{', '.join(names.values())}; name it with --clip_model")
    print(f"towers: {name}; heads: D {heads.config.dim}, {heads.config.temporal_layers} temporal blocks, "
          f"{heads.config.positions} positions")
    retriever = Retriever.load(file, towers=name, device="cpu")
    side = retriever.encoding.picture.size
    noise = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    videos = retriever.encode_frames([noise[:2], noise[2:]], [["a dog", "a cat"], ["a car", None]])
    scores = retriever.score(retriever.encode_queries(["a dog runs", "a car"]), videos)
    finite = all(x.isfinite().all() for x in scores.values())
    print(f"scores of two texts with two videos of noise: {'finite' if finite else 'NOT finite'}, S_qv "
          f"{scores['video'].min():.3f} to {scores['video'].max():.3f}; evaluate it with configs/msrvtt_*.yaml "
          f"--eval_only --checkpoint {file}")
    return finite


if __name__ == "__main__":
    command(main)
