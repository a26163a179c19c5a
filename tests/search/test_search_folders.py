"""Several folders in one index, and an index that is kept up to date while it is watched."""

import shutil
from pathlib import Path

import pytest
from test_search_index import Fake, clip, content, originals, statistics, videos  # noqa: F401 (fixtures)

from narvid import InputError
from narvid.search import build
from narvid.search.build import Report, update, watch
from narvid.search.folders import place, place_of
from narvid.search.site import about
from narvid.search.store import Store


def paths(index, there=True):
    with Store(index, read_only=True) as store:
        assert not there or all(place(store, file.path).is_file() for file in store.files())
        return [file.path for file in store.files()]


@pytest.fixture
def others(tmp_path):
    clip(tmp_path / "far" / "others" / "a.mp4", 2)
    clip(tmp_path / "far" / "others" / "sub" / "e.mp4", 6)
    return tmp_path / "far" / "others"


def test_two_folders_from_the_beginning_are_told_apart_by_their_names(tmp_path, videos, others):  # noqa: F811
    assert update([videos, others], tmp_path / "i", Fake()) == Report(5, 0, 0, 0, 0, 5)
    assert paths(tmp_path / "i") == ["others/a.mp4", "others/sub/e.mp4", "videos/a.mp4", "videos/b/c.mkv",
                                     "videos/d.mp4"]
    with Store(tmp_path / "i", read_only=True) as store:
        assert len(store.all_windows("others")) == 2 and len(store.all_windows("videos/b")) == 1
        said = about(store, "")
        assert said["videos"] == "videos and others" and said["folders"][0] == "others"
        assert store.one("PRAGMA user_version")[0] == 3  # an earlier version would not know what to do with it
    assert update([others, videos], tmp_path / "i", Fake()).unchanged == 5
    (others / "a.mp4").rename(videos / "was_a.mp4")  # from one folder to the other
    again = Fake()
    assert update([videos, others], tmp_path / "i", again).moved == 1 and not again.seen


def test_an_index_of_one_folder_gets_a_second_and_stays_as_it_is(tmp_path, videos, others):  # noqa: F811
    update(videos, tmp_path / "i", Fake())
    before = content(tmp_path / "i")
    with pytest.raises(InputError, match="is the index of .*videos, not of .*others: give another --out, or"):
        update(others, tmp_path / "i", Fake())  # perhaps it is another index that is meant
    assert content(tmp_path / "i") == before
    assert update([videos, others], tmp_path / "i", Fake()) == Report(2, 0, 0, 0, 3, 5)
    assert paths(tmp_path / "i") == ["a.mp4", "b/c.mkv", "d.mp4", "others/a.mp4", "others/sub/e.mp4"]
    (videos / "a.mp4").unlink()
    (others / "a.mp4").unlink()
    assert update(others, tmp_path / "i", Fake()) == Report(0, 0, 1, 0, 1, 4)  # the other folder is not looked at
    assert update(videos, tmp_path / "i", Fake()).removed == 1
    (videos / "others").mkdir()
    clip(videos / "others" / "x.mp4")
    with pytest.raises(InputError, match="videos/others is called as the index calls .*far/others: rename it"):
        update([videos, others], tmp_path / "i", Fake())
    shutil.rmtree(videos / "others")
    assert update(videos, tmp_path / "i", Fake(), forget=["others"]).removed == 1
    assert paths(tmp_path / "i") == ["b/c.mkv", "d.mp4"]
    with Store(tmp_path / "i", read_only=True) as store:
        assert store.settings["folders"] is None
    for name, match in (("nowhere", "no such folder, it has .*videos"), (str(videos), "also one of those to index")):
        with pytest.raises(InputError, match=match):
            update(videos, tmp_path / "i", Fake(), forget=[name])


def test_names_that_are_taken_get_a_number(tmp_path, videos):  # noqa: F811
    """Of a folder, or of a subfolder of the one that was alone."""
    second, third = clip(tmp_path / "far" / "b" / "x.mp4").parent, clip(tmp_path / "near" / "b" / "x.mp4").parent
    update(videos, tmp_path / "i", Fake())
    update([videos, second, third], tmp_path / "i", Fake())
    assert paths(tmp_path / "i") == ["a.mp4", "b-2/x.mp4", "b-3/x.mp4", "b/c.mkv", "d.mp4"]
    settings = {"videos": "/v", "folders": {"": "/v", "b": "/far/b"}}
    assert place_of(settings, "b/x.mp4") == (Path("/far/b"), Path("/far/b/x.mp4"))
    assert place_of(settings, "c/x.mp4") == (Path("/v"), Path("/v/c/x.mp4"))
    assert place_of(settings, "b") == (Path("/v"), Path("/v/b"))


def test_a_folder_that_moved_is_followed_and_one_that_is_away_is_not_deleted(tmp_path, videos, others):  # noqa: F811
    update([videos, others], tmp_path / "i", Fake())
    before, again = content(tmp_path / "i"), Fake()
    moved = others.rename(tmp_path / "elsewhere")
    assert update([videos, moved], tmp_path / "i", again).unchanged == 5 and not again.seen
    assert paths(tmp_path / "i")[0] == "others/a.mp4"
    away = moved.rename(tmp_path / "unplugged")
    with pytest.raises(InputError, match="elsewhere is no folder that can be read"):
        update([videos, moved], tmp_path / "i", Fake())
    moved.mkdir()  # what is left of a disk that is not there
    with pytest.raises(InputError, match="no video in .*elsewhere"):
        update([videos, moved], tmp_path / "i", Fake())
    moved.rmdir()
    stranger = clip(tmp_path / "stranger" / "z.mp4", 7).parent
    update([videos, stranger], tmp_path / "i", Fake())  # another folder, not the one that is away
    away.rename(moved)
    assert len(paths(tmp_path / "i")) == 6 and update(stranger, tmp_path / "i", Fake(), forget=["others"]).removed == 2
    assert before != content(tmp_path / "i")
    alone = clip(tmp_path / "alone" / "a.mp4").parent
    update(alone, tmp_path / "j", Fake())
    alone.rename(tmp_path / "away")
    with pytest.raises(InputError, match="is the index of .*alone, not of .*stranger"):
        update(stranger, tmp_path / "j", Fake())


def test_folders_twice_or_in_one_another_are_refused(tmp_path, videos, others):  # noqa: F811
    for given, match in (([videos, others, videos], "videos is given twice: give it once"),
                         ([videos, videos / "b"], r"videos/b lies in .*videos, which is searched with its subfolders"),
                         ([videos / "b", others, videos], r"videos/b lies in .*videos")):
        with pytest.raises(InputError, match=match):
            update(given, tmp_path / "i", Fake())
    update(videos, tmp_path / "i", Fake())
    with pytest.raises(InputError, match="lies in"):
        update([videos, videos / "b"], tmp_path / "i", Fake())
    assert paths(tmp_path / "i") == ["a.mp4", "b/c.mkv", "d.mp4"]


# ---- watching ----


def watched(monkeypatch, index, folders, steps, embedder=None):
    """`watch` with something done before each look, Ctrl-C after the last -> what it said, and the index's paths then.

    steps: called before a look each; None: nothing happens.
    """
    said, seen, todo = [], [], list(steps)

    def sleep(seconds):
        seen.append(paths(index, there=False))
        if not todo:
            raise KeyboardInterrupt
        if step := todo.pop(0):
            step()

    monkeypatch.setattr(build.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch(folders, index, embedder or Fake(), every=0.1, say=said.append)
    return said, seen


def test_what_has_stopped_growing_is_indexed(tmp_path, videos, monkeypatch, statistics):  # noqa: F811
    whole = clip(tmp_path / "whole.mp4", 6).read_bytes()

    def grow(size):
        return lambda: (videos / "new.mp4").write_bytes(whole[:size])

    said, seen = watched(monkeypatch, tmp_path / "i", videos, [None, grow(500), grow(900), grow(10**9), None, None])
    assert [len(now) for now in seen] == [3, 3, 3, 3, 3, 4, 4]  # at the second look at which it is whole
    assert said[0].startswith("3 files new, 0 changed, 0 removed; watching")
    assert said[1:] == [f"1 files new, 0 changed, 0 removed, 0 moved or renamed, 0 of all could not be read; "
                        f"{tmp_path / 'i'} holds 4 windows"]
    assert len(statistics) == 2  # measured when something has changed, and not at every look


def test_what_is_gone_moved_or_cannot_be_read_is_noticed(tmp_path, videos, monkeypatch):  # noqa: F811
    embedder = Fake()
    said, seen = watched(monkeypatch, tmp_path / "i", videos, [
        lambda: (videos / "a.mp4").rename(videos / "b" / "renamed.mp4"), None, None,
        lambda: (videos / "d.mp4").unlink(), None, lambda: (videos / "no.mp4").write_text("no video"), None, None],
        embedder)
    assert seen[3] == ["b/c.mkv", "b/renamed.mp4", "d.mp4"] and len(embedder.seen) == 3  # known by its content
    assert "0 files new, 0 changed, 0 removed, 1 moved" in said[1] and "1 removed" in said[2]
    assert "1 of all could not be read" in said[3] and len(said) == 4  # said once, not tried at every look
    assert seen[5] == ["b/c.mkv", "b/renamed.mp4"]


def test_a_watched_folder_that_goes_away_keeps_its_files(tmp_path, videos, others, monkeypatch):  # noqa: F811
    away = tmp_path / "unplugged"
    said, seen = watched(monkeypatch, tmp_path / "i", [videos, others], [
        lambda: others.rename(away), None, lambda: (videos / "a.mp4").unlink(), None,
        lambda: away.rename(others), None, lambda: (others / "a.mp4").unlink(), None, None])
    assert ["others/a.mp4" in now for now in seen] == [True] * 8 + [False] * 2
    assert sum("what is indexed of it stays" in line for line in said) == 1
    assert "videos/a.mp4" not in seen[4]  # the other one is watched meanwhile
