"""Several processes (gloo, on CPU) compute what one process computes with the whole batch.

Where everything is float64 and nothing is random, "equal" means to 1e-9; the requirement is 1e-5. N items, W processes.
"""

import os
from functools import partial

import pytest
import tiny
import torch
from torch.nn.parallel import DistributedDataParallel

import main_task_retrieval as trainer
from narvid import InputError, distributed
from narvid.evaluation import Encoding, score_queries
from narvid.data.frames import Picture
from narvid.methods import METHODS
from narvid.model import Queries, Videos
from narvid.towers.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def run_ranks(world_size, function, *args, log):
    """function on all ranks, to its end; a rank that fails fails the test with what it printed."""
    processes = tiny.start_ranks(world_size, function, *args, log=log)
    codes = [tiny.wait(process, timeout=180) for process in processes]
    assert codes == [0] * world_size, "\n".join(p.read_text() for p in sorted(log.parent.glob(f"{log.name}.*")))


# -------------------------------------------------------------------------------------------- one step, in float64


# Forms of a step, then every method (tiny.TRAINED). Their names are words of the tests' ids.
VARIANTS = {"in parts": ["--exclude_same_video", "--micro_batch", "3", "--gradient_accumulation_steps", "2"],
            "accumulated": ["--exclude_same_video", "--gradient_accumulation_steps", "2", "--grad_checkpointing"],
            "scale alone": ["--method", "clip4clip", "--head", "meanP", "--freeze_towers"],
            "siglip towers": [], "timm towers": ["--freeze_layers", "-1"],
            **{" ".join(form[1:]).replace("--", ""): [*form, "--exclude_same_video"] for form in tiny.TRAINED}}
OTHERS = [f"{name} towers" for name in tiny.OTHER_TOWERS]
HINGE = "narvid hard_loss hinge"


def write_step(argv, out, world):
    """On one rank: the trainer's own first step, in float64; its loss, gradients and videos go to <out>.<rank>."""
    step = tiny.first_step(argv, world.rank, world.size)
    step.model.double()
    for module in step.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = DistributedDataParallel(step.model) if world.size > 1 else step.model
    parts = tiny.take_step(step, model, world)
    gradients = {name: p.grad for name, p in step.model.named_parameters() if p.requires_grad}
    torch.save({"parts": parts, "gradients": gradients, "length": step.batches[0].tokens.shape[1],
                "videos": step.batches[0].video}, f"{out}.{world.rank}")
    return step


def write_steps(argv_of, folder):
    """On one rank: the first step of each variant, one after the other in one process group."""
    world = distributed.start()
    for name, argv in argv_of.items():
        write_step(argv, folder / name, world)
    distributed.stop()


@pytest.fixture(scope="module")
def alone(corpus, weights, tmp_path_factory):
    """Variant -> (argv, its first step in one process). NarVid's weights come from numpy."""
    folder, steps, before = tmp_path_factory.mktemp("alone"), {}, None
    bare = tiny.write_checkpoint(folder / "bare.pt", corpus / "clip.json", modules=())
    for name, more in VARIANTS.items():
        start = before if "titles" in more else None  # Cap4Video's second stage goes on from its first
        if name in OTHERS:
            more = [*more, *tiny.towers_of(corpus, name.split()[0])]
            if name == "timm towers":  # with pictures of the tower's own size: timm resizes positions in float32
                (folder / "timm.json").write_text((corpus / "timm.json").read_text().replace(": 48}", ": 160}"))
                more += ["--clip_model", folder / "timm.json"]
        elif "narvid" in more or "--method" not in more:
            start = bare if "--modules" in more else weights
        argv = tiny.flags(corpus, folder, *more, *(["--checkpoint", start] if start else []))
        step = write_step(argv, folder / name, distributed.World(0, 1, torch.device("cpu")))
        steps[name] = argv, torch.load(folder / f"{name}.0")
        before = folder / f"{name}.pt"  # after a step at rate 0
        tiny.save_start(step, before)
    return steps


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Number of processes -> folder with their steps: of all variants for two, of NarVid's hinge for four."""
    folders = {}
    for world_size, names in ((2, [*VARIANTS]), (4, [HINGE])):
        folders[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
        run_ranks(world_size, write_steps, {name: alone[name][0] for name in names}, folders[world_size],
                  log=folders[world_size] / "log")
    return folders


@pytest.mark.parametrize("world_size, variant", [*((2, name) for name in VARIANTS), (4, HINGE)])
def test_loss_and_every_gradient_equal_those_of_one_process(alone, together, world_size, variant):
    argv, expected = alone[variant]
    ranks = [torch.load(together[world_size] / f"{variant}.{rank}") for rank in range(world_size)]

    if variant != "siglip towers":  # which read every text in full length
        assert len({r["length"] for r in ranks}) > 1  # the ranks' longest queries differ: words are never gathered
    if "--exclude_same_video" in argv:
        assert len(expected["videos"].unique()) < len(expected["videos"])  # a video twice in the batch: it matters
    assert expected["gradients"].keys() and all(g.abs().max() < 1e6 for g in expected["gradients"].values())
    for rank in ranks:
        assert rank["parts"] == pytest.approx(expected["parts"], rel=1e-9)
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "in parts"])
def test_encoding_in_parts_gives_the_gradient_of_the_whole_batch(alone, tmp_path, variant):
    """--micro_batch: the negatives stay those of the whole batch, whatever the parts (16 = 5 + 5 + 5 + 1)."""
    argv, expected = alone[variant]
    args = trainer.parse_args(argv)
    if METHODS[args.method].score_has_parameters(args):
        pytest.skip("a score with parameters refuses --micro_batch")
    write_step([*argv, "--micro_batch", "5"], tmp_path / "step", distributed.World(0, 1, torch.device("cpu")))
    got = torch.load(tmp_path / "step.0")
    assert got["parts"] == pytest.approx(expected["parts"], rel=1e-9)
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


# ------------------------------------------------------------------------------------------------------- the helpers


def check_helpers():
    """On one rank: sharing and collecting give back what was shared, for any number of items."""
    world = distributed.start()
    for n in (0, 1, 2, 3, 7, 8, 100):
        shares = [distributed.share(n, world._replace(rank=rank)) for rank in range(world.size)]
        assert [i for part in shares for i in part] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        mine = shares[world.rank]
        whole = torch.arange(6.0 * n).view(n, 3, 2) + 0.5
        for x in (whole, whole.long(), whole.sum(dim=(1, 2)) % 2 > 0, whole.half()):
            got = distributed.collect(x[mine.start:mine.stop], n, world)
            assert got.dtype == x.dtype and torch.equal(got, x)
    assert torch.equal(distributed.gather(torch.tensor([world.rank, 7])), torch.tensor([0, 7, 1, 7, 2, 7]))
    for columns in (3, 4, 8):
        whole = torch.rand(5, columns, generator=torch.Generator().manual_seed(0))
        mine = distributed.share(columns, world)
        joined = distributed.join_columns({"video": whole[:, mine.start:mine.stop]}, world)
        assert torch.equal(joined["video"], whole) if world.rank == 0 else joined == {}
        assert distributed.total(len(mine), world) == columns
    with pytest.raises(distributed.SaidByAll, match="^rank 1 has no disk$"):
        distributed.agree("rank 1 has no disk" if world.rank == 1 else None, world)
    distributed.agree(None, world)
    with pytest.raises(distributed.SaidByAll, match="^rank 2 is late$"), distributed.together(world):
        if world.rank == 2:  # it never comes to the inner one, and its failure is noticed there
            raise InputError("rank 2 is late")
        with distributed.together(world):
            pass
    with pytest.raises(distributed.SaidByAll, match="process 1 sees another run .*step 3 there, 4 on process 0"):
        distributed.check_same({"epoch": 1, "step": 3 if world.rank == 1 else 4}, world)
    assert distributed.highest([world.rank, 7 - world.rank, 0], world) == [2, 7, 0]
    model = torch.nn.Linear(2, 3)
    model.weight.data.fill_(world.rank)
    distributed.spread(model, world)
    assert (model.weight == 0).all()
    distributed.stop()


def test_share_collect_gather_agree(tmp_path):
    run_ranks(3, check_helpers, log=tmp_path / "log")


class LengthModel:
    """A query's feature is the number of its words; a score is that number times the video's."""

    def encode_queries(self, tokens, word_mask):
        assert len(tokens)  # no tower takes an empty batch
        return Queries(word_mask.sum(dim=1, keepdim=True).float(), tokens[..., None].float(), word_mask, None)


def check_scores_of_few_queries():
    """On one of three ranks: two queries, five videos; one rank has no query of its own and still scores both."""
    world = distributed.start()
    mine = distributed.share(5, world)
    videos = Videos(torch.arange(1.0, 6)[mine.start:mine.stop, None, None], None, None, None)

    def score(queries, videos):
        assert not torch.is_autocast_enabled("cpu")  # the towers' number format is not that of scores
        assert len(queries.eos) == 2 and queries.words.shape[1] == 5
        return {"video": queries.eos @ videos.frames[:, 0].T}

    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    encoding = Encoding(Picture(32), Tokenizer({}), 20, 6, 4, 0, autocast, score, ("video",))
    scores = score_queries(LengthModel(), ["a red boat", "boat"], videos, encoding, world)
    expected = torch.tensor([[5.0], [3.0]]) * torch.arange(1.0, 6)
    assert torch.equal(scores["video"], expected) if world.rank == 0 else scores == {}
    distributed.stop()


def test_fewer_queries_than_ranks_are_scored_with_all_videos(tmp_path):
    run_ranks(3, check_scores_of_few_queries, log=tmp_path / "log")


def test_one_process_needs_no_group():
    world = distributed.start()
    assert (world.rank, world.size) == (0, 1) and not torch.distributed.is_initialized()
    x = torch.rand(3, 2)
    videos = Videos(x, None, x, None)
    assert distributed.gather_features(videos) == videos
    assert distributed.gather(x) is x and distributed.collect(x, 3, world) is x
    with pytest.raises(InputError, match="^no$"):
        distributed.agree("no", world)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_torchrun_gives_the_run_of_one_process(corpus, weights, tmp_path):
    def argv(run):
        return tiny.flags(corpus, tmp_path / run, "--checkpoint", weights, "--dropout", 0, "--exclude_same_video",
                          "--qb_norm_queries", 1, "--dsl_scale", 10)

    trainer.main(argv("one"))
    process = tiny.torchrun(argv("two"))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert tiny.losses(tmp_path / "two") == pytest.approx(tiny.losses(tmp_path / "one"), rel=1e-4)
    assert tiny.results(tmp_path / "two") == tiny.results(tmp_path / "one")
    one, two = (torch.load(tmp_path / run / "last.pt")["model"] for run in ("one", "two"))
    # Adam turns rounding into steps where a gradient is 0 (biases before a softmax), so weights are only near.
    assert max((one[name] - two[name]).abs().max() for name in one) < 5e-3


# Not even torchrun is needed for these two: the others notice that the connection is closed.


def test_refusal_by_rank_0_ends_all(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("this folder is no run, which only rank 0 looks at")
    ranks = tiny.start_ranks(2, trainer.main, tiny.flags(corpus, tmp_path), log=tmp_path / "log")
    assert 0 not in [tiny.wait(process) for process in ranks]
    assert "holds files but no run" in (tmp_path / "log.0").read_text()


def test_broken_frame_of_rank_1_ends_all(corpus, tmp_path):
    """A jpg that is broken inside is found in the middle of training."""
    broken = tmp_path / "frames"
    os.makedirs(broken)
    for entry in (corpus / "frames").iterdir():
        os.symlink(entry, broken / entry.name)
    argv = tiny.flags(corpus, tmp_path / "run", "--frames", broken)
    step = tiny.first_step(argv, rank=1, world_size=2)
    other = tiny.first_step(argv, rank=0, world_size=2)
    only_there = set(step.batches[0].video.tolist()) - set(other.batches[0].video.tolist())
    video = step.split.videos[min(only_there)]
    os.remove(broken / video)
    os.mkdir(broken / video)
    for jpg in (corpus / "frames" / video).iterdir():
        whole = jpg.read_bytes()
        (broken / video / jpg.name).write_bytes(whole[:len(whole) // 3] + whole[-2:])  # both ends are right
    ranks = tiny.start_ranks(2, trainer.main, argv, log=tmp_path / "log")
    assert [tiny.wait(process) for process in ranks] == [1, 1]
    said = (tmp_path / "log.0").read_text().strip().splitlines()[-1]  # rank 0 speaks for all
    assert said.startswith(f"error: frame {broken / video}")
    assert "frame" not in (tmp_path / "log.1").read_text()


@pytest.mark.parametrize("world_size, more, message", [
    (3, [], "--batch_size 16 is global and must divide by 3 processes"),
    (4, ["--batch_size", 48], "39 training pairs do not fill one batch of 48"),
])
def test_batch_that_does_not_fit_the_processes_is_refused(corpus, tmp_path, world_size, more, message):
    argv = tiny.flags(corpus, tmp_path / "run", *more)
    ranks = tiny.start_ranks(world_size, trainer.main, argv, log=tmp_path / "log")
    assert [tiny.wait(process) for process in ranks] == [1] * world_size
    assert message in (tmp_path / "log.0").read_text()


def test_more_processes_than_videos_are_refused_before_training(corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "narrations.jsonl"):
        (data / name).write_bytes((corpus / name).read_bytes())
    (data / "test.jsonl").write_text((corpus / "test.jsonl").read_text().splitlines()[0])
    argv = tiny.flags(corpus, tmp_path / "run", "--data_dir", data, "--frames", corpus / "frames")
    ranks = tiny.start_ranks(2, trainer.main, argv, log=tmp_path / "log")
    assert [tiny.wait(process) for process in ranks] == [1, 1]
    message = (tmp_path / "log.0").read_text()
    assert "test.jsonl: its 1 videos cannot be shared among 2" in message and "epoch" not in message
