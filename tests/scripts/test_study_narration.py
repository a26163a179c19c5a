"""scripts/study_narration.py: which cells there are, which queries, that they run once, what the tables say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from narvid import InputError
from narvid.data.narrations import load_narrations
from narvid.report.comparison import read_side
from scripts import extract_frames, make_demo_corpus, study_narration

PREPARE = Path(__file__).resolve().parents[2] / "data" / "prepare_msrvtt.py"


def test_cells_differ_where_they_say(tmp_path):
    args = study_narration.parse_args(["--corpora", str(tmp_path), "--alpha", "0"])
    flags = study_narration.flags_of(args, ("1of6", "blank", "none"), tmp_path / "t.pt")
    assert flags[-4:] == ["--filter", "none", "--alpha", "0"] and flags[flags.index("--max_frames") + 1] == "14"
    assert flags[flags.index("--narrations") + 1].endswith("1of6/narrations_blank.jsonl")
    other = study_narration.flags_of(args, ("1of6", "50", "p0.4"), tmp_path / "t.pt")
    assert [(a, b) for a, b in zip(flags, other) if a != b] == [
        (str(tmp_path / "1of6" / "narrations_blank.jsonl"), str(tmp_path / "1of6" / "narrations_50.jsonl")),
        ("--filter", "--filter_p"), ("none", "0.4")]


def test_queries_that_fit_another_test_video_are_not_asked(tmp_path):
    videos = [f"video{number}" for number in range(40)]
    truth = [make_demo_corpus.make_truth(5, number, 6) for number in range(40)]
    said = [make_demo_corpus.make_queries(5, number, events, mentioned=1) for number, events in enumerate(truth)]
    pairs = [{"video": video, "query": text} for video, queries in zip(videos, said) for text, _ in queries]
    lines = {"generator.json": [{"generator": 1, "seed": 5, "events": 6, "mentioned": 1}],
             "truth.jsonl": [{"video": v, "events": e} for v, e in zip(videos, truth)], "test.jsonl": pairs}
    for name, some in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    study_narration.take_queries(tmp_path, tmp_path / "asked")
    asked = [json.loads(line) for line in (tmp_path / "asked" / "test.jsonl").read_text().splitlines()]
    alone = [{"video": video, "query": text} for video, queries in zip(videos, said) for text, mentions in queries
             if sum(make_demo_corpus.fits(mentions, events) for events in truth) == 1]
    assert asked == alone and 0 < len(alone) < len(pairs) == 800
    (tmp_path / "generator.json").write_text('{"generator": 1, "seed": 6, "events": 6, "mentioned": 1}')
    with pytest.raises(InputError, match="test.jsonl.*other queries.*delete"):
        study_narration.take_queries(tmp_path, tmp_path / "asked")


@pytest.mark.slow
def test_a_tiny_study_runs_once(corpus, weights, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "2of3"
    make_demo_corpus.main(["videos", "--out", str(folder), "--train", "4", "--val", "2", "--test", "3", "--workers",
                           "1"])
    subprocess.run([sys.executable, PREPARE, "--annotations", folder / "annotations", "--protocol", "full",
                    "--allow_partial", "--videos", folder / "videos", "--out", folder], check=True)
    extract_frames.main(["--videos", str(folder / "videos"), "--out", str(folder / "frames"), "--workers", "1"])
    for percent in ("0", "20"):
        make_demo_corpus.main(["narrate", "--out", str(folder), "--hallucination_rate", f"0.{percent}"])
        (folder / "narrations.jsonl").rename(folder / f"narrations_{percent}.jsonl")
    (tmp_path / "towers").mkdir()
    shutil.copy(weights, tmp_path / "towers" / "best.pt")
    argv = ["--corpora", str(tmp_path), "--towers", str(tmp_path / "towers"), "--tiny", "--shares", "2of3",
            "--narrations", "blank", "20", "--filters", "none", "p0.8", "--jobs", "1", "--samples", "200",
            "--clip_model", str(corpus / "clip.json"), "--precision", "fp32", "--fusion_weight", "val"]
    study_narration.main(argv)
    said = capsys.readouterr().out
    assert "4 runs, 0 of them ended; 4 to do" in said
    runs = tmp_path / "runs"
    hits = {name: 100 * (read_side([runs / f"2of3_{name}_seed1"], None)[1] <= 1).mean()
            for name in ("blank_none", "blank_p0.8", "20_none", "20_p0.8")}
    rows = [row for row in said.splitlines() if row.startswith("| 2")]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["2 of 3", "none"], ["2 of 3", "20 % wrong"]] * 2 + [["2 of 3", "20 % wrong"]]
    assert [float(x) for row in cells[:2] for x in row[2:4]] == pytest.approx([*hits.values()], abs=0.051)
    assert float(cells[3][2].split()[0]) == pytest.approx(hits["20_p0.8"] - hits["20_none"], abs=0.0051)
    assert float(cells[4][3].split()[0]) == pytest.approx(hits["20_p0.8"] - hits["blank_p0.8"], abs=0.0051)
    assert 0 <= float(cells[0][-1]) <= 1  # the weight that was chosen
    blank = load_narrations(folder / "narrations_blank.jsonl")
    assert len(blank) == 9 and {text for of in blank.values() for text in of.sentences} == {"a video"}
    assert (runs / "study.md").read_text().strip() in said and (runs / "study.png").stat().st_size > 1000
    assert not [*runs.glob("*/best.pt"), *runs.glob("*/last.pt")]
    study_narration.main(argv)
    assert "0 to do" in capsys.readouterr().out
