"""The trainer as a whole, on CPU: main([...]) on a tiny corpus of real files, one process. Resuming is in
test_resume.py, several processes in test_distributed.py, real clips in test_real_msrvtt.py.

B queries, V videos, K frames of a video and sentences of its narration.
"""

import json
import re

import numpy as np
import pytest
import reference
import tiny
import torch
import yaml

import main_task_retrieval as trainer
from narvid import fusion
from narvid import losses as losses_module
from narvid.distributed import World
from narvid.metrics import NAMES, retrieval_metrics
from narvid.run.settings import build_parser

ALONE = World(0, 1, torch.device("cpu"))
MATRICES = ["S_qv", "S_qn", "S_sum", "S_fusion"]


def load(path):
    """A checkpoint, as anybody may load it."""
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def full_run(corpus, tmp_path_factory):
    """An ordinary run with all that the final evaluation can add -> (what main returned, its folder)."""
    folder = tmp_path_factory.mktemp("full") / "run"
    returned = trainer.main(tiny.flags(corpus, folder, "--save_similarity", "--dsl_scale", 20, "--qb_norm_queries", 7,
                                       "--fusion_weight", 0.3, "--clip_model", corpus / "wide.json"))
    return returned, folder


# ------------------------------------------------------------------------------------------------- the run directory


def test_main_returns_four_matrices_in_both_directions(full_run):
    returned, _ = full_run
    assert list(returned) == MATRICES
    for metrics in returned.values():
        assert list(metrics) == ["text_to_video", "video_to_text"]
        assert all(list(m) == ["R@1", "R@5", "R@10", "MdR", "MnR"] for m in metrics.values())


def test_run_directory_holds_what_it_promises(full_run):
    _, run = full_run
    files = {"config.yaml", "log.txt", "results.jsonl", "last.pt", "best.pt", "similarity.npz", "ranks.csv"}
    assert {p.name for p in run.iterdir()} == files | {".lock"}
    text = (run / "config.yaml").read_text()
    assert text.startswith("# commit: ") and len(text.splitlines()[0]) > len("# commit: ")
    flags = {action.dest for action in build_parser()._actions} - {"help"}
    config = yaml.safe_load(text)
    assert set(config) == flags and config["clip_lr"] == 1e-3 and config["select_on"] == "val"

    losses = tiny.losses(run)
    assert len(losses) == 4 and np.isfinite(losses).all()
    results = tiny.results(run)
    assert [(r["split"], r.get("epoch"), r.get("final")) for r in results] == [
        ("val", 1, None), ("val", 2, None), ("test", 1, True)]  # the first epoch was the better one
    assert "S_fusion" in (run / "log.txt").read_text()


def test_checkpoints_load_without_pickle_and_hold_what_a_resume_needs(full_run):
    _, run = full_run
    last, best = load(run / "last.pt"), load(run / "best.pt")
    both = {"model", "clip_config", "args", "epoch", "step", "global_step", "best", "results"}
    assert both <= last.keys() & best.keys()
    assert {"optimizer", "scaler"} <= last.keys() and not {"optimizer", "scaler"} & best.keys()
    assert (last["epoch"], last["step"], last["global_step"]) == (2, 0, 4)
    assert all(x.isfinite().all() for x in last["model"].values())


def test_best_is_the_best_on_val(full_run):
    _, run = full_run
    scores = [r["metrics"]["S_fusion"]["text_to_video"]["R@1"] for r in tiny.results(run)[:-1]]
    best = load(run / "best.pt")
    assert best["epoch"] == 1 + scores.index(max(scores)) and best["best"] == max(scores)


# -------------------------------------------------------------------------------------------------------- evaluation


def test_saved_matrices_give_the_reported_numbers(full_run):
    returned, run = full_run
    arrays, result = np.load(run / "similarity.npz"), tiny.results(run)[-1]
    s_video, s_narration, of_query = arrays["S_qv"], arrays["S_qn"], arrays["video_of_query"]
    assert s_video.shape == s_narration.shape == (26, 11) == (len(arrays["queries"]), len(arrays["videos"]))
    assert (result["queries"], result["videos"]) == (26, 11)  # as many queries as a video happens to have

    fused = reference.fuse(s_video, s_narration, 0.3)
    for name, matrix in zip(MATRICES, (s_video, s_narration, s_video + s_narration, fused)):
        assert result["metrics"][name] == returned[name]
        for direction, numbers in reference.retrieval_metrics(matrix, of_query).items():
            assert returned[name][direction] == pytest.approx(numbers)


@pytest.mark.parametrize("k", [1, 4])
def test_mean_number_of_frames_kept_stands_in_the_result(corpus, weights, tmp_path, k):
    """Table 4's numbers in parentheses, where they are known: top-k keeps k of a video's n frames, or all n < k."""
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--eval_only", "--checkpoint", weights, "--filter", "topk",
                            "--filter_k", k))
    split = trainer.load_data(trainer.parse_args(tiny.flags(corpus, tmp_path / "none")), ALONE)["test"]
    want = np.mean([min(len(picks), k) for picks in split.picks])
    of_sentences = np.mean([min(sum(s is not None for s in texts), k) for texts in split.sentences])
    kept = tiny.results(tmp_path / "run")[-1]["frames_kept"]
    assert kept == pytest.approx({"video": want, "narration": of_sentences})


def test_the_kept_frames_of_a_query_are_printed(corpus, weights, tmp_path):
    """For a query of the split: the videos in the order of its row, and k frames and sentences of each."""
    split = trainer.load_data(trainer.parse_args(tiny.flags(corpus, tmp_path / "none")), ALONE)["test"]
    query = split.queries[5]
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--eval_only", "--checkpoint", weights, "--filter", "topk",
                            "--filter_k", 2, "--save_similarity", "--show_kept", query))
    log = (tmp_path / "run" / "log.txt").read_text()
    blocks = re.split(r"^ +\d+\. ", log[log.index(f"{query}:"):].split("\ntest:")[0], flags=re.MULTILINE)[1:]
    arrays = np.load(tmp_path / "run" / "similarity.npz")
    fused = reference.fuse(arrays["S_qv"], arrays["S_qn"], 0.5)[5]
    best = [split.videos[v] for v in np.argsort(-fused)[:3]]
    assert [block.split()[0] for block in blocks] == best
    for block, video in zip(blocks, best):
        v = split.videos.index(video)
        assert len(re.findall(r"% frame (\d+)$", block, re.MULTILINE)) == min(2, len(split.picks[v]))
        texts = [text for text in split.sentences[v] if text is not None]
        assert len(re.findall(r"% a picture", block)) == min(2, len(texts))
        assert all(text in texts for text in re.findall(r"% (a picture.*)$", block, re.MULTILINE))


def test_post_processed_results_stand_in_columns_of_their_own(full_run, corpus):
    _, run = full_run
    arrays, result = np.load(run / "similarity.npz"), tiny.results(run)[-1]
    views = [torch.from_numpy(arrays[name]) for name in ("S_qv", "S_qn")]
    assert list(result["dsl"]) == list(result["qb_norm"]) == MATRICES
    for direction, over in (("text_to_video", "queries"), ("video_to_text", "videos")):
        fused = fusion.fuse(*(fusion.dsl(s, 20.0, over) for s in views), 0.3)
        expected = retrieval_metrics(fused.numpy(), arrays["video_of_query"])
        assert result["dsl"]["S_fusion"][direction] == expected[direction]
    assert result["dsl"]["S_qv"] != result["metrics"]["S_qv"]
    assert all(list(table) == ["text_to_video"] for table in result["qb_norm"].values())
    log = (run / "log.txt").read_text()
    assert "after DSL" in log and "after QB-Norm" in log


def test_ndcg_stands_beside_the_other_metrics_where_it_is_asked_for(corpus, weights, tmp_path):
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--eval_only", "--checkpoint", weights, "--save_similarity",
                            "--ndcg", "--dsl_scale", 20, "--qb_norm_queries", 3))
    arrays, [result] = np.load(tmp_path / "run" / "similarity.npz"), tiny.results(tmp_path / "run")
    wanted = [reference.ndcg_at_10(s, v) for s, v in zip(arrays["S_qn"], arrays["video_of_query"])]
    assert result["metrics"]["S_qn"]["text_to_video"]["nDCG@10"] == pytest.approx(np.mean(wanted))
    for tables in ("metrics", "dsl", "qb_norm"):
        assert all("nDCG@10" in metrics for table in result[tables].values() for metrics in table.values())
    head, names, row = (tmp_path / "run" / "log.txt").read_text().splitlines()[1:4]
    assert names.split("|")[1].split() == [*NAMES, "nDCG@10"] and head.index("|") == names.index("|") == row.index("|")
    assert len(names) == len(row)
    assert row.split("|")[1].split()[-1] == f"{result['metrics']['S_qv']['text_to_video']['nDCG@10']:.1f}"


def test_checkpoint_alone_says_how_to_evaluate_it(corpus, tmp_path):
    model_flags = ["--modules", "NM", "QAF", "--filter", "topk", "--filter_k", 2, "--max_words", 9, "--max_frames", 4,
                   "--temperature", 0.3, "--fidelity", "paper", "--fusion_weight", 0.8, "--select_on", "test"]
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--epochs", 1, "--save_similarity", *model_flags))
    again = trainer.main(["--eval_only", "--checkpoint", str(tmp_path / "run" / "best.pt"), "--data_dir", str(corpus),
                          "--num_workers", "0", "--output_dir", str(tmp_path / "again"), "--save_similarity",
                          "--eval_batch_size", "5"])
    there, here = tiny.results(tmp_path / "run")[-1], tiny.results(tmp_path / "again")[-1]
    assert again == there["metrics"] and here == there  # also the split that chose the epoch
    for name in ("S_qv", "S_qn"):
        assert np.array_equal(*(np.load(tmp_path / run / "similarity.npz")[name] for run in ("run", "again")))


def test_epoch_is_chosen_on_what_was_asked_for(corpus, tmp_path):
    last, test = tmp_path / "last", tmp_path / "test"
    trainer.main(tiny.flags(corpus, last, "--select_on", "last"))
    assert [(r["split"], r["select_on"]) for r in tiny.results(last)] == [("test", "last")]
    states = [load(last / name)["model"] for name in ("last.pt", "best.pt")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    trainer.main(tiny.flags(corpus, test, "--select_on", "test", "--eval_every", 1))
    *rounds, final = tiny.results(test)
    assert {r["split"] for r in rounds} == {"test"}
    assert [(r["epoch"], r["step"]) for r in rounds] == [(0, 1), (1, 0), (1, 1), (2, 0)]
    assert final["select_on"] == "test" and "epoch chosen on test" in (test / "log.txt").read_text()
    scores = [r["metrics"]["S_fusion"]["text_to_video"]["R@1"] for r in rounds]
    assert final["metrics"] == rounds[scores.index(max(scores))]["metrics"]


def test_of_equally_good_epochs_the_first_is_taken(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "selection_score", lambda result: 50.0)
    trainer.main(tiny.flags(corpus, tmp_path / "run"))
    assert load(tmp_path / "run" / "best.pt")["epoch"] == 1


def test_without_val_the_last_epoch_is_taken(corpus, tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    flags = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    assert trainer.parse_args(flags).select_on == "last"
    with pytest.raises(SystemExit, match="there is no .*val.jsonl"):
        trainer.parse_args([*flags, "--select_on", "val"])


# -------------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def reference_parts(step):
    """The loss parts of the first step, from the model's features on, in numpy; the mean of the micro-batches."""
    args, totals = step.args, {}
    narrated = "NM" in args.modules
    method = args.filter if "QAF" in args.modules else "uniform"
    for batch in step.batches:
        queries, videos, scale = step.model(batch.tokens, batch.word_mask, batch.frames, batch.mask, batch.sentences,
                                            batch.sentence_of_frame, batch.narration_mask)
        if not narrated:
            queries = queries._replace(word_weights=torch.zeros_like(queries.words[..., 0]))  # nobody reads them
        of_queries = [x.double().numpy() for x in queries]
        views = {"video": (videos.frames, videos.mask)} | ({"narration": videos[1::2]} if narrated else {})
        s = {view: reference.score_matrix(*of_queries, features.double().numpy(), mask.numpy(), fine_grained=narrated,
                                          fidelity=args.fidelity, method=method, p=args.filter_p, k=args.filter_k,
                                          temperature=args.temperature) for view, (features, mask) in views.items()}
        exclude = (batch.video[:, None] == batch.video).numpy() if args.exclude_same_video else None
        half = 0.5 if args.fidelity == "paper" and narrated else 1
        parts = {f"nce_{view}": half * reference.nce(matrix, scale.item(), exclude) for view, matrix in s.items()}
        if "CVH" in args.modules and args.hard_loss == "hinge":
            hard = reference.cross_view_hard_negative(s["video"], s["narration"], args.lam, args.eta, exclude)
            parts |= {name: args.alpha * value for name, value in hard.items()}
        elif "CVH" in args.modules:
            hard = reference.hard_negative_nce(s["video"], s["narration"], args.lam, scale.item(), exclude)
            parts |= {name: args.alpha * value for name, value in hard.items()}
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value / len(step.batches)
    return totals


@pytest.mark.parametrize("more", [
    *(["--modules", *modules] for modules in tiny.LADDER[:-1]), [], ["--hard_loss", "nce"], ["--fidelity", "paper"],
    ["--filter", "topk", "--filter_k", "2"], ["--filter", "none", "--temperature", "0.3"], ["--exclude_same_video"],
    ["--exclude_same_video", "--hard_loss", "nce", "--gradient_accumulation_steps", "2"],
    ["--lam", "0.4", "--eta", "1.1", "--alpha", "0.5", "--filter_p", "0.7"],
], ids=" ".join)
def test_first_loss_is_that_of_the_reference(corpus, tmp_path, more):
    argv = tiny.flags(corpus, tmp_path / "run", "--dropout", 0, "--epochs", 1, "--select_on", "last", *more)
    trainer.main(argv)
    line = next(x for x in (tmp_path / "run" / "log.txt").read_text().splitlines() if " epoch 1 step 1/2 " in x)
    words = line.split()
    expected = reference_parts(tiny.first_step(argv))
    assert {w for w in words if w[:4] in ("nce_", "hard")} == set(expected)
    for name, value in (expected | {"loss": sum(expected.values())}).items():
        assert float(words[words.index(name) + 1]) == pytest.approx(value, rel=1e-4, abs=1e-4)  # the log has 4 decimals


@pytest.mark.parametrize("modules", tiny.LADDER, ids=lambda modules: "+".join(modules) or "baseline")
def test_every_parameter_learns(corpus, tmp_path, modules):
    step = tiny.first_step(tiny.flags(corpus, tmp_path, "--freeze_layers", -1, "--modules", *modules))
    tiny.take_step(step, step.model, ALONE)
    gradients = {name: p.grad for name, p in step.model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    # A bias before a softmax moves nothing: the attention's key biases, the last of the word weights.
    still = {name for name, g in gradients.items() if g.abs().max() < 1e-7}
    assert all(name.endswith(("key.bias", "word_weight_mlp.2.bias")) for name in still)
    built = {name.split(".")[1] for name in gradients if name.startswith("heads.")}
    assert ("word_weight_mlp" in built) == ("NM" in modules) and ("co_attention" in built) == ("CMI" in modules)


def test_accumulation_is_the_mean_of_the_micro_batches(corpus, tmp_path):
    argv = tiny.flags(corpus, tmp_path, "--dropout", 0, "--gradient_accumulation_steps", 2)
    whole = tiny.first_step(argv)
    tiny.take_step(whole, whole.model, ALONE)
    assert len(whole.batches) == 2
    gradients = {name: p.grad.clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    parts = []
    for batch in whole.batches:
        tiny.take_step(whole._replace(batches=[batch]), whole.model, ALONE)
        parts.append({name: p.grad.clone() for name, p in whole.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-7)


def test_checkpointing_changes_no_gradient(corpus, tmp_path):
    gradients = []
    for more in ([], ["--grad_checkpointing"]):
        step = tiny.first_step(tiny.flags(corpus, tmp_path, "--dropout", 0, *more))
        assert step.model.clip.visual.transformer.grad_checkpointing == bool(more)
        tiny.take_step(step, step.model, ALONE)
        gradients.append({name: p.grad for name, p in step.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


# Losses of 4 steps in fp32 from numpy's weights; they change only where the mathematics of training does.
GOLDEN = [7.8101, 8.1518, 6.6897, 6.4072]


def test_golden_loss_trace(corpus, tmp_path):
    weights = tiny.write_checkpoint(tmp_path / "start.pt", corpus / "wide.json")
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--clip_model", corpus / "wide.json", "--checkpoint", weights,
                            "--dropout", 0, "--select_on", "last"))
    assert tiny.losses(tmp_path / "run") == pytest.approx(GOLDEN, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ optimisation


def moved(weights, run):
    """Names of the parameters that a run has changed."""
    before, after = load(weights)["model"], load(run / "last.pt")["model"]
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("more, frozen", [
    (["--freeze_layers", "-1"], ()),
    ([], ("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding")),
    (["--freeze_layers", "1"],
     ("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding", "resblocks.0.")),
    (["--freeze_towers"],
     ("visual.", "transformer.", "ln_final", "text_projection", "positional_embedding", "token_embedding")),
], ids=str)
def test_frozen_is_what_the_flags_say(corpus, weights, tmp_path, more, frozen):
    run = tmp_path / "run"
    trainer.main(tiny.flags(corpus, run, "--checkpoint", weights, "--select_on", "last", *more))
    names = load(weights)["model"]
    still = {n for n in names if n.startswith("clip.") and any(part in n for part in frozen)}
    assert names.keys() - moved(weights, run) == still


def test_reported_recipe_trains_fp16_towers(corpus, weights, tmp_path):
    run = tmp_path / "run"
    trainer.main(tiny.flags(corpus, run, "--checkpoint", weights, "--recipe", "reported", "--clip_lr", 1e-3))
    last = load(run / "last.pt")
    half = {name for name, x in last["model"].items() if x.dtype == torch.float16}
    assert {"clip.visual.conv1.weight", "clip.text_projection", "clip.transformer.resblocks.1.mlp.c_fc.weight"} <= half
    assert all(name.startswith("clip.") and ".ln_" not in name for name in half)
    assert {x["exp_avg"].dtype for x in last["optimizer"]["state"].values()} == {torch.float16, torch.float32}
    assert not torch.equal(last["model"]["clip.text_projection"], load(weights)["model"]["clip.text_projection"].half())
    again = trainer.main(["--eval_only", "--checkpoint", str(run / "best.pt"), "--data_dir", str(corpus),
                          "--output_dir", str(tmp_path / "again"), "--num_workers", "0", "--eval_batch_size", "5"])
    assert again == tiny.results(run)[-1]["metrics"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_stays_near_fp32(corpus, weights, tmp_path, precision):
    runs = {}
    for name in ("fp32", precision):
        runs[name] = tmp_path / name
        trainer.main(tiny.flags(corpus, runs[name], "--checkpoint", weights, "--dropout", 0, "--select_on", "last",
                                "--epochs", 1, "--precision", name))
    expected, losses = tiny.losses(runs["fp32"]), tiny.losses(runs[precision])
    assert losses == pytest.approx(expected, rel=0.05) and losses != expected
    last = load(runs[precision] / "last.pt")
    assert bool(last["scaler"]) == (precision == "fp16")
    assert {x.dtype for x in last["model"].values()} == {torch.float32}


def test_order_of_samples_and_dropout_come_from_the_seed(corpus, tmp_path):
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        run = tmp_path / str(number)
        trainer.main(tiny.flags(corpus, run, "--seed", seed, "--epochs", 1, "--select_on", "last"))
        losses.append(tiny.losses(run))
    assert losses[0] == losses[1] != losses[2]


def test_cached_frames_and_worker_processes_change_nothing(corpus, weights, tmp_path):
    losses = []
    for name, more in (("plain", []), ("cached", ["--cache_frames", "--num_workers", 1])):
        trainer.main(tiny.flags(corpus, tmp_path / name, "--checkpoint", weights, "--select_on", "last", *more))
        losses.append(tiny.losses(tmp_path / name))
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    run, nce, calls = tmp_path / "run", losses_module.nce, []

    def diverges(s, scale, exclude):
        calls.append(1)
        return nce(s, scale, exclude) * (float("nan") if len(calls) > 2 * 2 else 1)  # two views a step: in step 3

    monkeypatch.setattr(losses_module, "nce", diverges)
    with pytest.raises(SystemExit) as stopped:
        trainer.main(tiny.flags(corpus, run))
    message = str(stopped.value)
    assert message.startswith("error: the loss at epoch 2, step 1 is nan; videos of the batch: train")
    assert load(run / "last.pt")["global_step"] == 2


def test_every_result_counts_the_videos_that_are_missing(corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "val.jsonl", "test.jsonl"):
        (data / name).write_bytes((corpus / name).read_bytes())
    (data / "prepared.json").write_text(json.dumps({"missing": ["test90", "test91"]}))
    lines = (corpus / "narrations.jsonl").read_text().splitlines()
    (data / "narrations.jsonl").write_text("\n".join(x for x in lines if '"test3"' not in x))
    argv = tiny.flags(corpus, tmp_path / "run", "--data_dir", data, "--frames", corpus / "frames", "--epochs", 1,
                      "--select_on", "last", "--batch_size", 32)
    with pytest.raises(SystemExit, match="no narration for video test3"):
        trainer.main(argv)
    trainer.main([*argv[:-2], "--output_dir", str(tmp_path / "skips"), "--missing_narration", "skip-video"])
    result = tiny.results(tmp_path / "skips")[-1]
    assert (result["videos"], result["videos_without_narration"], result["videos_missing"]) == (10, 1, 2)
    log = (tmp_path / "skips" / "log.txt").read_text()
    assert "1 more have no narration; 2 videos of the corpus (all splits) were missing" in log


def test_with_eval_only_the_checkpoint_alone_says_what_chose_its_epoch(corpus, weights, tmp_path):
    argv = tiny.flags(corpus, tmp_path, "--eval_only", "--checkpoint", weights, "--select_on", "test")
    with pytest.raises(SystemExit, match="--select_on is of training"):
        trainer.parse_args(argv)


def test_evaluating_every_n_steps_needs_a_split_that_chooses(corpus, tmp_path):
    with pytest.raises(SystemExit, match="add --select_on val or test"):
        trainer.parse_args(tiny.flags(corpus, tmp_path, "--select_on", "last", "--eval_every", 1))
