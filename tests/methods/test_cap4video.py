"""narvid.methods.cap4video: both branches against reference_cap4video.py, the two stages, its titles and its runs.

B queries, V videos, K frames of a video, T titles of a video, U distinct titles, L words of a query, D joint dimension.
"""

import json

import numpy as np
import pytest
import reference
import reference_cap4video as loops
import tiny
import torch

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid import InputError
from narvid.methods.cap4video import Cap4Video, Queries, Videos, item_weights, word_token_interaction
from narvid.data.datasets import FrameDataset, collate, load_split
from narvid.towers.tokenizer import Tokenizer
from narvid.data.frames import Picture, load_frame_index
from narvid.data.narrations import load_narrations
from narvid.run.run_dir import load_checkpoint
from narvid.data.titles import load_titles, with_titles
from narvid.data.titles import main as add_titles

B, V, K, T, L = 5, 4, 3, 4, 6


FLAGS = {"titles": None, "max_titles": T, "title_weight": 0.27, "temporal_layers": 2, "dropout": 0.0}


def build(stage="video", *, dim=64, seed=0):
    """A model over tiny towers in float64, every weight of it random and none 0."""
    config = clip.ClipConfig(**tiny.WIDE | {"embed_dim": dim}, quick_gelu=True)
    torch.manual_seed(seed)
    model = Cap4Video(clip.build_towers(config), stage=stage, **FLAGS).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("clip."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def masks(*lengths, size):
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def batch(seed=0):
    """Arguments of `forward` for B queries and V videos: padding everywhere, one video without a title, B != V."""
    rng = np.random.default_rng(seed)
    word_mask = masks(6, 4, 2, 5, 3, size=L)
    tokens = torch.tensor(rng.integers(1, 49405, (B, L))) * word_mask
    tokens[range(B), word_mask.sum(1) - 1] = 49407
    titles = torch.tensor(rng.integers(1, 49405, (7, 5)))
    titles[:, -1] = 49407
    return {"tokens": tokens, "word_mask": word_mask,
            "frames": torch.tensor(rng.integers(0, 256, (V, K, 3, tiny.SIDE, tiny.SIDE)), dtype=torch.uint8),
            "mask": masks(3, 1, 2, 3, size=K), "titles": titles,
            "title_of_slot": torch.tensor(rng.integers(0, 7, (V, T))), "title_mask": masks(4, 2, 0, 1, size=T)}


def encode(model, x):
    with torch.no_grad():
        return (model.encode_queries(x["tokens"], x["word_mask"]),
                model.encode_videos(*(x[name] for name in ("frames", "mask", "titles", "title_of_slot", "title_mask"))))


def scores(model, x, **options):
    return model.score(*encode(model, x), **options)


def second_stage(seed=0):
    """A model of stage titles as the trainer sets it up: a stage video behind it, towers frozen."""
    model = build("titles", seed=seed)
    model.video_is_trained.fill_(True)
    model.clip.requires_grad_(False)
    model.clip.logit_scale.requires_grad_(True)
    return model


# ------------------------------------------------------------------------------------------ the maths, against loops


@pytest.mark.parametrize("dim", [64, 128])
def test_frames_ask_the_titles_and_pass_the_temporal_encoder(dim):
    model, rng = build(dim=dim).eval(), np.random.default_rng(1)
    frames, titles = rng.normal(size=(V, K, dim)), rng.normal(size=(V, T, dim))
    x = batch()
    with torch.no_grad():
        got = model.enhance(torch.tensor(frames), torch.tensor(titles), x["mask"], x["title_mask"]).numpy()
    for v in range(V):
        real = x["mask"][v].numpy()
        want = loops.enhance(arrays(model), frames[v], titles[v], real, x["title_mask"][v].numpy())
        np.testing.assert_allclose(got[v][real], want[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])  # torch takes other kernels in evaluation
@pytest.mark.parametrize("dim", [64, 128])
def test_titles_are_pooled_as_described(dim, training):
    model, x = build("titles", dim=dim).train(training), batch()
    titles = np.random.default_rng(2).normal(size=(V, T, dim))
    with torch.set_grad_enabled(training):
        got = model.titles.pool(torch.tensor(titles), x["title_mask"]).detach().numpy()
    want = [loops.pool_titles(arrays(model), titles[v], x["title_mask"][v].numpy()) for v in range(V)]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["word_weight_mlp", "frame_weight_mlp"])
def test_words_and_frames_are_weighted_without_a_temperature(name):
    model, items = build(), np.random.default_rng(3).normal(size=(B, L, 64))
    mask = masks(6, 1, 3, 2, 5, size=L)
    got = item_weights(getattr(model, name), torch.tensor(items), mask).detach().numpy()
    want = [loops.item_weights(arrays(model), name, items[i], mask[i].numpy()) for i in range(B)]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-9, atol=1e-12)


def random_features(seed=0, dim=8, queries=B, videos=V):
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.integers(0, K, (videos, 1)) >= np.arange(K))
    word_mask = torch.tensor(rng.integers(1, L, (queries, 1)) >= np.arange(L))

    def draw(*shape):
        return torch.tensor(rng.normal(size=shape))

    def weights(mask):
        return draw(*mask.shape).exp() * mask / mask.sum(1, keepdim=True)

    return (Queries(draw(queries, L, dim), word_mask, weights(word_mask), draw(queries, dim)),
            Videos(draw(videos, K, dim), mask, weights(mask), draw(videos, dim)))


@pytest.mark.parametrize("block", [None, 1, 2, 3, 100])
def test_word_token_interaction_in_any_tiles(block):
    queries, videos = random_features()
    videos.mask[1], videos.frame_weights[1] = False, 0  # a video without one real frame
    got = word_token_interaction(queries, videos, block=block)
    want = [[loops.word_token_interaction(*(x[b].numpy() for x in queries[:3]), *(x[v].numpy() for x in videos[:3]))
             for v in range(V)] for b in range(B)]
    np.testing.assert_allclose(got.numpy(), np.array(want), rtol=1e-9, atol=1e-12)


def test_masked_items_do_not_compete_with_zero():
    """All cosines below 0: the release's zeros would win, ours is the best real one."""
    words, frames = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[-1.0, 0.1], [9.0, 9.0]]])
    one = torch.tensor([[1.0, 0.0]])
    score = word_token_interaction(Queries(words, one.bool(), one, None), Videos(frames, one.bool(), one, None))
    assert score.item() == pytest.approx(reference.cosine([1, 0], [-1, 0.1]))


def test_the_title_branch_has_its_own_end_of_clips_text_tower():
    model, x = build("titles"), batch()
    state = {name.removeprefix("clip."): value for name, value in arrays(model).items() if name.startswith("clip.")}
    state |= {name: arrays(model)[f"titles.clip.{name}"] for name in (
        "ln_final.weight", "ln_final.bias", "text_projection")}
    with torch.no_grad():
        got = model.titles.encode(model.clip, x["titles"]).numpy()
    want = [reference.clip_text(state, row)[0] for row in x["titles"].numpy()]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-9, atol=1e-9)
    own, _ = model.clip.encode_text(x["titles"], words=False)
    assert not np.allclose(own.detach().numpy(), got, atol=1e-3)


def test_scores_of_both_branches_and_their_sum():
    model, x = build("titles").eval(), batch()
    queries, videos = encode(model, x)
    got = model.score(queries, videos)
    assert list(got) == ["video", "titles"]
    assert all(s.shape == (B, V) for s in got.values())
    want = np.array([[loops.title_score(queries.eos[b].numpy(), videos.titles[v].numpy()) for v in range(V)]
                     for b in range(B)])
    np.testing.assert_allclose(got["titles"].numpy(), want, rtol=1e-9, atol=1e-12)
    assert (want[:, 2] == 0).all() and (want[:, 0] != 0).all()  # video 2 has no title
    table = dict(model.combine(got, 0.5))
    assert list(table) == ["S_qv", "S_titles", "S_weighted"]
    np.testing.assert_allclose(table["S_weighted"], loops.fuse(got["video"].numpy(), want, 0.27), rtol=1e-9)
    assert list(dict(model.combine({"video": got["video"]}, 0.5))) == ["S_qv"]


def test_the_loss_is_symmetric_cross_entropy_on_the_scaled_cosines():
    model, s = build(), np.random.default_rng(5).uniform(-1, 1, (V, V))
    got = model.loss({"video": torch.tensor(s)}, torch.tensor(20.0), None)
    assert list(got) == ["nce_video"]
    assert got["nce_video"].item() == pytest.approx(reference.nce(s, 20.0))


# -------------------------------------------------------------------------------------------------------- properties


def test_padding_and_the_order_of_videos_change_nothing():
    model, x = build("titles").eval(), batch()
    want = scores(model, x)
    more = {"tokens": 0, "word_mask": False, "frames": 77, "mask": False, "title_of_slot": 3, "title_mask": False}
    padded = x | {name: torch.cat([x[name], torch.full_like(x[name][:, :1], value)], dim=1)
                  for name, value in more.items()}
    model.titles.positions = torch.nn.Parameter(torch.cat([model.titles.positions, torch.randn(1, 64).double()]))
    order = torch.tensor([2, 0, 3, 1])
    moved = x | {name: x[name][order] for name in ("frames", "mask", "title_of_slot", "title_mask")}
    for view in ("video", "titles"):
        torch.testing.assert_close(scores(model, padded)[view], want[view])
        torch.testing.assert_close(scores(model, moved)[view], want[view][:, order])


def test_a_pairs_score_depends_on_this_pair_alone():
    """So no score can know which pair is right."""
    model = build("titles")
    queries, videos = random_features()
    whole = model.score(queries, videos)
    some = model.score(Queries(*(x[[3, 1]] for x in queries)), Videos(*(x[[2, 0, 1]] for x in videos)))
    for view in ("video", "titles"):
        torch.testing.assert_close(some[view], whole[view][[3, 1]][:, [2, 0, 1]])


def test_random_features_are_found_by_chance_only():
    model, hits, seeds = build("titles"), {"video": 0, "titles": 0}, 40
    for seed in range(seeds):
        for view, s in model.score(*random_features(seed, queries=20, videos=10)).items():
            hits[view] += (s.argmax(dim=1) == torch.arange(20) % 10).sum().item()
    for view, count in hits.items():  # binomial: 800 draws at 1 / 10, five standard deviations
        assert abs(count / (20 * seeds) - 0.1) < 5 * (0.09 / 800) ** 0.5, view


# -------------------------------------------------------------------------------------------------------- two stages


def train_step(model, x, optimizer=None):
    """Loss of V pairs (of the B queries the first V), its gradients, a step where an optimiser is given."""
    queries, videos, scale = model(x["tokens"][:V], x["word_mask"][:V], *(x[name] for name in (
        "frames", "mask", "titles", "title_of_slot", "title_mask")))
    parts = model.loss(model.score(queries, videos), scale, None)
    sum(parts.values()).backward()
    if optimizer:
        optimizer.step()
    return parts


@pytest.mark.parametrize("stage", ["video", "titles"])
def test_every_parameter_that_is_trained_gets_a_gradient(stage):
    model = build() if stage == "video" else second_stage()
    parts = train_step(model, batch())
    assert list(parts) == [f"nce_{stage}"]
    dead = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # A key's bias and the last bias before a softmax shift every logit alike: their gradient is 0 but for rounding.
    assert dead <= {"co_attention.key.bias", "word_weight_mlp.2.bias", "frame_weight_mlp.2.bias"}, dead
    branch = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("clip.")]
    assert branch and all(name.startswith("titles.") == (stage == "titles") for name in branch)


def test_stage_titles_leaves_the_video_branch_as_it_is():
    model, x = second_stage(), batch()
    before = scores(model.eval(), x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model.train(), x, optimizer)
    after = scores(model.eval(), x)
    assert torch.equal(before["video"], after["video"])
    assert (before["titles"] - after["titles"]).abs().max() > 1e-4


def test_stage_video_leaves_to_the_title_branch_what_clip_came_with():
    config = clip.ClipConfig(**tiny.WIDE)
    towers = clip.build_towers(config)
    start = towers.text_projection.detach().clone()
    model = Cap4Video(towers, stage="video", **FLAGS)
    assert not model.video_is_trained
    train_step(model, batch(), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert model.video_is_trained and not torch.equal(towers.text_projection, start)
    assert torch.equal(model.titles.clip.text_projection, start)
    second = Cap4Video(clip.build_towers(config), stage="titles", **FLAGS)
    clip.load_weights(second, model.state_dict(), source="best.pt")  # one checkpoint serves both stages
    assert second.video_is_trained and torch.equal(second.titles.clip.text_projection, start)


def test_stage_titles_without_its_first_stage_is_refused():
    model = second_stage()
    model.clip.text_projection.requires_grad_(True)
    with pytest.raises(InputError, match="add --freeze_towers"):
        train_step(model, batch())
    model.video_is_trained.fill_(False)
    with pytest.raises(InputError, match="name its best.pt with --checkpoint"):
        train_step(model, batch())


# ------------------------------------------------------------------------------------------------- titles of a corpus


def write_titles(path, videos):
    """Cap4Video's form of test files: as many titles a video as it likes, the best first."""
    path.write_text(json.dumps({video: [f"title {n} of {video}" for n in range(count)] for video, count in videos}))
    return path


def test_titles_come_from_several_files_and_from_narrations(tmp_path, corpus):
    known = {"a", "b.c"}
    first, second = write_titles(tmp_path / "1.json", [("a.mp4", 5)]), write_titles(tmp_path / "2.json", [("b.c", 2)])
    got = load_titles([first, second], known, max_titles=3)
    assert got == {"a": [f"title {n} of a.mp4" for n in range(3)], "b.c": ["title 0 of b.c", "title 1 of b.c"]}
    (tmp_path / "blank.json").write_text(json.dumps({"a": ["", "one", " "]}))
    assert load_titles([tmp_path / "blank.json"], known, 3) == {"a": ["one"]}
    with pytest.raises(InputError, match="2.json: b.c has titles in another of the files too"):
        load_titles([second, second], known, 3)

    narrations = load_narrations(corpus / "narrations.jsonl")
    got = load_titles([corpus / "narrations.jsonl"], narrations, max_titles=2)
    for video, narration in narrations.items():
        distinct = list(dict.fromkeys(s for s in narration.sentences if s.strip()))
        assert got[video] == ([distinct[0], distinct[-1]] if len(distinct) > 2 else distinct)


def test_a_split_gets_the_titles_of_its_videos(corpus):
    times = load_frame_index(corpus / "frames")
    split = load_split(corpus / "test.jsonl", corpus / "frames", times, max_frames=3)
    titles = {video: [f"of {video}"] for video in split.videos}
    whole = with_titles(split, titles, paths=["t.json"])
    assert whole.titles == [[f"of {video}"] for video in split.videos] and whole.queries == split.queries
    assert (whole.video_of_query == split.video_of_query).all() and whole.picks == split.picks
    gone = split.videos[1]
    with pytest.raises(InputError, match=f"t.json: no title for 1 of 11 videos, the first is {gone}; .*--titles"):
        with_titles(split, titles | {gone: []}, paths=["t.json"])
    left = with_titles(split, titles | {gone: []}, paths=["t.json"], missing="skip-video")
    assert left.skipped == [gone] and left.videos == [video for video in split.videos if video != gone]
    pairs = [(split.videos[v], query) for v, query in zip(split.video_of_query, split.queries)]
    assert [(left.videos[v], query) for v, query in zip(left.video_of_query, left.queries)] == [
        pair for pair in pairs if pair[0] != gone]
    assert [left.titles[v] for v in left.video_of_query] == [[f"of {video}"] for video, _ in pairs if video != gone]
    assert [len(p) for p in left.picks] == [len(p) for p, video in zip(split.picks, split.videos) if video != gone]


def test_a_batch_carries_titles_whatever_the_number_of_frames(corpus):
    times = load_frame_index(corpus / "frames")
    split = load_split(corpus / "test.jsonl", corpus / "frames", times, max_frames=3)
    titles = {video: [f"{n} of {video}" for n in range(1 + i % 5)] + ["all have it"]
              for i, video in enumerate(split.videos)}
    split = with_titles(split, titles, paths=["t.json"])
    dataset = FrameDataset(split, np.arange(11), Picture(tiny.SIDE))
    got = collate([dataset[i] for i in (4, 0)], split=split, tokenize=Tokenizer({}), max_words=20,
                  max_frames=3, with_queries=False)
    assert got.frames.shape[:2] == got.mask.shape == (2, 3)
    assert got.sentence_of_frame.shape == got.narration_mask.shape == (2, 6)
    assert got.narration_mask.sum(1).tolist() == [6, 2] and len(got.sentences) == 7  # one title is of both
    for row, video in enumerate((4, 0)):
        tokens, _ = Tokenizer({})(split.titles[video], 20)
        assert torch.equal(got.sentences[got.sentence_of_frame[row][got.narration_mask[row]]], tokens)


def test_the_best_title_becomes_an_extra_training_pair(tmp_path, corpus, capsys):
    videos = [json.loads(line)["video"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    titles = write_titles(tmp_path / "t.json", [(video, 3) for video in dict.fromkeys(videos) if video != "train2"])
    (tmp_path / "c").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "c" / name).write_text((corpus / name).read_text())
    (tmp_path / "c" / "prepared.json").write_text(json.dumps({"queries": {"train": 39}, "missing": ["x"]}))
    add_titles(["--titles", str(titles), "--corpus", str(tmp_path / "c"), "--out", str(tmp_path / "out")])
    assert "12 pairs added, 1 training videos have no title" in capsys.readouterr().out
    before, after = ((tmp_path / folder / "train.jsonl").read_text().splitlines() for folder in ("c", "out"))
    assert after[:39] == before and [json.loads(line) for line in after[39:]] == [
        {"video": video, "query": f"title 0 of {video}"} for video in dict.fromkeys(videos) if video != "train2"]
    assert (tmp_path / "out" / "test.jsonl").read_text() == (corpus / "test.jsonl").read_text()
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == {
        "queries": {"train": 51}, "missing": ["x"], "title_pairs": 12}
    assert not list((tmp_path / "out").glob("*.tmp"))
    for argv, words in ((["--corpus", tmp_path / "c", "--out", tmp_path / "c"], "--out .*is the corpus itself"),
                        (["--corpus", tmp_path / "out", "--out", tmp_path / "b"], None)):
        if words:
            with pytest.raises(SystemExit, match=f"^error: {words}"):
                add_titles(["--titles", str(titles), *map(str, argv)])
    with pytest.raises(SystemExit, match="^error: .*none of its 13 videos has a title"):
        add_titles(["--titles", str(write_titles(tmp_path / "no.json", [("other", 1)])), "--corpus",
                    str(tmp_path / "c"), "--out", str(tmp_path / "b")])


# ---------------------------------------------------------------------------------------------------------- a real run


def test_the_trainer_runs_both_stages_and_evaluates_them_again(corpus, tmp_path):
    titles = ["--method", "cap4video", "--titles", corpus / "narrations.jsonl"]
    own = [*titles, "--max_titles", 4, "--epochs", 1, "--select_on", "last"]
    second = ["--stage", "titles", "--freeze_towers", "--checkpoint", tmp_path / "video" / "best.pt"]
    video = trainer.main(tiny.flags(corpus, tmp_path / "video", *own))
    both = trainer.main(tiny.flags(corpus, tmp_path / "titles", *own, *second))
    assert list(video) == ["S_qv"] and list(both) == ["S_qv", "S_titles", "S_weighted"]
    assert both["S_qv"] == video["S_qv"]  # the video branch stood still
    one, two = (load_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("video", "titles"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed and all(name.startswith("titles.") or name == "clip.logit_scale" for name in changed)
    assert trainer.main([str(x) for x in (
        *titles, "--eval_only", "--checkpoint", tmp_path / "titles" / "best.pt", "--data_dir", corpus,
        "--num_workers", 0, "--output_dir", tmp_path / "again", "--eval_batch_size", 7)]) == both
