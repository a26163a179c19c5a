"""What the trainer's tests share: a tiny corpus, tiny CLIP towers with weights from numpy, processes that start fast.

Nothing here is random to the reader: numpy's RandomState is frozen by its makers, pictures are flat patches that every
jpg decoder gives back alike, and weights do not come from torch's initialisers. Nothing here tests anything.
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid.data.datasets import Batch, FrameDataset, Split, collate
from narvid.data.loader import PairSampler
from narvid.distributed import World
from narvid.methods import METHODS
from narvid.methods.protocol import names_of
from narvid.model import MODULES, NarVid, NarVidConfig

SIDE = 32  # pixels
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 30),
           "white": (245, 245, 245), "black": (15, 15, 15), "pink": (250, 150, 190), "brown": (120, 70, 30)}
VIDEOS = {"train": 13, "val": 9, "test": 11}
# The vocabulary is CLIP's, so that a wide text tower would take most of the time of most tests.
CLIP = {"embed_dim": 64,
        "vision_cfg": {"image_size": SIDE, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2}}
# With a text tower as wide as the joint dimension, as OpenAI's are: methods start from copies of its blocks.
WIDE = CLIP | {"text_cfg": CLIP["text_cfg"] | {"width": 64}}
# Towers of other families, as files beside clip.json: a text tower that sees its padding, and a timm image tower.
OTHER_TOWERS = {
    "siglip": {"embed_dim": 64, "custom_text": True, "init_logit_bias": -10, "vision_cfg": CLIP["vision_cfg"],
               "text_cfg": {"context_length": 24, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2,
                            "hf_tokenizer_name": "none", "no_causal_mask": True, "pool_type": "last",
                            "proj_bias": True, "act_kwargs": {"approximate": "tanh"}}},
    "timm": {"embed_dim": 64, "custom_text": True,
             "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": None, "image_size": 48},
             "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2}}}
# Method -> the settings that train or compute something else than its defaults; a method that is not named has one.
FORMS = {"narvid": [["--hard_loss", "hinge"], ["--hard_loss", "nce", "--freeze_layers", "-1"], ["--modules"]],
         "clip4clip": [["--head", "meanP"], ["--head", "seqLSTM", "--linear_patch", "3d"], ["--head", "seqTransf"],
                       ["--head", "tightTransf"]],
         "cap4video": [["--stage", "video"], ["--stage", "titles", "--freeze_towers"]]}
TRAINED = [("--method", method, *form) for method in METHODS if METHODS[method].trained
           for form in FORMS.get(method, [[]])]  # each goes on from the last one where it must (stage titles)
LADDER = [list(MODULES[:n]) for n in range(len(MODULES) + 1)]  # Table 3: baseline, + NM, + CMI, + QAF, + CVH

# ---- the corpus ----


def make_corpus(folder: Path) -> Path:
    """33 videos of 1 to 9 frames at 1 fps, 1 to 4 queries each, narrations with holes -> the folder, ready to train."""
    titles, rng = {}, np.random.RandomState(7)
    index, narrations = [], []
    for split, count in VIDEOS.items():
        pairs = []
        for number in range(count):
            video = f"{split}{number}"
            seen = _make_frames(folder / "frames" / video, rng, frames=1 + (4 * number + 2) % 9)
            index.append({"video": video, "times": [float(k) for k in range(len(seen))], "sampling": "1 fps"})
            narrations.append({"video": video, "captioner": "tiny", "prompt": "", "sentences": _narrate(seen, rng)})
            titles[video] = [f"a film of {colour}" for colour in sorted({colour for four in seen for colour in four})]
            queries = _queries(seen, rng, 3 if split == "train" else 1 + number % 4)
            pairs += [{"video": video, "query": query} for query in queries]
        _write_lines(folder / f"{split}.jsonl", pairs)
    _write_lines(folder / "frames" / "index.jsonl", index)
    _write_lines(folder / "narrations.jsonl", narrations)
    (folder / "titles.json").write_text(json.dumps(titles))
    for name, config in {"clip": CLIP, "wide": WIDE, **OTHER_TOWERS}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    _write_tokenizer(folder / "tokenizer")
    return folder


def _make_frames(folder: Path, rng, *, frames: int) -> list[list[str]]:
    """Pictures of four flat patches, some of them wider than high -> the colours of each."""
    folder.mkdir(parents=True)
    width = SIDE + 16 * rng.randint(2)
    seen = [[str(colour) for colour in rng.choice(sorted(COLOURS), 4)] for _ in range(frames)]
    for k, colours in enumerate(seen):
        picture = np.empty((SIDE, width, 3), dtype=np.uint8)
        for patch, colour in enumerate(colours):
            picture[16 * (patch // 2):][:16, width // 2 * (patch % 2):][:, :width // 2] = COLOURS[colour]
        Image.fromarray(picture).save(folder / f"{k:05d}.jpg", quality=95, subsampling=0)
    return seen


def _narrate(seen: list[list[str]], rng) -> list[dict]:
    """A sentence a frame; of three or more frames one has no sentence and one a blank one."""
    sentences = [{"time": float(k), "text": f"a picture of {a} and {b}, with {c} below"}
                 for k, (a, b, c, _) in enumerate(seen)]
    if len(seen) > 3:
        sentences[rng.randint(1, len(seen))]["text"] = " "
        sentences.pop(-1)
    return sentences


def _queries(seen: list[list[str]], rng, count: int) -> list[str]:
    forms = ["{}{} turns {}", "something {}{} becomes {}", "{}{} and then, after a while, {}", "{}{} {}"]
    return [forms[rng.randint(4)].format("very " * rng.randint(8), seen[0][rng.randint(4)], seen[-1][rng.randint(4)])
            for _ in range(count)]  # of many lengths


def _write_tokenizer(folder: Path) -> None:
    """Whole words of the corpus, as SigLIP's tokenizer frames them: an end token, which is the padding too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # here: a second, which few tests need

    words = "a picture of and with below turns something becomes then after while very , film".split()
    vocabulary = {word: n for n, word in enumerate(["<unk>", "</s>", *words, *sorted(COLOURS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="</s>",
                            eos_token="</s>").save_pretrained(folder)


def towers_of(corpus: Path, name: str) -> list[str]:
    """The flags of OTHER_TOWERS."""
    tokenizer = ["--tokenizer", str(corpus / "tokenizer")] if name == "siglip" else []
    return ["--clip_model", str(corpus / f"{name}.json"), *tokenizer]


def _write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


# ---- weights, flags, batches ----


def flags(corpus: Path, output_dir: Path, *more) -> list[str]:
    """argv of a run of 2 epochs x 2 steps in fp32; `more` stands behind and wins."""
    method = more[more.index("--method") + 1] if "--method" in more else "narvid"
    layers = ("--temporal_layers", 2) if "temporal_layers" in names_of(METHODS[method].add_flags) else ()
    return [str(x) for x in (
        "--data_dir", corpus, "--clip_model", corpus / "clip.json", "--output_dir", output_dir, "--max_frames", 6,
        "--max_words", 24, "--num_workers", 0, *layers, "--precision", "fp32", "--epochs", 2, "--batch_size", 16,
        "--lr", 1e-3, "--clip_lr", 1e-3, "--eval_batch_size", 5, "--log_every", 1, *more)]


def write_checkpoint(path: Path, clip_model: Path, modules=MODULES, seed: int = 0) -> Path:
    """A checkpoint of the towers of a config file, to start from, whose every weight comes from numpy."""
    config = clip.ClipConfig(**json.loads(clip_model.read_text()))
    model = NarVid(clip.build_towers(config), NarVidConfig(CLIP["embed_dim"], tuple(modules), temporal_layers=2))
    rng = np.random.RandomState(seed)
    state = model.state_dict()
    for name in sorted(state):
        values = 0.1 * rng.standard_normal(tuple(state[name].shape))
        if name.endswith("weight") and values.ndim == 1:  # LayerNorm
            values += 1
        state[name] = torch.tensor(values, dtype=torch.float32)
    state["clip.logit_scale"].fill_(np.log(1 / 0.07))
    stored = {"clip_model": str(clip_model), "modules": list(modules), "temporal_layers": 2}
    torch.save({"model": state, "clip_config": asdict(config), "args": stored}, path)
    return path


class FirstStep(NamedTuple):
    """What the trainer has in hand before its first step."""

    args: argparse.Namespace
    split: Split  # train
    model: NarVid
    batches: list[Batch]  # this rank's part of the first global batch, one a micro-batch


def first_step(argv: list[str], rank: int = 0, world_size: int = 1) -> FirstStep:
    """The run of these flags up to its first step."""
    args = trainer.parse_args(argv)
    trainer.seed_everything(args)
    split = trainer.load_data(args, World(0, 1, torch.device("cpu")))["train"]
    model = trainer.build_model(args)
    sampler = PairSampler(len(split.queries), args.batch_size, rank=rank, world_size=world_size, seed=args.seed,
                          accumulation=args.gradient_accumulation_steps)
    dataset = FrameDataset(split, split.video_of_query, model.clip.picture)
    items = list(sampler)[:args.gradient_accumulation_steps]
    batches = [collate([dataset[i] for i in some], split=split, tokenize=model.clip.tokenizer,
                       max_words=args.max_words, max_frames=args.max_frames, with_queries=True) for some in items]
    return FirstStep(args, split, model, batches)


def save_start(step: FirstStep, path: Path) -> None:
    """The model as a checkpoint to go on from, in fp32."""
    state = {name: x.float() if x.is_floating_point() else x for name, x in step.model.state_dict().items()}
    torch.save({"model": state, "clip_config": asdict(step.model.clip.config), "args": vars(step.args)}, path)


def take_step(step: FirstStep, model: nn.Module, world: World) -> dict[str, float]:
    """The trainer's own step at rate 0 -> its loss parts; the gradients, unclipped, stay in the model."""
    step.args.max_grad_norm = 1e9
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(trained, lr=0.0), torch.amp.GradScaler(enabled=False)
    return trainer.train_step(model, step.batches, optimizer, scaler, "step 1", step.split, step.args,
                              world)[0]


def losses(run: Path) -> list[float]:
    """The loss of every step, from the run's log."""
    log = (run / "log.txt").read_text()
    return [float(value) for value in re.findall(r"^[\d:]+ epoch \d+ step .* loss (\S+)", log, re.MULTILINE)]


def results(run: Path) -> list[dict]:
    """The evaluations of a run, the final one last."""
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


# ---- processes ----

# torch is imported once, by a server; each process is then forked from it, clean, in milliseconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "torch.distributed", "main_task_retrieval"])


def start(function, *args, log: Path, **environment: str) -> multiprocessing.Process:
    """function(*args) in a process of its own; what it prints goes to `log`."""
    log.touch()
    process = _processes.Process(target=_run, args=(function, args, log, environment))
    process.start()
    return process


def _run(function, args, log, environment):
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def python(*argv) -> None:
    """For `start`: what `python argv` does, a script or -m and a module, without the seconds of importing torch."""
    sys.argv = [str(word) for word in argv]
    sys.stdout.reconfigure(line_buffering=True)
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def start_ranks(world_size: int, function, *args, log: Path) -> list[multiprocessing.Process]:
    """function(*args) on `world_size` ranks with torchrun's environment; rank r prints to <log>.r."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(function, *args, log=log.with_name(f"{log.name}.{rank}"), RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for rank in range(world_size)]


def torchrun(argv, **more) -> subprocess.Popen:
    """The trainer on two ranks as people start it; what it prints comes in one pipe."""
    script = Path(__file__).resolve().parents[1] / "main_task_retrieval.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, *argv]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            **more)


def wait(process: multiprocessing.Process, timeout: float = 60) -> int:
    """The exit code (negative: the signal); a process that does not end in time is killed and an error."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process did not end in {timeout} s")
    return process.exitcode
