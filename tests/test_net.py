"""flags.command: what a person sees of a fault that nobody foresaw, and of the ends that are foreseen."""

import re
import sys
from pathlib import Path

import pytest

from narvid import InputError
from narvid.flags import FAULT, command


def ends(monkeypatch, tmp_path, error, *argv):
    """The sentence of a command that ends so."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        command(main)
    return str(left.value)


def test_an_unforeseen_fault_is_one_line_and_its_traceback_a_file(monkeypatch, tmp_path):
    said = ends(monkeypatch, tmp_path, ZeroDivisionError("a\nb"))
    assert said.startswith("error: ") and "\n" not in said and FAULT in said and "ZeroDivisionError: a b" in said
    written = Path(re.search(r"traceback is in (\S+),", said)[1])
    assert written.parent == tmp_path and "raise error" in written.read_text()


def test_the_traceback_of_a_run_lies_in_the_run_and_last_pt_is_named(monkeypatch, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1\n")
    (run / "last.pt").write_bytes(b"x")
    for argv in (("--output_dir", run), (f"--output_dir={run}",)):
        said = ends(monkeypatch, tmp_path, KeyError("x"), *argv)
        assert f"traceback is in {run}/fault-" in said and f"{run / 'last.pt'} is whole" in said
    assert "raise error" in next(run.glob("fault-*.txt")).read_text()


def test_a_folder_that_is_no_run_gets_no_file(monkeypatch, tmp_path):
    (tmp_path / "new").mkdir()
    ends(monkeypatch, tmp_path, KeyError("x"), "--output_dir", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("error, said", [
    (InputError("data.jsonl:3: is no JSON; correct it"), "error: data.jsonl:3: is no JSON; correct it"),
    (KeyboardInterrupt(), "stopped; the same command continues"),
    (MemoryError("x"), "error: out of memory (MemoryError: x); lower the batch size, or in training set --micro_batch"),
])
def test_what_is_foreseen_is_not_called_a_fault(monkeypatch, tmp_path, error, said):
    assert ends(monkeypatch, tmp_path, error) == said and not list(tmp_path.iterdir())
