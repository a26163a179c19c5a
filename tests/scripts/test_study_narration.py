"""scripts/study_narration.py: which cells there are, that they run and are not run again, what the table says."""

import re
import shutil

import pytest

from narvid.report.comparison import read_side
from scripts import study_narration


def test_cells_differ_where_they_say(corpus, tmp_path):
    args = study_narration.parse_args(["--corpora", str(tmp_path)])
    cells = study_narration.cells_of(args)
    assert len(cells) == 3 * (1 + 3) * 4 and cells["1of6_video_p0.8"] == ("1of6", None, "p0.8")
    flags = study_narration.flags_of(args, cells["1of6_video_none"], tmp_path / "t.pt")
    assert flags[-4:] == ["--filter", "none", "--modules", "QAF"] and flags[flags.index("--max_frames") + 1] == "14"
    flags = study_narration.flags_of(args, cells["2of3_50_p0.4"], tmp_path / "t.pt")
    assert flags[-2:] == ["--filter_p", "0.4"] and "--modules" not in flags
    assert flags[flags.index("--narrations") + 1].endswith("2of3/narrations_50.jsonl")


@pytest.mark.slow
def test_a_tiny_study_runs_once(corpus, weights, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("train.jsonl", "test.jsonl", "narrations.jsonl"):
        (tmp_path / "2of3").mkdir(exist_ok=True)
        shutil.copy(corpus / name, tmp_path / "2of3" / name.replace("narrations", "narrations_20"))
    (tmp_path / "2of3" / "narrations_0.jsonl").write_text((corpus / "narrations.jsonl").read_text())
    (tmp_path / "2of3" / "frames").symlink_to(corpus / "frames")
    (tmp_path / "towers").mkdir()
    shutil.copy(weights, tmp_path / "towers" / "best.pt")
    argv = ["--corpora", str(tmp_path), "--towers", str(tmp_path / "towers"), "--tiny", "--shares", "2of3", "--errors",
            "20", "--filters", "p0.8", "--jobs", "1", "--clip_model", str(corpus / "clip.json"), "--precision",
            "fp32"]
    study_narration.main(argv)
    said = capsys.readouterr().out
    rows = re.findall(r"\| 2 of 3 \| (.*?) \| (\S+)", said)
    assert [row[0] for row in rows] == ["none", "20 % of the sentences wrong"]
    hits = 100 * (read_side([tmp_path / "runs" / "2of3_20_p0.8_seed1"], None)[1] <= 1)
    assert float(rows[1][1]) == pytest.approx(hits.mean(), abs=0.051)
    assert (tmp_path / "runs" / "study.md").is_file() and (tmp_path / "runs" / "study.png").stat().st_size > 1000
    study_narration.main(argv)
    assert "0 to do" in capsys.readouterr().out
