"""narvid.search's speech: what is said in files is stored, found by words and by vectors, and counted as a view.

Indexes of folders take test_search_index.py's Fake for a model; what is found is test_search_engine.py's tiny NarVid's.
"""

import io
import json
import os
import sqlite3
from functools import partial
from math import log

import numpy as np
import pytest
from PIL import Image
from test_search_engine import checkpoint, embedder, measured, new_store, pictures  # noqa: F401 (fixtures)
from test_search_engine import put as put_video
from test_search_index import Fake, clip, statistics  # noqa: F401 (a fixture)
from test_subtitles import CUES, OF_CUES, make_video

from narvid import InputError
from narvid.narration import transcribe
from narvid.narration.subtitles import Timed
from narvid.search import __main__ as commands
from narvid.search import speech_store
from narvid.search.build import update
from narvid.search.engine import Engine
from narvid.search.parts import parse
from narvid.search.speech import Speech
from narvid.search.speech_sources import Hearing, subtitles_beside, utterances
from narvid.search.statistics import compute_statistics, speech_statistics
from narvid.search.rows import Filter
from narvid.search.store import Store


def put(store, path="a.mp4", seconds=60.0, windows=((0.0, 30.0), (15.0, 45.0), (30.0, 60.0))):
    """A file whose windows overlap by half; its id."""
    n = len(windows)
    store.put_file(path, 1, 2, seconds, "", [(0, 0.0, b"jpg", None)], [(start, end, [0]) for start, end in windows],
                   {"frames": np.zeros((n, 1, 2), np.float32)}, np.zeros((n, 4)))
    return next(file.id for file in store.files() if file.path == path)


SAID = [(1.0, 3.0, "The dogs are running"), (14.0, 18.0, "Café Zoë, number 42"), (58.0, 60.0, "good-bye")]
VECTORS = np.eye(3, 4, dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "index", create={}) as store:
        store.speech.put(put(store), "said.srt 1 2", "", SAID, VECTORS)
        yield store


def test_utterances_belong_to_the_windows_that_their_middle_lies_in(store):
    windows = store.all_windows().tolist()
    places, said, vectors = store.speech.of_windows(windows[::-1])
    assert [(place, utterance.text) for place, utterance in zip(places, said)] == [
        (0, "good-bye"), (1, "Café Zoë, number 42"), (2, "The dogs are running"), (2, "Café Zoë, number 42")]
    assert said[0][1:] == (58.0, 60.0, "good-bye") and np.array_equal(vectors, VECTORS[[2, 1, 0, 1]])
    [of_file] = store.files()
    assert (of_file.speech, of_file.speech_note) == ("said.srt 1 2", "")
    assert [u.text for u in store.speech.of_file(of_file.id)] == [text for _, _, text in SAID]
    assert store.speech.windows_of(store.speech.ids()[:2]).tolist() == windows[:2]
    places, said, vectors = store.speech.of_windows([])
    assert len(places) == len(said) == len(vectors) == 0


def test_words_are_found_in_their_forms_and_without_accents(store):
    first, second, third = store.speech.ids().tolist()
    for word, expected in {"dog": [first], "RUN": [first], "cafe": [second], "42": [second], "4": [], "bye": [third],
                           "_": [], "or": [], "the": [first]}.items():
        assert store.speech.with_word(word, 10).tolist() == expected, word
    assert len(store.speech.with_word("the", 0)) == 0


def test_speech_goes_with_its_file_and_is_replaced_as_a_whole(store):
    change, file = store.change, store.files()[0].id
    store.speech.put(file, "other", "a note", [(0.0, 2.0, "cats")], VECTORS[:1])
    assert store.change > change and store.files()[0].speech_note == "a note"
    assert not len(store.speech.with_word("dog", 9)) and len(store.speech.with_word("cat", 9)) == 1
    assert store.speech.count() == (1, 1)
    assert len(store.all_windows(has_speech=True)) == 1 and len(store.all_windows("nowhere", has_speech=True)) == 0
    put(store)  # the video is indexed again
    assert store.speech.count() == (0, 0) and store.files()[0].speech == ""
    assert not len(store.speech.with_word("cat", 9)) and not len(store.all_windows(has_speech=True))
    store.speech.put(store.files()[0].id, "x", "", [(0.0, 2.0, "mice")], VECTORS[:1])
    store.speech.drop()
    assert store.speech.count() == (0, 0) and not len(store.speech.with_word("mice", 9))
    assert store.files()[0].speech == "" and len(store.all_windows()) == 3


def test_sqlite_keeps_words_and_vectors_in_step(store):
    [(ids, vectors)] = store.speech.vectors()
    assert np.array_equal(ids, store.speech.ids()) and np.array_equal(vectors, VECTORS)
    put(store)
    store.speech.put(store.files()[0].id, "x", "", [(0.0, 2.0, "mice")], VECTORS[:1])
    store.speech.drop()
    with store.transaction() as run:
        run("INSERT INTO speech_words (speech_words) VALUES ('integrity-check')")


def test_a_failed_write_leaves_what_was_there(store):
    file = store.files()[0].id
    with pytest.raises(ValueError):
        store.speech.put(file, "other", "", [(0.0, 1.0, "one"), (1.0, 2.0, "two")], VECTORS[:1])
    assert store.speech.count() == (1, 3) and len(store.speech.with_word("dog", 9)) == 1


def test_without_full_text_search_words_are_found_by_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_store, "WORDS", ("CREATE VIRTUAL TABLE speech_words USING no_such_thing(text)",))
    with Store(tmp_path, create={}) as store:
        store.speech.put(put(store), "x", "", SAID, VECTORS)
        first, second, _ = store.speech.ids().tolist()
        assert store.speech.with_word("dogs", 9).tolist() == [first] and not len(store.speech.with_word("dog", 9))
        assert store.speech.with_word("NUMBER", 9).tolist() == [second] and not len(store.speech.with_word("_", 9))
        put(store)
        assert store.speech.count() == (0, 0)


def test_an_index_made_before_opens_and_gets_the_tables_when_it_is_written_to(tmp_path):
    with Store(tmp_path, create={}) as store:
        put(store)
    connection = sqlite3.connect(tmp_path / "index.db")
    for what in ("TRIGGER speech_put", "TRIGGER speech_gone", "TABLE speech_words", "TABLE speech", "TABLE speech_of"):
        connection.execute(f"DROP {what}")
    connection.close()
    with Store(tmp_path, read_only=True) as store:
        assert store.speech.count() == (0, 0) and not len(store.speech.ids()) and not store.speech.of_file(1)
        assert store.files()[0].speech == "" and len(store.all_windows()) == 3
        assert not len(store.all_windows(has_speech=True))
    with Store(tmp_path) as store:
        store.speech.put(store.files()[0].id, "x", "", SAID, VECTORS)
        assert len(store.speech.with_word("dog", 9)) == 1


def test_full_text_search_that_is_missing_is_said(tmp_path, store, monkeypatch):
    def without(*_):
        raise sqlite3.OperationalError("no such module: fts5")

    with pytest.raises(InputError, match="FTS5.*another Python"), store._in_words():
        without()


# ---- which file says it, and when it is read again ----


class Reader(Fake):
    """A Fake that encodes texts, each as its letters' counts."""

    def text_vectors(self, texts):
        counts = np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)


SRT = "1\n00:00:00,500 --> 00:00:01,500\n{}\n"


@pytest.fixture
def videos(tmp_path):
    for name in ("a.mp4", "b/c.mkv"):
        clip(tmp_path / "videos" / name, 3)
    return tmp_path / "videos"


def heard(index):
    """What an index says is said: {path: [text, ...]}, and what is amiss: {path: note}."""
    with Store(index, read_only=True) as store:
        files = store.files()
        return ({file.path: [u.text for u in store.speech.of_file(file.id)] for file in files},
                {file.path: file.speech_note for file in files if file.speech_note})


def test_subtitles_are_found_read_again_and_forgotten(tmp_path, videos):
    index = tmp_path / "index"
    (videos / "a.en.srt").write_text(SRT.format("hello there"))
    (videos / "b" / "a.srt").write_text(SRT.format("of no video in this folder"))
    model = Reader()
    update(videos, index, model)
    assert heard(index) == ({"a.mp4": ["hello there"], "b/c.mkv": []}, {})
    encoded, change = len(model.seen), Store(index, read_only=True).change
    update(videos, index, model)
    assert Store(index, read_only=True).change == change  # nothing is read again

    (videos / "a.en.srt").write_text(SRT.format("something else"))
    (videos / "b" / "c.json").write_text(json.dumps({"segments": [{"start": 1, "end": 9, "text": "whispered"}]}))
    update(videos, index, model)
    assert heard(index)[0] == {"a.mp4": ["something else"], "b/c.mkv": ["whispered"]}
    with Store(index, read_only=True) as store:
        assert store.speech.of_file(2)[0][1:3] == (1.0, store.file(2).seconds)  # cut where the file ends
        assert store.fact("speech_statistics") is not None
    (videos / "a.en.srt").unlink()
    update(videos, index, model)
    assert heard(index)[0] == {"a.mp4": [], "b/c.mkv": ["whispered"]}
    assert len(model.seen) == encoded  # no video was decoded for all that
    (videos / "b").rename(videos / "moved")
    update(videos, index, model)
    assert heard(index)[0] == {"a.mp4": [], "moved/c.mkv": ["whispered"]} and len(model.seen) == encoded
    update(videos, index, model, hearing=None)
    assert not any(heard(index)[0].values())
    update(videos, index, model)
    assert heard(index)[0]["moved/c.mkv"] == ["whispered"]


def test_a_changed_video_is_heard_again(tmp_path, videos):
    (videos / "a.srt").write_text(SRT.format("hello"))
    update(videos, tmp_path / "index", Reader())
    clip(videos / "a.mp4", 5)
    update(videos, tmp_path / "index", Reader())
    assert heard(tmp_path / "index")[0]["a.mp4"] == ["hello"]


def test_broken_subtitles_cost_no_video(tmp_path, videos, capsys):
    index = tmp_path / "index"
    (videos / "a.srt").write_bytes(b"\xff\xfe no subtitles")
    (videos / "b" / "c.vtt").write_text("no WebVTT")
    report = update(videos, index, Reader())
    said, notes = heard(index)
    assert (report.added, report.failed) == (2, 0) and said == {"a.mp4": [], "b/c.mkv": []}
    assert "a.srt" in notes["a.mp4"] and "UTF-8" in notes["a.mp4"] and str(videos) not in notes["a.mp4"]
    assert notes["b/c.mkv"].startswith("b/c.vtt:1: does not begin with WEBVTT")
    assert "a.mp4: a.srt" in capsys.readouterr().out
    update(videos, index, Reader())
    assert "a.srt" not in capsys.readouterr().out  # said once
    (videos / "a.srt").write_text(SRT.format("mended"))
    update(videos, index, Reader())
    assert heard(index)[0]["a.mp4"] == ["mended"] and "a.mp4" not in heard(index)[1]


def test_which_file_of_several(tmp_path):
    for name in ("a.mp4", "a.srt", "a.de.srt", "a.info.json", "b.mp4", "b.de.vtt", "b.en.ass", "b.json", "c.mp4",
                 "c.part2.srt", "c.part2.mp4", "d.mp4", ".d.srt"):
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / "outside.srt"
    outside.write_text("x")
    (tmp_path / "d.en.srt").symlink_to(outside)
    (tmp_path / "d.fr.srt").symlink_to(tmp_path / "gone.srt")
    os.mkfifo(tmp_path / "d.it.srt")
    (tmp_path / "\udcff.mp4").write_text("x")
    (tmp_path / "\udcff.\udcfe.srt").write_text("x")

    def chosen(language=None):
        names = ["a.mp4", "b.mp4", "c.mp4", "c.part2.mp4", "d.mp4", "\udcff.mp4"]
        found = subtitles_beside({name: (tmp_path, tmp_path / name) for name in names}, language)
        return {path: beside and (beside.path.name, "taken" in beside.note) for path, beside in found.items()}

    assert chosen() == {"a.mp4": ("a.srt", True), "b.mp4": ("b.json", True), "c.mp4": None,
                        "c.part2.mp4": ("c.part2.srt", False), "d.mp4": None,
                        "\udcff.mp4": ("\udcff.\udcfe.srt", False)}
    assert chosen("en")["b.mp4"] == ("b.en.ass", False) and chosen("en")["a.mp4"] == ("a.srt", True)
    assert chosen("de")["a.mp4"] == ("a.de.srt", False)
    mark = subtitles_beside({"x": (tmp_path, tmp_path / "\udcff.mp4")})["x"].mark
    assert mark.encode() and mark.split()[1] == "1"


def test_text_tracks_inside(tmp_path):
    tracks = [("subrip", "ger", str.encode, [(0, 1000, "Hallo.")]), ("subrip", "eng", str.encode, CUES)]
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mkv", tracks)
    make_video(tmp_path / "videos" / "b.mkv", sound=True)
    update(tmp_path / "videos", tmp_path / "index", Reader())
    assert heard(tmp_path / "index") == ({"a.mkv": ["Hallo."], "b.mkv": []}, {})
    update(tmp_path / "videos", tmp_path / "index", Reader(), hearing=Hearing(language="en"))
    assert heard(tmp_path / "index")[0]["a.mkv"] == [" ".join(cue.text for cue in OF_CUES)]


class Listener:
    """A transcriber that counts what it is given."""

    def __init__(self, label="a listener"):
        self.label, self.seconds = label, []

    def sentences(self, sound):
        self.seconds.append(len(sound) / transcribe.RATE)
        return [Timed(2.0, 3.0, "a tone")]


def test_sound_is_heard_once_where_nothing_is_written(tmp_path):
    folder, index = tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    make_video(folder / "a.mkv", sound=True)
    make_video(folder / "b.mkv", sound=True)
    make_video(folder / "silent.mkv")
    (folder / "b.srt").write_text(SRT.format("written"))
    update(folder, index, Reader())
    listener = Listener()
    update(folder, index, Reader(), hearing=Hearing(listener))
    expected = {"a.mkv": ["a tone"], "b.mkv": ["written"], "silent.mkv": []}
    assert heard(index) == (expected, {}) and listener.seconds == [pytest.approx(4, abs=0.2)]
    update(folder, index, Reader(), hearing=Hearing(listener))
    update(folder, index, Reader())  # what was heard stays
    assert heard(index)[0] == expected and len(listener.seconds) == 1
    update(folder, index, Reader(), hearing=Hearing(Listener("another")))
    assert heard(index)[0] == expected


def test_a_model_that_cannot_listen_ends_the_run_and_marks_nothing(tmp_path):
    class Deaf(Listener):
        def sentences(self, sound):
            raise InputError("--speech x: no Whisper")

    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mkv", sound=True)
    with pytest.raises(InputError, match="no Whisper"):
        update(tmp_path / "videos", tmp_path / "index", Reader(), hearing=Hearing(Deaf()))
    update(tmp_path / "videos", tmp_path / "index", Reader(), hearing=Hearing(Listener()))
    assert heard(tmp_path / "index")[0] == {"a.mkv": ["a tone"]}


def test_a_stopped_run_goes_on(tmp_path, videos, monkeypatch):
    for name in ("a.srt", "b/c.srt"):
        (videos / name).write_text(SRT.format("hello"))
    calls = []

    class Stops(Reader):
        def text_vectors(self, texts):
            calls.append(texts)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().text_vectors(texts)

    with pytest.raises(KeyboardInterrupt):
        update(videos, tmp_path / "index", Stops())
    assert list(heard(tmp_path / "index")[0].values()) == [["hello"], []]
    update(videos, tmp_path / "index", Reader())
    assert list(heard(tmp_path / "index")[0].values()) == [["hello"], ["hello"]]


def test_an_utterance_is_a_sentence():
    lines = [Timed(0, 1, "so then we"), Timed(1.2, 2, "went home."), Timed(2, 3, "It rained"), Timed(4.5, 5, "a lot"),
             Timed(5, 6, "and " * 19 + "on"), Timed(6, 7, "end")]
    assert utterances(lines) == [(0, 2, "so then we went home."), (2, 3, "It rained"), (4.5, 5, "a lot"),
                                 (5, 6, "and " * 19 + "on"), (6, 7, "end")]
    assert utterances([]) == []


# ---- what is found ----

SPOKEN = {"clip1": [(0.2, 1.2, "my name is anna and I take 42"), (1.5, 2.5, "red is not blue")],
          "clip2": [(0.0, 1.0, "this is carl, 42 please")], "clip3": [(1.0, 2.0, "anna says nothing of numbers")]}
QUERIES = ["anna mentions 42", "very red turns blue", "carl", "zebra crossing", "ANNA, anna!", "42 of carl"]


def speaking(store, split, embedder):  # noqa: F811
    """All test videos as one window each; some speak."""
    for video, frames, sentences in zip(split.videos, pictures(split), split.sentences):
        put_video(store, embedder, f"{video}.mp4", frames, sentences)
    store.statistics = compute_statistics(store, embedder, None)
    for file, said in zip(store.files(), [*SPOKEN.values()]):
        store.speech.put(file.id, "x", "", said, embedder.text_vectors([text for _, _, text in said]))
    store.set_fact("speech_statistics", speech_statistics(store, Speech(store, embedder), embedder, None))
    return store


@pytest.fixture(scope="module")
def spoken(measured, embedder, tmp_path_factory):  # noqa: F811
    with speaking(new_store(tmp_path_factory.mktemp("spoken") / "i", embedder), measured[0], embedder) as store:
        yield store


def z_of(store, embedder, query, said):  # noqa: F811
    """z_qs of a query and what is said in a window, as speech.py's first lines have it, written out."""
    texts = [text for of_video in SPOKEN.values() for _, _, text in of_video]
    words_of = lambda text: set(text.casefold().replace(",", " ").replace("!", " ").split())  # noqa: E731
    count = {word: sum(word in words_of(text) for text in texts) for word in words_of(query)}
    idf = {word: log(1 + (len(texts) - h + 0.5) / (h + 0.5)) for word, h in count.items()}
    shares = [sum(idf[word] for word in idf if word in words_of(text)) / sum(idf.values()) for _, _, text in said]
    together = set().union(*(words_of(text) for _, _, text in said))
    share = (max(shares) + sum(idf[word] for word in idf if word in together) / sum(idf.values())) / 2
    cosine = max(float(a @ b) for a in embedder.text_vectors([query])
                 for b in embedder.text_vectors([text for _, _, text in said]).astype(np.float16).astype(np.float32))
    (m, s), (mean, std) = store.fact("speech_statistics")
    return max(0, (share - m) / max(s, 0.01) - 2) + max(0, (cosine - mean) / max(std, 0.01) - 2)


def test_speech_is_added_to_the_score_by_the_formula(spoken, embedder):  # noqa: F811
    engine = Engine(spoken, embedder)
    of_file = dict(zip([file.id for file in spoken.files()], SPOKEN.values()))
    found = engine.search(QUERIES, top=99)
    engine.speech.ask = lambda texts, eos: None  # deaf
    without = [{a.window: a for a in answers} for answers in engine.search(QUERIES, top=99)]
    counts = 0
    for query, answers, before in zip(QUERIES, found, without, strict=True):
        for answer in answers:
            said, silent = of_file.get(answer.file), before[answer.window]
            if said is None:  # to the bit
                assert (answer.score, answer.speech, answer.said) == (silent.score, None, None)
                continue
            z = z_of(spoken, embedder, query, said)
            assert answer.speech == pytest.approx(z, abs=1e-4)
            assert answer.score == pytest.approx(silent.score + z, abs=1e-4) and silent.speech is None
            assert (answer.said is not None) == (answer.speech > 0)
            counts += answer.speech > 0
    assert counts >= 4
    best = found[0][0]
    assert best.said == (0.2, 1.2, "my name is anna and I take 42") and best.file == spoken.files()[0].id
    assert 'at 0:00 is said "my name is anna and I take 42", which adds ' in best.why
    assert found[5][0].said.text == "this is carl, 42 please"
    assert not any(answer.said for answer in found[3])


def test_an_index_that_says_nothing_is_searched_as_before(spoken, measured, embedder, tmp_path):  # noqa: F811
    split, *_ = measured
    with new_store(tmp_path / "i", embedder) as store:
        for video, frames, sentences in zip(split.videos, pictures(split), split.sentences):
            put_video(store, embedder, f"{video}.mp4", frames, sentences)
        store.statistics = spoken.statistics
        engine = Engine(store, embedder)
        found = engine.search(QUERIES, top=99)
        engine.speech.ask = lambda texts, eos: None
        assert engine.search(QUERIES, top=99) == found and all(a.speech is None for answers in found for a in answers)


def test_stage_one_finds_what_only_speech_answers(spoken, embedder):  # noqa: F811
    every = Engine(spoken, embedder).search(QUERIES, top=99, exact=True)
    engine = Engine(spoken, embedder, candidates=4)
    for query, exact, few in zip(QUERIES, every, engine.search(QUERIES, top=99)):
        scores = {answer.window: answer.score for answer in exact}
        assert all(answer.score == pytest.approx(scores[answer.window], abs=1e-5) for answer in few)
        assert few[0].window == exact[0].window or not exact[0].said, query
    deaf = Engine(spoken, embedder, candidates=4)
    deaf.speech.candidates = lambda *_: np.empty(0, np.int64)
    answers = deaf.search(QUERIES, top=99)
    assert any(few[0].window != exact[0].window for few, exact in zip(answers, every) if exact[0].said)
    path = spoken.files()[0].path
    assert engine.search(["anna mentions 42"], max_seconds=0.5)[0] == []
    assert engine.search(["anna mentions 42"], top=1)[0][0].path == path


def candidates(store, embedder, query, count, where=Filter(), eos=None):  # noqa: F811
    speech, vector = Speech(store, embedder), embedder.text_vectors([query]) if eos is None else eos
    return speech.candidates(speech.ask([query], vector), where, count).tolist()


def test_candidates_by_words_and_by_vectors(spoken, embedder, monkeypatch):  # noqa: F811
    windows, found = spoken.all_windows(has_speech=True).tolist(), partial(candidates, spoken, embedder)
    by_vector = embedder.text_vectors(["this is carl, 42 please"])
    assert found("zebra", 1, eos=by_vector) == [windows[1]]  # the nearest of four, by an index of vectors
    assert found("anna", 1, eos=by_vector) == windows[:2]
    assert found("zebra", len(spoken.speech.ids())) == windows
    assert found("anna", 1, Filter(folder="nowhere")) == []
    monkeypatch.setattr("narvid.search.speech.COMMON", 2)
    asked = Speech(spoken, embedder)
    fit = asked.fit(asked.ask(["anna carl"], by_vector), windows[:3])
    assert fit[0, 0].tolist() == pytest.approx([0, 1, 0])  # anna is said too often to tell anything


def test_speech_that_the_index_of_vectors_does_not_know_yet_is_always_looked_at(spoken, embedder):  # noqa: F811
    windows, found = spoken.all_windows(has_speech=True).tolist(), partial(candidates, spoken, embedder)
    by_vector = embedder.text_vectors(["this is carl, 42 please"])
    assert found("zebra", 1, eos=by_vector) == [windows[1]]  # it is made
    new = spoken.files()[-1].id
    spoken.speech.put(new, "x", "", [(0.0, 1.0, "a zebra")], embedder.text_vectors(["a zebra"]))
    try:
        of_new = spoken.all_windows(has_speech=True)[~np.isin(spoken.all_windows(has_speech=True), windows)].tolist()
        assert found("horse", 1, eos=by_vector) == sorted([windows[1], *of_new])
    finally:
        spoken.speech.put(new, "x", "", [], np.zeros((0, 1)))


def test_pictures_ask_nothing_of_speech_and_minus_takes_it_away(spoken, embedder):  # noqa: F811
    engine, file = Engine(spoken, embedder), io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    assert all(a.speech is None and a.said is None for a in engine.like_picture(file.getvalue(), top=99))
    queries = ["zebra crossing", "anna mentions 42", parse('"zebra crossing" - "anna mentions 42"')]
    found = engine.search(queries, top=99)
    first = spoken.all_windows()[0]
    plus, other, both = (next(a for a in answers if a.window == first) for answers in found)
    assert both.score == pytest.approx(plus.score - other.score, abs=1e-4)
    assert both.speech == pytest.approx(plus.speech - other.speech, abs=1e-4) and both.speech < 0 and both.said is None


def test_only_what_speaks(spoken, embedder):  # noqa: F811
    engine = Engine(spoken, embedder)
    speaking = {file.id for file in spoken.files()[:3]}
    for exact in (False, True):
        found = engine.search(["black pink"], top=99, has_speech=True, exact=exact)[0]
        assert {answer.file for answer in found} == speaking


def test_the_table_and_its_flags(spoken, embedder, tmp_path, capsys):  # noqa: F811
    [answers] = Engine(spoken, embedder).search(["anna mentions 42"], top=2)
    lines = list(commands.table("anna mentions 42", answers))
    assert f"       0:00 said: my name is anna and I take 42 ({answers[0].speech:+.2f})" in lines
    as_dict = answers[0].as_dict()
    assert as_dict["said"] == {"start": 0.2, "end": 1.2, "text": "my name is anna and I take 42"}
    assert json.loads(json.dumps(as_dict))["speech"] == answers[0].speech
    for flags, said in {("--no_speech", "--speech", "tiny"): "--no_speech excludes",
                        ("--no_speech", "--language", "en"): "--no_speech excludes"}.items():
        with pytest.raises(SystemExit) as stopped:
            commands.parse_args(["index", "videos", "--out", "index", *flags])
        assert said in f"{stopped.value}{capsys.readouterr().err}"
    assert commands.parse_args(["query", "index", "x", "--has_speech"]).has_speech
