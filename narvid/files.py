"""The one way in and out for files: text, JSON, JSON lines, csv and YAML; whole files; a folder that one process owns.

Whatever is wrong with a file that is read ends in one InputError that names file and line and says what to do: not
UTF-8, malformed, nested without end, a number that no computer holds, NaN, a name that stands twice, half a surrogate
pair. A line ends at \\n (or \\r\\n) and nowhere else: captions hold U+2028 and U+0085.

What is written stands under a temporary name until it is whole, then takes its own in one step; a full disk is one
sentence, and the file that stood there before stays. This file knows no format of ours, and no torch.
"""

from __future__ import annotations

import codecs
import csv
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from narvid import InputError
from narvid.parsing import ADVICE, parse_csv, parse_json, parse_yaml

# ---- reading: bytes and text ----


def read_bytes(path: str | Path, *, advice: str = ADVICE) -> bytes:
    """The whole file; InputError where it cannot be read. `advice`: what the reader of the sentence can do about it."""
    return b"".join(read_parts(path, size=-1, advice=advice))


def read_parts(path: str | Path, *, size: int = 2**24, advice: str = ADVICE) -> Iterator[bytes]:
    """The file in parts of `size` bytes, for weights that memory need not hold; InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            while part := file.read(size):
                yield part
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a file; {advice}") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {advice}") from None


def read_text(path: str | Path, *, advice: str = ADVICE) -> str:
    """A UTF-8 text, with or without a byte order mark (dropped), line ends as they stand."""
    return as_text(read_bytes(path, advice=advice), path, advice=advice)


def as_text(content: bytes, path: str | Path, *, advice: str = ADVICE) -> str:
    """Bytes that were read of `path` (or "standard input") as text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path}: is UTF-16 text; save it as UTF-8") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {error.start} of the file); {advice}") from None
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise InputError(f"{path}:{line}: holds a NUL byte: no text, or UTF-16 (save it as UTF-8); {advice}")
    return text


def read_lines(path: str | Path, *, advice: str = ADVICE, whole: bool = False) -> list[str]:
    """The lines of a UTF-8 text without their ends. `whole`: only those that end, for a kill can tear the last one."""
    content = read_bytes(path, advice=advice)
    if whole:
        content = content[:content.rfind(b"\n") + 1]
    lines = [line.removesuffix("\r") for line in as_text(content, path, advice=advice).split("\n")]
    return lines if lines[-1] else lines[:-1]


# ---- reading: values ----


def read_json(path: str | Path, kind: type = object, *, advice: str = ADVICE) -> object:
    """The value of a JSON file, of type `kind` (dict or list) where one is named."""
    value = parse_json(read_text(path, advice=advice), path, advice=advice)
    if not isinstance(value, kind):
        wanted = {dict: 'an object {"name": value, ...}', list: "a list [...]"}[kind]
        raise InputError(f"{path}: holds no {wanted.partition(' ')[2]}; is this the right file? Else {advice}")
    return value


def read_json_lines(path: str | Path, *, advice: str = ADVICE, whole: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a file with one JSON object a line; blank lines are passed over."""
    for number, line in enumerate(read_lines(path, advice=advice, whole=whole), 1):
        if line.strip():
            entry = parse_json(line, path, line=number, advice=advice)
            if not isinstance(entry, dict):
                raise InputError(f'{path}:{number}: is no object {{"name": value, ...}}; {advice}')
            yield number, entry


def read_csv(path: str | Path, columns: Sequence[str], *, advice: str = ADVICE) -> list[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each line below the header (parsing.parse_csv)."""
    return parse_csv(read_text(path, advice=advice), path, columns, advice=advice)


def read_yaml(path: str | Path, *, advice: str = ADVICE) -> dict[str, object]:
    """The {name: value} of a YAML file (parsing.parse_yaml)."""
    return parse_yaml(read_text(path, advice=advice), path, advice=advice)


# ---- reading: folders ----


def list_folder(folder: str | Path) -> list[str]:
    """The names in a folder, sorted; InputError where it may not be read, which must not look like an empty one."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(error, folder) from None
    if fault := misread(names):
        raise InputError(f"{folder}: {fault}")
    return names


def misread(names: Iterable[str]) -> str | None:
    """What is wrong with names of files, or flags, that an old locale hands over in other letters than they have."""
    encoding = sys.getfilesystemencoding()
    odd = next((name for name in names if not name.isascii()), None) if encoding != "utf-8" else None
    return odd and f"{ascii(odd)} is read as {encoding} here: set PYTHONUTF8=1, or a UTF-8 locale (LC_ALL=C.UTF-8)"


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, sorted names of its files) of this one and all below it but hidden ones, links followed.

    Each real folder comes once, so a link back up is no loop; one that may not be read is an InputError.
    """
    def stop(error: OSError):
        raise _unreadable(error, error.filename) from None

    seen = {os.path.realpath(folder)}
    list_folder(folder)  # os.walk takes a file, or nothing, for an empty folder
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if fault := misread((*folders, *names)):
            raise InputError(f"{parent}: {fault}")
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders) if name[0] != "."}
        folders[:] = [name for name in real if real[name] not in seen and not seen.add(real[name])]
        yield parent, sorted(names)


def _unreadable(error: OSError, folder: str | Path) -> InputError:
    return InputError(f"{folder}: the folder cannot be read ({error.strerror}); mend that, or name another")


# ---- writing ----


@contextmanager
def writing(path: str | Path, *, binary: bool = False) -> Iterator[IO]:
    """A file to write, under a temporary name in the folder of `path`, which is made; it becomes `path` at the end.

    Where the block is left by an exception, the temporary file goes and `path` is as it was. A disk that does not take
    it is an InputError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "xb") if binary else open(temporary, "x", encoding="utf-8", newline="")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if refusal := _refusal_in(error):
            raise unwritable(path, refusal) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file, as `writing`."""
    with writing(path) as file:
        file.write(text)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, one name a line, as `writing`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str | Path, entries: Iterable[dict]) -> None:
    """Write one JSON object a line, as `writing`."""
    with writing(path) as file:
        file.writelines(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)


def write_csv(path: str | Path, rows: Iterable[Sequence]) -> None:
    """Write one row a line, the header first, as `writing`."""
    with writing(path) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def replace(temporary: str | Path, path: str | Path) -> None:
    """Give a file or folder that is whole its name; what had the name is gone in the same step."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error


def remove(path: str | Path) -> None:
    """Remove a file, if it is there."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def appending(path: str | Path) -> Iterator[IO[str]]:
    """A UTF-8 file to add lines to, made where it is missing; half a line that a kill left at its end is cut off."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            yield file
    except OSError as error:
        if _refusal_in(error) or error.filename == os.fspath(path):
            raise unwritable(path, error) from error
        raise


def try_writing(folder: str | Path, size: int = 0) -> None:
    """InputError unless `folder` can be made, written, and take `size` bytes; leaves nothing behind.

    The bytes are really laid claim to, for a quota and `ulimit -f` are known in no other way.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    temporary = folder / f".{uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(f"{folder}: {size / 2**30:.2f} GiB are needed and its disk has {free / 2**30:.2f} left; "
                             "make room, or name a folder elsewhere")
        with open(temporary, "xb", buffering=0) as file:
            file.write(b"\0")
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise unwritable(folder, error) from error
    finally:
        with suppress(OSError, ValueError):
            os.unlink(temporary)
        for path in new:
            with suppress(OSError, ValueError):  # somebody else has begun to use it
                path.rmdir()


def _refusal_in(error: BaseException | None) -> OSError | None:
    """What the disk said behind an error; torch's writer hides it in one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            return error
        error = error.__cause__ or error.__context__
    return None


_REFUSALS = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "your quota on this disk is used up; make room",
    errno.EFBIG: "it would be larger than a file may be here; raise the limit (ulimit -f)",
    errno.EROFS: "the disk is read-only; name a folder elsewhere",
    errno.EIO: "the disk reports an error; name a folder elsewhere",
}


def unwritable(path: str | Path, error: Exception) -> InputError:
    """What a disk said about writing `path`, as one sentence."""
    said = getattr(error, "strerror", None) or error
    with suppress(OSError, ValueError):
        for place in (Path(path), *Path(path).parents):
            if place.is_symlink() and not place.exists():
                said = f"the link {place} leads nowhere (is its disk there?)"
    what = _REFUSALS.get(getattr(error, "errno", None), f"{said}; name another place, or mend that")
    return InputError(f"{path}: cannot be written: {what}. What stood there before is as it was")


# ---- a folder that one process owns ----

_held: weakref.WeakSet[IO] = weakref.WeakSet()


def lock(folder: str | Path, name: str = ".lock", *, wait: bool = False) -> IO[bytes]:
    """Own a folder, which is made, until what is returned is closed (also by `with`) or the process ends, however.

    Two parts of one folder can have owners of their own under other names. A second process gets an InputError that
    names the owner, or waits. The temporary files of an owner that was killed are removed. A disk that knows no locks
    lets everybody in.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "ab+", buffering=0)  # noqa: SIM115 (held until it is closed)
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        with file:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "unknown"
        what = folder if name == ".lock" else folder / name
        raise InputError(f"{what}: is being written by another process ({owner}); wait for it to end, or name another "
                         "folder") from None
    except OSError:
        return file
    path = folder / name
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        file.close()  # its owner has gone in this moment, and removed it with the folder
        return lock(folder, name, wait=wait)
    _held.add(file)
    with suppress(OSError):  # a full disk: the lock holds, its owner is not named
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    for left in folder.glob(".*.????????.tmp"):
        with suppress(OSError):
            left.unlink()
    return file


def _let_go() -> None:
    """A forked worker must not hold its parent's lock: it may live for seconds after the parent was killed."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
