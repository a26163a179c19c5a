"""narvid.search's speech: what is said in files is stored, found by words and by vectors, and counted as a view."""

import sqlite3

import numpy as np
import pytest

from narvid import InputError
from narvid.search import speech_store
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
    [(ids, vectors)] = store.speech.vectors()
    assert np.array_equal(ids, store.speech.ids()) and np.array_equal(vectors, VECTORS)
    assert store.speech.windows_of(ids[:2]).tolist() == windows[:2]
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
