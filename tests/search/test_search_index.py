"""The index of one's own videos: what is stored, what is found in a folder, kills, changes, hostile names, windows.

Models are stood in for by Fake, whose features are a window's mean colours and the letters of its sentences; one test
takes a tiny NarVid. Clips are those of test_frames.py: frame i of a clip has the colour COLOURS[i].
"""

import gc
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sqlite3
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_frames import make_clip, on_screen

from narvid.data import extraction as extract_frames
from narvid import InputError
from narvid.methods import METHODS
from narvid.narration.answers import Failed
from narvid.narration.chat_server import ServerCaptioner
from narvid.data.frames import Picture, pick_frames, read_frames
from narvid.data.videos import read_video
from narvid.search import build, engine
from narvid.search import store as store_module
from narvid.search.build import Report, update
from narvid.search.embedding import Embedder
from narvid.search.reading import SUFFIXES, cut, find_videos, frames_between, read_all
from narvid.search.spool import Spool, recorded_at
from narvid.search.rows import Window
from narvid.search.store import Store


class Features(NamedTuple):
    frames: torch.Tensor  # (V, K, 3)
    narration: torch.Tensor  # (V, K, 1)
    mask: torch.Tensor  # (V, K)
    words: None


class Fake:
    """An Embedder without a model; `seen` keeps what it was given."""

    max_frames, picture, narration, frames_alone = 6, Picture(32), True, ""

    def __init__(self, **settings):
        self.settings = {"method": "narvid", "narration": True, "max_frames": self.max_frames, **settings}
        self.seen = []

    def check(self, settings, index):
        if any(settings.get(name) != value for name, value in self.settings.items()):
            raise InputError(f"{index}: another model")

    def videos(self, frames, sentences):
        self.seen += zip(frames, sentences or [None] * len(frames), strict=True)
        shape = len(frames), self.max_frames
        made = Features(torch.zeros(*shape, 3), torch.zeros(*shape, 1), torch.zeros(shape, dtype=torch.bool), None)
        for v, pictures in enumerate(frames):
            made.frames[v, : len(pictures)] = pictures.float().mean(dim=(2, 3)) / 3
            made.mask[v, : len(pictures)] = True
            for k, sentence in enumerate(sentences[v] if sentences else ()):
                made.narration[v, k] = sum(map(ord, sentence or ""))
        return made

    def pack(self, videos):
        return {name: x if x is None else x.numpy() for name, x in zip(videos._fields, videos, strict=True)}

    def pool_videos(self, videos):
        return videos.frames.mean(dim=1).numpy()


class Captioner:
    """Answers with a picture's mean colour, or as `answer` says; counts the pictures it was shown."""

    label, prompt = "fake greedy", "say it"

    def __init__(self, answer=None):
        self.answer, self.shown = answer, 0

    def caption(self, pictures, keys=None):
        self.shown += len(pictures)
        if keys is None:  # the question whether it sees
            return [f"{len(picture)} bytes" for picture in pictures]
        return [self.answer(key) if self.answer else f"a picture of {key}" for key in keys]


@pytest.fixture(autouse=True)
def statistics(monkeypatch):
    """In place of the engine's: calls are counted, nothing is scored."""
    calls = []

    def compute(store, embedder, queries, seed=0):
        calls.append(queries)
        return {"text": ((0.1, 0.2), (0.3, float(store.count()))), "like": ((0.1, 0.2), None)}

    monkeypatch.setattr(build, "compute_statistics", compute)
    monkeypatch.setattr(build, "measure_level", lambda store, embedder: None)
    return calls


def clip(path, seconds=3, rate=2):
    """`seconds` at so many frames a second, each of another colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_clip(path, [i / rate for i in range(int(seconds * rate))], size=(32, 24), codec="mpeg4", rate=rate)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Three clips of 3, 4 and 5 s, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("originals")
    for n, name in enumerate(["a.mp4", "b/c.mkv", "d.mp4"]):
        clip(folder / name, 3 + n)
    return folder


@pytest.fixture
def videos(originals, tmp_path):
    return Path(shutil.copytree(originals, tmp_path / "videos"))


def content(index):
    """All that an index holds, but for ids."""
    with Store(index, read_only=True) as store:
        files = {}
        for file in store.files():
            ids = [id for id in store.all_windows() if store.windows([id])[0].file == file.id]
            frames = [(*frame, store.jpeg(file.id, frame.number)) for frame in store.frames(file.id)]
            features = {name: x if x is None else x.tobytes() for name, x in store.features(ids).items()}
            files[file.path] = (file[2:], frames, [window[3:] for window in store.windows(ids)], features)
        vectors = [vectors.tobytes() for _, vectors in store.pooled(block=2)]
        return files, b"".join(sorted(vectors)), store.statistics


def in_child(function, *args):
    """Call it in a forked process -> that process's wait status."""
    child = os.fork()
    if not child:
        try:
            function(*args)
        finally:
            os._exit(77)
    return os.waitpid(child, 0)[1]


def said_by(function):
    """The sentence of the InputError with which a function ends in a forked process."""
    reader, writer = os.pipe()

    def run():
        try:
            function()
        except InputError as error:
            os.write(writer, str(error).encode())

    in_child(run)
    os.close(writer)
    with open(reader) as sentence:
        return sentence.read()


# ---- the store ----


def rows(n, seed=0):
    """Features and stage-one vectors of n windows."""
    rng = np.random.default_rng(seed)
    features = {"frames": rng.standard_normal((n, 3, 4), dtype=np.float32), "narration": None,
                "mask": rng.random((n, 3)) < 0.5, "weight": rng.standard_normal(n, dtype=np.float32)}
    features["frames"][0, 0, :2] = np.nan, -0.0
    return features, rng.standard_normal((n, 5), dtype=np.float32)


def put(store, path, n=2, seed=0, seconds=9.0, jpeg=b"jpg", frames=None):
    frames = frames or [(0, 0.0, jpeg, None), (1, 1.1, b"\0\xff", "a 'sentence' \u4e2d\0")]
    windows = [(0.1 * i, 0.1 * i + 5, [0, i]) for i in range(n)]
    store.put_file(path, 1 << 40, 1_700_000_000_123_456_789, seconds, "note", frames, windows, *rows(n, seed))


def equal(found, expected, ids):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if x is None:
            assert found[name] is None
        else:
            assert found[name].dtype == x.dtype and found[name].tobytes() == x[ids].tobytes(), name


def test_what_is_put_is_found_to_the_bit(tmp_path):
    made = {"videos": "/v/\udcff", "window": 0.1, "narration": True}
    with Store(tmp_path / "new" / "index", create=made) as store:
        assert (store.settings, store.statistics, store.change, store.count()) == (made, None, 0, 0)
        put(store, "a.mp4", 3, seed=1)
        put(store, "b/c.mp4", 2, seed=2)
        store.statistics = {"text": ((0.1, 1 / 3), (0.2, 1e-9)), "like": ((0.3, 0.4), None)}
        store.update_settings(fps=2.0)
    with Store(tmp_path / "new" / "index", read_only=True) as store:
        assert store.settings == made | {"fps": 2.0}
        assert store.statistics == {"text": ((0.1, 1 / 3), (0.2, 1e-9)), "like": ((0.3, 0.4), None)}
        first, second = store.files()
        assert first[1:] == ("a.mp4", 1 << 40, 1_700_000_000_123_456_789, 9.0, "", "note", "", "", None, "", "")
        assert store.file(second.id) == second
        assert store.frames(first.id) == [(0, 0.0, None), (1, 1.1, "a 'sentence' \u4e2d\0")]
        assert [store.jpeg(first.id, n) for n in (0, 1)] == [b"jpg", b"\0\xff"]
        ids = store.all_windows().tolist()
        assert len(ids) == store.count() == 5
        assert store.windows([ids[4], ids[0]]) == [
            Window(ids[4], second.id, "b/c.mp4", 0.1, 5.1, [0, 1]), Window(ids[0], first.id, "a.mp4", 0.0, 5.0, [0, 0])
        ]
        (features, vectors), (more, more_vectors) = rows(3, 1), rows(2, 2)
        both = {name: x if x is None else np.concatenate([x, more[name]]) for name, x in features.items()}
        order = [3, 0, 4, 4]
        equal(store.features([ids[i] for i in order]), both, order)
        assert store.features([])["frames"].shape == (0, 3, 4)
        blocks = list(store.pooled(block=2))
        assert [len(block) for block, _ in blocks] == [2, 2, 1]
        assert np.concatenate([block for block, _ in blocks]).tolist() == ids
        found = np.concatenate([vectors for _, vectors in blocks])
        expected = np.concatenate([vectors, more_vectors])
        assert found.dtype == np.float32 and np.array_equal(found, expected.astype(np.float16))  # kept in 16 bits
        for missing in (lambda: store.jpeg(first.id, 2), lambda: store.file(99), lambda: store.windows([ids[0], 99])):
            with pytest.raises(KeyError):
                missing()


def test_a_file_put_again_replaces_all_of_it(tmp_path):
    with Store(tmp_path, create={}) as store:
        put(store, "b.mp4", 1)
        put(store, "a.mp4", 3)
        before = store.all_windows().tolist(), store.change
        put(store, "a.mp4", 2, seed=5)
        assert not set(store.all_windows().tolist()[1:]) & set(before[0])  # an old id never means a new window
        assert [file.path for file in store.files()] == ["a.mp4", "b.mp4"] and store.change > before[1]
        equal(store.features(store.all_windows()[1:]), rows(2, 5)[0], [0, 1])
        store.fail_file("a.mp4", 1, 2, "why \udcff")
        store.remove_file("b.mp4")
        assert [(file.path, file.why, file.size) for file in store.files()] == [("a.mp4", "why \\udcff", 1)]
        for table in ("frames", "windows", "pooled", "features"):
            assert store.one(f"SELECT count(*) FROM {table}") == (0,), table
        with pytest.raises(ValueError, match="the index holds"):
            store.put_file("c", 1, 1, 1.0, "", [], [(0, 1, [0])], {"frames": np.zeros((1, 2, 2))}, np.zeros((1, 5)))
        assert len(store.files()) == 1


def test_windows_by_folder_and_length(tmp_path):
    with Store(tmp_path, create={}) as store:
        for n, path in enumerate(["a/b/x", "a/b.c/x", "a/bc", "a/b", "A/b/x", "a/%/x", "a/_/x", "\udcff/x", "a/b/c/y"]):
            put(store, path, 1, seconds=float(n))
        paths = [window.path for window in store.windows(store.all_windows())]

        def of(*args):
            return {paths[i] for i in np.searchsorted(store.all_windows(), store.all_windows(*args))}

        assert of("a/b") == {"a/b/x", "a/b/c/y"} == of("/a//b/") == of("./a/b")
        assert [of(folder) for folder in ("a/%", "a/_", "\udcff")] == [{"a/%/x"}, {"a/_/x"}, {"\udcff/x"}]
        assert of("", 2.0, 4.0) == {"a/bc", "a/b", "A/b/x"} and of("a", 3.0) == {"a/b", "a/%/x", "a/_/x", "a/b/c/y"}
        assert of("' OR 1=1 --") == of("..") == of("a/b/x") == set()
        assert store.all_windows().dtype == np.int64 and (np.diff(store.all_windows()) > 0).all()


def test_many_threads_read_while_one_process_writes(tmp_path):
    with Store(tmp_path, create={}) as store:
        put(store, "0")
        reader, written = Store(tmp_path, read_only=True), threading.Event()

        def read():
            while True:
                windows = reader.windows(reader.all_windows()[:1])
                assert reader.jpeg(windows[0].file, 0) == b"jpg" and reader.count() % 2 == 0
                if written.is_set():
                    return reader.count()

        with ThreadPoolExecutor(4) as pool:
            counts = [pool.submit(read) for _ in range(4)]
            for n in range(1, 15):
                put(store, str(n))
            written.set()
            assert [count.result() for count in counts] == [30] * 4
        assert reader.change == store.change
        gc.collect()
        files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        assert files.count(str(tmp_path / "index.db")) == 2  # those of this thread, none of threads that have ended
        with pytest.raises(InputError, match="cannot be written: no permission"):
            reader.remove_file("0")
        reader.close()


def test_a_kill_in_a_transaction_loses_that_file_and_nothing_else(tmp_path):
    with Store(tmp_path / "i", create={}) as store:
        put(store, "a")
        put(store, "b")
    before = content(tmp_path / "i")

    def frames():
        for n in range(200):
            yield (n, float(n), bytes(50_000), None)  # 10 MB: more than SQLite keeps in memory
        os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(lambda: put(Store(tmp_path / "i"), "a", frames=frames()))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "i" / "index.db-journal").stat().st_size > 0  # it was written to, and must be undone
    assert content(tmp_path / "i") == before  # by one who only reads
    with Store(tmp_path / "i") as store:
        put(store, "c")
        assert store.count() == 6


def test_an_index_replaced_behind_an_open_store_is_not_mixed_with_it(tmp_path):
    for name in ("one", "two"):
        with Store(tmp_path / name, create={"videos": name}) as store:
            put(store, "a.mp4")
    with Store(tmp_path / "one", read_only=True) as store:
        assert store.settings["videos"] == "one"
        (tmp_path / "one").rename(tmp_path / "old")
        with pytest.raises(InputError, match="deleted or replaced"):
            store.count()
        (tmp_path / "two").rename(tmp_path / "one")
        with pytest.raises(InputError, match="deleted or replaced"):
            store.files()


def test_what_is_no_index_is_said_in_a_sentence(tmp_path):
    def refuses(match, path=tmp_path / "i", **how):
        with pytest.raises(InputError, match=match) as caught, Store(path, **how) as store:
            store.features(store.all_windows())
        assert "\n" not in str(caught.value)

    refuses("i is no index, it holds no index.db: make one with `python -m narvid.search index")
    with Store(tmp_path / "i", create={}) as store:
        refuses("is being written by another process")
        refuses("is an index already|is being written", create={})
        Store(tmp_path / "i", read_only=True).close()
        for n in range(30):
            put(store, str(n), jpeg=bytes(3000))
    refuses("is an index already; nothing is replaced: give another --out", create={})
    database = tmp_path / "i" / "index.db"
    whole = database.read_bytes()
    database.write_bytes(whole[: len(whole) // 3])
    refuses("index.db is damaged .*: delete .* and index again")
    database.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    refuses("index.db is damaged")
    for junk in (b"", b"no database, but a text that is long enough to be one" * 100):
        database.write_bytes(junk)
        refuses("is damaged|is no index of narvid.search", read_only=bool(junk))
    for pragma, match in (("application_id = 7", "no index of narvid"), ("user_version = 4", "newer version")):
        database.write_bytes(whole)
        connection = sqlite3.connect(database)
        connection.execute(f"PRAGMA {pragma}")
        connection.close()
        refuses(match)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear")
    refuses("is in use for something else", tmp_path / "used", create={})
    refuses("cannot be written", tmp_path / "used" / "letter.txt" / "i", create={})


def test_a_killed_creation_is_begun_again(tmp_path, monkeypatch):
    def killed(run, settings):
        run("CREATE TABLE files (x)")
        run("INSERT INTO files VALUES (zeroblob(10000000))")
        os._exit(42)

    monkeypatch.setattr(store_module, "_fill", killed)
    assert os.WEXITSTATUS(in_child(lambda: Store(tmp_path / "i", create={"new": 0}))) == 42
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "i").iterdir()} == {"lock", "index.tmp", "index.tmp-journal"}
    with Store(tmp_path / "i", create={"new": 1}) as made:
        put(made, "a")
        assert made.settings == {"new": 1} and made.count() == 2


def test_a_full_disk_is_said_and_leaves_the_index_whole(tmp_path):
    with Store(tmp_path / "i", create={}) as store:
        put(store, "a")
    before = content(tmp_path / "i")
    with Store(tmp_path / "i") as store:
        store._connection.execute("PRAGMA max_page_count = 30")
        with pytest.raises(InputError, match="the disk is full; make room, then the same command continues"):
            put(store, "b", jpeg=bytes(1 << 20))
    assert content(tmp_path / "i") == before


# ---- what is read of a folder ----


def test_video_files_are_those_of_the_extractor():
    assert SUFFIXES == extract_frames.EXTENSIONS


def test_which_files_of_a_folder(tmp_path):
    root, outside, index = tmp_path / "v", tmp_path / "outside", tmp_path / "v" / "index"
    for path in ("v/a.mp4", "v/sub/B.MKV", "v/.hidden.mp4", "v/.trash/x.mp4", "v/notes.txt", "v/index/clips/1.mp4",
                 "outside/secret.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * len(path))
    (root / "out.mp4").symlink_to(outside / "secret.mp4")
    (root / "out_of_it").symlink_to(outside)
    (root / "sub" / "up.mp4").symlink_to("../../outside/secret.mp4")
    (root / "sub" / "round").symlink_to(root)
    (root / "gone.mp4").symlink_to(root / "nothing.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "inside.mp4").symlink_to("sub/B.MKV")
    os.mkfifo(root / "pipe.mp4")
    (root / "folder.mp4").mkdir()
    found = find_videos(root, index)
    assert {path: size for path, (size, _) in found.items()} == {"a.mp4": 7, "inside.mp4": 11, "sub/B.MKV": 11}
    assert found["a.mp4"][1] == (root / "a.mp4").stat().st_mtime_ns
    (tmp_path / "link").symlink_to(root)  # the folder itself may be reached through one
    assert find_videos(tmp_path / "link", tmp_path / "link" / "index") == found
    for folder, match in ((root / "folder.mp4", "no video in"), (root / "a.mp4", "is no folder")):
        with pytest.raises(InputError, match=match):
            find_videos(folder, index)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, [(0, 0.04)]),
        (30.0, [(0, 30)]),
        (30.4, [(0, 30.4)]),
        (30.6, [(0, 30), (0.6, 30.6)]),
        (45.0, [(0, 30), (15, 45)]),
        (45.2, [(0, 30), (15.2, 45.2)]),
        (50.0, [(0, 30), (15, 45), (20, 50)]),
        (75.0, [(0, 30), (15, 45), (30, 60), (45, 75)]),
    ],
)
def test_windows_of_a_long_video(seconds, expected):
    assert cut(seconds, 30, 1) == [pytest.approx(window) for window in expected]


def test_windows_cover_a_video_and_overlap_by_half():
    rng = np.random.default_rng(0)
    for seconds, window in zip(rng.uniform(1, 500, 200), rng.choice([5, 12.5, 30, 60], 200), strict=True):
        windows = cut(seconds, window, 1)
        assert windows[0][0] == 0 and windows[-1][1] == seconds
        for (start, end), (following, _) in zip(windows, windows[1:], strict=False):
            assert end - start == pytest.approx(window) and 0 < following - start <= window / 2 + 0.5


@pytest.mark.parametrize("rate", [29.97, 25, 12, 2])
def test_frames_of_a_window(rate):
    times = [time for time, _ in on_screen([i / rate for i in range(int(80 * rate))], range(80))]
    assert len(times) == 80
    assert frames_between(times, 0, 30, 1) == range(30) and frames_between(times, 15, 45, 1) == range(15, 45)
    assert frames_between(times, 50, 80, 1) == range(50, 80)


def test_frames_of_a_window_in_which_nothing_moves():
    times = [0.0, 1.0, 2.0, 40.0, 41.0, 90.0]  # a recording of a screen
    expected = {(0, 30): (0, 3), (15, 45): (2, 5), (45, 75): (4, 5), (60, 90): (4, 5), (60, np.inf): (4, 6)}
    for (start, end), (first, stop) in expected.items():
        assert frames_between(times, start, end, 1) == range(first, stop), (start, end)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_length_and_time_of_a_clip(tmp_path, name):
    path = clip(tmp_path / name, 7, rate=10)
    read = read_video(path)
    assert read.seconds == pytest.approx(7, abs=0.11) and read.note == ""
    assert read.times == [float(n) for n in range(7)] == [float(n) for n in range(len(read.jpegs))]


def test_a_cut_off_file_is_as_long_as_what_is_left(tmp_path):
    path = make_clip(tmp_path / "a.mp4", [i / 10 for i in range(100)], noise=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = read_video(path)
    assert "announced" in read.note and read.seconds == read.times[-1] + 1 < 7


def test_a_file_that_kills_its_reader_costs_that_file(tmp_path):
    paths = ["1", "__import__('os')._exit(3)", "__import__('narvid').data.videos.read_video('none.mp4')", "4"]
    first, second, third, fourth = read_all(paths, eval, workers=1)
    assert (first, fourth) == (1, 4) and isinstance(second, InputError) and isinstance(third, InputError)
    assert "the process that read it died" in str(second) and "none.mp4 cannot be opened" in str(third)


# ---- a folder becomes an index ----


def test_frames_are_those_of_the_extractor(tmp_path, videos):
    how = {"fps": 1.0, "short_side": 256, "max_seconds": float("inf")}
    out, embedder = tmp_path / "frames", Fake()
    (out / extract_frames.UNFINISHED).mkdir(parents=True)
    clip(videos / "e.mp4", 20)  # more frames than are picked
    clip(videos / "f.mp4", 3.1, rate=10)  # the last frame is on screen for a tenth of a second
    report = update(videos, tmp_path / "i", embedder)
    assert report == Report(added=5, changed=0, removed=0, failed=0, unchanged=0, windows=5)
    with Store(tmp_path / "i", read_only=True) as store:
        for file, (seen, _) in zip(store.files(), embedder.seen, strict=True):
            job = extract_frames.Job(Path(file.path).stem, videos / file.path, out, how, 95)
            times = extract_frames.extract_video(job)["times"]
            jpgs = [out / job.video / f"{n:05d}.jpg" for n in range(len(times))]
            numbers = pick_frames(len(jpgs), embedder.max_frames)
            assert store.frames(file.id) == [(n, times[n], None) for n in numbers]  # what no window shows is not kept
            for n in numbers:  # small, for people: the model saw the extractor's
                with Image.open(io.BytesIO(store.jpeg(file.id, n))) as kept, Image.open(jpgs[n]) as shown:
                    assert kept.format == "WEBP" and kept.size == shown.size
                    assert np.abs(np.asarray(kept, int) - np.asarray(shown, int)).mean() < 8
            picked = [jpgs[n] for n in numbers]
            assert torch.equal(seen, read_frames(picked, embedder.picture))


def test_windows_of_a_long_file_in_the_index(tmp_path):
    clip(tmp_path / "v" / "long.mp4", 80)
    embedder = Fake()
    assert update(tmp_path / "v", tmp_path / "i", embedder, captioner=Captioner()).windows == 5
    with Store(tmp_path / "i", read_only=True) as store:
        windows = store.windows(store.all_windows())
        frames = {frame.number: frame for frame in store.frames(windows[0].file)}
        assert [(w.start, w.end) for w in windows] == [(0, 30), (15, 45), (30, 60), (45, 75), (50, 80)]
        for window, (_, given) in zip(windows, embedder.seen, strict=True):
            times = [frames[n].time for n in window.picks]
            assert len(times) == 6 and window.start <= times[0] and times[-1] < window.end
            assert given == [f"a picture of long.mp4 {time}" for time in times]
            assert given == [frames[n].sentence for n in window.picks]
        picked = {n for window in windows for n in window.picks}
        assert frames.keys() == picked and None not in {frame.sentence for frame in frames.values()}
        assert len(next(store.pooled())[0]) == 5


def test_new_changed_renamed_and_deleted_files(tmp_path, videos, statistics):
    first, again = Fake(), Fake()
    update(videos, tmp_path / "i", first, statistics_queries=["what"])
    assert update(videos, tmp_path / "i", again) == Report(0, 0, 0, 0, 3, 3) and not again.seen
    assert statistics == [["what"]]  # nothing changed, nothing measured
    clip(videos / "b" / "new.mp4", 2)
    shutil.copy(videos / "d.mp4", videos / "a.mp4")  # another size, another time
    (videos / "b" / "c.mkv").rename(videos / "b" / "renamed.mkv")
    (videos / "d.mp4").unlink()
    assert update(videos, tmp_path / "i", again) == Report(1, 1, 1, 0, 1, windows=3, moved=1)
    assert len(again.seen) == 2 and statistics[1:] == [["what"]]  # a new name is no new video; the queries are kept
    update(videos, tmp_path / "fresh", Fake())
    assert content(tmp_path / "i")[::2] == content(tmp_path / "fresh")[::2]  # but for the order of windows
    status = (videos / "a.mp4").stat()
    os.utime(videos / "a.mp4", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert update(videos, tmp_path / "i", again) == Report(0, 0, 0, 0, 3, 3)  # touched: it holds what it held
    assert len(again.seen) == 2
    for path in videos.rglob("*.m*"):
        path.unlink()
    with pytest.raises(InputError, match="no video in"):  # a disk that is not mounted looks like this
        update(videos, tmp_path / "i", Fake())
    assert len(content(tmp_path / "i")[0]) == 3


def test_a_changed_file_that_kept_size_and_date_is_found_by_its_content(tmp_path, videos):
    update(videos, tmp_path / "i", Fake())
    path, status = videos / "a.mp4", (videos / "a.mp4").stat()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert update(videos, tmp_path / "i", Fake()) == Report(0, 0, 0, 0, 3, 3)
    assert update(videos, tmp_path / "i", Fake(), check_content=True) == Report(0, 1, 0, 0, 2, 3)
    assert update(videos, tmp_path / "i", Fake(), check_content=True) == Report(0, 0, 0, 0, 3, 3)


def test_frames_wait_on_disk_and_nothing_of_them_is_left(tmp_path, videos):
    left = tmp_path / "i" / "reading"
    update(videos, tmp_path / "i", Fake())
    assert not left.exists()
    left.mkdir()
    (left / "killed.jpgs").write_bytes(b"x")
    clip(videos / "e.mp4", 2)
    update(videos, tmp_path / "i", Fake(), workers=1)
    assert not left.exists()
    (tmp_path / "s").mkdir()
    spool = Spool(tmp_path / "s")
    for data in (b"one", b"", b"three"):
        spool.append(data)
    again = pickle.loads(pickle.dumps(spool))
    assert list(again) == [b"one", b"", b"three"] and len(again) == 3
    again.remove()
    again.remove()
    assert not list((tmp_path / "s").iterdir())


def test_the_day_of_a_recording(tmp_path):
    for name, said, expected in (("a", "2020-05-17T10:00:00.000000Z", 1589709600.0),
                                 ("b", "1904-01-01T00:00:00Z", None), ("c", "yesterday", None)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            container.metadata["creation_time"] = said
            stream = container.add_stream("mpeg4", rate=1)
            stream.width, stream.height = 32, 24
            for colour in (50, 200):
                picture = av.VideoFrame.from_ndarray(np.full((24, 32, 3), colour, np.uint8), "rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        assert recorded_at(tmp_path / f"{name}.mp4") == expected
    update(tmp_path, tmp_path / "i", Fake())
    with Store(tmp_path / "i", read_only=True) as store:
        year = [datetime(n, 1, 1, tzinfo=timezone.utc).timestamp() for n in (2020, 2021)]
        [window] = store.windows(store.all_windows(since=year[0], until=year[1]))
        assert window.path == "a.mp4" and len(store.all_windows(since=year[1])) == 2  # when these were written
        assert len(store.all_windows("", 0.0, 60.0, year[0])) == 3


def test_an_unreadable_file_is_said_skipped_and_left_until_it_changes(tmp_path, videos, capsys):
    broken = videos / "b" / "broken.mp4"
    broken.write_bytes(b"no video")
    assert update(videos, tmp_path / "i", Fake()) == Report(4, 0, 0, 1, 0, 3)
    assert "skipped: b/broken.mp4 cannot be opened as a video" in capsys.readouterr().out
    assert update(videos, tmp_path / "i", Fake()) == Report(0, 0, 0, 1, 3, 3)
    assert "skipped" not in capsys.readouterr().out
    assert update(videos, tmp_path / "i", Fake(), retry=True) == Report(0, 1, 0, 1, 3, 3)
    assert "skipped: b/broken.mp4" in capsys.readouterr().out
    shutil.copy(videos / "a.mp4", broken)
    assert update(videos, tmp_path / "i", Fake()) == Report(0, 1, 0, 0, 3, 4)
    broken.write_bytes(b"")
    assert update(videos, tmp_path / "i", Fake()) == Report(0, 1, 0, 1, 3, 3)  # its old windows are gone
    with Store(tmp_path / "i", read_only=True) as store:
        assert [(file.path, file.why[:24]) for file in store.files() if file.why] == [
            ("b/broken.mp4", "b/broken.mp4 cannot be o")
        ]


def test_hostile_names(tmp_path, originals, capsys):
    names = ["it's \"quoted\".mp4", "a\nb\x1b[31m.mp4", "%s %00 {0}.mp4", "-rf --out.mp4", "file:x.mp4",
             "a?mode=ro#.mp4", "<script>alert(1)</script>.mp4", "\udcff\udcfe.mp4", "\u202egpj.mp4", "n" * 250 + ".mp4",
             "'; DROP TABLE files; --.mp4"]
    for name in names:
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(originals / "a.mp4", tmp_path / "v" / name)
    (tmp_path / "v" / "bad\n\udcff\x1b.mp4").write_bytes(b"")
    report = update(tmp_path / "v", tmp_path / "in?de%x#\udcff'", Fake(), captioner=Captioner())
    assert report == Report(len(names) + 1, 0, 0, 1, 0, len(names))
    out = capsys.readouterr().out
    assert r"skipped: bad\n\udcff\x1b.mp4" in out and "\x1b" not in out
    with Store(tmp_path / "in?de%x#\udcff'", read_only=True) as store:
        assert {file.path for file in store.files() if not file.why} == set(names)
        for file in store.files():
            assert (tmp_path / "v" / file.path).stat().st_size == file.size
    assert update(tmp_path / "v", tmp_path / "in?de%x#\udcff'", Fake(), captioner=Captioner()).unchanged == len(names)


@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_index(tmp_path, videos, file):
    class Killed(Fake):
        def pool_videos(self, pooled):
            if len(self.seen) == file:
                os._exit(42)
            return super().pool_videos(pooled)

    assert os.WEXITSTATUS(in_child(lambda: update(videos, tmp_path / "i", Killed()))) == 42
    with Store(tmp_path / "i", read_only=True) as store:
        assert len(store.files()) == file - 1
    rest = Fake()
    assert update(videos, tmp_path / "i", rest) == Report(4 - file, 0, 0, 0, file - 1, 3) and len(rest.seen) == 4 - file
    update(videos, tmp_path / "unbroken", Fake())
    assert content(tmp_path / "i") == content(tmp_path / "unbroken")


def test_a_run_killed_before_its_statistics_measures_them_next_time(tmp_path, videos, statistics, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "compute_statistics", lambda *_: os._exit(42))
        assert os.WEXITSTATUS(in_child(lambda: update(videos, tmp_path / "i", Fake()))) == 42
    assert update(videos, tmp_path / "i", Fake()) == Report(0, 0, 0, 0, 3, 3) and len(statistics) == 1
    update(videos, tmp_path / "unbroken", Fake())
    assert content(tmp_path / "i") == content(tmp_path / "unbroken")


def test_no_room_is_said_in_a_sentence(tmp_path, videos):
    update(videos, tmp_path / "i", Fake())
    before = content(tmp_path / "i")
    clip(videos / "z.mp4", 99)

    def full():
        size = (tmp_path / "i" / "index.db").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        update(videos, tmp_path / "i", Fake())

    assert "index.db: the disk" in said_by(full)
    assert content(tmp_path / "i") == before
    assert update(videos, tmp_path / "i", Fake()).added == 1


def test_an_index_that_may_only_be_read(originals):
    with tempfile.TemporaryDirectory() as parent:  # a user without rights can reach it, unlike tmp_path
        Path(parent).chmod(0o755)
        index, videos = Path(parent, "i"), Path(shutil.copytree(originals, Path(parent, "v")))
        update(videos, index, Fake())
        before = content(index)
        for path in (*index.iterdir(), index):
            path.chmod(0o555)

        def read_then_write():
            if not os.geteuid():
                os.setuid(65534)
            assert content(index) == before
            update(videos, index, Fake())

        try:
            videos.chmod(0o000)  # its files must not look deleted
            assert f"{videos} cannot be read (Permission denied)" in said_by(read_then_write)
            videos.chmod(0o755)
            assert f"{index}: cannot be written: Permission denied; name another place" in said_by(read_then_write)
        finally:
            index.chmod(0o755)


@pytest.mark.parametrize("window, fps", [(1e-9, 1.0), (0.9, 1.0), (5e-324, 1e-300), (1.9, 0.5)])
def test_a_window_that_holds_no_frame_is_refused_before_anything_is_read(tmp_path, videos, window, fps):
    """It would be cut into billions."""
    with pytest.raises(InputError, match=r"--window \S+ s is shorter than the \S+ s between two frames"):
        update(videos, tmp_path / "i", Fake(), window=window, fps=fps)
    assert not (tmp_path / "i").exists()


def test_an_index_is_gone_on_with_only_as_it_was_made(tmp_path, videos):
    update(videos, tmp_path / "i", Fake())
    for how, match in (
        ({"window": 10.0}, "was made with window 30.0, this run asks for 10.0: give the same flags, or another --out"),
        ({"fps": 2.0}, "fps 1.0"),
        ({"short_side": 64}, "short_side 256"),
        ({"captioner": Captioner()}, "captioner None, this run asks for 'fake greedy same_frame=5'"),
    ):
        with pytest.raises(InputError, match=match):
            update(videos, tmp_path / "i", Fake(), **how)
    with pytest.raises(InputError, match="another model"):
        update(videos, tmp_path / "i", Fake(method="zeroshot"))
    with pytest.raises(InputError, match=r"is the index of .*videos, not of .*: give another --out"):
        update(videos / "b", tmp_path / "i", Fake())
    moved = videos.rename(tmp_path / "moved")
    assert update(moved, tmp_path / "i", Fake()).unchanged == 3
    with Store(tmp_path / "i", read_only=True) as store:
        assert store.settings["videos"] == str(moved)


# ---- sentences ----


def write_narrations(path, of_video):
    lines = [{"video": video, "captioner": "c", "prompt": "", "sentences": [{"time": t, "text": s} for t, s in pairs]}
             for video, pairs in of_video.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sentences(index):
    with Store(index, read_only=True) as store:
        return {file.path: [frame.sentence for frame in store.frames(file.id)] for file in store.files()}


def test_a_narration_file_is_joined_by_time(tmp_path, videos):
    of_video = {"c": [(0.2, "at 0"), (1.2, " "), (2.0, "at 2 \u2028")], "a": [(0.0, "x"), (1.0, "y"), (2.0, "z")]}
    path, embedder = write_narrations(tmp_path / "n.jsonl", of_video), Fake()
    update(videos, tmp_path / "i", embedder, narrations=path)
    expected = {"a.mp4": ["x", "y", "z"], "b/c.mkv": ["at 0", None, "at 2 \u2028", None], "d.mp4": [None] * 5}
    assert sentences(tmp_path / "i") == expected
    assert [given for _, given in embedder.seen] == [*expected.values()]
    with Store(tmp_path / "i", read_only=True) as store:
        notes = [file.note for file in store.files()]
    assert notes == ["", "2 of 4 frames without a sentence", "5 of 5 frames without a sentence"]
    again = Fake()
    assert update(videos, tmp_path / "i", again, narrations=path, retry=True).unchanged == 3 and not again.seen
    of_video |= {"d": [(float(n), f"new {n}") for n in range(5)], "a": [(0.0, "x"), (1.0, "y"), (2.0, "changed")]}
    write_narrations(path, of_video)
    assert update(videos, tmp_path / "i", again, narrations=path) == Report(0, 2, 0, 0, 1, 3)
    expected |= {"a.mp4": ["x", "y", "changed"], "d.mp4": [f"new {n}" for n in range(5)]}
    assert sentences(tmp_path / "i") == expected


def test_a_narration_of_other_frames_is_refused(tmp_path, videos):
    path = write_narrations(tmp_path / "n.jsonl", {"c": [(n * 0.7, "x") for n in range(6)]})
    with pytest.raises(InputError, match=r"n.jsonl: c: narration of another frame rate"):
        update(videos, tmp_path / "i", Fake(), narrations=path)
    (videos / "e").mkdir()
    shutil.copy(videos / "a.mp4", videos / "e" / "c.mp4")
    with pytest.raises(InputError, match=r"b/c.mkv and e/c.mp4 have one id, 'c', in .*n.jsonl: rename one"):
        update(videos, tmp_path / "i", Fake(), narrations=path)
    write_narrations(path, {"b/c.mkv": [(0.0, "x")]})
    with pytest.raises(InputError, match="narrates none of these videos; an id is a file's name without its suffix"):
        update(videos, tmp_path / "i", Fake(), narrations=path)
    with pytest.raises(InputError, match="exclude each other"):
        update(videos, tmp_path / "i", Fake(), narrations=path, captioner=Captioner())
    wordless = Fake()
    wordless.narration = False
    with pytest.raises(InputError, match="this model reads no narration"):
        update(videos, tmp_path / "j", wordless, narrations=path)
    assert not (tmp_path / "j").exists()


def test_a_frame_without_an_answer_has_no_sentence(tmp_path, videos):
    captioner = Captioner(lambda key: Failed("busy <b>") if key == "b/c.mkv 2.0" else f"at {key}")
    update(videos, tmp_path / "i", Fake(), captioner=captioner)
    assert captioner.shown == 2 + 3 + 4 + 5
    assert sentences(tmp_path / "i")["b/c.mkv"] == ["at b/c.mkv 0.0", "at b/c.mkv 1.0", None, "at b/c.mkv 3.0"]
    with Store(tmp_path / "i", read_only=True) as store:
        assert [file.note for file in store.files()] == ["", "1 of 4 frames without a sentence (busy <b>)", ""]
    assert update(videos, tmp_path / "i", Fake(), captioner=Captioner()).unchanged == 3
    assert update(videos, tmp_path / "i", Fake(), captioner=Captioner(), retry=True) == Report(0, 1, 0, 0, 2, 3)
    assert None not in sentences(tmp_path / "i")["b/c.mkv"]


def test_a_captioner_that_is_down_or_blind_stops_the_run(tmp_path, videos):
    down = Captioner(lambda key: "at" if key.startswith("a.mp4") else Failed("503"))
    clip(videos / "e.mp4", 20)
    with pytest.raises(InputError, match="10 frames in a row got no sentence, the last one because: 503"):
        update(videos, tmp_path / "i", Fake(), captioner=down)
    assert list(sentences(tmp_path / "i")) == ["a.mp4", "b/c.mkv", "d.mp4"]  # not the file in hand
    blind = Captioner()
    blind.caption = lambda pictures, keys=None: ["a photo"] * len(pictures)
    with pytest.raises(InputError, match="the picture does not reach the model"):
        update(videos, tmp_path / "i", Fake(), captioner=blind)


@pytest.fixture
def server():
    """The captioning server of the narration's tests."""
    from test_narrate import Server

    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_refused_pictures_and_apologies_are_frames_without_a_sentence_and_end_nothing(tmp_path, videos, server):
    from test_chat_server import APOLOGY, POLICY
    from test_narrate import chat, sentence_of

    clip(videos / "e.mp4", 20)
    answers, now = {"e.mp4": POLICY, "b/c.mkv": chat(APOLOGY)}, [""]
    server.answer = lambda picture: answers.get(now[-1]) or chat(sentence_of(picture))
    captioner = ServerCaptioner(server.url, "m")
    caption = captioner.caption
    captioner.caption = lambda pictures, keys=None: (
        now.append(keys[0].rpartition(" ")[0] if keys else "") or caption(pictures, keys))
    update(videos, tmp_path / "i", Fake(), captioner=captioner, window=5)
    found = sentences(tmp_path / "i")
    assert set(found["e.mp4"]) == set(found["b/c.mkv"]) == {None} and None not in found["a.mp4"] + found["d.mp4"]
    with Store(tmp_path / "i", read_only=True) as store:
        notes = {file.path: file.note for file in store.files() if file.note}
    assert notes["b/c.mkv"] == "4 of 4 frames without a sentence (an apology or a refusal)"
    assert re.fullmatch(r"20 of 20 frames without a sentence \(.*400: The picture was refused by .*\)", notes["e.mp4"])


def test_an_index_records_the_parameters_that_a_server_does_not_take(tmp_path, videos, server):
    from test_chat_server import picky

    server.refuse = picky(temperature=True)
    update(videos, tmp_path / "i", Fake(), captioner=ServerCaptioner(server.url, "m"))
    label = "m server greedy max_new_tokens=77 without=temperature same_frame=5"
    with Store(tmp_path / "i", read_only=True) as store:
        assert store.settings["captioner"] == label
    clip(videos / "f.mp4", 3)
    server.bodies.clear()
    assert update(videos, tmp_path / "i", Fake(), captioner=ServerCaptioner(server.url, "m")).added == 1
    assert server.bodies and not any("temperature" in body for _, _, body in server.bodies)
    server.refuse = picky(max_tokens=True)
    clip(videos / "g.mp4", 3)
    with pytest.raises(InputError, match="no sentence for a first picture .*max_completion_tokens"):
        update(videos, tmp_path / "i", Fake(), captioner=ServerCaptioner(server.url, "m"))


def test_a_server_is_asked_for_many_frames_at_once(tmp_path):
    class Server(Captioner, ServerCaptioner):
        pass

    clip(tmp_path / "v" / "a.mp4", 4)
    all_there = threading.Barrier(4, timeout=20)
    captioner = Server(lambda key: f"at {key}" * (all_there.wait() >= 0))
    update(tmp_path / "v", tmp_path / "i", Fake(), captioner=captioner)
    assert sentences(tmp_path / "i")["a.mp4"] == [f"at a.mp4 {n}.0" for n in range(4)]


def test_still_frames_share_a_sentence(tmp_path):
    (tmp_path / "v").mkdir()
    make_clip(tmp_path / "v" / "still.mp4", [i / 2 for i in range(10)], paint=np.full((48, 64, 3), 90, np.uint8))
    captioner = Captioner()
    update(tmp_path / "v", tmp_path / "i", Fake(), captioner=captioner)
    assert captioner.shown == 2 + 1 and sentences(tmp_path / "i") == {"still.mp4": ["a picture of still.mp4 0.0"] * 5}


@pytest.mark.parametrize(("method", "said"), [("narvid", "46.3 % .* 51.0 % .*Table 10"), ("zeroshot", "loses nothing")])
def test_frames_alone_say_what_that_loses(tmp_path, videos, capsys, method, said):
    embedder = Fake(method=method)
    embedder.frames_alone = METHODS[method].frames_alone
    update(videos, tmp_path / "i", embedder)
    assert re.search(said, capsys.readouterr().out)
    assert {given for _, given in embedder.seen} == {None}
    update(videos, tmp_path / "j", Fake(method=method), captioner=Captioner())
    assert "Table" not in capsys.readouterr().out


# ---- a model ----


def test_features_of_a_tiny_narvid(tmp_path, corpus, weights, videos, monkeypatch):
    monkeypatch.setattr(build, "compute_statistics", engine.compute_statistics)
    embedder = Embedder.load(weights, device="cpu")
    path = write_narrations(tmp_path / "n.jsonl", {"c": [(0.0, "red and green"), (1.0, ""), (2.0, "blue")]})
    update(videos, tmp_path / "i", embedder, narrations=path)
    read = read_video(videos / "b" / "c.mkv")
    jpgs = [tmp_path / f"{n}.jpg" for n in range(len(read.jpegs))]
    for jpg, data in zip(jpgs, read.jpegs, strict=True):
        jpg.write_bytes(data)
    expected = embedder.videos([read_frames(jpgs, embedder.picture)], [["red and green", None, "blue", None]])
    with Store(tmp_path / "i", read_only=True) as store:
        ids = store.all_windows("b")
        found = embedder.unpack(store.features(ids))
        for name, x, y in zip(expected._fields, found, expected, strict=True):
            assert torch.allclose(x, y, atol=1e-3 if name == "look" else 0), name
        assert all(std > 0 for _, std in store.statistics["text"])
        assert store.settings["method"] == "narvid" and store.settings["captioner"] == "narration file"
    assert found.narration_mask.tolist()[0][:4] == [True, False, True, False]
