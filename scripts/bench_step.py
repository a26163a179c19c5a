"""A training step of the paper's recipe beside its two towers alone and one matrix product, all in the same run.

  python scripts/bench_step.py                                   MSR-VTT's step: ViT-B/16, 64 videos; for a GPU
  python scripts/bench_step.py --videos 8 --repeats 3            a smaller batch, for a CPU
  python scripts/bench_step.py --videos 8 --micro_batch 4 --compile      and those two beside it

Step: the trainer's own train_step. Towers: forward of the same frames, sentences and queries, backward from features
that are given a gradient; all that the step does besides counts as not the towers. The product of two square matrices
in the towers' number format is the unit. They take turns, so that a busy machine slows all alike; medians are
compared. FLOPs are those of every matrix product executed, counted by torch.utils.flop_counter in a step without
checkpointing (2 a multiply-add; elementwise work and the optimiser count nothing). Weights and pixels are random;
queries have 8 to 20 words, sentences 10 to 25 tokens, start and end included; no two sentences are equal.
Here: the batch, timing, counting, memory. Not here: the step itself (main_task_retrieval.py).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import main_task_retrieval as trainer
from narvid import distributed
from narvid.towers import compile_blocks
from narvid.run import optim
from narvid.data.datasets import Batch
from narvid.flags import Parser, command, count, positive
from narvid.profiling import Profile
from narvid.progress import tqdm

QUERY = (10, 22)  # tokens: 8 to 20 words, start and end
SENTENCE = (10, 25)  # tokens
END = 49407  # CLIP's end token
MOST = 4096  # videos that the search for the largest batch goes up to


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--videos", type=positive, default=64, help="pairs of a batch (default %(default)s, the paper's)")
    add("--frames", type=positive, default=12, help="of a video, with a sentence each (default %(default)s)")
    add("--model", default="ViT-B-16", help="open_clip's name or a model config in .json (default %(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="bf16", help="of the towers (default %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of torch (default %(default)s)")
    add("--repeats", type=positive, default=5, help="of every measurement (default %(default)s)")
    add("--micro_batch", type=count, default=0, help="also time the step with this --micro_batch of the trainer")
    add("--compile", action="store_true", help="also time the step with the trainer's --compile")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------- what is measured


class Bench:
    """The model, its optimiser and one batch: the trainer's step, and the towers' part of it alone."""

    def __init__(self, args: argparse.Namespace, world: distributed.World):
        self.world, self.frames = world, args.frames
        self.args = trainer.parse_args(["--clip_model", args.model, "--precision", args.precision, "--max_frames",
                                        str(args.frames), "--select_on", "last", "--output_dir", "unused"])
        trainer.seed_everything(self.args)
        self.model = trainer.build_model(self.args)
        self.model.to(world.device).train()
        self.side = self.model.clip.picture.size
        self.optimizer = optim.build_optimizer(self.model, recipe="modern", lr=1e-4, clip_lr=1e-6, weight_decay=0.2)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=False)
        self.batch = make_batch(args.videos, args.frames, self.side).to(world.device)
        self.profile = Profile(args.repeats, world.device, warm_up=1)

    def step(self, batch: Batch | None = None, **settings) -> None:
        """One step of the trainer; `settings` of its flags: micro_batch, grad_checkpointing."""
        self.args.micro_batch = settings.get("micro_batch", 0)
        self.model.clip.set_grad_checkpointing(settings.get("grad_checkpointing", False))
        trainer.train_step(self.model, [batch or self.batch], self.optimizer, self.scaler, "a step", None, self.args,
                           self.world)

    def profiled_step(self) -> None:
        """The step with its stages on a clock."""
        with self.profile.step():
            self.step()

    def towers(self) -> None:
        """Forward and backward of the towers on the same inputs."""
        self.model.clip.set_grad_checkpointing(False)
        self.optimizer.zero_grad(set_to_none=True)
        batch, towers = self.batch, self.model.clip
        with trainer.autocast(self.args, self.world.device):
            made = [towers.encode_frames(batch.frames[batch.mask]), *towers.encode_text(batch.tokens),
                    towers.encode_text(batch.sentences, words=False)[0]]
        torch.autograd.backward(made, [torch.full_like(x, 1e-3) for x in made])

    def heads(self) -> None:
        """Forward and backward of what the trainer adds above the towers, on features that are random."""
        batch, heads = self.batch, self.model.heads
        dim = heads.config.dim

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dim, device=self.world.device, requires_grad=True)

        with trainer.autocast(self.args, self.world.device):
            videos = heads.enhance(random(*batch.mask.shape), random(*batch.mask.shape), batch.mask,
                                   batch.narration_mask)
            weights = heads.word_weights(random(*batch.tokens.shape), batch.word_mask)
        made = [videos.frames, videos.narration, weights]
        torch.autograd.backward(made, [torch.full_like(x, 1e-3) for x in made])


def make_batch(videos: int, frames: int, side: int) -> Batch:
    """A batch of the trainer with V = `videos`, K = `frames`, every frame real and with a sentence of its own."""
    generator = torch.Generator().manual_seed(0)
    tokens, word_mask = make_texts(videos, *QUERY, generator)
    sentences, _ = make_texts(videos * frames, *SENTENCE, generator)
    everything = torch.ones(videos, frames, dtype=torch.bool)
    pixels = torch.randint(0, 256, (videos, frames, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(torch.arange(videos), torch.arange(videos), tokens, word_mask, pixels, everything, sentences,
                 torch.arange(videos * frames).view(videos, frames), everything.clone())


def make_texts(n: int, shortest: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n random texts of shortest to longest tokens -> tokens (n, T), mask (n, T) True = a word."""
    lengths = torch.randint(shortest, longest + 1, (n, 1), generator=generator)
    lengths[0] = longest  # the width of a batch does not hang on chance
    place = torch.arange(longest)
    tokens = torch.randint(1, END - 1, (n, longest), generator=generator).masked_fill(place >= lengths, 0)
    return tokens.masked_fill(place == lengths - 1, END), place < lengths


# ---------------------------------------------------------------------------------------------------------- measuring


def flops_of(work: Callable[[], None]) -> int:
    """Of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, in real time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def rounds(ways: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, turn by turn; one turn before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(repeats + 1), unit="round", leave=False):
        for name, work in ways.items():
            took = seconds(work, device)
            if turn:
                taken[name].append(took)
    return taken


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the turns: what slows a whole turn slows both."""
    return median(x / y for x, y in zip(a, b))


def peak_memory(work: Callable[[], None], device: torch.device) -> float:
    """GiB: the GPU's during one call, or on a CPU the process' until now (so measure the smaller first)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2 ** 30
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def largest_batch(bench: Bench, **settings) -> int:
    """The most videos of a step that the GPU's memory holds: doubling, then bisecting down to a 16th."""
    def fits(videos: int) -> bool:
        try:
            not_compiled(partial(bench.step, make_batch(videos, bench.frames, bench.side), **settings))
            fitted = True
        except torch.OutOfMemoryError:
            fitted = False
        bench.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return fitted

    fitting, failing = 0, len(bench.batch.mask)
    while failing <= MOST and fits(failing):
        fitting, failing = failing, 2 * failing
    while failing <= MOST and failing - fitting > max(1, fitting // 16):
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


# ------------------------------------------------------------------------------------------------------------- report


def count_flops(bench: Bench) -> dict[str, int]:
    """Part of a step -> its FLOPs; matching and loss are what remains of the whole."""
    parts = {"towers": flops_of(bench.towers), "heads": flops_of(bench.heads)}
    whole = flops_of(bench.step)
    return parts | {"matching and loss": whole - sum(parts.values()), "step": whole}


def ways_of(args: argparse.Namespace, bench: Bench, side: int) -> dict[str, Callable]:
    """Name -> what is timed under it."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=bench.world.device).to(dtype)
    ways: dict[str, Callable] = {"unit": lambda: a @ a, "towers": bench.towers, "step": bench.profiled_step,
                                 "step, checkpointing": partial(bench.step, grad_checkpointing=True)}
    if args.micro_batch:
        ways[f"step, micro-batch {args.micro_batch}"] = partial(bench.step, micro_batch=args.micro_batch)
    if args.compile:
        compile_blocks(bench.model.clip, bench.world.device)
        compiled = {"towers, compiled": bench.towers, "step, compiled": bench.step}
        ways = {name: partial(not_compiled, work) for name, work in ways.items()} | compiled
    return ways


def not_compiled(work: Callable[[], object]) -> None:
    """Runs the blocks as they were before they were compiled."""
    with torch.compiler.set_stance("force_eager"):
        work()


def report(args: argparse.Namespace, bench: Bench) -> None:
    """Measure and print everything."""
    device = bench.world.device
    on_gpu = device.type == "cuda"
    flops = count_flops(bench)
    print(f"\n{'TFLOP of':22} {'':>9} {'share':>7}")
    for name, n in flops.items():
        print(f"{name:22} {n / 1e12:9.3f} {n / flops['step']:7.2%}")

    settings = {"with checkpointing": {"grad_checkpointing": True}, "without": {}}
    if args.micro_batch:
        settings = {f"with micro-batch {args.micro_batch}": {"micro_batch": args.micro_batch}} | settings
    memory = {name: peak_memory(partial(bench.step, **each), device) for name, each in settings.items()}
    side = 8192 if on_gpu else 2048
    took = rounds(ways_of(args, bench, side), args.repeats, device)
    done = {"unit": 2 * side ** 3, "step": flops["step"], "towers": flops["towers"]}
    print(f"\n{'':28} {'seconds':>9} {'/ towers':>9} {'TFLOP/s':>9} {'of the unit':>12}")
    for name, each in took.items():
        n = done[name.partition(",")[0]]  # of the work asked for: what checkpointing computes again counts nothing
        print(f"{name:28} {median(each):9.4f} {ratio(each, took['towers']):9.3f} {n / median(each) / 1e12:9.3f} "
              f"{n / done['unit'] * ratio(took['unit'], each):12.1%}")
    print(f"\nthe step by stage; a tower's backward is in backward\n{bench.profile.table()}\n")
    reached = flops["step"] / done["unit"] * ratio(took["unit"], took["step"])
    unit = f"a product of two {side} x {side} matrices in {args.precision}"
    print(f"share of the matrix rate: the step reaches {reached:.1%} of {unit} "
          + ("(aim: 45 %)" if on_gpu else "on this CPU, which says nothing of a GPU"))
    print(f"all but the towers: {1 - ratio(took['towers'], took['step']):.1%} of the step"
          + (" (aim: under 5 %)" if on_gpu else " on this CPU"))
    if args.compile:
        print("compiled / not: " + ", ".join(f"{name} {ratio(took[f'{name}, compiled'], took[name]):.3f}"
                                             for name in ("step", "towers")))
    where = "on the GPU" if on_gpu else "of the process, counting FLOPs included"
    print(f"peak memory {where}: " + ", ".join(f"{gib:.2f} GiB {name}" for name, gib in memory.items()))
    if on_gpu:
        for name, checkpointing in (("without checkpointing", False), ("with checkpointing", True)):
            print(f"largest batch that fits, {name}: {largest_batch(bench, grad_checkpointing=checkpointing)} videos")
    else:
        print("a GPU's share of its matrix rate, all but the towers, largest batch: not measured, there is no GPU here")


def main(argv: list[str] | None = None) -> None:
    """Print what was measured."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    world = distributed.start()
    bench = Bench(args, world)
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{name}; {args.model}, {args.precision}, {args.videos} videos x {args.frames} frames and sentences + "
          f"{args.videos} queries" + ("" if args.videos >= 64 else " (the paper's batch is 64)"))
    report(args, bench)


if __name__ == "__main__":
    command(main)
