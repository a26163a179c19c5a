"""The README's Python example runs as it stands, on the demo's videos with a tiny model of random weights."""

import json
import re
from pathlib import Path

import torch

from scripts import make_demo_corpus

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_runs_as_it_stands(weights, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^From Python:\n\n((?:    .*\n)+)", text, re.MULTILINE)
    lines = [line[4:] for line in block.splitlines()]
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    stored = torch.load(weights, weights_only=True)
    torch.save(stored | {"args": stored["args"] | {"max_frames": 6}}, "runs/demo/best.pt")
    make_demo_corpus.main(["videos", "--out", "demo", "--train", "0", "--test", "2", "--workers", "1"])
    for v in range(2):
        Path(f"demo/videos/video{v}.mp4").rename(f"demo/videos/video{1281 + v}.mp4")
    entries = [{"video": f"video{v}", "captioner": "", "prompt": "",
                "sentences": [{"time": float(t), "text": "a red cross"} for t in range(make_demo_corpus.seconds_of(3))]}
               for v in (1281, 1282)]
    Path("demo/narrations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    capsys.readouterr()
    exec("\n".join(lines), {})
    [[number, *others], second] = json.loads(re.search(r"\[\[.*\]\]", capsys.readouterr().out.replace("\n", ""))[0])
    assert len([number, *others]) == len(second) == 2 and abs(number) < 4
