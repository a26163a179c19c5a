"""A result does not depend on the batch that a video or query was in, nor on how many processes shared the work.

Scores are cosines; "equal" means to 1e-5. B queries, V videos.
"""

import numpy as np
import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid import InputError
from narvid.run import optim
from narvid.run.settings import parse_args
from narvid.search.embedding import Embedder


def matrices(run):
    with np.load(run / "similarity.npz") as arrays:
        return np.stack([arrays["S_qv"], arrays["S_qn"]])  # (2, B, V)


def evaluated(corpus, run, checkpoint, *more):
    """The matrices of an evaluation."""
    trainer.main(tiny.flags(corpus, run, "--eval_only", "--checkpoint", checkpoint, "--save_similarity", *more))
    return matrices(run)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Recipe -> a run that was trained in 16 bit."""
    folder = tmp_path_factory.mktemp("trained")
    for recipe in ("modern", "reported"):
        trainer.main(tiny.flags(corpus, folder / recipe, "--recipe", recipe, "--precision", "bf16", "--epochs", 1,
                                "--select_on", "last", "--save_similarity"))
    return folder


@pytest.mark.parametrize("recipe", ["modern", "reported"])
def test_scores_are_the_same_for_any_batch_size_and_number_of_processes(corpus, trained, tmp_path, recipe):
    best, of_run = trained / recipe / "best.pt", matrices(trained / recipe)  # with --eval_batch_size 5
    for size in (1, 64):
        scores = evaluated(corpus, tmp_path / str(size), best, "--eval_batch_size", size)
        assert np.abs(scores - of_run).max() < 1e-5
    argv = tiny.flags(corpus, tmp_path / "ranks", "--eval_only", "--checkpoint", best, "--save_similarity",
                      "--eval_batch_size", 3)
    ranks = tiny.start_ranks(2, trainer.main, argv, log=tmp_path / "log")
    assert [tiny.wait(process) for process in ranks] == [0, 0]
    assert np.abs(matrices(tmp_path / "ranks") - of_run).max() < 1e-5
    assert tiny.results(tmp_path / "ranks")[-1]["eval_precision"] == "fp32"


@pytest.mark.parametrize("recipe", ["modern", "reported"])
def test_the_format_of_training_can_be_asked_for_and_is_another(corpus, trained, tmp_path, recipe):
    """Else the test above could not fail."""
    best, of_run = trained / recipe / "best.pt", matrices(trained / recipe)
    for asked in ("train", "bf16"):
        scores = evaluated(corpus, tmp_path / asked, best, "--precision", "bf16", "--eval_precision", asked)
        assert 1e-5 < np.abs(scores - of_run).max() < 0.1
        assert tiny.results(tmp_path / asked)[-1]["eval_precision"] == asked


def test_a_checkpoint_does_not_bring_back_the_format_of_an_evaluation(corpus, tmp_path):
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--epochs", 1, "--select_on", "last", "--eval_precision", "bf16"))
    argv = tiny.flags(corpus, tmp_path / "again", "--eval_only", "--checkpoint", tmp_path / "run" / "best.pt")
    assert parse_args(argv).eval_precision == "fp32"


def test_evaluation_in_fp32_leaves_the_fp16_towers_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3).half(), torch.nn.Linear(3, 3))
    before = [(p.dtype, p.clone()) for p in model.parameters()]
    copy = optim.in_fp32(model)
    assert all(p.dtype == torch.float32 for p in copy.parameters())
    assert all(torch.equal(a.float(), b) for (_, a), b in zip(before, copy.parameters()))
    assert all(p.dtype == dtype and torch.equal(p, value) for p, (dtype, value) in zip(model.parameters(), before))
    assert optim.in_fp32(copy) is copy  # nothing is copied for nothing


def test_an_index_that_was_encoded_in_another_format_is_refused(trained):
    """Indexes of before noted the format of training, in which they were encoded."""
    embedder = Embedder.load(trained / "modern", device="cpu")
    of_before = {name: value for name, value in embedder.settings.items() if name != "eval_precision"}
    with pytest.raises(InputError, match="index.db: .*number format bf16 there, fp32 here"):
        embedder.check(of_before, "index.db")
    embedder.check(of_before | {"eval_precision": "fp32"}, "index.db")
