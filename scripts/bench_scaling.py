"""Weak scaling of a training step on this machine, and what its processes send each other.

  python scripts/bench_scaling.py                          1, 2, 4 processes on small towers, a thread each (gloo)
  python scripts/bench_scaling.py --processes 1 2 4 8 --clip_model ViT-B-16 --videos 64 --side 224 --precision bf16
                                                           on a machine with 8 GPUs (nccl)

Every process has the same work: the trainer's own train_step on the same --videos random videos (bench_step.py's).
Numbers of processes take turns, round after round, so that a busy machine slows all alike; a step's time is the
slowest process's, printed is the median over all steps. Bytes are counted where narvid and DDP call torch.distributed
and stand beside the formula of scripts/cost.py. Several machines: compare the steps/s of two training logs.
Here: starting, timing, counting. Not here: the step (main_task_retrieval.py), the formula (cost.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import main_task_retrieval as trainer
from narvid import InputError, distributed
from narvid.run import optim
from narvid.flags import Parser, command, positive
from narvid.progress import tqdm
from scripts import cost
from scripts.bench_step import make_batch

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # steps
EXPLAINED = """efficiency: the time of one process over that of this many, same work each. corrected: as if threads
that share a core took turns at no loss; what is missing to 100 % is communication, memory and waiting for the slowest.
processor: the time a process computes, on a busy machine the only steady measure; it leaves out waiting.
"""

# ------------------------------------------------------------------------------------------------------- one process


class Counted:
    """Bytes of the results of torch.distributed's collectives, by name, while it is entered; DDP's by its hook."""

    def __init__(self, model: torch.nn.Module):
        self.bytes: Counter[str] = Counter()
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._bucket)

    def __enter__(self) -> Counted:
        self._original = dist.all_gather, dist.all_reduce

        def all_gather(parts, x, *rest, **named):
            self.bytes["all_gather"] += sum(map(_bytes, parts))
            return self._original[0](parts, x, *rest, **named)

        def all_reduce(x, *rest, **named):
            self.bytes["all_reduce"] += _bytes(x)
            return self._original[1](x, *rest, **named)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        return self

    def __exit__(self, *_) -> None:
        dist.all_gather, dist.all_reduce = self._original

    def _bucket(self, group, bucket):
        self.bytes["parameters"] += _bytes(bucket.buffer())
        self.bytes["all_reduce"] -= _bytes(bucket.buffer())  # what the next line adds
        return allreduce_hook(group, bucket)


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def measure(args: argparse.Namespace, world: distributed.World) -> tuple[list, cost.Traffic, cost.Traffic]:
    """(clock, processor) seconds of each step on this process; the payload of a step counted, and by the formula."""
    flags = ["--data_dir", "unused", "--output_dir", "unused", "--clip_model", args.clip_model, "--precision",
             args.precision, "--batch_size", args.videos * world.size, "--max_frames", args.frames]
    options = trainer.parse_args([str(word) for word in flags])
    trainer.seed_everything(options)
    model = trainer.build_model(options)
    config = model.clip.config
    model.to(world.device).train()
    optimizer = optim.build_optimizer(model, recipe="modern", lr=1e-4, clip_lr=1e-6, weight_decay=0.2)
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    batch = make_batch(args.videos, args.frames, model.clip.picture.size)
    formula = cost.Traffic(0, 0, 0)
    if world.size > 1:
        formula = cost.traffic(args.videos * world.size, args.frames, config.embed_dim, cost.gradient_bytes(model))
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    counted, seconds = Counted(model), []
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            counted.bytes.clear()
        distributed.barrier(world)
        start = time.perf_counter(), time.process_time()
        with counted:
            trainer.train_step(model, [batch], optimizer, scaler, f"step {step}", None, options, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    payload = (counted.bytes[name] // args.steps for name in ("all_gather", "all_reduce", "parameters"))
    return seconds[WARM_UP:], cost.Traffic(*payload), formula


def work(rank: int, args: argparse.Namespace, ports: list[int], turn, results) -> None:
    """What process `rank` does: its part in every measurement it belongs to; in the others it sleeps."""
    torch.set_num_threads(args.threads)
    for port, size in zip(ports, args.processes * args.rounds):
        turn.wait()
        if rank >= size:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            results.put(measure(args, distributed.start()))
        except Exception as error:
            results.put(InputError(f"process {rank} of {size}: {error}"))
            raise
        finally:
            distributed.stop()


# -------------------------------------------------------------------------------------------------------- all of them


class Measured(NamedTuple):
    """All rounds of one number of processes."""

    clock: list[float]  # s of each step: the slowest process's
    processor: list[float]  # s of each step: mean of the processes
    payload: cost.Traffic  # of a step, counted
    formula: cost.Traffic


def run(args: argparse.Namespace) -> dict[int, Measured]:
    """Number of processes -> what was measured."""
    context = multiprocessing.get_context("forkserver")  # imports once; each process is then forked, clean
    context.set_forkserver_preload(["main_task_retrieval"])
    most, order = max(args.processes), args.processes * args.rounds
    turn, results, ports = context.Barrier(most + 1), context.Queue(), _free_ports(len(order))
    workers = [context.Process(target=work, args=(rank, args, ports, turn, results), daemon=True)
               for rank in range(most)]
    for process in workers:
        process.start()
    measured = {size: Measured([], [], *[cost.Traffic(0, 0, 0)] * 2) for size in args.processes}
    for size in tqdm(order, desc="measure", unit="run", leave=False):
        turn.wait(args.timeout)
        got = [_next(results, args.timeout) for _ in range(size)]
        steps = torch.tensor([seconds for seconds, _, _ in got])  # (processes, steps, 2)
        measured[size].clock.extend(steps[..., 0].amax(dim=0).tolist())
        measured[size].processor.extend(steps[..., 1].mean(dim=0).tolist())
        measured[size] = measured[size]._replace(payload=got[0][1], formula=got[0][2])
    for process in workers:
        process.join()
    return measured


def _next(results, timeout: float) -> tuple:
    try:
        got = results.get(timeout=timeout)
    except queue.Empty:
        raise InputError(f"no process has ended its steps in {timeout} s; raise --timeout, or measure less") from None
    if isinstance(got, InputError):
        raise got
    return got


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def show(measured: dict[int, Measured], args: argparse.Namespace, cores: int, gpus: int) -> str:
    """Two tables: time and efficiency; bytes."""
    alone = measured[1]
    lines = ["processes   ms a step   pairs/s   efficiency   corrected   processor ms   by processor time"]
    for size, m in measured.items():
        step, spent = median(m.clock), median(m.processor)
        crowd = 1.0 if gpus else max(1.0, size * args.threads / cores)  # threads to a core
        efficiency = median(alone.clock) / step
        lines.append(f"{size:9} {1000 * step:11.1f} {size * args.videos / step:9.1f} {efficiency:12.1%} "
                     f"{crowd * efficiency:11.1%} {1000 * spent:14.1f} {median(alone.processor) / spent:19.1%}"
                     + (f"   {crowd:.1f} threads share a core" if crowd > 1 else ""))
    lines += [EXPLAINED, "processes   payload of a step in bytes, counted (by the formula)"]
    for size, m in measured.items():
        parts = [f"{name} {a:,} ({b:,})" for name, a, b in
                 zip(("gathered", "features and rows summed", "parameters summed"), m.payload, m.formula)]
        lines.append(f"{size:9}   {'; '.join(parts)}; a process sends {cost.ring_bytes(m.payload, size) / 1e6:.2f} MB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--processes", type=positive, nargs="+", default=[1, 2, 4], help="how many at a time; 1 is the measure of all")
    add("--clip_model", default=str(ROOT / "configs" / "demo_clip.json"), help="open_clip model, or a config in .json")
    add("--videos", type=positive, default=8, help="pairs a process")
    add("--frames", type=positive, default=12, help="K")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="autocast")
    add("--threads", type=positive, default=1, help="of each process")
    add("--steps", type=positive, default=5, help="measured in each round")
    add("--rounds", type=positive, default=3, help="of all numbers of processes")
    add("--timeout", type=positive, default=300, help="seconds to wait for a process")
    args = parser.parse_args(argv)
    if 1 not in args.processes:
        parser.error("--processes needs a 1: the others are compared with it")
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    if gpus and max(args.processes) > gpus:
        parser.error(f"--processes {max(args.processes)}: this machine has {gpus} GPU(s)")
    print(f"{gpus} GPUs" if gpus else f"no GPU: {cores} cores, {args.threads} thread(s) a process, gloo", end="; ")
    print(f"{args.videos} videos x {args.frames} frames a process, {Path(args.clip_model).stem}, {args.precision}, "
          f"{args.rounds} rounds of {args.steps} steps")
    try:
        print(show(run(args), args, cores, gpus))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command(main)
