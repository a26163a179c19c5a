"""What training, narrating and searching cost on machines that nobody has here: the tables of docs/scaling.md.

  python scripts/cost.py                        all tables
  python scripts/cost.py --peak 989 --share 0.3     the same for 30 % of the peak, or for another GPU (TFLOP/s)

Times stand in pairs, at 20 % of the peak (what published contrastive training reaches) and at 45 % (the aim).

Everything is arithmetic. FLOPs are counted by torch on the code of narvid/ (meta tensors: shapes without numbers),
batches, epochs and K come from configs/, numbers of videos and queries from data/README.md. What is assumed, and what
was measured elsewhere, stands below with its source; nothing else is put in. B, V, K, L, D as everywhere; W processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import open_clip
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from narvid.towers import ClipConfig, build_towers
from narvid.run import optim
from narvid.files import read_yaml
from narvid.flags import Parser, command, positive_float, share
from narvid.model import NarVid, NarVidConfig

ROOT = Path(__file__).resolve().parents[1]

# ---- assumed: what makers publish. The sheet of the H200 SXM prints 1,979 TFLOP/s "with sparsity": half is dense ----
PEAK = 989.0  # TFLOP/s, bf16 and fp16 alike
# Of the peak over a whole step; not measured here. 18 to 21 % is published for contrastive training on Hopper (NeMo's
# CLIP g/14 on 8 H100: 20.6 %; LAION on GH200), 39 % on A100; 45 % is the aim.
SHARES = [0.20, 0.45]
PEAK_FP32 = 67.0  # TFLOP/s, matching's products
HBM = 4.8e12  # bytes/s of the GPU's memory
NVLINK = 450e9  # bytes/s a GPU sends inside a machine (900 GB/s both ways)
INFINIBAND = 50e9  # bytes/s a GPU sends between machines: one 400 Gb/s card a GPU

# ---- assumed: LLaVA 1.5 7B. 6.74e9 weights of Vicuna 7B (32 layers, width 4096); its picture tower is left out ----
WEIGHTS, LAYERS, WIDTH = 6.74e9, 32, 4096
PROMPT = 576 + 24  # tokens: a picture's, and about those of prompt C with its frame
NEW_TOKENS = 77  # the captioners' limit; prompt C asks for no single sentence, so most answers reach it
NARRATION_BATCH = 16  # narrate.sh's default
EAGER_STEP = 1 / 25.5  # s a decoding step takes where the CPU's calls are the limit: 25.5 tokens/s of a plain 7B model
#                        on an A100, pytorch.org/blog/accelerating-generative-ai-2

# ---- measured here (scripts/bench_frames.py): one core, 15 real MSR-VTT clips; kB of a stored frame ----
READING = {256: (203, 34.6), 224: (677, 28.5)}  # short side -> frames/s of one core, kB a frame
TEXT = 0.46  # ms to tokenise a sentence of 61 tokens, one core
CORES = 16  # a GPU
DIM = 512  # D of ViT-B/16
PAIR_WORDS = 64  # tokens every text is counted with: --max_words, the most


class Corpus(NamedTuple):
    """Sizes of a corpus; `frames` is the mean of min(K, seconds rounded up) over its videos."""

    name: str
    preset: str
    pairs: int  # of train
    train: int  # videos
    videos: int  # in all splits
    seconds: float  # mean length
    frames: float  # that a video gives to a batch


# Seconds: start and end times of MSRVTT_data.json; start and end in the ids of MSVD and VATEX; DiDeMo's num_segments
# of val and test, at most 5 s each.
CORPORA = [Corpus("MSR-VTT", "msrvtt_vitb16", 180_000, 9_000, 10_000, 15.5, 11.8),
           Corpus("MSVD", "msvd", 48_774, 1_200, 1_970, 9.7, 8.3),
           Corpus("VATEX", "vatex", 259_910, 25_991, 28_991, 10.0, 10.0),
           Corpus("DiDeMo", "didemo", 8_392, 8_392, 10_461, 29.3, 29.3)]

# ------------------------------------------------------------------------------------------------------ the model


@cache
def build() -> nn.Module:
    """NarVid on ViT-B/16, on the meta device, the embeddings frozen as in the presets."""
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        towers = build_towers(ClipConfig(config["embed_dim"], config["vision_cfg"], config["text_cfg"]))
        model = NarVid(towers, NarVidConfig(config["embed_dim"]))
    optim.freeze(towers, 0)
    return model


def flops(run: Callable[[], torch.Tensor]) -> int:
    """FLOPs (two a multiply-add) of run() and of its backward."""
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return counter.get_total_flops()


@cache
def flops_of_towers() -> tuple[int, int]:
    """Training FLOPs of one frame, and of one text of PAIR_WORDS tokens."""
    towers = build().clip
    with torch.device("meta"):
        picture = torch.zeros(1, 3, *towers.visual.image_size)
        text = torch.zeros(1, PAIR_WORDS, dtype=torch.long)
    return (flops(lambda: towers.encode_frames(picture).sum()),
            flops(lambda: towers.encode_text(text)[1].sum()))


@cache
def flops_of_heads(k: int) -> int:
    """Training FLOPs of co-attention and temporal encoders for one video with K frames and sentences."""
    heads = build().heads
    with torch.device("meta"):
        features = [torch.zeros(1, k, heads.config.dim, requires_grad=True) for _ in range(2)]
        mask = torch.ones(1, k, dtype=torch.bool)

    def enhance() -> torch.Tensor:
        videos = heads.enhance(*features, mask, mask)
        return videos.frames.sum() + videos.narration.sum()

    return flops(enhance)


def flops_of_pair(frames: float, k: int) -> dict[str, float]:
    """Training FLOPs of one pair: its video's frames and sentences (as many), its query, the heads. Matching aside."""
    frame, text = flops_of_towers()
    return {"frames": frames * frame, "sentences": frames * text, "query": text, "heads": flops_of_heads(k)}


def matching_flops(batch: int, world: int, k: int = 12, words: int = 32, dim: int = DIM) -> float:
    """A rank's products words x frames: B / W queries, B videos, 2 views; forward, again in backward, 2 gradients."""
    return 2 * 4 * 2 * (batch / world) * batch * k * words * dim


# ---------------------------------------------------------------------------------------------------------- traffic


class Traffic(NamedTuple):
    """Payload of one step in bytes: the size of the result each rank holds after the collective."""

    gathered: int  # all-gather: features of all videos, both views, their masks, the rows of both matrices, indices
    summed: int  # all-reduce in backward: gradients of features and rows
    parameters: int  # all-reduce by DDP: gradients of what is trained


def traffic(batch: int, k: int, dim: int, parameters: int) -> Traffic:
    """Of the trainer's step with narration; fp32 features, masks as bytes, int64 indices. Queries stay at home."""
    features, rows = 2 * batch * k * dim * 4, 2 * batch * batch * 4
    return Traffic(features + 2 * batch * k + rows + 8 * batch, features + rows, parameters)


def ring_bytes(t: Traffic, world: int) -> float:
    """Bytes a rank sends: (W - 1) / W of an all-gather's result, twice that of an all-reduce's."""
    return (world - 1) / world * (t.gathered + 2 * t.summed + 2 * t.parameters)


def gradient_bytes(model: nn.Module) -> int:
    """Of all trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


# ----------------------------------------------------------------------------------------------------------- tables


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Markdown, its title in bold above it."""
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines)


def each(rates: list[float], cell: Callable[[float], str]) -> str:
    """A cell for every rate (FLOP/s): "1.80 / 0.80"."""
    return " / ".join(map(cell, rates))


def preset(name: str) -> dict:
    return read_yaml(ROOT / "configs" / f"{name}.yaml")


def traffic_table(rates: list[float]) -> str:
    """Weak (64 pairs a GPU) and strong scaling (64 pairs in all) on 8 and 64 GPUs."""
    pair, size = sum(flops_of_pair(12, 12).values()), gradient_bytes(build())
    rows = []
    for world, batch in ((8, 64), (8, 512), (64, 64), (64, 4096)):
        t = traffic(batch, 12, DIM, size)
        sent = ring_bytes(t, world)
        work = pair * batch / world
        network = 1000 * sent / (NVLINK if world <= 8 else INFINIBAND)
        rows.append([f"{world}", f"{batch}", *(f"{x / 1e6:.1f}" for x in t), f"{sent / 1e6:.0f}", f"{network:.1f}",
                     each(rates, lambda rate: f"{1000 * work / rate:.1f}")])
    return table("Communication of a step, ViT-B/16, K = 12, recipe modern (fp32 gradients)",
                 ["GPUs", "batch", "all-gather MB", "all-reduce, features and rows MB",
                  "all-reduce, parameters MB", "a GPU sends MB", "at link speed ms", "computing ms"], rows)


def matching_table(rates: list[float]) -> str:
    pair = sum(flops_of_pair(12, 12).values())
    rows = []
    for world, batch in ((1, 64), (8, 512), (64, 4096)):
        work, step = matching_flops(batch, world), pair * batch / world
        taken = work / PEAK_FP32 / 1e12
        rows.append([f"{batch}", f"{world}", f"{work / 1e9:.1f}", f"{1000 * taken:.2f}",
                     f"{2 * batch * batch * 4 / 1e6:.2f}", f"{work / step:.2%}",
                     each(rates, lambda rate: f"{taken / (step / rate):.1%}")])
    return table("Matching, forward and backward, words x frames of both views, queries of 32 tokens",
                 ["batch", "GPUs", "GFLOP a GPU", "ms at the fp32 peak", "both matrices MB", "of the step's FLOPs",
                  "of its computing time"], rows)


def training_table(rates: list[float]) -> str:
    rows = []
    for c in CORPORA:
        p = preset(c.preset)
        parts = flops_of_pair(c.frames, p["max_frames"])
        step = p["batch_size"] * sum(parts.values())
        steps = c.pairs // p["batch_size"] * p["epochs"]
        sent = ring_bytes(traffic(p["batch_size"], p["max_frames"], DIM, gradient_bytes(build())), 8)

        def slow(rate: float) -> float:
            """Seconds of a step on 8 GPUs."""
            return step / rate / 8 + sent / NVLINK

        rows.append([c.name, f"{c.frames:.1f} of {p['max_frames']}", f"{steps:,}", f"{step / 1e12:.1f}",
                     f"{parts['frames'] / sum(parts.values()):.0%}",
                     each(rates, lambda rate: f"{1000 * step / rate:.0f}"),
                     each(rates, lambda rate: f"{steps * step / rate / 3600:.2f}"),
                     each(rates, lambda rate: f"{1000 * slow(rate):.0f}"),
                     each(rates, lambda rate: f"{steps * slow(rate) / 3600:.2f}")])
    return table("Training, batch and epochs of the presets",
                 ["corpus", "frames", "steps", "TFLOP a step", "of it frames", "ms, 1 GPU", "hours, 1 GPU",
                  "ms, 8 GPUs", "hours, 8 GPUs"], rows)


def narration_table(rates: list[float]) -> str:
    """Captions a second as the GPU's arithmetic and memory allow, and as calls from Python allow."""
    cache = 2 * LAYERS * WIDTH * 2  # bytes a token, keys and values in 16 bits
    reading = NARRATION_BATCH * (2 * WEIGHTS * PROMPT + 4 * PROMPT**2 * WIDTH * LAYERS)  # FLOPs
    bound = NEW_TOKENS * (2 * WEIGHTS + NARRATION_BATCH * cache * (PROMPT + NEW_TOKENS / 2)) / HBM

    def captions(rate: float) -> list[float]:
        return [NARRATION_BATCH / (reading / rate + step) for step in (bound, NEW_TOKENS * EAGER_STEP)]

    rows = []
    for c in CORPORA:
        every = c.videos * c.seconds
        picked = c.videos * c.frames
        hours = [each(rates, lambda rate: f"{picked / captions(rate)[limit] / 3600 / n:.2f}")
                 for n in (1, 8) for limit in (0, 1)]
        rows.append([c.name, f"{picked:,.0f}", *hours,
                     f"{every / picked:.2f}"])
    gpu, calls = (each(rates, lambda rate: f"{captions(rate)[limit]:.1f}") for limit in (0, 1))
    return table(f"Narration by LLaVA 1.5 7B, {NARRATION_BATCH} frames at once: {gpu} captions/s of one GPU where the "
                 f"GPU is the limit, {calls} where the calls are",
                 ["corpus", "sentences (--max_frames K)", "hours, 1 GPU", "1 GPU, calls", "hours, 8 GPUs",
                  "8 GPUs, calls", "x for every frame"], rows)


def reading_table(rates: list[float]) -> str:
    rows = []
    for c in CORPORA:
        p = preset(c.preset)
        demand = [c.frames * rate / sum(flops_of_pair(c.frames, p["max_frames"]).values()) for rate in rates]
        cores = [each(demand, lambda d: f"{d * (1 / fps + TEXT / 1000):.1f}") for fps, _ in READING.values()]
        frames = c.videos * c.seconds
        rows.append([c.name, each(demand, lambda d: f"{d:,.0f}"), *cores,
                     each(demand, lambda d: f"{d * READING[256][1] / 1000:.0f}"),
                     f"{frames * READING[256][1] / 1e6:.1f}", f"{frames * READING[224][1] / 1e6:.1f}",
                     f"{c.train * p['max_frames'] * 3 * 224**2 / 2**30:.1f}"])
    return table(f"Reading for one GPU at those speeds; it has {CORES} cores",
                 ["corpus", "frames/s", "cores, stored at 256", "cores, stored at 224", "MB/s at 256", "GB at 256",
                  "GB at 224", "--cache_frames GiB"], rows)


# ---- an index for searching: assumed machines, and the formats of narvid/search ----
MEMORY, DISK = 128e9 * 0.7, 4e12 * 0.8  # bytes of a machine that are filled: 128 GB of memory, 4 TB of flash
SCALARS = 3 * 8 + 1 + 2 * 12  # bytes in memory beside a vector in Milvus: id, window, file, a bit; about 12 a value of
#                               an inverted index on two of them
PICTURES = 6 * 5_200  # bytes a window: 6 pictures of it are in no window before (half a window overlaps), 5.2 kB each
#                       (docs/search.md: 1,434 pictures, 7.5 MB)


def search_table(_: list[float], k: int = 12, dim: int = DIM) -> str:
    """What 1, 10 and 100 million windows take: K frames, both views; vectors of W = 2 D numbers, a bit each."""
    width = 2 * dim
    vector = width / 8 + 8 + 8  # RaBitQ: bits, two factors; and the id
    features = k * dim * (4 + 4 + 2) + 2 * k  # frames, sentences, CLIP's frames in 16 bits, masks
    rows = []
    for millions in (1, 10, 100):
        n = millions * 1e6
        memory = n * (k * (vector + SCALARS) + vector + SCALARS)
        flash = n * features * 4 / 3  # base64
        stored = n * (4 * (k + 1) * width + PICTURES * 4 / 3) + flash + memory
        machines = max(-(-memory // MEMORY), -(-flash // DISK))
        rows.append([f"{millions}", f"{n * k * vector / 1e9:,.1f}", f"{n * features / 1e9:,.0f}",
                     f"{n * 2 * (k + 1) * width / 1e9:,.0f}", f"{memory / 1e9:,.1f}", f"{flash / 1e9:,.0f}",
                     f"{stored / 1e9:,.0f}", f"{machines:.0f}"])
    return table(f"GB that an index takes, K = {k}, D = {dim}, both views: {vector:.0f} bytes a vector of stage one, "
                 f"{features:,} of features a window",
                 ["million windows", "FAISS: stage one, memory", "features, disk", "vectors, disk",
                  "Milvus: memory of one replica", "its flash (features)", "object storage",
                  "machines a replica"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peak", type=positive_float, default=PEAK, help="bf16 TFLOP/s of one GPU, dense")
    parser.add_argument("--share", type=share, nargs="+", default=SHARES, help="of the peak that a step reaches")
    args = parser.parse_args(argv)
    rates = [args.peak * share * 1e12 for share in args.share]
    print(f"one GPU: {each(args.share, lambda share: f'{share:.0%}')} of {args.peak:g} TFLOP/s\n")
    tables = (traffic_table, matching_table, training_table, narration_table, reading_table, search_table)
    print("\n\n".join(make(rates) for make in tables))


if __name__ == "__main__":
    command(main)
