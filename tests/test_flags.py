"""How a command ends: a mistake in its own sentence, and what nobody foresaw in one line below which a net hangs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main_task_retrieval as trainer
from narvid.flags import FAULT, Parser

ROOT = Path(__file__).resolve().parent.parent


def ended(body: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own whose main is `body`."""
    code = f"from narvid import InputError\nfrom narvid.flags import command\ndef main():\n    {body}\ncommand(main)"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)


def test_a_mistake_has_its_sentence_and_no_more():
    for body, said in (("raise InputError('file:3: is no number')", "error: file:3: is no number\n"),
                       ("raise KeyboardInterrupt", "stopped; the same command continues\n"),
                       ("import sys; sys.exit('error: flags')", "error: flags\n")):
        run = ended(body)
        assert (run.returncode, run.stdout, run.stderr) == (1, "", said)
    assert ended("print('fine')").stdout == "fine\n"


def test_a_fault_of_ours_is_one_line_that_says_where_its_traceback_lies(tmp_path):
    run = ended("{}['two\\nlines']", TMPDIR=str(tmp_path))
    (written,) = tmp_path.iterdir()
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert FAULT in run.stderr and "KeyError" in run.stderr and str(written) in run.stderr
    assert "Traceback (most recent call last)" in written.read_text() and "KeyError" in written.read_text()


@pytest.mark.parametrize("flag", ["--output_dir {}", "--output_dir={}"])
def test_a_fault_in_a_run_is_written_beside_it_and_says_what_is_saved(tmp_path, flag):
    for name in ("config.yaml", "last.pt"):
        (tmp_path / name).write_text("")
    run = ended("1 / 0", *flag.format(tmp_path).split())
    (written,) = tmp_path.glob("fault-*.txt")
    assert str(written) in run.stderr and f"{tmp_path / 'last.pt'} is whole, --resume auto goes on" in run.stderr


def test_a_fault_puts_nothing_into_a_folder_that_is_no_run(tmp_path):
    """RunDir would take it for something else's folder, and refuse it next time."""
    (tmp_path / "new").mkdir()
    run = ended("1 / 0", "--output_dir", str(tmp_path / "new"), TMPDIR=str(tmp_path))
    assert not list((tmp_path / "new").iterdir()) and FAULT in run.stderr and len(list(tmp_path.glob("fault-*"))) == 1


def test_a_fault_on_a_full_disk_still_says_what_it_is(tmp_path):
    run = ended("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); 1 / 0", TMPDIR=str(tmp_path))
    assert FAULT in run.stderr and "ZeroDivisionError" in run.stderr and "line 4, in main" in run.stderr
    assert not list(tmp_path.iterdir())


def test_no_memory_left_is_no_fault_of_ours():
    run = ended("raise MemoryError('3 GiB')")
    assert run.stderr.startswith("error: out of memory (MemoryError: 3 GiB); lower the batch size")
    assert FAULT not in run.stderr


def test_a_reader_who_leaves_and_a_terminal_without_letters():
    run = subprocess.run(["sh", "-c", f"{sys.executable} -c \"from narvid.flags import command\n"
                          "def main():\n    print('x' * 10**6)\ncommand(main)\" | head -c 1"],
                         cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("x", "")
    run = ended("print('a \\u2028 \\U0001f600')", PYTHONIOENCODING="ascii")
    assert run.returncode == 0 and run.stdout == "a \\u2028 \\U0001f600\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(tmp_path, closed):
    """As some schedulers start a command: it works, and what it prints reaches none of its files."""
    code = ("import sys\nfrom narvid.flags import command\ndef main():\n    with open('made', 'w') as file:\n"
            "        print('out', flush=True)\n        print('err', file=sys.stderr, flush=True)\n"
            "        file.write('whole')\ncommand(main)")
    run = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=tmp_path, text=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0 and (tmp_path / "made").read_text() == "whole"
    assert run.stdout == ("out\n" if closed in ("2>&-", "<&-") else "")
    assert run.stderr == ("err\n" if closed in (">&-", "<&-") else "")


def test_a_fault_where_there_is_no_folder_for_temporary_files(tmp_path):
    run = ended("import tempfile\n    def nowhere():\n"
                "        raise FileNotFoundError(2, 'No usable temporary directory')\n"
                "    tempfile.gettempdir = nowhere\n    {}['x']")
    assert FAULT in run.stderr and "No usable temporary directory" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_an_old_locale_is_named_and_not_the_file(tmp_path, environment):
    (tmp_path / "caf\u00e9").mkdir()
    run = ended("from narvid.flags import Parser; parser = Parser(); parser.add_argument('folder'); "
                "print(len(parser.parse_args().folder))", str(tmp_path), **environment)
    assert run.stdout == f"{len(str(tmp_path))}\n"  # a plain name is read by every locale
    for body, argv in (("from narvid import files; import sys; print(files.list_folder(sys.argv[1]))", [tmp_path]),
                       ("from narvid import files; import sys; print(list(files.walk(sys.argv[1])))", [tmp_path]),
                       ("from narvid.flags import Parser; parser = Parser(); parser.add_argument('folder'); "
                        "print(parser.parse_args().folder)", [tmp_path / "caf\u00e9"])):
        run = ended(body, *map(str, argv), **environment)
        if environment:
            assert run.returncode == 1 and "set PYTHONUTF8=1" in run.stderr and len(run.stderr.splitlines()) == 1
        else:
            assert run.returncode == 0 and "caf" in run.stdout


def test_the_net_hangs_below_processes_alone(monkeypatch, tmp_path):
    """main() as a function raises what it meets: no test can take the net's line for a sentence of ours."""

    def broken(*args):
        raise LookupError("nobody foresaw this")

    monkeypatch.setattr(trainer, "run_task", broken)
    with pytest.raises(LookupError):
        trainer.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")])


def test_every_command_ends_through_it():
    """All that is run as a process: `if __name__ == "__main__"` calls command(...), or what calls it."""
    without = []
    for path in [ROOT / "main_task_retrieval.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("data/*.py"),
                 *ROOT.glob("narvid/**/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                if "command(" not in (text := ast.unparse(node.body)) and text != "start()":
                    without.append(path.name)
    assert without == []


def test_text_that_is_no_utf8_is_refused_among_the_flags(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--query")
    assert parser.parse_args(["--query", "a \u2028"]).query == "a \u2028"
    with pytest.raises(SystemExit, match=r"error: 'a\\udcff' is no UTF-8 text"):
        parser.parse_args(["--query", os.fsdecode(b"a\xff")])
