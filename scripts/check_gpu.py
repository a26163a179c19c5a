"""All that only a GPU can show, on one GPU in 8 minutes: one Markdown table, printed and written to --out.

  python scripts/check_gpu.py                  equalities, number formats, captioner, speed
  python scripts/check_gpu.py --tiny           the same, small and on a CPU: tries this script, says nothing of a GPU
  python scripts/check_gpu.py --only ranks     one part (several may be named)

Each part is a process of its own with a time limit: what fails, hangs or does not fit into the 8 minutes is a row with
its reason. The exit code is 1 if an equality does not hold or could not be shown. Models are the tests' (tests/tiny.py)
and random, except where speed is measured. CPU and GPU are compared in fp32 with TF32 off, processes in fp64.
Here: the parts and their table. Not here: how speed is measured (bench_step.py, bench_eval.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "scripts", "tests", "tests/narration", "tests/data")]

import numpy as np
import tiny
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import main_task_retrieval as trainer
from narvid import distributed, files
from narvid.data.datasets import FrameDataset, collate
from narvid.data.loader import PairSampler, make_loader
from narvid.distributed import World
from narvid.flags import Parser, command
from narvid.methods import METHODS

SECONDS = 480  # of everything; with --tiny, on a CPU, ten times as much, and each part too
CPU = World(0, 1, torch.device("cpu"))
# Largest difference allowed, as a share of the largest value of each tensor.
BOUNDS = {"features and scores": 1e-4, "loss": 1e-4, "gradients": 1e-3, "processes": 1e-9, "same run": 1e-3}
OK, DIFFERS, FAILED, SKIPPED, MEASURED = "equal", "DIFFERS", "failed", "skipped", "measured"
Add = Callable[[str, str, str], None]  # a row: what, outcome, detail


class Work(NamedTuple):
    """What a part is given: a folder with the tiny corpus in it, and whether sizes are tiny."""

    folder: Path
    tiny: bool

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"


def device() -> torch.device:
    """The GPU; with --tiny the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------- equalities


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of tensors, each as a share of its largest value; NaN counts as inf."""
    ours, theirs = ({name: x.detach().double().cpu() for name, x in of.items()} for of in (ours, theirs))
    most = max(x.abs().max().item() for x in theirs.values())
    worst = 0.0
    for name, x in theirs.items():
        size = max(x.abs().max().item(), 1e-3 * most)  # what is 0 but for rounding is measured by the others
        share = (ours[name] - x).abs().max().item() / size
        worst = max(worst, share) if share == share else float("inf")
    return worst


def verdict(add: Add, what: str, kind: str, difference: float, more: str = "") -> None:
    """A row of an equality."""
    outcome = OK if difference <= BOUNDS[kind] else DIFFERS
    add(what, outcome, f"{difference:.1e} of the largest value, allowed {BOUNDS[kind]:.0e}{more}")


def first_steps(work: Work) -> Iterator[tuple[str, tiny.FirstStep]]:
    """Every form of every trained method before its first step, dropout off; a second stage goes on from its first."""
    before = None
    for form in tiny.TRAINED:
        more = ["--clip_model", work.corpus / "wide.json"]  # methods start from its blocks, as from those of OpenAI
        more += ["--checkpoint", before] if "titles" in form else []
        step = tiny.first_step(tiny.flags(work.corpus, work.folder / "unused", *form, *more))
        for module in step.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        yield " ".join(form[1:]).replace("--", ""), step
        before = work.folder / "before.pt"
        tiny.save_start(step, before)


def taken(step: tiny.FirstStep, model: torch.nn.Module, world: World) -> tuple[dict, dict]:
    """The trainer's step -> loss parts and gradients, as tensors by name."""
    parts = tiny.take_step(step, model, world)
    gradients = {name: p.grad.clone() for name, p in trainer.plain(model).named_parameters() if p.grad is not None}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in parts.items()}, gradients


@torch.no_grad()
def encoded(model: torch.nn.Module, batch, on: torch.device) -> dict[str, torch.Tensor]:
    """Features and scores of a batch, by name."""
    batch = batch.to(on)
    queries = model.encode_queries(batch.tokens, batch.word_mask)
    videos = model.encode_videos(batch.frames, batch.mask, batch.sentences, batch.sentence_of_frame,
                                 batch.narration_mask)
    made = {**{f"query {k}": x for k, x in queries._asdict().items()},
            **{f"video {k}": x for k, x in videos._asdict().items()}, **model.score(queries, videos)}
    return {name: x for name, x in made.items() if x is not None and x.is_floating_point()}


def cpu_and_gpu(work: Work, add: Add) -> None:
    """Forward, losses and gradients of every method on both, from the same weights."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    there, batch = World(0, 1, device()), None
    for name, step in first_steps(work):
        batch = batch or step.batches[0]  # NarVid's, with sentences
        other = copy.deepcopy(step.model).to(there.device)
        features = apart(encoded(other.eval(), step.batches[0], there.device),
                         encoded(step.model.eval(), step.batches[0], CPU.device))
        (here_loss, here), (there_loss, gradients) = (taken(step, step.model.train(), CPU),
                                                      taken(step, other.train(), there))
        differences = {"features and scores": features, "loss": apart(there_loss, here_loss),
                       "gradients": apart(gradients, here)}
        for kind, difference in differences.items():
            verdict(add, f"{name}: {kind}", kind, difference)
    for name in (name for name in METHODS if not METHODS[name].trained):
        flags = tiny.flags(work.corpus, work.folder / "unused", "--method", name)
        model = trainer.build_model(trainer.parse_args(flags)).eval()
        difference = apart(encoded(copy.deepcopy(model).to(there.device), batch, there.device),
                           encoded(model, batch, CPU.device))
        verdict(add, f"{name}: features and scores", "features and scores", difference)


def ranks(work: Work, add: Add) -> None:
    """torchrun with one rank a GPU, two at most; without a GPU two ranks of gloo."""
    count = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
               __file__, "--part", "rank", "--work", str(work.folder), *(["--tiny"] if work.tiny else [])]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        add(f"{count} rank(s)", FAILED, last_line(done.stdout))


def rank(work: Work, add: Add) -> None:
    """One rank: each method's step of the whole batch by itself, then its share of it in the process group."""
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = work.folder / f"rank{number}"
    folder.mkdir()
    (folder / "corpus").symlink_to(work.corpus)
    alone = World(0, 1, torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu"))
    expected = {}
    for name, step in first_steps(work._replace(folder=folder)):
        step.model.double().to(alone.device)
        expected[name] = copy.deepcopy(step), taken(step, step.model, alone)
        step.model.float().cpu()
    world = distributed.start()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo")
    for name, (step, (loss, gradients)) in expected.items():
        rows = distributed.share(len(step.batches[0].video), world)
        own = step._replace(batches=[part_of(step.batches[0], slice(rows.start, rows.stop))])
        own_loss, own_gradients = taken(own, DistributedDataParallel(step.model), world)
        difference = max(apart(own_loss, loss), apart(own_gradients, gradients))
        if number == 0:
            verdict(add, f"{name}: {size} rank(s) of {dist.get_backend()} and one process", "processes", difference)
    distributed.stop()


def part_of(batch, rows: slice):
    """Some pairs of a batch; its sentences stay, they are numbered."""
    return type(batch)(**{name: x if x is None or name == "sentences" else x[rows]
                          for name, x in batch._asdict().items()})


# ------------------------------------------------------------------------------------------- number formats and flags


def run(work: Work, name: str, *more) -> list[float]:
    """A tiny run of NarVid without dropout -> the losses of its steps; run again it goes on where it was."""
    folder = work.folder / name
    trainer.main(tiny.flags(work.corpus, folder, "--dropout", 0, "--select_on", "last", *more))
    return tiny.losses(folder)


def formats(work: Work, add: Add) -> None:
    """Both recipes train in half precision, with losses near fp32's."""
    exact = run(work, "fp32")
    for name, more in {"recipe reported, fp16 towers": ["--recipe", "reported"],
                       "recipe modern, bf16": ["--precision", "bf16"],
                       "recipe modern, fp16 with a scaler": ["--precision", "fp16"]}.items():
        losses = run(work, name, *more)
        add(name, MEASURED if np.isfinite(losses).all() else FAILED,
            f"first loss {losses[0]:.4f}, in fp32 {exact[0]:.4f}; last {losses[-1]:.4f}, {exact[-1]:.4f}")


def flags(work: Work, add: Add) -> None:
    """Flags that must not change a run: encoding in parts, recomputing blocks, going on after a kill."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = np.array(run(work, "plain"))

    def same(name: str, losses: list[float]) -> None:
        difference = np.abs(np.array(losses) / expected - 1).max() if len(losses) == len(expected) else float("inf")
        verdict(add, name, "same run", float(difference), f"; losses of {len(losses)} steps as logged")

    same("--micro_batch 5", run(work, "micro", "--micro_batch", 5))
    same("--grad_checkpointing", run(work, "checkpointing", "--grad_checkpointing"))
    real, calls = trainer.train_step, []

    def broken(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    trainer.train_step = broken
    with contextlib.suppress(KeyboardInterrupt):
        run(work, "resumed")
    trainer.train_step = real
    same("--resume auto after a kill in step 3", run(work, "resumed", "--resume", "auto"))


def compiled(work: Work, add: Add) -> None:
    """--compile gives the run that is not compiled; the compiler takes most of the time."""
    expected, losses = run(work, "not compiled"), run(work, "compiled", "--compile")
    verdict(add, "--compile", "same run", float(np.abs(np.array(losses) / np.array(expected) - 1).max()))


def captioner(work: Work, add: Add) -> None:
    """A LLaVA of two layers answers two pictures differently."""
    from test_captioners import save_llava

    from narvid.narration.captioners import LocalCaptioner
    model = LocalCaptioner(str(save_llava(work.folder / "llava")))
    pictures = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(buffer := io.BytesIO(), "jpeg")
        pictures.append(buffer.getvalue())
    answers, label = model.caption(pictures), model.label.removeprefix(f"{work.folder}/")
    add("local captioner, a random model", MEASURED if len(set(answers)) == 2 else FAILED,
        f"{label}: {len(set(answers))} answers to 2 pictures")


# ------------------------------------------------------------------------------------------------------------- speed


class Lines(io.TextIOBase):
    """Takes what a benchmark prints, keeps it for the end of the page and shows each line to `see` when it is there."""

    def __init__(self, path: Path, see: Callable[[str], None]):
        self.file, self.see, self.rest = open(path, "w", encoding="utf-8"), see, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            print(line, file=self.file, flush=True)
            self.see(line)
        return len(text)


def step_speed(work: Work, add: Add) -> None:
    """bench_step.py: ViT-B/16, 64 x 12 frames and sentences. The search for the largest batch comes last."""
    import bench_step

    def see(line: str) -> None:
        if row := re.match(r"step +(\S+) +\S+ +(\S+) +\S+$", line):
            add("training step", MEASURED, f"{row[1]} s, {row[2]} TFLOP/s")
        if line.startswith(("share of", "all but the towers", "peak memory", "largest batch", "a GPU's share")):
            what, _, detail = line.partition(": ")
            add(what, SKIPPED if detail.startswith("not measured") else MEASURED, detail)

    sizes = ["--videos", "4", "--frames", "2", "--repeats", "1", "--model", str(work.corpus / "clip.json")]
    with contextlib.redirect_stdout(Lines(work.folder / "bench_step.txt", see)):
        bench_step.main(sizes if work.tiny else [])


def scoring_speed(work: Work, add: Add) -> None:
    """bench_eval.py: 1,000 x 1,000 beside the field's way."""
    import bench_eval

    def see(line: str) -> None:
        if row := re.match(r"(reference|ours|ours, bf16 products)  +(\S+) +\S+(?: +(\S+))? *$", line):
            what = f"scoring {'70 x 70' if work.tiny else '1,000 x 1,000'}: {row[1].replace('reference', 'the field')}"
            add(what, MEASURED, f"{row[2]} s" + (f", {row[3]} times faster" if row[3] else ""))

    sizes = ["--queries", "70", "--videos", "70", "--frames", "3", "--dim", "64", "--rounds", "1", "--sample", "1"]
    with contextlib.redirect_stdout(Lines(work.folder / "bench_eval.txt", see)):
        bench_eval.main([*(sizes if work.tiny else []), "--device", device().type])


def msvd_speed(work: Work, add: Add) -> None:
    """bench_eval.py with MSVD's test split."""
    import bench_eval
    sizes = "--queries 200 --videos 20 --dim 64" if work.tiny else "--queries 27763 --videos 670"
    seen = []
    with contextlib.redirect_stdout(Lines(work.folder / "bench_eval_msvd.txt", seen.append)):
        bench_eval.main([*sizes.split(), "--only_ours", "--device", device().type])
    what, _, detail = "; ".join(seen[1:]).partition(": ")
    add(f"scoring {what}", MEASURED, detail)


def loader_speed(work: Work, add: Add) -> None:
    """The step on batches that the loader reads from disk, beside the same step on one batch in memory."""
    import bench_step
    videos, frames, steps = (8, 2, 3) if work.tiny else (64, 12, 10)
    args = bench_step.parse_args(["--videos", str(videos), "--frames", str(frames), "--repeats", "1"]
                                 + (["--model", str(work.corpus / "clip.json")] if work.tiny else []))
    folder = make_pictures(work.folder / "pictures", videos, frames)
    workers = max(1, (os.cpu_count() or 1) - 1)
    bench = bench_step.Bench(args, World(0, 1, device()))
    options = trainer.parse_args(["--data_dir", str(folder), "--clip_model", args.model, "--output_dir", "unused",
                                  "--max_frames", str(frames), "--select_on", "last"])
    split = trainer.load_data(options, CPU)["train"]
    sampler = PairSampler(len(split.queries), videos, rank=0, world_size=1, seed=0, accumulation=1)
    to_batch = partial(collate, split=split, tokenize=bench.model.clip.tokenizer, max_words=options.max_words,
                       max_frames=frames, with_queries=True)
    dataset = FrameDataset(split, split.video_of_query, bench.model.clip.picture)
    loader = make_loader(dataset, to_batch, sampler, num_workers=workers)
    batches, waited, took = iter(loader), [], []
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - start)
        took.append(waited[-1] + bench_step.seconds(partial(bench.step, batch), bench.world.device))
    del batches
    alone = [bench_step.seconds(bench.step, bench.world.device) for _ in range(steps)]
    add(f"loader, {workers} workers", MEASURED,
        f"step {median(took[1:]):.3f} s with it, {median(alone[1:]):.3f} s without; waiting for data "
        f"{sum(waited[1:]) / sum(took[1:]):.0%}")


def make_pictures(folder: Path, videos: int, frames: int) -> Path:
    """A corpus of smooth noise, short side 256, with enough pairs for a dozen steps."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)).resize((340, 256)) for _ in range(8)]
    names = [f"v{v}" for v in range(videos + 1)]  # the last one is the test split
    sentence = "two people stand in a kitchen and talk about what they cook"
    for v, name in enumerate(names):
        (folder / "frames" / name).mkdir(parents=True)
        for k in range(frames):
            noise[(v + k) % 8].save(folder / "frames" / name / f"{k:05d}.jpg", quality=85)
    times = [float(k) for k in range(frames)]
    lines = {"frames/index.jsonl": [{"video": name, "times": times} for name in names],
             "narrations.jsonl": [{"video": name, "captioner": "noise", "prompt": "", "sentences": [
                 {"time": t, "text": f"{sentence} {name} {t}"} for t in times]} for name in names],
             "train.jsonl": [{"video": name, "query": f"{sentence}, part {n}"} for n in range(12)
                             for name in names[:-1]],
             "test.jsonl": [{"video": names[-1], "query": sentence}]}
    for name, entries in lines.items():
        files.write_json_lines(folder / name, entries)
    return folder


# ------------------------------------------------------------------------------------------------- parts and the table


class Part(NamedTuple):
    """One process: its work, how many seconds it may take, whether what it shows is an equality."""

    work: Callable[[Work, Add], None]
    limit: int
    equality: bool


PARTS = {"equality": Part(cpu_and_gpu, 90, True), "ranks": Part(ranks, 90, True), "flags": Part(flags, 90, True),
         "formats": Part(formats, 60, False), "captioner": Part(captioner, 60, False),
         "scoring": Part(scoring_speed, 60, False), "msvd": Part(msvd_speed, 60, False),
         "loader": Part(loader_speed, 60, False), "compile": Part(compiled, 120, True),
         "step": Part(step_speed, 240, False)}  # last: its search for the largest batch takes what time is left
INSIDE = {"rank": rank}  # started by a part


def last_line(text: str) -> str:
    """The last line that says something, for a cell of the table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|error|Exception)\b", line)]
    return ([*lines, *errors] or ["nothing was printed"])[-1].replace("|", "/")[:300]


def run_part(name: str, work: Work, seconds: float) -> list[list[str]]:
    """The rows of a part; if it fails or takes longer than `seconds`, one more that says so."""
    rows = work.folder / f"{name}.jsonl"
    command = [sys.executable, __file__, "--part", name, "--work", str(work.folder), *(["--tiny"] if work.tiny else [])]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    reason = None
    try:
        text, _ = process.communicate(timeout=seconds)
        reason = last_line(text) if process.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"not done in {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.wait()
    made = list(map(json.loads, files.read_lines(rows, whole=True))) if rows.exists() else []
    return made + ([[name, FAILED, reason]] if reason or not made else [])


def failed(rows: dict[str, list[list[str]]]) -> bool:
    """Whether an equality does not hold, or could not be shown."""
    equalities = [of for name, of in rows.items() if PARTS[name].equality]
    return any(outcome in (DIFFERS, FAILED) for of in equalities for _, outcome, _ in of)


def page(rows: dict[str, list[list[str]]], work: Work, seconds: float) -> str:
    """The table in Markdown, and below it what the benchmarks printed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny sizes: says nothing of a GPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=False).stdout.strip() or "unknown"
    lines = [f"# check_gpu: {name}", "", f"{date.today()}, commit {commit}, torch {torch.__version__}, {seconds:.0f} s",
             "", "| part | what | outcome | |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, of in rows.items() for row in of]
    for path in sorted(work.folder.glob("bench_*.txt")):
        lines += ["", f"## {path.stem}", "", "```", files.read_text(path).strip(), "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """All parts -> the exit code."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/check_gpu.md"), help="the table (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too: to try this script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--part", choices=[*PARTS, *INSIDE], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        work = Work(args.work, args.tiny)
        with open(args.work / f"{'ranks' if args.part in INSIDE else args.part}.jsonl", "a") as f:
            (INSIDE | {name: part.work for name, part in PARTS.items()})[args.part](
                work, lambda *row: print(json.dumps(row), file=f, flush=True))
        return 0
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no GPU is visible; --tiny tries this script on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part in progress ends too
    start, rows, slower = time.monotonic(), {}, 10 if args.tiny else 1
    with TemporaryDirectory() as folder:
        work = Work(Path(folder), args.tiny)
        tiny.make_corpus(work.corpus)
        for name in args.only:
            limit = min(SECONDS * slower - (time.monotonic() - start), PARTS[name].limit * slower)
            print(f"== {name}: {limit:.0f} s at most", file=sys.stderr)
            rows[name] = (run_part(name, work, limit) if limit > 5 else
                          [[name, FAILED if PARTS[name].equality else SKIPPED, "the time is over"]])
        text = page(rows, work, time.monotonic() - start)
    files.write_text(args.out, text)
    print(text)
    return int(failed(rows))


if __name__ == "__main__":
    command(lambda: sys.exit(main()))
