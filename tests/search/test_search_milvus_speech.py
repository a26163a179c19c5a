"""What is said, kept in Milvus: the tests of speech once more, over milvus-lite, and what only an engine can get wrong.

Kills in the middle of a put are in test_search_milvus.py.
"""

# flake8: noqa: F811  fixtures are imported and asked for

import pytest
from test_search_engine import checkpoint, embedder, measured  # noqa: F401
from test_search_engine import new_store as in_a_folder
from test_search_milvus import at, in_milvus  # noqa: F401  (which skips this file too where Milvus is missing)
from test_search_speech import QUERIES, SAID, VECTORS, put, speaking, spoken, statistics, store, videos  # noqa: F401

from narvid.search import milvus_speech
from narvid.search.engine import Engine
from narvid.search.milvus_store import MilvusStore
from narvid.search.rows import Filter

pytestmark = pytest.mark.slow
from test_search_speech import (  # noqa: E402, F401
    test_a_changed_video_is_heard_again,
    test_a_failed_write_leaves_what_was_there,
    test_candidates_by_words_and_by_vectors,
    test_only_what_speaks,
    test_pictures_ask_nothing_of_speech_and_minus_takes_it_away,
    test_speech_goes_with_its_file_and_is_replaced_as_a_whole,
    test_speech_is_added_to_the_score_by_the_formula,
    test_stage_one_finds_what_only_speech_answers,
    test_utterances_belong_to_the_windows_that_their_middle_lies_in,
    test_words_are_found_in_their_forms_and_without_accents,
)


def test_an_index_without_room_for_speech_is_read_and_gets_it_from_a_writer(at):
    with MilvusStore(at(), create={}) as store:
        file = put(store)
        store.milvus.drop(["said"])
    with MilvusStore(at(), read_only=True) as store:
        assert not store.speech.exists and store.speech.count() == (0, 0) and not len(store.speech.ids())
        assert store.files()[0].speech == "" and not len(store.all_windows(has_speech=True))
        assert not store.speech.of_file(file)
    with MilvusStore(at()) as store:
        store.speech.put(file, "x", "", SAID, VECTORS)
        assert len(store.speech.with_word("dog", 9)) == 1 and store.files()[0].speech == "x"


def test_what_an_error_left_in_hand_is_swept_by_the_next_write(at):
    with MilvusStore(at(), create={}) as store:
        file = put(store)
        store.speech.put(file, "x", "", SAID, VECTORS)
        with pytest.raises(ValueError):
            store.speech.put(file, "y", "", SAID, VECTORS[:2])
        put(store, "b.mp4")
        rows = [row for page in store.milvus.pages("speech", "", ["id"]) for row in page]
        assert len(rows) == 3 and store.speech.count() == (1, 3) and store.state()["hand"] is None


def test_filters_hold_for_speech(at):
    with MilvusStore(at(), create={}) as store:
        for path in ("a.mp4", "in/b.mp4"):
            store.speech.put(put(store, path), "x", "", SAID, VECTORS)
        ids, inside = store.speech.ids(), store.speech.ids(Filter("in"))
        assert len(ids) == 6 and inside.tolist() == ids[3:].tolist()
        assert store.speech.within(ids, Filter("in", has_speech=True)).tolist() == [False] * 3 + [True] * 3
        [near] = store.speech.nearest(VECTORS[:1], 1, Filter("in"))
        assert near.tolist() == [inside[0]]
        windows = store.all_windows("in", has_speech=True)
        assert windows.tolist() == store.all_windows("in").tolist()
        assert not len(store.all_windows("nowhere", has_speech=True))


def test_words_are_split_as_sqlite_splits_them(monkeypatch):
    assert milvus_speech.stems("The dogs' running, CAFÉ_no 42!") == ["42", "cafe", "dog", "no", "run", "the"]
    assert milvus_speech.stems("") == milvus_speech.stems("_ !") == []
    monkeypatch.setattr(milvus_speech, "_splitter", lambda: None)
    assert milvus_speech.stems("The dogs") == ["dogs", "the"]


def test_answers_equal_those_of_an_index_in_a_folder(spoken, measured, embedder, tmp_path):
    """Every score of every query, the third view among them."""
    def answers(store):
        found = Engine(store, embedder).search(QUERIES, top=99)
        return [[(a.path, a.start, a.score, a.speech, a.said, a.why) for a in of_query] for of_query in found]

    with speaking(in_a_folder(tmp_path / "i", embedder), measured[0], embedder) as folder:
        assert answers(folder) == answers(spoken)


def test_speech_of_a_file_that_is_on_its_way_out_brings_no_window(at):
    with MilvusStore(at(), create={}) as store:
        first, second = put(store), put(store, "b.mp4")
        for file in (first, second):
            store.speech.put(file, "x", "", SAID, VECTORS)
        ids = store.speech.ids()
        store.milvus.delete("files", f"id == {first}")  # a writer was killed here
        left = store.speech.windows_of(ids).tolist()
        assert left == store.all_windows(has_speech=True).tolist() == store.speech.windows_of(ids[3:]).tolist()
        assert len(left) == 3
