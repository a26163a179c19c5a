"""--speech and --sentence: what a frame's sentence is, in data, digest, checkpoint, evaluation and check_data."""

import argparse
import json
import shutil

import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid.data.narrations import with_speech
from narvid.distributed import World
from narvid.report import gallery
from narvid.run.settings import flags_of
from narvid.towers.tokenizer import Tokenizer
from scripts import check_data

ALONE = World(0, 1, torch.device("cpu"))


def words(texts):
    """A tokenizer of two special tokens and one token a word."""
    return [2 + len(text.split()) for text in texts]


# ---- one sentence of two ----


@pytest.mark.parametrize("caption, speech, max_words, expected", [
    ("a b c", "x y", 9, "a b c x y"),
    ("a b c", "x y", 7, "a b c x y"),  # just fits
    ("a b c d e f", "x y", 8, "a b c d x y"),  # speech leaves of its half
    ("a b", "u v w x y z", 8, "a b u v w x"),
    ("a b c d e f", "u v w x y z", 8, "a b c u v w"),  # half each
    ("a b c d e f", "u v w x y z", 9, "a b c u v w x"),
    ("a b c d e f", None, 4, "a b c d e f"),  # alone, the tower cuts it as always
    (None, "u v w", 4, "u v w"), (None, None, 9, None),
    ("a b", "x y", 2, ""), ("a b", "x y", 3, "x"),
])
def test_the_caption_then_what_is_said(caption, speech, max_words, expected):
    assert with_speech([caption], [speech], words, max_words) == [expected]


def test_what_is_cut_fits_clip_s_tower():
    lengths = Tokenizer({}).lengths
    caption = "A man, wearing a half-unbuttoned shirt, photographs wildebeests " * 4
    [both] = with_speech([caption], ["Nevertheless, Mr. O'Shaughnessy's antidisestablishmentarianism"], lengths, 40)
    assert both.startswith("A man, wearing") and both.endswith("antidisestablishmentarianism")
    assert 36 <= lengths([both])[0] <= 40


# ---- the trainer ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tiny corpus with speech: in every second video somebody speaks at each frame but the first."""
    folder = tiny.make_corpus(tmp_path_factory.mktemp("corpus"))
    index = [json.loads(line) for line in (folder / "frames" / "index.jsonl").read_text().splitlines()]
    lines = [{"video": entry["video"], "captioner": "subtitles within=2", "prompt": "", "source": "speech",
              "sentences": [{"time": time, "text": f"now {time:g} of {entry['video']}"} for time in entry["times"][1:]]}
             for entry in index[::2]]
    (folder / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def split_of(corpus, tmp_path, *more, name="train"):
    args = trainer.parse_args(tiny.flags(corpus, tmp_path / "none", *more))
    return trainer.load_data(args, ALONE, words)[name]


def test_each_choice_of_sentence(corpus, tmp_path):
    caption, both = split_of(corpus, tmp_path), split_of(corpus, tmp_path, "--sentence", "both")
    assert caption.videos == both.videos and caption.picks == both.picks
    spoken = json.loads((corpus / "speech.jsonl").read_text().splitlines()[0])["video"]
    seen = 0
    for video, picks, alone, of_both in zip(both.videos, both.picks, caption.sentences, both.sentences):
        speaks = int(video.removeprefix("train")) % 2 == 0
        for pick, one, two in zip(picks, alone, of_both):
            said = f"now {pick} of {video}" if speaks and pick else None
            assert two == (" ".join(filter(None, (one, said))) or None)
            seen += bool(said)
    assert seen > 10 and spoken in both.videos
    speech = split_of(corpus, tmp_path, "--sentence", "speech", "--missing_narration", "skip-video")
    assert all(int(video.removeprefix("train")) % 2 == 0 for video in speech.videos) and speech.skipped
    assert {text for of_video in speech.sentences for text in of_video} - {None} == {
        f"now {pick} of {video}" for video, picks in zip(speech.videos, speech.picks) for pick in picks if pick}


def error(*argv):
    with pytest.raises(SystemExit) as stopped:
        trainer.main([*map(str, argv)])
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_flags_that_do_not_go_together(corpus, tmp_path):
    base = tiny.flags(corpus, tmp_path / "none")
    assert "--speech is read with --sentence speech or both" in error(*base, "--speech", "x.jsonl")
    assert "reads no narration" in error(*tiny.flags(corpus, tmp_path / "none", "--method", "clip4clip"),
                                         "--sentence", "both")
    assert "no_such.jsonl: cannot be read" in error(*base, "--sentence", "both", "--speech", "no_such.jsonl")
    assert "no narration for video train1 " in error(*base, "--sentence", "speech")


def test_a_run_knows_its_speech_and_a_checkpoint_brings_the_choice_back(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    argv = tiny.flags(corpus, run, "--sentence", "both", "--epochs", 1)
    metrics = trainer.main(argv)
    stored = torch.load(run / "last.pt", weights_only=True)
    alone = split_of(corpus, tmp_path)
    again = trainer.main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "eval"), "--eval_only",
                          "--checkpoint", str(run / "best.pt"), "--num_workers", "0"])
    assert again == metrics and stored["args"]["sentence"] == "both"
    other = trainer.main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "other"), "--eval_only",
                          "--checkpoint", str(run / "best.pt"), "--num_workers", "0", "--sentence", "caption"])
    assert other != metrics and alone.sentences is not None
    gallery.main(["--run", str(run), "--out", str(tmp_path / "gallery"), "--queries", "2"])
    assert "ranks of S_fusion are those of its ranks.csv" in capsys.readouterr().out
    moved = tmp_path / "moved.jsonl"
    shutil.copy(corpus / "speech.jsonl", moved)  # the path may change, what it says may not
    (run / "results.jsonl").unlink()
    longer = [*argv, "--resume", "auto", "--speech", str(moved)]
    assert trainer.main(longer) == metrics
    (run / "results.jsonl").unlink()
    moved.write_text(moved.read_text().replace("now", "then"))
    assert "train's sentences" in error(*longer)
    assert "--sentence both there, caption here" in error(*argv, "--resume", "auto", "--sentence", "caption")


def test_a_run_from_before_the_flags_has_their_defaults():
    args = flags_of({"method": "narvid"})
    assert isinstance(args, argparse.Namespace) and (args.sentence, args.speech) == ("caption", None)


# ---- scripts/check_data.py ----


def test_check_data_says_what_of_the_speech_is_there(corpus, tmp_path, capsys):
    preset = tmp_path / "p.yaml"
    preset.write_text(f"data_dir: {corpus}\nsentence: both\n")
    with pytest.raises(SystemExit) as left:
        check_data.main([str(preset)])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "[x] speech       in 1" in printed and "of 33 videos somebody speaks" in printed
    preset.write_text(f"data_dir: {corpus}\nsentence: speech\nspeech: {tmp_path / 'none.jsonl'}\n")
    with pytest.raises(SystemExit) as left:
        check_data.main([str(preset)])
    printed = capsys.readouterr().out
    assert left.value.code == 1 and "narrations   " not in printed
    assert "next: python -m narvid.narration import SUBTITLES --frames" in printed
