"""--compile: the towers' blocks under torch.compile give what they give without it, whatever the lengths.

Here the backend is "eager": the same capture, guards and recompilations as the default one's, without minutes of a C++
compiler. N frames or texts, T tokens.
"""

import copy
import sysconfig

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid.towers import compiling
from narvid import InputError

CPU = torch.device("cpu")
SIZES = [(6, 7), (7, 9), (3, 24), (8, 12), (2, 30)]  # (N, T) of successive steps


@pytest.fixture
def clean():
    """Nothing compiled before counts, and nothing compiled here stays; the settings of torch are put back."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch({}):
        yield
    torch._dynamo.reset()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone, all that DDP asks for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Encode(nn.Module):
    """What DDP wraps: frames and texts -> every feature that the trainer takes from the towers."""

    def __init__(self, towers):
        super().__init__()
        self.clip = towers

    def forward(self, frames, tokens):
        return self.clip.encode_frames(frames), *self.clip.encode_text(tokens)


def encode(model, n, t):
    """Features and gradients of n random frames and n texts of t tokens, in bf16 as the trainer runs."""
    generator = torch.Generator().manual_seed(100 * n + t)
    frames = torch.randint(0, 256, (n, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49408, (n, t), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(frames, tokens)
    model.zero_grad()
    sum(x.float().square().mean() for x in made).backward()
    return [*(x.detach() for x in made), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_nothing_changes_and_nothing_is_compiled_for_another_length(clean, one_rank):
    """Under DDP, with gradient checkpointing."""
    plain = clip.build_towers(clip.ClipConfig(**tiny.CLIP))
    plain.set_grad_checkpointing(True)
    plain.logit_scale.requires_grad_(False)  # has no part in the features
    compiled = copy.deepcopy(plain)
    clip.compile_blocks(compiled, CPU, backend="eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ours, expected, forms = DistributedDataParallel(Encode(compiled)), Encode(plain), []
    for n, t in SIZES:
        pairs = list(zip(encode(ours, n, t), encode(expected, n, t), strict=True))
        assert len(pairs) > 40
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())
        forms.append(counters["stats"]["unique_graphs"])
    assert forms == [2] * len(SIZES)  # one of frames and one of texts, whatever the layers


@pytest.mark.parametrize("device, missing, sentence", [
    ("cpu", "compiler", "finds no g++ here"), ("cuda", "compiler", "finds no gcc or clang here"),
    ("cpu", "headers", "no Python.h in"), ("cuda", "headers", "no Python.h in")])
def test_machine_that_cannot_compile_is_told_at_once(monkeypatch, tmp_path, device, missing, sentence):
    monkeypatch.setattr(compiling.sys, "platform", "linux")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    if missing == "headers":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        for name in ("gcc", "g++"):
            (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    towers = clip.build_towers(clip.ClipConfig(**tiny.CLIP))
    with pytest.raises(InputError, match="--compile") as error:
        clip.compile_blocks(towers, torch.device(device))
    assert sentence in str(error.value) and "leave --compile out" in str(error.value)
    assert all(block._compiled_call_impl is None for block in towers.modules())  # and nothing is half done


def test_flag_compiles_the_towers_of_every_method(monkeypatch, corpus, tmp_path):
    seen = []
    monkeypatch.setattr(clip, "compile_blocks", lambda towers, device: seen.append(towers))
    for more in (["--compile"], ["--compile", "--method", "clip4clip"], []):
        model = trainer.build_model(trainer.parse_args(tiny.flags(corpus, tmp_path / "run", *more)))
        assert seen == ([model.clip] if more else [])
        seen.clear()
