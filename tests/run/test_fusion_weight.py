"""--fusion_weight val: chosen on val and never on test, said in every result, kept by best.pt, refused without val."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid import InputError, Retriever
from narvid.evaluation import WEIGHTS, choose_weight
from narvid.fusion import combine, fuse
from narvid.metrics import text_to_video_ranks
from narvid.report import gallery, tables
from narvid.run.run_dir import load_checkpoint


def results(run):
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def test_the_weight_is_the_best_of_the_grid():
    rng = np.random.RandomState(0)
    truth = np.arange(40)
    strong, weak = (torch.tensor(np.eye(40) * by + rng.randn(40, 40)) for by in (3.0, 1.5))
    scores = {"video": strong, "narration": weak}
    found = {w: [int((text_to_video_ranks(fuse(strong, weak, w).numpy(), truth) <= k).sum()) for k in (1, 5, 10)]
             for w in WEIGHTS}
    best = choose_weight(scores, truth, combine)
    assert found[best] == max(found.values()) and 0.5 < best < 1 and found[best][0] > found[0.5][0]
    # Cap4Video's published matrices are such a pair: 0.8 to 0.2 beats equal weights (docs/training.md).
    assert choose_weight({"video": weak, "narration": strong}, truth, combine) < 0.5
    assert choose_weight({"video": strong, "narration": strong}, truth, combine) == 0.5  # all alike: Eq. 11's own


@pytest.fixture(scope="module")
def chosen(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("chosen") / "run"
    trainer.main(tiny.flags(corpus, run, "--fusion_weight", "val", "--save_similarity", "--seed", 3))
    return run


def test_the_result_says_what_was_chosen_and_that_it_is_vals_choice(corpus, chosen, tmp_path):
    *of_epochs, final = results(chosen)
    assert final["fusion_weight_on"] == "val" and final["split"] == "test" and of_epochs[0]["split"] == "val"
    best = max(of_epochs, key=lambda r: r["metrics"]["S_fusion"]["text_to_video"]["R@1"])
    assert final["fusion_weight"] == best["fusion_weight"]
    # The table is fused with this weight, and val, scored as if it were the test split, chooses it.
    with np.load(chosen / "similarity.npz") as saved:
        fused = fuse(*(torch.tensor(saved[name]) for name in ("S_qv", "S_qn")), final["fusion_weight"]).numpy()
        ranks = text_to_video_ranks(fused, saved["video_of_query"])
    assert final["metrics"]["S_fusion"]["text_to_video"]["R@1"] == pytest.approx(100 * float((ranks <= 1).mean()))
    other = tmp_path / "data"
    other.mkdir()
    shutil.copy(corpus / "val.jsonl", other / "test.jsonl")
    more = ("--frames", corpus / "frames", "--narrations", corpus / "narrations.jsonl", "--data_dir", other)
    trainer.main(tiny.flags(corpus, tmp_path / "val", "--eval_only", "--checkpoint", chosen / "best.pt",
                            "--save_similarity", *more))
    with np.load(tmp_path / "val" / "similarity.npz") as saved:
        of_val = {"video": torch.tensor(saved["S_qv"]), "narration": torch.tensor(saved["S_qn"])}
        assert choose_weight(of_val, saved["video_of_query"], combine) == final["fusion_weight"]
    assert f"fusion weight {final['fusion_weight']:g}, chosen on val" in (chosen / "log.txt").read_text()


def test_the_choice_never_reads_the_test_split(corpus, chosen, tmp_path):
    """With the test videos' sentences given to the wrong videos, another test result, the same weight."""
    other = tmp_path / "data"
    shutil.copytree(corpus, other)
    lines = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    videos = [line["video"] for line in lines]
    (other / "test.jsonl").write_text("".join(json.dumps({"video": video, "query": line["query"]}) + "\n"
                                              for video, line in zip([*videos[5:], *videos[:5]], lines)))
    trainer.main(tiny.flags(other, tmp_path / "run", "--eval_only", "--checkpoint", chosen / "best.pt",
                            "--clip_model", corpus / "clip.json", "--fusion_weight", "val"))
    [again], [*_, final] = results(tmp_path / "run"), results(chosen)
    assert again["fusion_weight"] == final["fusion_weight"] and again["fusion_weight_on"] == "val"
    assert again["metrics"] != final["metrics"]


@pytest.mark.parametrize("select_on", ["val", "last", "test"])
def test_best_holds_the_number_whatever_chose_the_epoch(corpus, chosen, tmp_path, select_on):
    run = chosen
    if select_on != "val":
        run = tmp_path / "run"
        trainer.main(tiny.flags(corpus, run, "--fusion_weight", "val", "--select_on", select_on, "--epochs", 1))
    *_, final = results(run)
    weight = load_checkpoint(run / "best.pt")["args"]["fusion_weight"]
    assert weight == final["fusion_weight"] and load_checkpoint(run / "last.pt")["args"]["fusion_weight"] == "val"
    trainer.main(tiny.flags(corpus, tmp_path / "again", "--eval_only", "--checkpoint", run / "best.pt"))
    [again] = results(tmp_path / "again")
    assert again["metrics"] == final["metrics"] and again.get("fusion_weight", 0.5) == weight
    assert "fusion_weight_on" not in again
    assert Retriever.load(run, device="cpu").flags.fusion_weight == weight
    assert gallery.trainer_args(run, str(corpus), tmp_path / "page").fusion_weight == weight


def test_a_run_that_goes_on_chooses_the_same(corpus, chosen, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chosen, run)
    before = results(run)
    (run / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in before[:-1]))  # a kill
    trainer.main(tiny.flags(corpus, run, "--fusion_weight", "val", "--save_similarity", "--seed", 3, "--resume",
                            "auto"))
    assert results(run) == before
    with pytest.raises(SystemExit, match="--fusion_weight val there, 0.4 here"):
        trainer.main(tiny.flags(corpus, run, "--fusion_weight", 0.4, "--save_similarity", "--seed", 3, "--resume",
                                "auto"))


def test_tables_say_it(chosen):
    runs, _ = tables.read_runs(chosen.parent)
    [run] = runs
    assert "chosen on val" in tables.describe(run)


def test_refusals(corpus, chosen, tmp_path):
    def said(data, *more):
        with pytest.raises(SystemExit) as left:
            trainer.main(tiny.flags(data, tmp_path / "run", "--fusion_weight", "val", *more))
        return str(left.value)

    other = tmp_path / "data"
    other.mkdir()
    assert "val.jsonl" in said(other, "--select_on", "last") and "best.pt" in said(other, "--select_on", "last")
    assert "nothing to weigh" in said(corpus, "--modules")
    with pytest.raises(InputError, match="best.pt"):
        Retriever.load(chosen / "last.pt", device="cpu")
