"""An index by its name: a folder, or "milvus:" and where it lies there.

Not here: what either holds (store.py, milvus_store.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from narvid.search.database import NAME
from narvid.search.store import Store

if TYPE_CHECKING:
    from narvid.search.milvus_store import MilvusStore


def open_store(index: str | Path, *, create: dict | None = None, read_only: bool = False) -> Store | MilvusStore:
    """The index, in a folder (Store) or, where its name begins with "milvus:", in Milvus (MilvusStore)."""
    if not in_engine(index):
        return Store(index, create=create, read_only=read_only)
    from narvid.search.milvus_store import MilvusStore

    return MilvusStore(str(index), create=create, read_only=read_only)


def is_there(index: str | Path) -> bool:
    """Whether there is such an index already."""
    if not in_engine(index):
        return os.path.exists(Path(index) / NAME)
    from narvid.search.milvus_store import is_index

    return is_index(str(index))


def in_engine(index: str | Path) -> bool:
    """Whether an index lies in an engine, not in a folder."""
    return str(index).startswith("milvus:")
