"""A rehearsal for a GPU on a machine without one: `with rehearsal():` makes "cuda" a device that any process has.

A tensor that is sent there computes on the CPU, says that it is on a GPU, and so does what is computed from it. What a
GPU would refuse raises here, with the place in our code: an operation that mixes it with a CPU tensor, a CPU tensor
indexed by it, numpy of it. Nothing is shown of kernels, number formats, streams, memory or speed.

Only the process (and its threads) that entered the rehearsal sees the device: workers forked from it have none, and
fail where they ask for it, as they do on a real one.
"""

import contextlib
import os
import threading
import time
import traceback
from functools import partial
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# These move data between devices, or look at it; indexing has rules of its own.
MAY_MIX = {"to", "copy_", "set_", "type", "__get__", "__set__", "is_same_size", "_has_compatible_shallow_copy_type",
           "backward", "grad", "new_tensor"}
INDEXING = {"__getitem__", "__setitem__", "index_put_"}
TO_NUMPY = {"numpy", "__array__"}


class State(threading.local):
    """Above 0 inside backward, optimiser steps and saving: there torch itself hands plain tensors to marked ones."""

    unchecked = 0


state = State()


def gpu() -> torch.device:
    """This process' one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def unchecked():
    """Torch's own code, whose mixing is not ours."""
    state.unchecked += 1
    try:
        yield
    finally:
        state.unchecked -= 1


def place() -> str:
    """The innermost places outside torch and this file."""
    ours = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    return " > ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in ours[-3:])


def mark(x):
    """A plain tensor -> one that says it is on the GPU; anything else as it is."""
    return x.as_subclass(OnGPU) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


def unmark(x):
    """The plain tensor below; anything else as it is."""
    return x.as_subclass(torch.Tensor) if isinstance(x, OnGPU) else x


def is_plain(x) -> bool:
    """A CPU tensor that a GPU does not take: a number (no axis) it takes."""
    return isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) and x.dim() > 0


class OnGPU(torch.Tensor):
    """A tensor of the rehearsal."""

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with unchecked():
                copied = mark(unmark(self).detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (torch.nn.Parameter(copied, self.requires_grad) if is_parameter
                              else copied.requires_grad_(self.requires_grad))
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        compute = partial(super().__torch_function__, func, types, args, kwargs)
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            answers = {"device": gpu(), "is_cuda": True, "is_cpu": False}
            return answers[attribute] if attribute in answers else mark(compute()) if attribute == "grad" else compute()
        if name == "get_device":
            return gpu().index
        if not state.unchecked:
            if name in TO_NUMPY:
                raise TypeError(f"a tensor on cuda becomes numpy at {place()}: .cpu() first")
            if name in INDEXING:
                check_index(name, *args)
            elif name not in MAY_MIX and any(is_plain(x) for x in tree_leaves((args, kwargs))):
                raise RuntimeError(f"{name} mixes cuda and cpu at {place()}")
        return compute()


def check_index(name: str, tensor, index, value=None, *_) -> None:
    """A GPU's tensor takes an index on the CPU, the other way round not; elements picked by tensors want a value on
    their own device, while slices copy from any."""
    picked = any(isinstance(x, torch.Tensor) for x in tree_leaves(index))
    if picked and is_plain(tensor):
        raise RuntimeError(f"{name}: a tensor on the CPU is indexed by, or given, one on cuda at {place()}")
    if picked and is_plain(value):
        raise RuntimeError(f"{name}: elements on cuda are set from a tensor on the CPU at {place()}")


class Device(TorchFunctionMode):
    """Sees where tensors are made and moved, marked or not."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if os.getpid() != self.process:
            return func(*args, **kwargs)
        if name == "backward":
            with unchecked():
                return func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor):
            if name in ("cuda", "cpu"):
                return (mark if name == "cuda" else unmark)(args[0])
            if name == "pin_memory":
                return args[0]
            if name == "to":
                return move(func, *args, **kwargs)
        if kind_of(kwargs.get("device")) == "cuda":
            kwargs["device"] = torch.device("cpu")
            plain = [unmark(a) if name in ("tensor", "as_tensor") else a for a in args]
            return mark(func(*plain, **kwargs))
        made = func(*args, **kwargs)
        return unmark(made) if kind_of(kwargs.get("device")) == "cpu" else made


def kind_of(device) -> str | None:
    """"cuda" or "cpu" of a device or its name; None for anything else."""
    return str(device).split(":")[0] if isinstance(device, (str, torch.device)) else None


def move(func, x, *args, device=None, non_blocking=False, **kwargs):
    """tensor.to in all its forms: to a device, a dtype, both, or like another tensor."""
    send, dtypes = None, []
    for a in (*args, device):
        if kind_of(a) == "cuda" or isinstance(a, OnGPU):
            send = mark
        elif kind_of(a) == "cpu" or isinstance(a, torch.Tensor):
            send = unmark
        dtypes += [a] if isinstance(a, torch.dtype) else [a.dtype] if isinstance(a, torch.Tensor) else []
    x = func(x, *dtypes, **kwargs) if dtypes or kwargs else x
    return send(x) if send else x


class Event:
    """torch.cuda.Event on the CPU's clock."""

    def __init__(self, **_):
        self.time = 0.0

    def record(self, *_) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other) -> float:
        return 1000 * (other.time - self.time)


class Autocast(torch.autocast):
    """Autocast of the CPU, whatever the device's name."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


ANSWERS = {"is_available": True, "device_count": 8, "current_device": 0, "set_device": None, "synchronize": None,
           "max_memory_allocated": 0, "memory_allocated": 0, "reset_peak_memory_stats": None, "empty_cache": None,
           "get_device_name": "rehearsal", "is_bf16_supported": True, "get_device_capability": (9, 0),
           "mem_get_info": (2 ** 34, 2 ** 34)}


@contextlib.contextmanager
def rehearsal():
    """Inside, this process has a GPU. For a process of its own: what torch registers for optimisers stays."""
    process, patches = os.getpid(), contextlib.ExitStack()

    def put(where, name, make) -> None:
        """where.name becomes make(what it was), in this process alone."""
        before = getattr(where, name)
        after = make(before)
        if not isinstance(after, type):
            here = after
            after = lambda *a, **k: (here if os.getpid() == process else before)(*a, **k)  # noqa: E731
        patches.enter_context(patch.object(where, name, after))

    def save(before):
        def save_plain(value, *args, **kwargs):
            with unchecked():
                return before(tree_map(unmark, value), *args, **kwargs)
        return save_plain

    def backward(before):
        """Autograd hands plain gradients to a backward of ours, and takes plain ones; inside, all is checked."""
        def checked(ctx, *gradients):
            outside, state.unchecked = state.unchecked, 0
            if any(isinstance(x, OnGPU) for x in ctx.saved_tensors):
                gradients = map(mark, gradients)
            try:
                with torch._C._EnableTorchFunction(), Device():
                    made = before(ctx, *gradients)
            finally:
                state.unchecked = outside
            return tuple(map(unmark, made)) if isinstance(made, tuple) else unmark(made)
        return staticmethod(checked)

    def run_thread(before):
        def run(thread):
            with Device():
                before(thread)
        return run

    for name, answer in ANSWERS.items():
        put(torch.cuda, name, lambda _, answer=answer: lambda *a, **k: answer)
    put(torch.cuda, "Event", lambda _: Event)
    put(torch.accelerator, "current_device_index", lambda _: lambda: 0)
    put(torch.accelerator, "current_accelerator", lambda _: lambda *a, **k: gpu())
    put(torch, "autocast", lambda _: Autocast)
    put(torch.amp, "autocast", lambda _: Autocast)
    put(torch.amp, "GradScaler", lambda before: lambda device="cuda", **k: before("cpu", **k))
    put(torch.nn.LSTM, "flatten_parameters", lambda _: lambda self: None)
    put(torch.utils.data.DataLoader, "__init__",  # pinning is CUDA's own
        lambda before: lambda self, *a, **k: before(self, *a, **{**k, "pin_memory": False}))
    put(torch.distributed, "init_process_group", lambda before: lambda backend, **k: before("gloo", **k))
    put(torch, "save", save)
    put(threading.Thread, "run", run_thread)
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("narvid."):
            patches.enter_context(patch.object(function, "backward", backward(function.backward)))
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            put(torch.optim.Optimizer, name, lambda _: lambda self: None)
    patches.callback(torch.__future__.set_overwrite_module_params_on_conversion,
                     torch.__future__.get_overwrite_module_params_on_conversion())
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to makes new, marked parameters
    hooks = contextlib.ExitStack()
    before = register_optimizer_step_pre_hook(lambda *_: setattr(state, "unchecked", state.unchecked + 1))
    after = register_optimizer_step_post_hook(lambda *_: setattr(state, "unchecked", state.unchecked - 1))
    hooks.callback(before.remove)
    hooks.callback(after.remove)
    with patches, hooks, Device():
        yield
