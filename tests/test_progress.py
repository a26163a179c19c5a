"""narvid/progress.py: what a log file and a terminal get to see."""

import io
import sys

from narvid import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_work_leaves_nothing_in_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.tqdm(range(1000), desc="steps")) == list(range(1000))
    assert sys.stderr.getvalue() == ""


def test_long_work_leaves_a_line_each_interval(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS", 0)
    for _ in progress.tqdm(range(5), desc="steps"):
        pass
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) >= 5 and all(line.startswith("steps: ") for line in lines)
    assert "\r" not in sys.stderr.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.tqdm(range(5), desc="steps"):
        pass
    assert "\r" in sys.stderr.getvalue() and "5/5" in sys.stderr.getvalue()
