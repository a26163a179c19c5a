"""All that uses a GPU runs in a rehearsal of one (rehearse_gpu.py): every method, two ranks, search, captioner.

Five processes start at once; each writes the outcome of its parts to a file: null, or the traceback. A part that a CPU
alone would pass (a tensor made on the wrong device, numpy of a GPU's tensor) fails here.
"""

import importlib
import inspect
import json
import os
import re
import traceback

import pytest
import test_frames
import tiny
import torch
from PIL import Image
from rehearse_gpu import rehearsal

import main_task_retrieval as trainer
from narvid import Retriever, distributed
from narvid.methods import METHODS
from narvid.narration.captioners import LocalCaptioner
from narvid.search.__main__ import main as search
from scripts import check_gpu

pytestmark = pytest.mark.slow

SHORT = ("--epochs", 1, "--dsl_scale", 10, "--qb_norm_queries", 4)
METHOD_RUNS = {" ".join(form[1:]).replace("--", ""): (*form, "--select_on", "last") for form in tiny.TRAINED}
METHOD_RUNS |= {method: ("--method", method) for method in METHODS if not METHODS[method].trained}
# Two ranks: the first form of each method, which all gather alike.
RANK_RUNS = [next(name for name in METHOD_RUNS if name.split()[0] == method) for method in METHODS]
OTHER_RUNS = {
    "micro batches": ("--micro_batch", 5, "--exclude_same_video", "--fidelity", "paper"),
    "workers, profile": ("--num_workers", 2, "--profile", 1, "--show_kept", "a red boat"),
    "recipe reported": ("--recipe", "reported", "--select_on", "last"),
    "fp16, scaler": ("--precision", "fp16", "--select_on", "last"),
    "bf16, checkpointing": ("--precision", "bf16", "--grad_checkpointing", "--select_on", "last"),
    "feature cache": ("--freeze_towers", "--feature_cache", "features", "--select_on", "last"),
    "frames in memory": ("--cache_frames", "--save_every", 1, "--save_similarity", "--select_on", "last"),
}
PLANTED = {  # what -> module, a piece of it, the same as someone without a GPU might write it, what then is said
    "arange": ("losses", "torch.arange(len(logits), device=logits.device)", "torch.arange(len(logits))",
               "mixes cuda and cpu at .*losses.py"),
    "backward": ("similarity", "torch.zeros_like(words), torch.empty_like(frames)",
                 "torch.zeros(words.shape), torch.empty_like(frames)", "mixes cuda and cpu at .*similarity.py"),
    "captioner": ("narration.captioners", "x.to(self._device, self._dtype if", "x.to(self._dtype if",
                  "captioners.py.*mixes cuda and cpu"),
    "scores": ("evaluation", "part.float().cpu()", "part.float()", "given, one on cuda at .*evaluation.py"),
}

# ------------------------------------------------------------------------------------------------ inside the process


def write_outcomes(out, parts):
    """Each part's outcome by name, null or a traceback, into the file `out`. parts: name -> (function, arguments)."""
    outcomes = {}
    for name, (function, *arguments) in parts.items():
        try:
            outcomes[name] = function(*arguments)
        except (Exception, SystemExit):
            outcomes[name] = traceback.format_exc()
    out.write_text(json.dumps(outcomes))


def train(argv):
    """One run, start to end."""
    with rehearsal():
        trainer.main(argv)


def planted(module, piece, instead, function, *arguments):
    """function(*arguments) with a piece of the module's text changed, in this process alone."""
    module = importlib.import_module(f"narvid.{module}")
    source = inspect.getsource(module)
    assert source.count(piece) == 1, f"{module.__name__} has no longer one {piece}: plant something else"
    changed = dict(vars(module))
    exec(compile(source.replace(piece, instead), module.__file__, "exec"), changed)
    old, new = functions_of(vars(module), module), functions_of(changed, module)
    codes = {name: function.__code__ for name, function in old.items()}
    try:
        for name, there in old.items():  # whoever has imported it runs the new code
            there.__code__ = new[name].__code__
        function(*arguments)
    finally:
        for name, there in old.items():
            there.__code__ = codes[name]


def functions_of(namespace, module):
    """Qualified name -> function, of a module and its classes, below decorators."""
    own = [x for x in namespace.values() if getattr(x, "__module__", None) == module.__name__]
    inside = [getattr(x, "__func__", x) for owner in own if inspect.isclass(owner) for x in vars(owner).values()]
    functions = [inspect.unwrap(x) for x in own + inside if inspect.isfunction(x)]
    return {x.__qualname__: x for x in functions if x.__module__ == module.__name__}


def ask_worker(items):
    """In a loader's worker: no GPU, no marked tensor."""
    made = torch.zeros(2)
    with pytest.raises((RuntimeError, AssertionError)):
        made.to("cuda")
    return torch.cuda.is_available(), type(made) is torch.Tensor


def check_workers():
    """What `ask_worker` says."""
    with rehearsal():
        assert torch.cuda.is_available()
        assert [*torch.utils.data.DataLoader([0], collate_fn=ask_worker, num_workers=1)] == [(False, True)]


def check_equality(folder, corpus):
    """The part of scripts/check_gpu.py that compares a GPU with the CPU, for one method; and its loader."""
    rows = []
    (folder / "check_gpu").mkdir()
    (folder / "check_gpu" / "corpus").symlink_to(corpus)
    tiny.TRAINED = tiny.TRAINED[:1]
    with rehearsal():
        for part in ("equality", "loader"):
            check_gpu.PARTS[part].work(check_gpu.Work(folder / "check_gpu", True), lambda *row: rows.append(row))
    assert [outcome for _, outcome, _ in rows] == [check_gpu.OK] * 4 + [check_gpu.MEASURED], rows


def train_ranks(out, argvs):
    """On one of two ranks: run after run in one process group."""
    stop, distributed.stop = distributed.stop, lambda: None
    write_outcomes(out.with_name(f"{out.name}{os.environ['RANK']}"),
                   {name: (train, argv) for name, argv in argvs.items()})
    stop()


def search_and_narrate(out, folder, checkpoint):
    """Index two clips with a captioner; ask for a text, a picture and a clip. Workers are processes of their own."""
    from test_captioners import save_llava  # skips where there is no transformers
    with rehearsal():
        videos, index = folder / "videos", folder / "index"
        videos.mkdir()
        for name in ("one.mp4", "two.mp4"):
            test_frames.make_clip(videos / name, [0, 0.5, 1, 1.5, 2], size=(32, 24), codec="mpeg4", rate=2)
        Image.new("RGB", (32, 32), "red").save(folder / "red.jpg")
        captioner = save_llava(folder / "llava")
        write_outcomes(out, {
            "index": (search, ["index", str(videos), "--out", str(index), "--checkpoint", str(checkpoint),
                               "--captioner", str(captioner)]),
            "text": (search, ["query", str(index), "a red boat", "--json"]),
            "picture": (search, ["query", str(index), "--picture", str(folder / "red.jpg")]),
            "clip": (search, ["query", str(index), "--clip", str(videos / "one.mp4")]),
            "retriever": (retrieve, checkpoint, videos / "one.mp4", folder / "exported"),
            "planted captioner": (planted, *PLANTED["captioner"][:3], caption, captioner, folder / "red.jpg")})


def retrieve(checkpoint, video, folder):
    """Python's way: load, encode, score, export, load what was exported."""
    for source in (checkpoint, folder):
        model = Retriever.load(source)
        model.score(model.encode_queries(["a red boat", "boat"]), model.encode_videos([video]))
        if source == checkpoint:
            model.save(folder)


def caption(captioner, picture):
    """One picture by the local captioner."""
    LocalCaptioner(str(captioner)).caption([picture.read_bytes()])


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def outcomes(corpus, weights, tmp_path_factory):
    """Process -> part -> null or a traceback."""
    folder = tmp_path_factory.mktemp("rehearsal")

    def argv(name, options):
        start = ["--checkpoint", folder / "cap4video stage video" / "best.pt"] if "titles" in options else []
        options = [folder / x if x == "features" else x for x in options]
        return tiny.flags(corpus, folder / name, *SHORT, *options, *start)

    runs = {name: argv(name, options) for name, options in (METHOD_RUNS | OTHER_RUNS).items()}
    methods = {name: (train, runs[name]) for name in METHOD_RUNS} | {"check_gpu": (check_equality, folder, corpus)}
    others = {name: (train, runs[name]) for name in OTHER_RUNS} | {"workers": (check_workers,)}
    others |= {f"planted {name}": (planted, *plant, train, argv(f"planted {name}", ("--select_on", "last")))
               for name, (*plant, _) in PLANTED.items() if name != "captioner"}
    pairs = {name: argv(f"two ranks, {name}", METHOD_RUNS[name]) for name in RANK_RUNS}
    stored = torch.load(weights)
    stored["args"] |= {"max_frames": 6, "max_words": 24, "precision": "fp32"}
    torch.save(stored, folder / "best.pt")

    processes = [
        tiny.start(write_outcomes, folder / "methods", methods, log=folder / "methods.log"),
        tiny.start(write_outcomes, folder / "others", others, log=folder / "others.log"),
        tiny.start(search_and_narrate, folder / "search", folder, folder / "best.pt", log=folder / "search.log"),
        *tiny.start_ranks(2, train_ranks, folder / "ranks", pairs, log=folder / "ranks.log")]
    codes = [tiny.wait(process, timeout=500) for process in processes]
    assert codes == [0] * len(codes), "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log*"))
    processes = ("methods", "others", "search", "ranks0", "ranks1")
    return {name: json.loads((folder / name).read_text()) for name in processes} | {
        "log": (folder / "methods.log").read_text()}


@pytest.mark.parametrize("process, part", [
    *(("methods", name) for name in [*METHOD_RUNS, "check_gpu"]),
    *(("others", name) for name in [*OTHER_RUNS, "workers"]),
    *((f"ranks{rank}", name) for name in RANK_RUNS for rank in (0, 1)),
    *(("search", name) for name in ("index", "text", "picture", "clip", "retriever"))])
def test_it_runs_on_a_gpu(outcomes, process, part):
    assert outcomes[process][part] is None, outcomes[process][part]
    assert "1 process(es), cuda" in outcomes["log"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_line_for_the_cpu_alone_is_found(outcomes, name):
    said = outcomes["search" if name == "captioner" else "others"][f"planted {name}"] or "it passed"
    assert re.search(PLANTED[name][-1], said, re.DOTALL), said


def test_what_a_gpu_refuses_and_what_it_takes():
    outside = torch.cuda.is_available()
    with rehearsal():
        here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
        for refused in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there @ here,
                        lambda: here[there.long()], lambda: there.__setitem__(there > 1, here[:1]),
                        lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError), match="test_rehearsal.py"):
                refused()
        there[1:] = here[1:]  # slices copy
        assert torch.equal((there[here.long()] + 1).cpu().detach() - here, torch.ones(3))
        made = [there + 1, there.new_zeros(2), torch.zeros_like(there), here.to("cuda"), here.to(there), here.cuda(),
                torch.nn.Linear(3, 3).to("cuda")(there), torch.tensor([1.0], device="cuda")]
        assert {x.device for x in made} == {torch.device("cuda", 0)} and all(x.is_cuda for x in made)
        assert {x.to("cpu").device.type for x in made} == {"cpu"} and there.tolist() == [0, 1, 2]
    assert torch.cuda.is_available() == outside
