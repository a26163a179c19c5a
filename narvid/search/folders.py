"""The folders of an index: which they are, what the index calls a file, and where it lies.

An index of one folder knows its files by their paths in it. Of several, each has a name, that of the folder, and a path
begins with it; the one that was there alone keeps the name "" and its paths. Settings: "videos", the first folder, and
"folders", {name: folder}, where there are several.
Here: names and places. Not here: which files of a folder are videos (reading.py), what is done with them (build.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from narvid import InputError
from narvid.search.reading import find_videos
from narvid.search.rows import File
from narvid.search.store import Store


def folders_of(settings: dict) -> dict[str, Path]:
    """{name: folder}, the first one first."""
    return {name: Path(folder) for name, folder in (settings.get("folders") or {"": settings["videos"]}).items()}


def place_of(settings: dict, path: str) -> tuple[Path, Path]:
    """The folder of an indexed file, and where the file lies; nothing is asked of the disk."""
    folders, (first, _, rest) = folders_of(settings), path.partition("/")
    if rest and first and first in folders:
        return folders[first], folders[first] / rest
    root = folders.get("", Path(settings["videos"]))
    return root, root / path


def place(store: Store, path: str) -> Path:
    """Where a file of an index lies."""
    return place_of(store.settings, path)[1]


def name_of(folders: dict[str, Path], path: str) -> str:
    """The name of an indexed file's folder."""
    first, _, rest = path.partition("/")
    return first if rest and first in folders else ""


def choose(given: Sequence[str | Path], settings: dict | None, files: list[File],
           index: str | Path) -> dict[str, Path]:
    """{name: folder} of an index, once it holds the given folders: those it has (settings; None: it is new), and new
    ones. One that is no longer there and whose files lie in a given one has moved there.

    InputError for folders that are given twice or lie in one another, and for one that the index does not have, where
    none is given that it has: it may be another index that is meant.
    """
    given = [Path(folder).resolve() for folder in given]
    folders = {} if settings is None else {name: folder.resolve() for name, folder in folders_of(settings).items()}
    new = [folder for folder in given if folder not in folders.values()]
    for name, folder in folders.items():
        if new and not os.path.exists(folder):
            if moved := next((to for to in new if _holds(to, folders, name, files)), None):
                folders[name] = moved
                new.remove(moved)
    if new and folders and not set(given) & set(folders.values()):
        known = " and ".join(map(str, folders.values()))
        raise InputError(f"{index} is the index of {known}, not of {new[0]}: give another --out, or that folder too, "
                         "to have both in one index")
    alone = settings is None and len(new) == 1
    for folder in new:
        folders["" if alone else _free_name(folder, folders, files)] = folder
    all_given = [*given, *(folder for folder in folders.values() if folder not in given)]
    for n, folder in enumerate(all_given):
        for other in all_given[:n]:
            if folder == other:
                raise InputError(f"the folder {folder} is given twice: give it once")
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                inner, outer = (folder, other) if folder.is_relative_to(other) else (other, folder)
                raise InputError(f"the folder {inner} lies in {outer}, which is searched with its subfolders: give one")
    return folders


def find(folders: dict[str, Path], names: Iterable[str], index: str | Path) -> dict[str, tuple[int, int]]:
    """Of these folders: {path as the index knows it: (bytes, mtime in ns)}, in the order of path bytes.

    InputError as of `find_videos`, and for a subfolder that is called as another folder of the index is.
    """
    found = {}
    for name in names:
        for path, status in find_videos(folders[name], index).items():
            if not name and name_of(folders, path):
                raise InputError(f"{folders['']}/{path.partition('/')[0]} is called as the index calls "
                                 f"{folders[name_of(folders, path)]}: rename it")
            found[f"{name}/{path}" if name else path] = status
    return dict(sorted(found.items(), key=lambda item: os.fsencode(item[0])))


def as_settings(folders: dict[str, Path]) -> dict:
    """What an index keeps of them."""
    known = {name: str(folder) for name, folder in folders.items()}
    return {"videos": next(iter(known.values())), "folders": None if list(known) == [""] else known}


def _holds(folder: Path, folders: dict[str, Path], name: str, files: list[File]) -> bool:
    """Whether any of a folder's indexed files lies in another one by now, or it has none."""
    own = [file for file in files if name_of(folders, file.path) == name]
    for file in own:
        try:
            if os.stat(folder / file.path[len(name) + bool(name):]).st_size == file.size:
                return True
        except OSError:
            continue
    return not own


def _free_name(folder: Path, folders: dict[str, Path], files: list[File]) -> str:
    """Its own name, with a number where the index has it already, be it of a folder or of a subfolder."""
    taken = set(folders)
    if "" in folders:
        taken |= {file.path.partition("/")[0] for file in files}
    name, n = folder.name or "root", 2
    while name in taken or ("" in folders and os.path.exists(folders[""] / name)):
        name, n = f"{folder.name or 'root'}-{n}", n + 1
    return name
