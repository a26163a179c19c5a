"""narvid/progress.py: what a log file and a terminal get to see."""

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from narvid import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves; stderr is a file."""
    clock = Clock()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))  # pytest has the real one
    monkeypatch.setattr(progress, "monotonic", clock)
    monkeypatch.setattr(progress.tqdm, "next_line", 0.0)
    return clock


def states():
    """The n of every line so far."""
    lines = progress.sys.stderr.getvalue().splitlines()
    assert all(line.startswith("steps: ") for line in lines) and "\r" not in progress.sys.stderr.getvalue()
    return [int(re.search(r"(\d+)/\d+ \[", line).group(1)) for line in lines]


def test_short_work_leaves_nothing_in_a_file(clock):
    for _ in progress.tqdm(range(1000), desc="steps"):
        clock.now += 0.029
    assert progress.sys.stderr.getvalue() == ""


def test_a_file_gets_one_line_every_30_seconds_and_the_last(clock):
    for _ in progress.tqdm(range(200), desc="steps"):
        clock.now += 0.5
    assert states() == [60, 120, 180, 200]


def test_redraws_that_are_asked_for_add_no_line(clock):
    """What the trainer does (new numbers behind the bar), and what tqdm's own thread does."""
    with progress.tqdm(total=100, desc="steps") as bar:
        for step in range(100):
            clock.now += 1
            bar.update()
            bar.set_postfix(loss=step)
            bar.refresh()
    assert states() == [30, 60, 90, 100]
    assert bar.miniters == 1 and not bar.dynamic_miniters  # tqdm's thread only redraws bars that wait for more


def test_a_long_step_writes_nothing_until_it_ends(clock):
    with progress.tqdm(total=3, desc="steps") as bar:
        clock.now += 31
        bar.update()
        for _ in range(20):
            clock.now += 29
            bar.refresh()
        assert states() == [1]
        bar.update()
        assert states() == [1, 2]
        bar.refresh()
        clock.now += 1
        bar.update()
    assert states() == [1, 2, 3]


def test_an_end_is_written_once(clock):
    with progress.tqdm(total=2, desc="steps") as bar:
        clock.now += 40
        bar.update(2)
    bar.close()
    assert states() == [2]


def test_work_that_breaks_off_says_where(clock):
    with pytest.raises(KeyError):
        for step in progress.tqdm(range(100), desc="steps"):
            clock.now += 1
            if step == 44:
                raise KeyError
    assert states() == [30, 44]


def test_bars_share_the_30_seconds(clock):
    """Epochs of 31 seconds with an evaluation of 8: the ends, and not a second line a second before each."""
    begin = clock.now
    for _ in range(20):
        for _ in progress.tqdm(range(31), desc="steps"):
            clock.now += 1
        for _ in progress.tqdm(range(8), desc="steps"):
            clock.now += 1
    assert set(states()) == {30, 31} and states().count(31) == 20
    assert len(states()) <= 1 + (clock.now - begin) / 30


def test_a_bar_inside_another_moves_no_cursor(clock):
    with progress.tqdm(total=2, desc="steps") as outer:
        for _ in progress.tqdm(range(40), desc="steps"):
            clock.now += 1
        outer.update(2)
    assert states() == [30, 40, 2]
    assert "\x1b" not in progress.sys.stderr.getvalue()


def test_a_bar_that_is_switched_off_writes_nothing(clock):
    for _ in progress.tqdm(range(100), desc="steps", disable=True):
        clock.now += 1
    assert progress.sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.tqdm(range(5), desc="steps"):
        pass
    assert "\r" in sys.stderr.getvalue() and "5/5" in sys.stderr.getvalue()


# ---- nobody reads any more ----

WORK = """
import sys
from narvid.flags import command
from narvid.progress import say, tqdm
def main():
    tqdm.next_line, bar = 0, tqdm(range(3000))
    for number in bar:
        bar.started = tqdm.next_line = -1000  # a line is due at any time
        say(f"step {number}")
    open(sys.argv[1], "w").write(f"{number}")
command(main)
"""


@pytest.mark.parametrize("output", ["| head -n 1", "2>&1 | head -n 1", "> /dev/full", "> /dev/full 2>&1"])
def test_work_goes_on_where_nobody_reads(tmp_path, output):
    done = tmp_path / "done"
    run = subprocess.run(["sh", "-c", f'"$0" -c "$1" "$2" {output}', sys.executable, WORK, done], capture_output=True,
                         text=True, cwd=Path(__file__).parents[1])
    assert done.read_text() == "2999" and len(run.stdout.splitlines()) <= 1 and "rror" not in run.stderr
