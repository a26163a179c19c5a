"""The only file that knows rank and world size: start, gather with gradient, sharing work, speaking with one voice.

Works three ways without a flag: plain python (one process), torchrun on CPU (gloo), torchrun on GPUs (nccl for tensors
there, gloo for what processes say to each other).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from narvid import InputError
from narvid.profiling import stage


class World(NamedTuple):
    """This process among all: rank in 0..size-1, and its device."""

    rank: int
    size: int
    device: torch.device


class SaidByAll(InputError):
    """What one process found and all of them raise: one voice is enough."""


def start(minutes: float = 30.0) -> World:
    """Join the process group that torchrun describes in the environment, if there is one.

    minutes: how long one process waits for another before it takes it for lost (is_lost).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPU(s): start as "
                             "many processes as there are GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: else a convolution's digits change with the batch
    else:
        # The CPU's fused attention is made for long sequences: its backward over frames and captions of a few dozen
        # tokens takes several times the plain products'.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # bf16 stays bf16 in those products
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=minutes))
    return World(rank, size, device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether this error says that another process has ended, or has not answered in time."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and (
        "gloo" in str(error) or "NCCL" in str(error) or "Connection closed by peer" in str(error))


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; backward sums every rank's gradient of this rank's part.

    Each rank computes the loss of the whole batch, so its own part receives world_size times the gradient; DDP's mean
    over ranks divides by the same number. What remains is exactly the gradient of one process with the whole batch.
    (Both spellings in torch.distributed.nn warn as deprecated.)
    """

    @staticmethod
    @stage("communication")
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows, x = len(x), x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    @stage("communication")
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may use its own elsewhere
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows:][:ctx.rows]


def gather(x: Tensor) -> Tensor:
    """(N, ...) of each rank, the same N on all -> (world * N, ...), in order of rank, with gradient."""
    if not dist.is_initialized():
        return x
    return _Gather.apply(x) if x.is_floating_point() else torch.cat(_all_gather(x))


def gather_features(features: NamedTuple) -> NamedTuple:
    """The features of each rank's part of a batch -> those of the whole batch, with gradient."""
    return type(features)(*(None if x is None else gather(x) for x in features))


def share(n: int, world: World) -> range:
    """This rank's contiguous part of n items; parts differ by at most one."""
    return range(n * world.rank // world.size, n * (world.rank + 1) // world.size)


def collect(part: Tensor, n: int, world: World) -> Tensor:
    """The parts that `share` gave out, (about n / world, ...) each -> the whole (n, ...) on every rank; no gradient."""
    if world.size == 1:
        return part
    longest = -(-n // world.size)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[:len(part)] = part
    parts = _all_gather(padded)
    return torch.cat([x[:len(share(n, world._replace(rank=rank)))] for rank, x in enumerate(parts)])


def join_columns(scores: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Each rank's columns, {view: (B, its part of V)} on the CPU -> {view: (B, V)} on rank 0; elsewhere {}."""
    if world.size == 1:
        return scores
    columns = total(len(next(iter(scores.values())).T), world)
    widths = [len(share(columns, world._replace(rank=rank))) for rank in range(world.size)]
    whole = {}
    for view, part in scores.items():
        padded = torch.nn.functional.pad(part, (0, max(widths) - part.shape[1])).to(world.device)
        parts = [torch.empty_like(padded) for _ in widths] if world.rank == 0 else None
        dist.gather(padded, parts)
        if world.rank == 0:
            whole[view] = torch.cat([x[:, :width].cpu() for x, width in zip(parts, widths)], dim=1)
    return whole


def total(count: int, world: World) -> int:
    """The sum of all ranks' counts."""
    if world.size == 1:
        return count
    summed = torch.tensor(count, device=world.device)
    dist.all_reduce(summed)
    return int(summed)


def agree(error: str | None, world: World) -> None:
    """Raise the first rank's error, if any has one, on every rank: all stop together, nobody waits for a dead peer."""
    errors = everybody(error, world)
    if first := next((e for e in errors if e), None):
        raise SaidByAll(first)


@contextlib.contextmanager
def together(world: World) -> Iterator[None]:
    """What the block raises as an InputError on one rank, all raise.

    Inside, ranks may speak to each other by `agree` alone: the failure of one is noticed at the next.
    """
    error = None
    try:
        yield
    except SaidByAll:
        raise
    except InputError as e:
        error = str(e)
    agree(error, world)


def everybody(value: Any, world: World) -> list:
    """The value of each rank, on every rank; for small ones."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def check_same(what: dict[str, Any], world: World) -> None:
    """InputError on every rank, which names rank and keys, unless all ranks have equal values."""
    first, *others = everybody(what, world)
    for rank, other in enumerate(others, 1):
        differ = [key for key in first | other if first.get(key) != other.get(key)]
        if differ:
            gap = ", ".join(f"{key} {other.get(key)} there, {first.get(key)} on process 0" for key in differ[:4])
            raise SaidByAll(f"process {rank} sees another run than process 0 ({gap}); all of them must see the same "
                            "data and one --output_dir")


def highest(numbers: list[int], world: World) -> list[int]:
    """Of each number the highest that any rank has; by way of the CPU, in a fraction of a millisecond."""
    if world.size == 1:
        return numbers
    with stage("communication"):
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def spread(model: torch.nn.Module, world: World) -> None:
    """Give every rank the weights of rank 0."""
    if world.size > 1:
        with torch.no_grad():
            for value in model.state_dict().values():
                dist.broadcast(value, 0)


def from_first(make: Callable[[], Any], world: World) -> Any:
    """What rank 0 makes, on every rank; for small results of large inputs."""
    made = [make() if world.rank == 0 else None]
    if world.size > 1:
        dist.broadcast_object_list(made)
    return made[0]


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()


@stage("communication")
def _all_gather(x: Tensor) -> list[Tensor]:
    as_bytes = (x.to(torch.uint8) if x.dtype == torch.bool else x).contiguous()
    parts = [torch.empty_like(as_bytes) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, as_bytes)
    return [part.to(x.dtype) for part in parts]
