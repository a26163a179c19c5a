"""A model built anew from its checkpoint is the one that was trained: here the activation of its temporal blocks."""

from dataclasses import asdict

import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid.model import TemporalBlock
from narvid.run.build import build_model

WITH_BLOCKS = [("narvid",), ("clip4clip", "--head", "seqTransf"), ("clip4clip", "--head", "tightTransf"),
               ("cap4video",), ("clip2video",)]


def quick_gelus(model):
    """Whether the temporal blocks run with QuickGELU: {True}, {False} or, which must not be, both."""
    return {module.activation == "quick_gelu" for module in model.modules() if isinstance(module, TemporalBlock)}


def built(argv):
    """The model of these flags, and the flags."""
    args = trainer.parse_args(argv)
    return build_model(args), args


@pytest.mark.parametrize("method", WITH_BLOCKS, ids=" ".join)
def test_blocks_keep_the_activation_of_the_tower_they_started_from(corpus, tmp_path, method):
    wide = ("--clip_model", corpus / "wide.json")
    for flag, quick_gelu in (("--quick_gelu", True), ("--no-quick_gelu", False)):
        model, args = built(tiny.flags(corpus, tmp_path / "run", *wide, "--method", *method, flag))
        assert quick_gelus(model) == {quick_gelu}
        stored = {"model": model.state_dict(), "clip_config": asdict(model.clip.config), "args": vars(args)}
        again = tiny.flags(corpus, tmp_path / "run", *wide, "--checkpoint", tmp_path / "start.pt")
        torch.save(stored, tmp_path / "start.pt")
        assert quick_gelus(built(again)[0]) == {quick_gelu}
        del stored["clip_config"]["temporal_quick_gelu"]  # as in every checkpoint before this field
        torch.save(stored, tmp_path / "start.pt")
        assert quick_gelus(built(again)[0]) == {True}


def test_a_run_does_not_change_its_activation_on_the_way(corpus, tmp_path):
    """Started before the field, over towers with GELU: it goes on as it began."""
    argv = tiny.flags(corpus, tmp_path / "run", "--epochs", 1, "--select_on", "last", "--resume", "auto")
    trainer.main(argv)
    (tmp_path / "run" / "results.jsonl").unlink()
    for name in ("last.pt", "best.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert state["clip_config"].pop("temporal_quick_gelu") is False
        torch.save(state, tmp_path / "run" / name)
    assert quick_gelus(build_model(trainer.parse_args(argv), state)) == {True}
    metrics = trainer.main(argv)
    again = tiny.flags(corpus, tmp_path / "again", "--eval_only", "--checkpoint", tmp_path / "run" / "best.pt")
    assert trainer.main(again) == metrics
