"""Milvus, as an index uses it: where one lies, collections and their rows, errors in words.

Here: nothing that knows of videos (milvus_store.py), or of who may write (milvus_lease.py).

  milvus:FOLDER/FILE.db/NAME                 milvus-lite, in this process: one process at a time
  milvus:http://HOST:19530/NAME              a server or a cluster, also milvus-lite's own server; https:// too
  ...?database=DB&index=HNSW&shards=4&replicas=2      where it is no default one; the last three when it is made

NAME stands before the names of the index's collections. A token or user:password comes from the environment
(TOKEN), so that no secret lies in a command, an index or a message.

Milvus has no transactions: one row is written whole or not at all, and no more than that. While nobody answers a call
is made again, for PATIENCE seconds; after that an InputError says so, and the same command goes on later.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from narvid import InputError, one_line
from narvid.progress import say
from narvid.search.milvus_lease import Lease

PREFIX, TOKEN = "milvus:", "NARVID_MILVUS_TOKEN"
PATIENCE, PAUSE = 60.0, 1.0  # seconds: while nobody answers a writer asks again, a reader a quarter as long
BATCH = 8_000_000  # bytes a message; a server takes 64 MB by default
PIECE = 65_532  # characters of a VARCHAR, 65,535 at most: a multiple of 4, so that base64 can be cut anywhere
MOST = 16_384  # hits that a search may ask for
PAGE = 8_192  # rows read at a time
LISTS, PROBED = 1024, 64  # of an index with lists, as in stage_one.py
GROUPING = ("FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW", "HNSW_SQ", "HNSW_PQ", "HNSW_PRQ", "DISKANN")  # Milvus's manual


class Place(NamedTuple):
    """Where an index lies. text: as it was given; index "": what suits the server; shards, replicas 0: one each."""

    text: str
    uri: str
    name: str
    database: str = ""
    index: str = ""
    shards: int = 0
    replicas: int = 0


def place_of(text: str) -> Place:
    """The parts of "milvus:..."; InputError says what is wrong with it."""
    address, _, asked = text.removeprefix(PREFIX).partition("?")
    example = "give milvus:http://HOST:19530/NAME or milvus:FILE.db/NAME"
    if "://" in address:
        try:
            parts = urlsplit(address)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError as error:
            raise InputError(f"{PREFIX}{address.rpartition('@')[2]}: {error}; {example}") from error
        if "@" in parts.netloc:
            raise InputError(f"milvus:{parts.scheme}://...@{parts.hostname}: no user and no password belong into an "
                             f"address; put user:password, or the token, into the variable {TOKEN}")
        uri, name = f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
    else:
        match = re.fullmatch(r"(.*\.db)(?:/([^/]*)/?)?", address)
        uri, name, known = (os.path.abspath(match[1]), match[2] or "", True) if match else ("", "", False)
    if not known:
        raise InputError(f"{text} names no Milvus: {example}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,200}", name := name or "narvid"):
        raise InputError(f"{text}: {name!r} is no name of a collection: letters, digits and _, no digit first")
    place = Place(text, uri, name)
    for key, value in parse_qsl(asked, keep_blank_values=True):
        if key not in ("database", "index", "shards", "replicas"):
            raise InputError(f"{text}: there is no {key!r}; database, index, shards and replicas can be given")
        if key in ("shards", "replicas"):
            if not re.fullmatch(r"[1-9][0-9]{0,3}", value):
                raise InputError(f"{text}: {key} is {value!r}; it must be a whole number, 1 or more")
            value = int(value)
        elif not value:
            raise InputError(f"{text}: {key} is empty: give one, or leave it out")
        place = place._replace(**{key: value})
    return place


class Milvus:
    """The collections of one index. lock(): this process writes from then on; close() at the end.

    Rows are dicts of a collection's fields. Every method raises InputError, one sentence, where nobody answers, the
    collection is missing or Milvus refuses.
    """

    def __init__(self, place: Place):
        self.place, self.client = place, None
        self.where = place.text.partition("?")[0]
        self._strong, self._lease, self._one = False, None, threading.RLock()
        pymilvus = _pymilvus()
        for chatty in ("pymilvus", "milvus_lite", "grpc._server"):  # they print a traceback with every error
            logging.getLogger(chatty).setLevel(logging.CRITICAL + 1)
        with self._in_words():
            if "://" not in place.uri:
                if not os.path.isdir(Path(place.uri).parent):
                    raise InputError(f"{place.text}: there is no folder {Path(place.uri).parent}; make it first")
                if os.path.isfile(place.uri):
                    raise InputError(f"{place.text}: {place.uri} is a file; milvus-lite 3 keeps a folder of that name")
            self.client = pymilvus.MilvusClient(place.uri, token=os.environ.get(TOKEN, ""), db_name=place.database,
                                                timeout=PATIENCE / 4, dedicated=True)
        version = self._call("get_server_version")
        self.lite = "lite" in version
        self.index = place.index or ("FLAT" if self.lite else "IVF_RABITQ")

    def close(self) -> None:
        """Let another process write, and end the connection."""
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        if self.client is not None:
            with suppress(Exception):  # it may be gone already
                self.client.close()
            self.client = None

    # ---- collections ----

    def has(self, name: str) -> bool:
        """Whether there is such a collection."""
        return self._call("has_collection", self._full(name))

    def make(self, name: str, fields: dict[str, str | tuple[str, int]], dim: int = 0, on_disk: bool = False) -> None:
        """A collection, where it is missing. fields: the key first; a type, "pieces" (pieces, or words), "ids" (up to
        4,096 of them) or (VARCHAR, length).

        dim: of its vectors, `v`, that are searched by inner product; 0: it is not searched, but Milvus wants a vector
        in every collection. on_disk: its rows are not kept in memory.
        """
        if self.has(name):
            return
        pymilvus, types = _pymilvus(), _pymilvus().DataType
        schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        index = pymilvus.MilvusClient.prepare_index_params()
        for place, (field, kind) in enumerate(fields.items()):
            more = {"is_primary": place == 0}
            if kind in ("pieces", "ids"):
                text = kind == "pieces"
                more |= {"element_type": types.VARCHAR if text else types.INT64, "max_capacity": 4096}
                more |= {"max_length": 65_535} if text else {}
                kind = "ARRAY"
            elif isinstance(kind, tuple):
                kind, more["max_length"] = kind
            schema.add_field(field, getattr(types, kind), **more)
            if field in ("file", "window") or field in ("windows", "words") and not self.lite:  # it indexes no ARRAY
                index.add_index(field_name=field, index_type="INVERTED")
        schema.add_field("v", types.FLOAT_VECTOR, dim=dim or 2)
        lists = {"nlist": LISTS} if self.index.startswith("IVF") else {}
        index.add_index(field_name="v", index_type=self.index if dim else "FLAT", metric_type="IP", params=lists)
        more = {"num_shards": self.place.shards} if self.place.shards else {}
        if on_disk:
            more["properties"] = {"mmap.enabled": True}
        self._call("create_collection", self._full(name), schema=schema)
        self._call("create_index", self._full(name), index_params=index, sync=False)  # it is empty: nothing to wait for
        self._load(name)

    def drop(self, names: Iterable[str]) -> None:
        """Delete collections, those that are there."""
        for name in names:
            self._call("drop_collection", self._full(name))

    def dim(self, name: str) -> int:
        """Numbers of a vector in a collection."""
        fields = self._call("describe_collection", self._full(name))["fields"]
        return next((field["params"]["dim"] for field in fields if field["name"] == "v"), 0)

    def fields(self, name: str) -> set[str]:
        """Names of a collection's fields."""
        return {field["name"] for field in self._call("describe_collection", self._full(name))["fields"]}

    # ---- rows ----

    def rows(self, name: str, where: str, fields: Sequence[str], most: int = 0) -> list[dict]:
        """The rows for which an expression holds, of no certain order; for few, or at most so many, up to MOST."""
        limit = {"limit": most} if most else {}
        return self._call("query", self._full(name), filter=where, output_fields=list(fields), **limit, **self._level())

    def count(self, name: str, where: str) -> int:
        """How many rows there are for which an expression holds."""
        return int(self.rows(name, where, ["count(*)"])[0]["count(*)"])

    def get(self, name: str, key: str, ids: Sequence, fields: Sequence[str], at_once: int = 1000) -> dict:
        """{id: row} of those of these ids that are there; ids are whole numbers or texts without quotation marks."""
        found = {}
        for start in range(0, len(ids), at_once):
            some = json.dumps([id if isinstance(id, str) else int(id) for id in ids[start:start + at_once]])
            found |= {row[key]: row for row in self.rows(name, f"{key} in {some}", fields)}
        return found

    def pages(self, name: str, where: str, fields: Sequence[str]) -> Iterator[list[dict]]:
        """The rows for which an expression holds, "" for all, page by page."""
        rows = self._call("query_iterator", self._full(name), batch_size=PAGE, filter=where, output_fields=list(fields),
                          **self._level())
        try:
            while True:
                with self._in_words(name):
                    page = rows.next()
                if not page:
                    return
                yield page
        finally:
            rows.close()

    def insert(self, name: str, rows: Iterable[dict], bytes_of: int) -> None:
        """New rows, in messages of about BATCH bytes; bytes_of: a row, about. A repeated call may write them twice."""
        batch, most = [], max(1, min(1000, BATCH // max(1, bytes_of)))
        for row in rows:
            batch.append({"v": [0.0, 0.0], **row})
            if len(batch) >= most:
                self._write("insert", name, data=batch)
                batch = []
        if batch:
            self._write("insert", name, data=batch)

    def upsert(self, name: str, row: dict, *, checked: bool = True) -> None:
        """Write one row, in place of one with this key: that is one step."""
        self._write("upsert", name, checked, data=[{"v": [0.0, 0.0], **row}])

    def delete(self, name: str, where: str) -> None:
        """Delete the rows for which an expression holds."""
        self._write("delete", name, filter=where)

    def nearest(self, name: str, vectors: list, limit: int, where: str, fields: Sequence[str], group: str | None,
                share: float) -> list[list[dict]]:
        """For each vector at most `limit` rows (their fields), best first; with `group` one a value of that field.

        share: of the collection that the expression leaves; lists are looked into as in stage_one.py.
        """
        how = {"group_by_field": group} if group else {}
        if self.index.startswith("IVF"):
            how["search_params"] = {"params": {"nprobe": min(LISTS, -int(-PROBED // max(share, 1 / LISTS)))}}
        found = self._call("search", self._full(name), data=list(vectors), anns_field="v", limit=limit, filter=where,
                           output_fields=list(fields), **how, **self._level())
        return [[{"id": hit["id"], **hit["entity"]} for hit in hits] for hits in found]

    # ---- one writer ----

    def lock(self) -> None:
        """Become the one process that writes; InputError names the one that is. NAME_facts must be there."""
        self._strong = True  # a writer sees all that was written
        self._lease = Lease(self)

    def fact(self, name: str):
        """A value of NAME_facts; KeyError where there is none."""
        row = self.get("facts", "name", [name], ["name", "value"])[name]
        return json.loads("".join(row["value"]))

    def set_fact(self, name: str, value, *, checked: bool = True) -> None:
        """Any value that JSON can hold, in one step. checked: only as the writer."""
        with self._one:  # the lease's thread writes too, and milvus-lite wants one at a time
            self.upsert("facts", {"name": name, "value": pieces(json.dumps(value))}, checked=checked)

    # ---- inside ----

    def _full(self, name: str) -> str:
        return f"{self.place.name}_{name}"

    def _level(self) -> dict:
        """Readers may see what was true some seconds ago, which costs them no waiting."""
        return {"consistency_level": "Strong" if self._strong else "Bounded"}

    def _write(self, what: str, name: str, checked: bool = True, **how) -> None:
        if self._lease is not None and checked:
            self._lease.check()
        self._call(what, self._full(name), **how)

    def _load(self, name: str) -> None:
        more = {"replica_number": self.place.replicas} if self.place.replicas else {}
        self._call("load_collection", self._full(name), **more)

    def _call(self, what: str, *args, **how):
        """A method of MilvusClient, again and again while nobody answers; what is not loaded (any more) is loaded."""
        until, loaded, said = time.monotonic() + (PATIENCE if self._strong else PATIENCE / 4), False, False
        while True:
            load = False
            with self._in_words(*args[:1]):
                try:
                    return getattr(self.client, what)(*args, timeout=PATIENCE, **how)
                except _pymilvus().MilvusException as error:
                    if not loaded and what != "load_collection" and (
                            error.code == 101 or "not loaded" in str(error.message)):  # its server was started anew
                        load = loaded = True
                    elif not is_away(error) or time.monotonic() > until:
                        raise
                    elif not said and self._strong:
                        said = True
                        say(f"{self.where} does not answer; it is asked again for {PATIENCE:g} s")
            if load:
                self._load(args[0].removeprefix(f"{self.place.name}_"))
            else:
                time.sleep(PAUSE)

    @contextmanager
    def _in_words(self, name: str = ""):
        """Milvus's errors as InputErrors, one sentence each."""
        import grpc

        where = self.where
        away = f"{where} does not answer: is Milvus running there? The same command goes on when it does"
        try:
            yield
        except _pymilvus().MilvusException as error:
            message, code = one_line(str(error.message)), error.code
            if code in (100, 4) or "not found[collection" in message:
                raise InputError(f"{where} is no index (any more), it has no collection {name}: make one with `python "
                                 f"-m narvid.search index VIDEOS --engine {where}`") from error
            if is_away(error):
                raise InputError(away) from error
            for sign, sentence in {
                r"failed to start|milvus.?lite.*(lock|start)|open local": f"{where} is open in another process; "
                "milvus-lite lets in one: end that one, or run `milvus-lite server` and give its http address",
                r"unauthenticated|auth|token|permission": f"{where} lets nobody in without the right token: put it, or "
                f"user:password, into the environment variable {TOKEN}",
                r"database not found|database.*(not exist|not found)|not found\[database": f"{where}: there is no "
                f"database {self.place.database!r}; make it first",
            }.items():
                if re.search(sign, f"{code} {message}", re.IGNORECASE):
                    raise InputError(sentence) from error
            raise InputError(f"{where}: Milvus refuses: {message[:300]}") from error
        except (grpc.RpcError, ConnectionError) as error:
            raise InputError(away) from error


def is_away(error) -> bool:
    """Whether a MilvusException says that nobody answers."""
    return bool(re.search("fail connecting|unavailable|deadline|timeout|retry run out|channel is closed",
                          f"{error.code} {error.message}", re.IGNORECASE))


def pieces(text: str) -> list[str]:
    """A text of ASCII, cut into what a VARCHAR holds."""
    return [text[start:start + PIECE] for start in range(0, len(text), PIECE)]


def _pymilvus():
    try:
        import pymilvus
    except ImportError as error:
        raise InputError(f'an index in Milvus needs pymilvus ({error}): pip install "narvid[milvus]"') from error
    return pymilvus
