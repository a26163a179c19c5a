"""Watching over HTTP: files as they are, stretches made for the browser, stretches to keep, where a file lies.

  GET  /api/clip?file&start&end     how to play that stretch: {"src", "begins", "preview", ...}
  GET  /clip/FILE                   the file, in part where a Range is asked for
  GET  /preview/FILE?start&end      the stretch as an mp4, sent while it is made
  GET  /cut/FILE?start&end          the stretch to keep: not encoded again where its codec can be copied
  GET  /api/path?file, POST /api/reveal?file     this machine's own page alone

No path ever comes from a request: files are named by their ids in the index, and one that has left the videos folder,
or changed since, is not served. Not here: what browsers can play and the folder of made clips (clips.py).
"""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import mkstemp
from urllib.parse import urlencode

import av
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from narvid import InputError
from narvid.search import clips, preview
from narvid.search.asked import number, number_of, parameters, whole_number
from narvid.search.folders import place_of
from narvid.search.site import Json, Site
from narvid.search.rows import File

LONGEST_CUT = 1800.0  # seconds


class Watching:
    """The endpoints. local: the server is for this machine alone, so that it may say and show where files lie."""

    def __init__(self, site: Site, local: bool):
        self.site, self.store, self.local = site, site.store, local
        self.folder = clips.Folder(site.store.folder / "clips")
        self.making = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)))
        self.under_way: dict[clips.Making, float] = {}  # when each was last asked for more

    # ---- as it is ----

    async def clip(self, request: Request) -> Response:
        if "," in request.headers.get("range", ""):  # no browser asks so, and it can be made to cost much
            raise HTTPException(416, "ask for one range at a time")
        file, path, found = await self.site.read(self._indexed_file, number_of(request, "file"))
        played = await self._how(file, path, found)
        return FileResponse(path, media_type=played.media_type if played.kind == "file" else "video/mp4",
                            stat_result=found)

    async def how(self, request: Request) -> Response:
        """Where the page finds a stretch: the file itself, or a preview of it."""
        file, start, end = self._stretch(request, parameters(request, "file", "start", "end"))
        file, path, found = await self.site.read(self._indexed_file, file)
        played = await self._how(file, path, found)
        if played.kind == "file":
            return Json({"src": f"/clip/{file.id}", "begins": 0.0, "ends": file.seconds, "preview": False})
        end = min(end, start + clips.LONGEST)
        begins = await self._make(clips.begin_of_copy, played, path, start)
        values = {"start": start, "end": end} | ({"encode": 1} if begins is None else {})
        src, begins = f"/preview/{file.id}?{urlencode(values)}", start if begins is None else begins
        return Json({"src": src, "begins": begins, "ends": end, "preview": True, "sound": not played.counted})

    # ---- made ----

    async def preview(self, request: Request) -> Response:
        values = parameters(request, "start", "end", "encode")
        file, start, end = self._stretch(request, values, number_of(request, "file"))
        file, path, found = await self.site.read(self._indexed_file, file)
        played = await self._how(file, path, found)
        end, copy = min(end, start + clips.LONGEST), played.kind != "encoded" and "encode" not in values
        place = self.folder.place(file, start, end, "copied" if copy else "encoded")
        if not await self.site.read(self.folder.find, place):
            if request.method == "HEAD":
                return Response(media_type="video/mp4")
            encode = partial(preview.encoded, path, start, end, counted=played.counted)
            ways = [partial(preview.copied, path, start, end)] * copy + [encode] * (not copy)
            making = self._begun(clips.Making(ways, place))
            try:
                chunk = await self._make(making.read)
                asked = request.headers.get("range", "bytes=0-")
                if asked == "bytes=0-":
                    return StreamingResponse(self._chunks(making, chunk), media_type="video/mp4",
                                             headers={"accept-ranges": "none"})
                while chunk:  # a part of it is wanted, as Safari does: first the whole
                    chunk = await self._make(making.read)
                    if await request.is_disconnected():
                        raise HTTPException(499, "nobody waits for it any more")
            except InputError as error:
                self._ended(making)
                raise HTTPException(415, f"{file.path}: {error}") from error
            except BaseException:
                self._ended(making)
                raise
            self._ended(making)
        return FileResponse(place, media_type="video/mp4")

    async def cut(self, request: Request) -> Response:
        """A stretch to keep, as a file of its own."""
        file, start, end = self._stretch(request, parameters(request, "start", "end"), number_of(request, "file"))
        if end - start > LONGEST_CUT:
            raise HTTPException(400, f"at most {LONGEST_CUT / 60:g} minutes are cut out at a time")
        file, path, found = await self.site.read(self._indexed_file, file)
        played = await self._how(file, path, found)
        encode = partial(preview.encoded, path, start, end, counted=played.counted, short_side=None, crf=18)
        ways = [encode] if played.counted else [partial(_copied_if_held, path, start, end), encode]
        place = self._new_file()
        try:
            await self._written(request, ways, place)
        except BaseException as error:
            place.unlink(missing_ok=True)
            if isinstance(error, InputError):
                raise HTTPException(415, f"{file.path}: {error}") from error
            raise
        name = f"{Path(file.path).stem}_{start:.0f}-{end:.0f}.mp4".encode("utf-8", "replace").decode()
        return FileResponse(place, media_type="video/mp4", filename=name,
                            background=BackgroundTask(partial(place.unlink, missing_ok=True)))

    def _new_file(self) -> Path:
        """An empty file for a stretch: in the index, else, where that may not be written, where temporary ones are."""
        with suppress(OSError):
            self.folder.path.mkdir(exist_ok=True)
            return Path(_temporary(self.folder.path))
        return Path(_temporary(None))

    async def _written(self, request: Request, ways: list[Callable], place: Path) -> None:
        """Written to a file in slices, so that one who leaves ends it."""
        for way in ways:
            steps = way(str(place))
            try:
                while await self._make(_some, steps):
                    if await request.is_disconnected():
                        raise HTTPException(499, "nobody waits for it any more")
                return
            except (av.FFmpegError, ValueError, OSError) as error:  # the next way
                if way is ways[-1]:
                    raise error if isinstance(error, InputError) else InputError(str(error)) from error
            finally:
                await self._make(_closed, steps)

    async def _make(self, function: Callable, *args):
        return await asyncio.get_running_loop().run_in_executor(self.making, function, *args)

    async def _chunks(self, making: clips.Making, chunk: bytes) -> AsyncIterator[bytes]:
        """What a viewer gets; where they leave, its making ends."""
        try:
            while chunk:
                yield chunk
                self.under_way[making] = time.monotonic()
                try:
                    chunk = await self._make(making.read)
                except InputError:  # in its middle: what is there is shown
                    return
        finally:
            self._ended(making)

    def _begun(self, making: clips.Making) -> clips.Making:
        while len(self.under_way) >= clips.AT_ONCE:
            self._ended(min(self.under_way, key=self.under_way.get))
        self.under_way[making] = time.monotonic()
        return making

    def _ended(self, making: clips.Making) -> None:
        making.closed = True
        if self.under_way.pop(making, None) is not None:
            self.making.submit(making.close)
            self.making.submit(self.folder.sweep)

    # ---- where it lies ----

    async def path(self, request: Request) -> Response:
        path = await self._path(request)
        return Json({"path": str(path)})

    async def reveal(self, request: Request) -> Response:
        """Show the file in this machine's file manager."""
        path = await self._path(request)
        command = {"darwin": ["open", "-R", str(path)], "win32": ["explorer", f"/select,{path}"]}.get(
            sys.platform, ["xdg-open", str(path.parent)])
        try:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise HTTPException(501, f"{command[0]} cannot be started here ({error.strerror})") from error
        return Json({"shown": str(path)})

    async def _path(self, request: Request) -> Path:
        if not self.local:
            raise HTTPException(403, "only a server for this machine alone says where files lie")
        wanted = whole_number(parameters(request, "file").get("file", ""))
        if wanted is None:
            raise HTTPException(400, "file is missing, or no number: that of an answer")
        return (await self.site.read(self._indexed_file, wanted))[1]

    # ---- which file ----

    def _stretch(self, request: Request, values: dict[str, str], file: int | None = None) -> tuple[int, float, float]:
        file = whole_number(values.get("file", "")) if file is None else file
        if file is None:
            raise HTTPException(400, "file is missing, or no number: that of an answer")
        start, end = number(values, "start"), number(values, "end")
        if end <= start:
            raise HTTPException(400, f"end is {end:g}; it must be more than start, {start:g}")
        return file, start, end

    async def _how(self, file: File, path: Path, found: os.stat_result) -> clips.Played:
        try:
            return await self.site.read(clips.how_played, path, found.st_size, found.st_mtime_ns, file.seconds,
                                        file.note)
        except InputError as error:
            raise HTTPException(415, str(error).replace(str(path), file.path)) from error

    def _indexed_file(self, wanted: int) -> tuple[File, Path, os.stat_result]:
        """An indexed file as it lies on the disk, if it is still the one that was indexed."""
        try:
            file = self.store.file(wanted)
        except KeyError:
            raise HTTPException(404, f"the index has no file {wanted} (any more)") from None
        if file.why:
            raise HTTPException(404, f"{file.path} is not indexed: it could not be read")
        root, path = place_of(self.store.settings, file.path)
        try:
            root, path = root.resolve(), path.resolve(strict=True)
            found = path.stat()
        except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle, before Python 3.13
            raise HTTPException(410, f"{file.path} is not there any more; run the index command again") from None
        if not path.is_relative_to(root) or not stat.S_ISREG(found.st_mode):
            raise HTTPException(403, f"{file.path} leads out of the videos folder; it is not served")
        if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
            raise HTTPException(409, f"{file.path} has changed since it was indexed; run the index command again")
        return file, path, found


def _temporary(folder: Path | None) -> str:
    number, name = mkstemp(".tmp.mp4", dir=folder)
    os.close(number)
    return name


def _copied_if_held(path: Path, start: float, end: float, sink: str):
    """A copy, of codecs that players of mp4 know; ValueError for others."""
    container, stream = preview.open_video(path)
    with container:
        codec = stream.codec_context.codec.canonical_name
    if codec not in clips.KEPT:
        raise ValueError(f"an mp4 of {codec} is not played everywhere")
    yield from preview.copied(path, start, end, sink)


def _some(steps) -> bool:
    """A tenth of a second or so of work; whether there is more."""
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        if next(steps, StopIteration) is StopIteration:
            return False
    return True


def _closed(steps) -> None:
    steps.close()
