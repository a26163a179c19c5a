"""The index in Milvus: the tests of the index and of the engine once more, over milvus-lite; then what only an engine
has: half a file at every step of a writer, one writer, addresses and errors.

milvus-lite runs in this process; as a server it is in test_search_milvus_server.py.
"""

# flake8: noqa: F811  fixtures are imported and asked for

import hashlib
import os

import numpy as np
import pytest

pytest.importorskip("pymilvus", reason='pymilvus is not installed: pip install "narvid[milvus]"')
pytest.importorskip("milvus_lite", reason='milvus-lite is not installed: pip install "narvid[milvus]"')

import test_search_engine
import test_search_index
import test_search_speech
from test_search_engine import QUERIES, checkpoint, embedder, index, measured, pictures, plain  # noqa: F401
from test_search_index import equal, originals, put, rows, statistics, videos  # noqa: F401
from test_search_speech import SAID, VECTORS

from narvid import InputError
from narvid.search import milvus, milvus_lease
from narvid.search.engine import Engine, compute_statistics
from narvid.search.milvus import place_of
from narvid.search.milvus_store import MilvusStore
from narvid.search.opening import open_store
from narvid.search.rows import EVERY, Filter, Window
from narvid.search.store import Store

# ---- the same tests, the index in Milvus ----

pytestmark = pytest.mark.slow
from test_search_engine import (  # noqa: E402, F401
    test_an_answer_is_a_file_with_its_further_moments,
    test_an_empty_index_and_one_whose_first_run_goes_on,
    test_an_index_of_frames_alone,
    test_every_query_of_the_split_is_ranked_as_in_evaluation,
    test_filters_leave_out_before_anything_is_ranked,
    test_like_a_picture,
    alone,
    test_like_a_window_leaves_itself_out_and_finds_its_twin_first,
    test_of_windows_that_overlap_the_better_is_an_answer,
    test_plain_clip_is_searched_by_its_pooled_features,
    test_statistics_come_of_a_sample,
    test_windows_without_a_sentence_are_scored_by_their_frames,
)
from test_search_index import (  # noqa: E402, F401
    test_a_changed_file_that_kept_size_and_date_is_found_by_its_content,
    test_a_frame_without_an_answer_has_no_sentence,
    test_a_narration_file_is_joined_by_time,
    test_an_index_is_gone_on_with_only_as_it_was_made,
    test_an_unreadable_file_is_said_skipped_and_left_until_it_changes,
    test_features_of_a_tiny_narvid,
    test_hostile_names,
    test_new_changed_renamed_and_deleted_files,
    test_the_day_of_a_recording,
    test_windows_by_folder_and_length,
)


@pytest.fixture(scope="module", autouse=True)
def in_milvus(tmp_path_factory):
    """For those tests: a folder's name stands for an index in Milvus; writers lose no time with looking around."""
    home, opened = tmp_path_factory.mktemp("milvus"), []

    def where(path):
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return path if str(path).startswith("milvus:") else f"milvus:{home / 'all.db'}/i{name}"

    def store(path, **how):
        opened.append(open_store(where(path), **how))
        return opened[-1]

    def content(path):
        """As test_search_index.content, without FAISS's vectors."""
        with open_store(where(path), read_only=True) as found:
            files = {}
            for file in found.files():
                ids = [id for id in found.all_windows() if found.windows([id])[0].file == file.id]
                frames = [(*frame, found.jpeg(file.id, frame.number)) for frame in found.frames(file.id)]
                features = {name: x if x is None else x.tobytes() for name, x in found.features(ids).items()}
                files[file.path] = (file[2:], frames, [window[3:] for window in found.windows(ids)], features)
            return files, None, found.statistics

    def new_store(folder, embedder, **settings):
        return store(folder, create={**embedder.settings, "videos": "/nowhere", "window": 4.0, "fps": 1.0,
                                     "short_side": 32, **settings})

    update = test_search_index.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        for name, seconds in {"SETTLE": 0.0, "BEAT": 0.3, "STALE": 1.5}.items():
            patch.setattr(milvus_lease, name, seconds)
        patch.setattr(test_search_engine, "new_store", new_store)
        patch.setattr(test_search_speech, "new_store", new_store)
        patch.setattr(test_search_index, "content", content)
        for tests in (test_search_index, test_search_speech):
            patch.setattr(tests, "Store", store)
            patch.setattr(tests, "update", lambda folder, index, *more, **how: update(
                folder, where(index), *more, **how))
        yield
    for one in opened:
        one.close()


@pytest.fixture
def at(tmp_path):
    """The name of an index in a Milvus of this test alone."""
    return lambda name="one": f"milvus:{tmp_path / 'own.db'}/{name}"


# ---- what is stored ----


def test_what_is_put_is_found_to_the_bit_by_another_connection(at):
    made = {"videos": "/v/\udcff", "window": 0.1, "narration": True}
    with MilvusStore(at(), create=made) as store:
        assert (store.settings, store.statistics, store.change, store.count()) == (made, None, 0, 0)
        assert store.windows([]) == [] and len(store.all_windows()) == 0
        put(store, "a.mp4", 3, seed=1)
        put(store, "b/c.mp4", 2, seed=2)
        store.statistics = {"text": ((0.1, 1 / 3), (0.2, 1e-9)), "like": ((0.3, 0.4), None)}
        store.update_settings(fps=2.0)
        store.set_fact("long", ["a query \u4e2d" * 20] * 900)  # more than a VARCHAR holds
    with MilvusStore(at(), read_only=True) as store:
        assert store.settings == made | {"fps": 2.0} and store.fact("long") == ["a query \u4e2d" * 20] * 900
        assert store.statistics == {"text": ((0.1, 1 / 3), (0.2, 1e-9)), "like": ((0.3, 0.4), None)}
        first, second = store.files()
        assert first[1:9] == ("a.mp4", 1 << 40, 1_700_000_000_123_456_789, 9.0, "", "note", "", "")
        assert store.file(second.id) == second and store.change == 2
        assert store.frames(first.id) == [(0, 0.0, None), (1, 1.1, "a 'sentence' \u4e2d\0")]
        assert [store.jpeg(first.id, n) for n in (0, 1)] == [b"jpg", b"\0\xff"]
        ids = store.all_windows().tolist()
        assert len(ids) == store.count() == 5
        assert store.windows([ids[4], ids[0]]) == [
            Window(ids[4], second.id, "b/c.mp4", 0.1, 5.1, [0, 1]), Window(ids[0], first.id, "a.mp4", 0.0, 5.0, [0, 0])]
        (features, _), (more, _) = rows(3, 1), rows(2, 2)
        both = {name: x if x is None else np.concatenate([x, more[name]]) for name, x in features.items()}
        order = [3, 0, 4, 4]
        equal(store.features([ids[i] for i in order]), both, order)
        assert store.features([])["frames"].shape == (0, 3, 4)
        for missing in (lambda: store.jpeg(first.id, 2), lambda: store.file(99), lambda: store.windows([ids[0], 99])):
            with pytest.raises(KeyError):
                missing()
        with pytest.raises(InputError, match="was opened for reading"):
            store.remove_file("a.mp4")


def test_a_picture_and_features_larger_than_a_field_come_back(at):
    rng = np.random.default_rng(0)
    picture, features = rng.bytes(200_000), {"frames": rng.standard_normal((2, 64, 1024), dtype=np.float32)}
    with MilvusStore(at(), create={}) as store:
        store.put_file("a", 1, 1, 1.0, "", [(0, 0.0, picture, "x" * 100_000)], [(0, 1, [0]), (1, 2, [0])], features,
                       np.ones((2, 3), np.float32))
        ids = store.all_windows()
        assert store.jpeg(1, 0) == picture and len(store.frames(1)[0].sentence) == 100_000
        assert np.array_equal(store.features(ids)["frames"], features["frames"])
        with pytest.raises(ValueError, match="the index holds"):
            store.put_file("c", 1, 1, 1.0, "", [], [(0, 1, [0])], {"frames": np.zeros((1, 2, 2))}, np.zeros((1, 3)))


def test_what_a_store_must_offer():
    """Whoever adds something to Store that others call has to think of Milvus."""
    here, there = ({name for name in dir(one) if not name.startswith("_")} for one in (MilvusStore, Store))
    only_sqlite = {"all", "one", "transaction", "changing", "narrowed", "pooled"}  # SQL, and what FAISS is made of
    assert there - here <= only_sqlite, there - here


# ---- the same answers ----


def test_answers_equal_those_of_faiss(measured, embedder, at, tmp_path):
    """The same ids and, to 1e-6, scores: of all windows, of stage one's candidates, and for windows like one."""
    split, *_ = measured
    stores = [Store(tmp_path / "i", create=made_of(embedder)), MilvusStore(at(), create=made_of(embedder))]
    for store in stores:
        for video, frames, sentences in zip(split.videos, pictures(split), split.sentences):
            test_search_engine.put(store, embedder, f"{video}.mp4", frames, sentences)
        store.statistics = compute_statistics(store, embedder, QUERIES)
    assert stores[0].statistics == stores[1].statistics

    def found(store, **how):
        engine = Engine(store, embedder, **how)
        return [*engine.search(QUERIES, top=11), *engine.search(QUERIES, top=11, exact=True),
                *engine.search(QUERIES, max_seconds=5.0), engine.like_window(3)]

    for how in ({}, {"candidates": 5}):
        ours, theirs = (found(store, **how) for store in stores)
        for one, other in zip(ours, theirs, strict=True):
            assert [a.window for a in one] == [a.window for a in other] and len(one)
            assert [a.score for a in one] == pytest.approx([a.score for a in other], abs=1e-6)
            assert [a._replace(score=0) for a in one] == [a._replace(score=0) for a in other]
    stores[1].close()


def made_of(embedder):
    return {**embedder.settings, "videos": "/nowhere", "window": 4.0, "fps": 1.0, "short_side": 32}


def crowded(at, windows=150, slots=12, width=8):
    """An index whose windows have vectors that are hardly apart -> (store, vectors (n, S, W))."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((windows, 1, width)) + 0.01 * rng.standard_normal((windows, slots, width))
    vectors[:, :, width // 2:] *= np.arange(windows)[:, None, None] % 5 > 0  # some without a sentence
    pooled = np.concatenate([vectors, vectors.mean(axis=1, keepdims=True)], axis=1).astype(np.float32)
    store = MilvusStore(at(), create={"dim": width // 2, "narration": True})
    for start in range(0, windows, 50):
        store.put_file(f"{start}/x.mp4", 1, 1, 1.0 + start, "", [], [(float(i), i + 1.0, [0]) for i in range(50)],
                       {"x": np.zeros((50, 1), np.float32)}, pooled[start:start + 50].reshape(50, -1))
    return store, vectors.astype(np.float32)


@pytest.mark.parametrize("index", ["FLAT", "IVF_RABITQ"])
def test_stage_one_asks_until_the_candidates_are_full(at, index, monkeypatch):
    """The nearest windows, exactly; grouped where Milvus groups with this index, else out of more vectors."""
    store, vectors = crowded(at)
    store.milvus.index = index  # milvus-lite has no such index: what is asked is the other way, its search is exact
    asked, nearest = [], store.milvus.nearest
    monkeypatch.setattr(store.milvus, "nearest", lambda *a: asked.append((a[2], a[5])) or nearest(*a))
    stage = store.candidates(None, "text", 40)
    stage.refresh()
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((3, vectors.shape[2])).astype(np.float32)
    has, of = np.arange(len(vectors)) % 5 > 0, np.einsum("nsw,bw->bns", vectors, queries).max(axis=2)  # (B, n)
    inside = (np.arange(len(vectors)) >= 50) & (np.arange(len(vectors)) < 100)
    for where, left in ((EVERY, np.ones(len(vectors), bool)), (Filter(folder="50"), inside)):
        assert stage.windows(where, 20) is None
        for b, ids in enumerate(stage.nearest(queries, where)):
            expected = set()
            for half in (has & left, ~has & left):
                best = np.flatnonzero(half)[np.argsort(-of[b, half], kind="stable")[:40]]
                expected |= set((1 + best).tolist())
            assert ids.dtype == np.int64 and set(ids.tolist()) == expected and (np.diff(ids) > 0).all()
    assert {group for _, group in asked} == ({"window"} if index == "FLAT" else {None})
    assert max(limit for limit, _ in asked) > 40  # once was not enough
    store.close()


def test_windows_of_half_a_file_are_no_candidates(at):
    store, vectors = crowded(at, windows=50)
    killed(store, 9, lambda: put_like(store, "half.mp4", vectors))
    with MilvusStore(at(), read_only=True) as reader:
        assert reader.milvus.count("windows", "id > 0") > reader.count() == 50  # they are there, and not to be seen
        stage = reader.candidates(None, "text", 45)
        stage.refresh()
        assert stage.windows(EVERY, 1000).tolist() == reader.all_windows().tolist() == list(range(1, 51))
        for ids in stage.nearest(vectors[:2, 0], EVERY):
            assert set(ids.tolist()) <= set(range(1, 51))
        with pytest.raises(KeyError):
            reader.windows([51])


def put_like(store, path, vectors):
    n, s, w = vectors.shape
    pooled = np.concatenate([vectors, vectors.mean(axis=1, keepdims=True)], axis=1).reshape(n, -1)
    store.put_file(path, 1, 1, 1.0, "", [(0, 0.0, b"jpg", None)], [(float(i), i + 1.0, [0]) for i in range(n)],
                   {"x": np.zeros((n, 1), np.float32)}, pooled)


# ---- kills, and one writer ----


class Killed(BaseException):
    pass


def killed(store, step, work):
    """Do something with a store, but that it ends without a word at its n-th call of Milvus; whether it got there."""
    calls, call = [], store.milvus._call

    def counted(what, *args, **how):
        calls.append(what)
        if len(calls) == step:
            raise Killed
        return call(what, *args, **how)

    store.milvus._lease._ended.set()  # its thread dies with it, and makes no call of its own meanwhile
    store.milvus._lease._thread.join()
    store.milvus._call = counted
    try:
        work()
    except Killed:
        pass
    store.milvus._call = call
    return len(calls) >= step


def all_of(store):
    """What a reader sees, but for ids."""
    ids = store.all_windows()
    by_file = {file.id: file for file in store.files()}
    of = [(by_file[w.file].path, *w[3:]) for w in store.windows(ids)]
    features = {name: x if x is None else x.tobytes() for name, x in store.features(ids).items()}
    frames = {file.path: [(*f, store.jpeg(file.id, f.number)) for f in store.frames(file.id)]
              for file in by_file.values()}
    said = {file.path: [u[1:] for u in store.speech.of_file(file.id)] for file in by_file.values()}
    heard = {path: len(store.speech.with_word("dog", 9)) for path, texts in said.items() if texts}
    return ({file.path: file[2:] for file in by_file.values()}, of, features, frames, said, heard, store.count(),
            store.speech.count())


def left_over(store):
    """Rows that belong to no file."""
    there = {file.id for file in store.files()}
    names = [name for name in ("frames", "windows", "features", "vectors", "speech") if store.milvus.has(name)]
    rows = [row for name in names for page in store.milvus.pages(name, "", ["id", "file"]) for row in page]
    said = [row for page in store.milvus.pages("said", "", ["file"]) for row in page]
    uttered = sum(len(store.speech.of_file(file)) for file in there)
    return (sum(row["file"] not in there for row in rows + said) or
            len([id for page in store.milvus.pages("speech", "", ["id"]) for id in page]) - uttered)


def of_b(store):
    return next(file.id for file in store.files() if file.path == "b.mp4")


EVERY_STEP = int(os.environ.get("NARVID_KILL_STRIDE", 9))  # 1 kills at each call of Milvus: minutes


@pytest.mark.parametrize("what", ["new", "changed", "moved", "removed", "heard", "silent", "deaf"])
def test_a_kill_at_any_step_loses_no_more_than_the_file_in_hand(at, what, monkeypatch):
    """A reader sees the state before or the one after, at every step of the writer, and the next writer too."""
    monkeypatch.setattr(milvus_lease, "STALE", 0.2)
    monkeypatch.setattr(milvus_lease, "BEAT", 0.1)
    work = {"new": lambda store: put(store, "new.mp4", 2, seed=3), "changed": lambda store: put(store, "b.mp4", 1, 4),
            "moved": lambda store: store.move_file("b.mp4", "c/d.mp4", 7),
            "removed": lambda store: store.remove_file("b.mp4"),
            "heard": lambda store: store.speech.put(of_b(store), "c", "a note", SAID[1:], VECTORS[1:]),
            "silent": lambda store: store.speech.put(of_b(store), "", "", [], VECTORS[:0]),
            "deaf": lambda store: store.speech.drop()}[what]

    def begun(name):
        store = MilvusStore(at(name), create={})
        put(store, "a.mp4", 3, seed=1)
        put(store, "b.mp4", 2, seed=2)
        store.speech.put(of_b(store), "a b", "", SAID[:2], VECTORS[:2])
        return store

    with begun("whole") as store:
        before = all_of(store)
        work(store)
        after = all_of(store)
    step, reached = 1 - EVERY_STEP, True
    store = begun("killed")
    while reached:
        step += EVERY_STEP
        reached = killed(store, step, lambda: work(store))
        store.milvus.client.close()
        store.milvus.client = None
        if not reached:
            break
        with MilvusStore(at("killed"), read_only=True) as reader:
            seen = all_of(reader)[:-2]
            replaced = seen[0] == after[0] and len(seen[1]) >= len(after[1])  # the old one is on its way out
            assert seen == before[:-2] or replaced, step
        store = MilvusStore(at("killed"))
        assert all_of(store) in (before, after) and not left_over(store), step
        if all_of(store) == after:  # begin again
            store.milvus.drop(["facts"])
            store.close()
            store = begun("killed")
    assert step > 3
    with MilvusStore(at("killed")) as store:
        work(store) if all_of(store) != after else None
        assert all_of(store) == after and not left_over(store)


def test_one_writes_and_the_second_is_told_who(at, capsys):
    with MilvusStore(at(), create={}) as store:
        put(store, "a.mp4")
        with pytest.raises(InputError, match=rf"own.db/one is being written by .*, process {os.getpid()}: wait for it"):
            MilvusStore(at())
        MilvusStore(at(), read_only=True).close()  # which readers are not
        put(store, "b.mp4")
        store.milvus._lease._ended.set()  # it stands still from here on, as a killed one does
        store.milvus._lease._thread.join()
        other = MilvusStore(at())
        assert "looking whether" in capsys.readouterr().err
        store.milvus._lease._raised -= milvus_lease.STALE + 1
        with pytest.raises(InputError, match="which took this process for dead: start again"):
            put(store, "c.mp4")
        put(other, "d.mp4")
        assert [file.path for file in other.files()] == ["a.mp4", "b.mp4", "d.mp4"]
        other.close()
    MilvusStore(at()).close()  # a right that was given back is there at once


# ---- addresses and errors ----


def test_addresses():
    place = place_of("milvus:http://host:19530/films?database=d&index=HNSW&shards=4&replicas=2")
    assert place[1:] == ("http://host:19530", "films", "d", "HNSW", 4, 2)
    assert place_of("milvus:https://host/")[1:3] == ("https://host", "narvid")
    assert place_of("milvus:/a/b.db/c")[1:3] == ("/a/b.db", "c")
    assert place_of("milvus:b.db")[1:3] == (os.path.abspath("b.db"), "narvid")
    for text, said in {
        "milvus:": "names no Milvus: give milvus:http://HOST:19530/NAME or",
        "milvus:films": "names no Milvus", "milvus:ftp://host/x": "names no Milvus", "milvus:http:///x": "names no Mil",
        "milvus:http://host:port/x": "Port", "milvus:http://host/1x": "'1x' is no name of a collection",
        "milvus:http://host/a-b": "no name of a collection", "milvus:http://host/a/b": "no name of a collection",
        "milvus:http://host/x?index=": "index is empty", "milvus:http://host/x?shards=0": "shards is '0'",
        "milvus:http://host/x?token=y": "there is no 'token'",
        "milvus:http://me:secret@host/x": "no user and no password belong into an address; put .* NARVID_MILVUS_TOKEN",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            place_of(text)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_wrong_is_said_in_a_sentence(at, tmp_path, monkeypatch):
    def refuses(match, path=at(), **how):
        with pytest.raises(InputError, match=match) as caught:
            MilvusStore(path, **how)
        assert "\n" not in str(caught.value)

    monkeypatch.setattr(milvus, "PATIENCE", 2.0)
    refuses(r"127.0.0.1:9/x does not answer: is Milvus running there\?", "milvus:http://127.0.0.1:9/x")
    refuses("there is no folder", f"milvus:{tmp_path}/none/x.db")
    (tmp_path / "file.db").write_bytes(b"SQLite")
    refuses("file.db is a file", f"milvus:{tmp_path}/file.db")
    refuses("own.db/one is no index, or one that was never finished: make one with `python -m narvid.search index VID")
    with MilvusStore(at(), create={}) as store:
        put(store, "a.mp4")
        shape = store.fact("vectors")
        store.milvus.set_fact("vectors", [shape[0], 77])
        store.milvus.set_fact("version", 99)
    refuses("is an index already; nothing is replaced: give another name", create={})
    refuses("was written by a newer version of narvid")
    with MilvusStore(at("two"), create={}) as store:
        put(store, "a.mp4")
        store.milvus.set_fact("vectors", [1, 77])
    refuses("holds vectors of 5 numbers, the index was made with 77", at("two"), read_only=True)
    with MilvusStore(at("three"), create={}) as store:
        reader = MilvusStore(at("three"), read_only=True)
        assert reader.count() == 0
        state = store.state()
        store.milvus.set_fact("state", state | {"born": "again"})
        with pytest.raises(InputError, match="was deleted and made anew since it was opened: start again"):
            reader.count()
        store.milvus.set_fact("state", state)
        put(store, "a.mp4")
        store.milvus.drop(["features"])
        with pytest.raises(InputError, match="it has no collection three_features"):
            store.features(store.all_windows())
        reader.close()
    with MilvusStore(at("four"), create={}) as store:
        store.milvus.drop(["facts"])
        store.milvus.make("facts", {"name": ("VARCHAR", 8), "else": "INT64"})
    refuses("four_facts is in use for something else; give another name", at("four"), create={})
