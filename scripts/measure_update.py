"""How far a step moves the weights, part by part, under both recipes on the same batches; and the rate that matches.

  python scripts/measure_update.py --config configs/ablate_demo.yaml --steps 30
  python scripts/measure_update.py --config configs/msrvtt_vitb32.yaml --clip_pretrained openai --steps 100

The published tables come from BertAdam over fp16 tower weights (recipe reported), where a rate of 1e-7 does not mean
what it means for AdamW over fp32 (recipe modern). This measures, after every step, |w' - w| / |w| of each part of the
model and the share of its weights that moved at all, and the change from the first weights to the last; then, for a few
modern CLIP rates, finds by interpolation in the logarithms the one whose mean change a step is the reported recipe's.
Heads keep --lr in both.

Flags that are not listed below go to main_task_retrieval.py (recipe, rates of the sweep and output_dir are set here).
Nothing is written. Here: the measuring. Not here: how a parameter is updated (narvid/run/optim.py).
"""

import argparse
import math
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

import main_task_retrieval as trainer
from narvid import InputError, distributed
from narvid.run import optim
from narvid.data.datasets import FrameDataset, collate
from narvid.data.loader import PairSampler, make_loader
from narvid.flags import command, positive, positive_float
from narvid.progress import tqdm

PARTS = (  # name -> pattern of the parameters; the first that fits. Blocks of the towers are split by depth.
    ("logit scale", r"clip\.logit_scale"),
    ("projections", r"clip\.(visual\.proj|text_projection)"),
    ("token embedding", r"clip\.token_embedding"),
    ("other embeddings", r"clip\.(positional_embedding|visual\.(conv1|class_embedding|positional_embedding))"),
    ("final and input norms", r"clip\.(ln_final|visual\.ln_)"),
    ("co-attention", r"heads\.co_attention"),
    ("temporal encoders", r"heads\.temporal_"),
    ("word weights", r"heads\.word_weight_mlp"),
)
BLOCK = re.compile(r"clip\.(visual\.)?transformer\.resblocks\.(\d+)\.")


def part_of(name: str, depths: tuple[int, int]) -> str:
    """The part that a parameter of NarVid belongs to; depths: blocks of the image and of the text tower."""
    if block := BLOCK.match(name):
        tower, depth = ("image", depths[0]) if block[1] else ("text", depths[1])
        return f"{tower} blocks, {('low', 'mid', 'high')[3 * int(block[2]) // depth]}"
    return next(part for part, pattern in PARTS if re.match(pattern, name))


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{part: its trained parameters}, with "all of CLIP" last."""
    clip = model.clip
    depths = len(clip.visual.transformer.resblocks), len(clip.transformer.resblocks)
    parts: dict[str, list[nn.Parameter]] = {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        parts.setdefault(part_of(name, depths), []).append(parameter)
    return dict(sorted(parts.items())) | {"all of CLIP": [p for name, p in trained if name.startswith("clip.")]}


def change(before: list[torch.Tensor], after: list[nn.Parameter]) -> tuple[float, float]:
    """|w' - w| / |w| of a part, and the share of its weights that moved. In float64: fp16 squares would vanish."""
    moved = norm = difference = numel = 0.0
    for w, new in zip(before, after):
        w, new = w.double(), new.detach().double()
        difference, norm = difference + (new - w).square().sum().item(), norm + w.square().sum().item()
        moved, numel = moved + (new != w).sum().item(), numel + w.numel()
    return math.sqrt(difference / norm) if norm else math.inf, moved / numel


def measure(argv: list[str], steps: int, world: distributed.World, splits: dict | None) -> tuple[dict, dict]:
    """A run of `steps` -> ({part: (change a step, share moved a step, change over the run)}, data for the next run)."""
    args = trainer.parse_args(argv)
    trainer.seed_everything(args)
    model = trainer.build_model(args)
    splits = splits or trainer.load_data(args, world, model.clip.tokenizer.lengths)
    model.to(world.device).train()
    train = splits["train"]
    sampler = PairSampler(len(train.queries), args.batch_size, rank=0, world_size=1, seed=args.seed,
                          accumulation=args.gradient_accumulation_steps)
    if steps > sampler.steps:
        raise InputError(f"--steps {steps}: one epoch has {sampler.steps}; ask for fewer")
    dataset = FrameDataset(train, train.video_of_query, model.clip.picture, seed=args.seed)
    to_batch = partial(collate, split=train, tokenize=model.clip.tokenizer, max_words=args.max_words,
                       max_frames=args.max_frames, with_queries=True)
    batches = iter(make_loader(dataset, to_batch, sampler, num_workers=args.num_workers))
    optimizer = optim.build_optimizer(model, recipe=args.recipe, lr=args.lr, clip_lr=args.clip_lr,
                                      weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.recipe == "modern" and args.precision == "fp16")
    parts, changes = parts_of(model), []
    first = {part: [p.detach().clone() for p in weights] for part, weights in parts.items()}
    for step in tqdm(range(steps), desc=f"{args.recipe} {args.clip_lr:g}", unit="step"):
        optim.set_lr(optimizer, optim.warmup_cosine((step + 1) / (steps + 1), args.warmup))
        torch.manual_seed(args.seed + step)  # dropout: the same in all runs
        before = {part: [p.detach().clone() for p in weights] for part, weights in parts.items()}
        trainer.train_step(model, [next(batches) for _ in range(args.gradient_accumulation_steps)], optimizer, scaler,
                           f"step {step + 1}", train, args, world)
        changes.append([change(before[part], weights) for part, weights in parts.items()])
    means = np.mean(changes, axis=0).tolist()
    return {part: (*mean, change(first[part], parts[part])[0]) for part, mean in zip(parts, means)}, splits


def matching_rate(wanted: float, rates: list[float], found: list[float]) -> float:
    """The rate whose relative change is `wanted`: log-linear between the measured ones, continued beyond them; or NaN.

    rates ascending, found their changes.
    """
    points = [(math.log(f), math.log(r)) for f, r in zip(found, rates) if f > 0]
    if wanted <= 0 or len(points) < 2 or any(b[0] <= a[0] for a, b in pairwise(points)):
        return math.nan
    x = math.log(wanted)
    i = min(max(sum(x > p[0] for p in points) - 1, 0), len(points) - 2)
    (x0, y0), (x1, y1) = points[i], points[i + 1]
    return math.exp(y0 + (x - x0) * (y1 - y0) / (x1 - x0))


def show(reported: dict, modern: list[dict], rates: list[float]) -> str:
    """A line a part; the matching rate only where --clip_lr governs it."""
    titles = ["reported", *(f"modern, clip_lr {rate:.0e}" for rate in rates)]
    columns = f" | {'a step':>8} {'moved':>6} {'the run':>8}"
    lines = [" " * 22 + "".join(f" | {title:^24}" for title in titles) + " | modern clip_lr with",
             f"{'part':22}" + columns * len(titles) + " | reported's change a step"]
    for part, (wanted, *_) in reported.items():
        cells = "".join(f" | {step:8.1e} {moved:6.1%} {run:8.1e}" for step, moved, run in
                        (found[part] for found in (reported, *modern)))
        rate = matching_rate(wanted, rates, [found[part][0] for found in modern])
        heads = part in ("co-attention", "temporal encoders", "word weights")
        lines.append(f"{part:22}{cells} | {'' if heads or math.isnan(rate) else f'{rate:.1e}'}".rstrip(" |"))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure both recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=30, help="of each run, with warm-up and cosine over them")
    parser.add_argument("--reported_lr", type=positive_float, default=1e-7, help="CLIP's rate under recipe reported")
    parser.add_argument("--rates", type=positive_float, nargs="+", default=[1e-7, 1e-6, 1e-5],
                        help="CLIP's rates under recipe modern")
    args, more = parser.parse_known_args(argv)
    if len(args.rates) < 2:
        raise InputError("--rates: interpolation needs two rates or more")
    world, rates = distributed.start(), sorted(args.rates)
    run = partial(measure, steps=args.steps, world=world)
    common = [*more, "--select_on", "last", "--output_dir", "unused"]
    try:
        reported, splits = run([*common, "--recipe", "reported", "--clip_lr", str(args.reported_lr)], splits=None)
        modern = [run([*common, "--recipe", "modern", "--clip_lr", str(rate)], splits=splits)[0] for rate in rates]
    finally:
        distributed.stop()
    print(show(reported, modern, rates))


if __name__ == "__main__":
    command(main)
