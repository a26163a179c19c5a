"""What docs/scaling.md rests on: its tables, the traffic of a step, counted FLOPs, the scripts of many machines."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

from narvid.data.loader import make_loader
from narvid.run.optim import freeze
from narvid.towers import build_towers, checked_model, config_of
from scripts import bench_frames, bench_scaling, bench_towers, cost

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real"))


# ---- the tables and what goes into them ----


def test_tables_of_the_page_are_those_the_script_prints(capsys):
    cost.main([])
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = [set(re.findall(r"^\*\*.+\*\*\n\n(?:\|.+\n)+", text, re.MULTILINE)) for text in (printed, page)]
    assert len(tables[0]) == 6 and tables[0] == tables[1]


def test_flops_of_a_frame_and_a_text_are_those_of_the_formula():
    width, tokens, patches, layers = 768, 197, 196, 12
    blocks = layers * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    frozen = 2 * patches * 3 * 16**2 * width  # the patch product: no gradient
    frame, text = cost.flops_of_towers()
    assert frame == 3 * blocks + frozen + 3 * 2 * width * 512
    width, tokens = 512, 64
    blocks = layers * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    assert text == 3 * (blocks + 2 * tokens * width * 512)


def test_what_a_frame_keeps_for_backward_is_what_the_blocks_formula_says():
    """Of ViT-B/32, bytes a token and width: inputs of products in bf16, of LayerNorms in fp32, GELU's; no matrix of
    attention is kept. Checkpointed: each block's input."""
    width, tokens, layers = 768, 50, 12
    model = checked_model("ViT-B-32")
    with torch.device("meta"):
        towers = build_towers(config_of(model, False, {}, None)).train()
    towers.to_empty(device="cpu")
    freeze(towers, 0)
    frame, _ = bench_towers.inputs(towers)

    def of_a_frame():
        return (bench_towers.kept(towers, lambda: towers.encode_frames(frame.repeat(2, 1, 1, 1)))
                - bench_towers.kept(towers, lambda: towers.encode_frames(frame)))

    # 2 LayerNorms, qkv's input, q k v, attention's output, c_fc's input, GELU's input and output
    block = 2 * 4 + 2 + 3 * 2 + 2 + 2 + 2 * 4 * 2
    assert of_a_frame() == pytest.approx(layers * block * tokens * width, rel=0.1)
    towers.set_grad_checkpointing(True)
    assert of_a_frame() == pytest.approx((layers * 2 + 4) * tokens * width, rel=0.1)  # and the last LayerNorm's


def test_a_ring_sends_what_rings_send():
    t = cost.Traffic(gathered=8, summed=16, parameters=32)
    assert cost.ring_bytes(t, 1) == 0 and cost.ring_bytes(t, 4) == 3 / 4 * (8 + 2 * 16 + 2 * 32)


def seconds_of_ids(*lists):
    ids = [line for path in lists for line in (REAL / path).read_text().split()]
    return [int(end) - int(start) for start, end in (name.rsplit("_", 2)[1:] for name in ids)]


@pytest.mark.skipif(not REAL.exists(), reason="no published annotations in ../shared/real or $NARVID_REAL_DATA")
@pytest.mark.parametrize("name", ["MSR-VTT", "MSVD", "VATEX", "DiDeMo"])
def test_lengths_are_those_of_the_annotations(name):
    corpus = next(c for c in cost.CORPORA if c.name == name)
    if name == "MSR-VTT":
        videos = json.loads((REAL / "msrvtt/annotations/MSRVTT_data.json").read_text())["videos"]
        seconds = [math.ceil(v["end time"] - v["start time"]) for v in videos]
    elif name == "DiDeMo":
        entries = [e for part in ("val", "test") for e in json.loads((REAL / f"didemo/{part}_data.json").read_text())]
        seconds = list({e["video"]: 5 * e["num_segments"] for e in entries}.values())
    else:
        folder = {"MSVD": "msvd/annotations", "VATEX": "vatex"}[name]
        seconds = seconds_of_ids(*(f"{folder}/{part}_list.txt" for part in ("train", "val", "test")))
        assert len(seconds) == corpus.videos
    most = cost.preset(corpus.preset)["max_frames"]
    picked = [min(most, s) for s in seconds]
    assert sum(seconds) / len(seconds) == pytest.approx(corpus.seconds, abs=0.05)
    assert sum(picked) / len(picked) == pytest.approx(corpus.frames, abs=0.05)


# ---- the benchmarks ----


@pytest.mark.slow
def test_bytes_of_a_step_are_those_of_the_formula(tmp_path, capsys):
    (tmp_path / "clip.json").write_text(json.dumps(tiny.CLIP))
    bench_scaling.main(["--processes", "1", "2", "--clip_model", str(tmp_path / "clip.json"), "--videos", "3",
                        "--frames", "2", "--steps", "1", "--rounds", "1"])
    out = capsys.readouterr().out
    alone, two = out.splitlines()[-2:]
    pairs = [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in re.findall(r"([\d,]+) \(([\d,]+)\)", two)]
    counted = [a for a, _ in pairs]
    assert alone.count(" 0 (0)") == 3 and counted == [b for _, b in pairs]
    features, rows = 2 * 6 * 2 * 64 * 4, 2 * 6 * 6 * 4
    assert counted[:2] == [features + 2 * 6 * 2 + rows + 6 * 8, features + rows] and counted[2] > 1e6


def test_the_loader_keeps_its_workers_and_pins_pages_for_a_gpu():
    loader = make_loader(range(4), None, [[0], [1]], num_workers=2)
    assert loader.persistent_workers and loader.pin_memory == torch.cuda.is_available()


def test_memory_of_a_worker_is_printed_over_an_epoch(tmp_path, capsys):
    bench_frames.main(["--startup", "10", "--corpus", str(tmp_path / "fake"), "--epoch", "--size", "2",
                       "--num_workers", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[0] == "128" and float(lines[-1].split()[1]) > 1


# ---- many machines ----


def bash(script, *argv, cwd=ROOT, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NODES", "HEAD", "NPROC"))}
    return subprocess.run(["bash", script, *argv], cwd=cwd, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture()
def fakes(tmp_path):
    """A folder of commands that print what they were asked; a PATH and a NARVID_PYTHON that find them."""
    commands = {"python": 'echo "python $*"', "scontrol": 'echo "hosts of $3" >&2; printf "node3\\nnode4\\n"',
                "srun": 'echo "srun $*"; while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 "$@"'}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NARVID_PYTHON": str(tmp_path / "python")}


EXPECTED = ("python -m torch.distributed.run --nnodes 2 --nproc_per_node 8 --max_restarts 0 --rdzv_backend c10d "
            "--rdzv_endpoint {head} --rdzv_id {id} {host}main_task_retrieval.py --config configs/msvd.yaml "
            "--output_dir runs/msvd --resume auto --seed 1\n")


def test_the_same_command_on_each_machine(fakes):
    done = bash("scripts/train_nodes.sh", "msvd", "--seed", "1", NODES="2", HEAD="node0:29500", NPROC="8", **fakes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == EXPECTED.format(head="node0:29500", id="msvd", host="")
    missing = bash("scripts/train_nodes.sh", "msvd", NODES="2", **fakes)
    assert missing.returncode and "HEAD: host:port of one of them" in missing.stderr


def test_slurm_starts_it_on_every_machine(fakes, tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[3-4]",
           "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "96", "NPROC": "8"}
    copy = tmp_path / "slurm_script"  # Slurm runs a copy
    copy.write_bytes((ROOT / "scripts/train_slurm.sh").read_bytes())
    done = bash(copy, "msvd", "--seed", "1", cwd=tmp_path, **fakes, **job)
    assert (done.returncode, done.stderr) == (0, "hosts of node[3-4]\n")
    started, command = done.stdout.splitlines(keepends=True)
    assert started.startswith("srun --cpus-per-task=96 --cpu-bind=none --kill-on-bad-exit=1 bash scripts/train_nodes")
    host = "--rdzv_conf is_host=false "  # the fake srun speaks of machine 1
    assert command == EXPECTED.format(head="node3:24567", id="1234567", host=host)
    elsewhere = bash(copy, "msvd", cwd=tmp_path, **fakes, **job | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert elsewhere.returncode == 1 and "submit from its top folder" in elsewhere.stderr
