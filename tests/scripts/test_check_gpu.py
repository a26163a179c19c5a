"""scripts/check_gpu.py on a CPU: its table, what counts as a failure, time limits."""

import copy

import pytest
import tiny
import torch

from scripts import check_gpu

pytestmark = pytest.mark.slow


@pytest.fixture
def work(corpus, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus)
    return check_gpu.Work(tmp_path, True)


def test_parts_become_one_table(tmp_path, capsys):
    out = tmp_path / "made" / "table.md"
    assert check_gpu.main(["--tiny", "--only", "scoring", "--out", str(out)]) == 0
    page = out.read_text()
    assert page.strip() in capsys.readouterr().out and "| part | what | outcome | |" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| scoring")]
    assert len(rows) == 3 and all(row[2] == "measured" for row in rows)
    assert "\n## bench_eval\n" in page


def test_equality_is_of_features_loss_and_gradients_and_may_fail(work, monkeypatch):
    """The second device's copy of the model gets one row of weights wrong."""
    monkeypatch.setattr(tiny, "TRAINED", [tiny.TRAINED[0], tiny.TRAINED[-1]])
    rows = []
    check_gpu.cpu_and_gpu(work, lambda *row: rows.append(row))
    assert len(rows) == 7 and {outcome for _, outcome, _ in rows} == {check_gpu.OK}  # the seventh: zeroshot

    def wrong(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.clip.text_projection[0] *= 3
        return other

    rows.clear()
    monkeypatch.setattr(check_gpu, "copy", type("copy", (), {"deepcopy": staticmethod(wrong)}))
    check_gpu.cpu_and_gpu(work, lambda *row: rows.append(row))
    assert [outcome for _, outcome, _ in rows] == [check_gpu.DIFFERS] * 7


def test_a_part_out_of_time_or_broken_is_a_row(work):
    (row,) = check_gpu.run_part("msvd", work, 0.2)
    assert row == ["msvd", "failed", "not done in 0 s"]
    (work.folder / "corpus").unlink()
    (row,) = check_gpu.run_part("equality", work, 60)
    assert row[:2] == ["equality", "failed"] and "is missing" in row[2]


@pytest.mark.parametrize("name, outcome, code", [("equality", "equal", 0), ("equality", "DIFFERS", 1),
                                                 ("equality", "failed", 1), ("msvd", "failed", 0)])
def test_only_an_equality_decides_the_exit_code(monkeypatch, tmp_path, name, outcome, code):
    monkeypatch.setattr(check_gpu, "run_part", lambda *_: [["something", outcome, "a reason"]])
    assert check_gpu.main(["--tiny", "--only", name, "--out", str(tmp_path / "t.md")]) == code


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no GPU is visible; --tiny"):
        check_gpu.main([])
