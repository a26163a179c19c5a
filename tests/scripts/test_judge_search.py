"""scripts/judge_search.py: halves, shares and ranks, of an engine whose heights and orders are known."""

import json
from types import SimpleNamespace

import pytest

from narvid.search.answers import Answers
from narvid.search.store import Store
from scripts import judge_search


class KnownEngine:
    """A query "real 7" has height 7 and finds its video at rank 7; sentences of others have height 3, nonsense 5."""

    def rows(self, texts):
        found = []
        for text in texts:
            answers = Answers()
            kind, _, number = text.partition(" ")
            answers.height = float(number) if kind == "real" else 3.0 if kind == "other" else 5.0
            found.append(answers)
        return found

    def search(self, texts, *, top, exact):
        assert exact
        return [[SimpleNamespace(rank=int(text.split()[1]), path=f"a/{text.split()[1]}.mp4")] for text in texts]


def test_what_is_told_apart_and_how_many_ranks_agree(tmp_path, monkeypatch, capsys):
    with Store(tmp_path / "i", create={}) as store:
        store.set_fact("level", 30.0)
    monkeypatch.setattr(judge_search, "open_engine", lambda store, checkpoint: KnownEngine())
    (tmp_path / "real.jsonl").write_text("".join(
        json.dumps({"video": str(n), "query": f"real {n}"}) + "\n" for n in range(1, 41)))
    (tmp_path / "other.txt").write_text("other 1\n\nother 2\nother 3\n")
    ranks = [f"{n},real {n},9,9,9,{n if n > 10 else n + 2}" for n in range(1, 41)]
    (tmp_path / "ranks.csv").write_text("\n".join(["video,query,S_qv,S_qn,S_sum,S_fusion", *ranks]) + "\n")
    judge_search.main([str(tmp_path / "i"), "--real", str(tmp_path / "real.jsonl"), "--unrelated",
                       str(tmp_path / "other.txt"), "--ranks", str(tmp_path / "ranks.csv"), "--queries", "100"])
    out = capsys.readouterr().out
    assert "40 real, 3 unrelated, 100 gibberish" in out
    assert "a level that 5% of the real ones do not reach is 2.90; 100.0% of gibberish reaches it" in out  # 1, 3, ...
    assert "that level: real 5.0%, unrelated 0.0%, gibberish 0.0%" in out  # 2, 4, 6, ...
    assert "own level 30.00: real 70.0%, unrelated 100.0%, gibberish 100.0%" in out
    assert "30 of 40 queries rank their video as evaluation does; the ranks of the others differ by up to 2" in out


def test_a_missing_flag_is_one_sentence():
    with pytest.raises(SystemExit):
        judge_search.main(["x"])
