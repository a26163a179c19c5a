"""One SQLite file in a folder of its own: opening, locks, threads, transactions, and its errors in words.

Here: nothing that knows of videos. What the tables hold is in store.py.

SQLite's rollback journal, not its write-ahead log: an index is one file that can be copied, read from a disk without
write permission, and lie on a network disk. One process writes (it holds <folder>/lock), any number of them read; each
thread has a connection of its own.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from narvid import InputError
from narvid.files import lock, replace

NAME, LOCK_NAME = "index.db", "lock"
KIND, VERSION = 0x4E56, 2  # "NV", SQLite's application_id of our files; the version of what they hold
SEVERAL = 3  # the version of an index of several folders
WAIT = 30.0  # seconds for another process's transaction


class _Connection(sqlite3.Connection):
    """Closed, by the garbage collector, when its thread has ended: a server's threads come and go."""

    def __del__(self):
        self.close()


class Database:
    """The database of a folder (`path`), open until close(); a context manager.

    create: called with the execute of a new, empty database, whose folder must hold nothing else; None: it must exist.
    read_only: nothing can be written. Everything here raises InputError, one sentence, where the folder is no index,
    was written by a newer version, is damaged, is written by another process, may not be written, or the disk is full.
    """

    def __init__(self, folder: Path, *, create: Callable | None = None, read_only: bool = False):
        self.path, self._file, self._read_only = folder, folder / NAME, read_only
        self._local, self._connections, self._lock, self._known = threading.local(), WeakSet(), None, None
        if create is None and not os.path.isfile(self._file):
            make = f"python -m narvid.search index VIDEOS --out {folder}"
            raise InputError(f"{folder} is no index, it holds no {NAME}: make one with `{make}`")
        if not read_only:
            self._take_lock()
        try:
            if create is not None:
                self._create(create)
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections of all threads and let another process write."""
        for connection in list(self._connections):
            connection.close()
        self._local = threading.local()
        if self._lock:
            self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- reading and writing ----

    def all(self, sql: str, *values) -> list[tuple]:
        """The rows of a query."""
        with self._in_words():
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, *values) -> tuple:
        """The one row of a query; KeyError where there is none."""
        rows = self.all(sql, *values)
        if not rows:
            raise KeyError(*values)
        return rows[0]

    @contextmanager
    def transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Everything inside is written, or nothing; gives the connection's execute(sql, values)."""
        with self._in_words():
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection.execute
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
                raise

    # ---- opening ----

    def _take_lock(self) -> None:
        """<folder>/lock, held until it is closed or the process ends; makes the folder where it is missing."""
        self._lock = lock(self.path, LOCK_NAME)

    def _create(self, fill: Callable) -> None:
        """A new database, under a temporary name first."""
        temporary = self._file.with_suffix(".tmp")
        left = [temporary, temporary.with_name(f"{temporary.name}-journal")]  # by a run that was killed here
        if others := set(os.listdir(self.path)) - {LOCK_NAME, *(path.name for path in left)}:
            what = "is an index already" if NAME in others else "is in use for something else"
            raise InputError(f"{self.path} {what}; nothing is replaced: give another --out")
        for path in left:
            path.unlink(missing_ok=True)
        with self._in_words():
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                connection.execute("BEGIN")
                connection.execute(f"PRAGMA application_id = {KIND}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                fill(connection.execute)
                connection.execute("COMMIT")
            finally:
                connection.close()
        replace(temporary, self._file)

    def _check(self) -> None:
        """InputError unless the file is ours and this version can read it."""
        (kind,), (version,) = self.one("PRAGMA application_id"), self.one("PRAGMA user_version")
        if kind != KIND:
            raise InputError(f"{self._file} is no index of narvid.search: give another folder")
        if version > SEVERAL:
            raise InputError(f"{self._file} was written by a newer version of narvid: update narvid, or index anew")

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        now = _identity(self._file)
        self._known = self._known or now
        if now != self._known:
            raise InputError(f"{self._file} was deleted or replaced since it was opened: start again")
        if not hasattr(self._local, "connection"):
            # Not mode=ro: a reader must be able to undo what a killed writer left half written; where it may not
            # write, SQLite opens the file for reading by itself. Only close() comes from another thread.
            how = {"timeout": WAIT, "isolation_level": None, "check_same_thread": False, "factory": _Connection}
            connection = sqlite3.connect(self._file, **how)
            self._connections.add(connection)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA query_only = {int(self._read_only)}")
            self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _in_words(self):
        """SQLite's errors about the file as InputErrors; those about our SQL stay as they are."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise
            for sign, sentence in {
                "locked": f"{self.path}: the index is being written by another process; wait for it",
                "readonly": f"{self._file} cannot be written: no permission",
                "unable to open": f"{self._file} cannot be opened: no permission, or it is gone",
                "full": f"{self._file}: the disk is full; make room, then the same command continues",
                "no such module": f"{self._file} needs SQLite's full-text search (FTS5), which this Python's SQLite "
                                  "lacks: use another Python, or index into a new folder",
                "disk I/O": f"{self._file}: the disk cannot be read or written: is it full, or gone?",
            }.items():
                if sign in str(error):
                    raise InputError(sentence) from error
            raise InputError(f"{self._file} is damaged ({error}): delete {self.path} and index again") from error


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file lies under this name; None: none, or none that may be looked at."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino
