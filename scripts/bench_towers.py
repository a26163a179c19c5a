"""What image-text towers weigh and cost: parameters, FLOPs counted, seconds measured with random weights on one core.

    python scripts/bench_towers.py [NAME ...] [--repeats 3] [--no_time]
    python scripts/bench_towers.py [NAME ...] --training

Nothing is downloaded. A FLOP is one of the two operations of a multiply-add. Seconds: one frame, and one text of 12
words, alone on one thread in fp32, the median of the repeats; of bf16 autocast beside it. --training wants memory for
the weights: what a frame and a text keep for backward is measured.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from narvid.flags import Parser, command, positive
from narvid.progress import tqdm
from narvid.run.optim import freeze
from narvid.towers import Towers, build_towers, checked_model, config_of

NAMES = ("MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-B", "PE-Core-T-16-384", "PE-Core-S-16-384", "ViT-B-32",
         "ViT-B-32-SigLIP2-256", "ViT-B-16", "ViT-B-16-SigLIP2", "PE-Core-B-16", "ViT-L-14", "PE-Core-L-14-336",
         "ViT-SO400M-14-SigLIP2", "ViT-H-14", "ViT-H-14-worldwide")
WORDS = 14  # 12 words, start and end


def inputs(towers: Towers) -> tuple[torch.Tensor, torch.Tensor]:
    """A frame, and a text of WORDS tokens or of full length where the tower reads no less."""
    side, length = towers.picture.size, WORDS if towers.cuts_text else towers.context_length
    tokens = torch.arange(1, length + 1)[None]  # the largest id stands last: the end token
    return torch.zeros(1, 3, side, side, dtype=torch.uint8), tokens


def counted(name: str) -> tuple[float, float, float, float]:
    """Millions of parameters and GFLOP a frame, then a text; nothing is computed."""
    model = checked_model(name)
    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        towers = build_towers(config_of(model, False, model.pictures or {}, None)).eval()
        towers.requires_grad_(False)  # the counter hooks what has a gradient, and trips over an expanded parameter
        frame, text = inputs(towers)
        flops = []
        for run in (lambda: towers.encode_frames(frame), lambda: towers.encode_text(text, words=False)):
            with FlopCounterMode(display=False) as counter:
                run()
            flops.append(counter.get_total_flops() / 1e9)
    of_image = sum(p.numel() for n, p in towers.named_parameters() if n.startswith("visual."))
    of_text = sum(p.numel() for p in towers.parameters()) - of_image
    return of_image / 1e6, flops[0], of_text / 1e6, flops[1]


def measured(name: str, repeats: int) -> tuple[float, float, float]:
    """Seconds of a frame in fp32 and in bf16 autocast, and of a text in fp32."""
    model = checked_model(name)
    towers = build_towers(config_of(model, False, model.pictures or {}, None)).eval()
    frame, text = inputs(towers)

    def seconds(run) -> float:
        took = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
        return float(np.median(took[1:]))

    with torch.no_grad():
        full = seconds(lambda: towers.encode_frames(frame))
        of_text = seconds(lambda: towers.encode_text(text, words=False))
        with torch.autocast("cpu", torch.bfloat16):
            half = seconds(lambda: towers.encode_frames(frame))
    return full, half, of_text


def kept(towers: Towers, run: Callable) -> int:
    """Bytes of the tensors that run() keeps for backward in bf16, weights among them; memory that is shared once.

    As on a GPU: LayerNorms compute in fp32, where a CPU's autocast leaves them in bf16, and attention is fused, which
    training on a CPU switches off (distributed.start).
    """
    storages = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage  # and holds it: no later tensor lies there
        return x

    def note_input(_, inputs: tuple) -> None:
        note(inputs[0])

    # A checkpointed block keeps its input where the hook of saved tensors does not look.
    hooks = [block.register_forward_pre_hook(note_input) for block in towers.blocks()]
    layer_norm = F.layer_norm
    with mock.patch.object(F, "layer_norm", lambda x, *more: layer_norm(x.float(), *more)), \
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16), \
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        run()
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in storages.values())


def activations(name: str, frames: int = 12) -> tuple[float, float]:
    """GB that a pair (see `training`) keeps for backward: plain, and with --grad_checkpointing at its highest.

    Of a frame and of a text: what two of them keep less what one keeps, so that weights drop out. The highest is when
    all inputs of blocks are kept and a block of the image tower has computed again.
    """
    model = checked_model(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        towers = build_towers(config_of(model, False, model.pictures or {}, None)).train()
    towers.to_empty(device="cpu")  # sizes alone count; random weights would take most of the time
    freeze(towers, 0)  # as in the presets
    frame, text = inputs(towers)
    runs = [lambda n: towers.encode_frames(frame.repeat(n, 1, 1, 1)),
            lambda n: towers.encode_text(text.repeat(n, 1), words=False)]
    of = {}
    for checkpointed in (False, True):
        towers.set_grad_checkpointing(checkpointed)
        of[checkpointed] = [kept(towers, lambda: run(2)) - kept(towers, lambda: run(1)) for run in runs]
    blocks = len(set(towers.visual.modules()) & set(towers.blocks()))
    whole, inputs_alone = (frames * image + (frames + 1) * words for image, words in (of[False], of[True]))
    return whole / 1e9, (inputs_alone + frames * (of[False][0] - of[True][0]) / blocks) / 1e9


def training(name: str, frames: int = 12) -> list[str]:
    """Cells: TFLOP of a pair, GB of what AdamW over fp32 weights holds, GB of a pair's activations, hours of MSR-VTT.

    A pair is `frames` frames, as many sentences and a query; forward and backward are three times forward. 900,000
    pairs are five epochs of MSR-VTT 9k; 989 TFLOP/s is an H100's bf16 rate, of which two shares are taken.
    """
    of_image, frame, of_text, text = counted(name)
    pair = 3 * (frames * frame + (frames + 1) * text) / 1000
    state = 16 * (of_image + of_text) / 1000  # 4 bytes each: weight, gradient, two moments
    return [f"{pair:.1f}", f"{state:.1f}", *(f"{x:.2f}" for x in activations(name, frames)),
            *(f"{9e5 * pair / 989 / share / 3600:.1f}" for share in (0.2, 0.45))]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="open_clip's names [those of docs/towers.md]")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each model")
    parser.add_argument("--no_time", action="store_true", help="count only")
    parser.add_argument("--training", action="store_true", help="instead: what NarVid's training over them takes")
    args = parser.parse_args(argv)
    if args.training:
        print("| model | TFLOP a pair | GB of weights, gradients, AdamW | GB of activations a pair | checkpointed "
              "| hours at 20 % | at 45 % |")
        print("| --- " * 7 + "|")
        for name in tqdm(args.names, desc="towers", unit="model", leave=False):
            tqdm.write(f"| {' | '.join([name, *training(name)])} |")
        return
    torch.set_num_threads(1)
    print("| model | side | image M | GFLOP a frame | text M | GFLOP a text | tokens | s a frame | bf16 | s a text |")
    print("| --- " * 10 + "|")
    for name in tqdm(args.names, desc="towers", unit="model", leave=False):
        of_image, frame, of_text, text = counted(name)
        config = checked_model(name).config
        cells = [name, config["vision_cfg"].get("image_size", 224), f"{of_image:.0f}", f"{frame:.1f}", f"{of_text:.0f}",
                 f"{text:.1f}", config["text_cfg"].get("context_length", 77)]
        cells += ["", "", ""] if args.no_time else [f"{x:.3f}" for x in measured(name, args.repeats)]
        tqdm.write(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    command(main)
