"""Every kind of file that is read, mutated: one sentence or the right value, and nothing else (scripts/fuzz.py)."""

import random

import pytest

from scripts import fuzz

MUTANTS = {name: 150 for name in fuzz.FORMATS} | {"model config": 60, "config.yaml": 60, "preset": 60}


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_a_mutant_is_refused_in_one_sentence_or_read_right(name, tmp_path):
    assert fuzz.accepted(fuzz.FORMATS[name], fuzz.FORMATS[name].sample, tmp_path)
    good = fuzz.fuzz(name, seed=0, mutants=MUTANTS[name], folder=tmp_path)
    assert 0 < good < MUTANTS[name], "a test of mutants that are all alike shows nothing"


def test_a_wrong_value_a_traceback_and_a_long_time_are_found(tmp_path):
    """The judge itself: what it must not let pass."""
    form = fuzz.FORMATS["list"]
    for read in (lambda path: {"v3"}, lambda path: {}["x"], lambda path: [n for n in range(10**12) if n < 0]):
        fuzz.SECONDS, before = 1, fuzz.SECONDS
        try:
            with pytest.raises((AssertionError, KeyError, fuzz.TooSlow)):
                fuzz.accepted(form._replace(read=read), form.sample, tmp_path)
        finally:
            fuzz.SECONDS = before


def test_a_seed_gives_its_mutants_again():
    sample = fuzz.FORMATS["narrations"].sample
    first, again = ([fuzz.mutant(rng, sample) for _ in range(50)] for rng in (random.Random(3), random.Random(3)))
    assert first == again and len(set(first)) > 40


def test_the_command_runs(capsys):
    fuzz.main(["--seed", "1", "--mutants", "5", "--formats", "list", "queries"])
    assert capsys.readouterr().out.count("5 mutants") == 2
