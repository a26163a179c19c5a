"""torch.compile for the residual blocks of the towers (--compile)."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from narvid import InputError


def compile_blocks(towers: torch.nn.Module, device: torch.device, *, backend: str = "inductor") -> None:
    """torch.compile for the residual blocks of both towers, in place: parameters keep their names.

    Block by block, because equal blocks share one compiled form and DDP, gradient checkpointing and the lengths around
    them stay plain Python. Sizes are symbolic from the start: with every new batch the number of texts and tokens
    changes. InputError for towers without such blocks, and where this machine lacks what the default backend builds
    with.
    """
    blocks = towers.blocks()
    if not blocks:
        raise InputError("--compile: these towers have no blocks that are alike; leave --compile out")
    if backend == "inductor":
        _check_compiler(device)
    # A form each for frames or text, training or evaluation, the lowest block (whose input needs no gradient) or
    # another, frozen or not; beyond the limit torch would run blocks as they are.
    torch._dynamo.config.cache_size_limit = 32
    torch._dynamo.config.optimize_ddp = False  # would cut each block at DDP's bucket size; blocks are small enough
    for block in blocks:
        block.compile(backend=backend, dynamic=True)


def _check_compiler(device: torch.device) -> None:
    """InputError unless inductor's C++ (on a CPU) or Triton's launchers (on a GPU) can be built here."""
    if device.type == "cuda":
        wanted, compilers = "gcc or clang", [os.environ.get("CC"), "gcc", "clang", "cc"]
    else:
        wanted, compilers = "g++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if not any(name and shutil.which(name) for name in compilers):
        raise InputError(f"--compile: torch.compile needs a C++ compiler and finds no {wanted} here; install it or "
                         "leave --compile out")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise InputError(f"--compile: torch.compile needs Python's headers and finds no Python.h in "
                         f"{sysconfig.get_path('include')}; install them (python3-dev) or leave --compile out")
