"""Frames: which ones are taken and when, what is in them, damaged files, the frame folder, a killed extraction.

Clips are made here: frame i of a clip has the colour COLOURS[i], so a picture says which frame it is.
"""

import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from narvid import InputError
from narvid.data.frames import Picture, check_jpg, frame_path, load_frame_index, pick_frames, read_frames
from narvid.data.videos import decode_video

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real"))
sys.path.insert(0, str(ROOT / "scripts"))
from narvid.data import extraction as extract_frames

COLOURS = np.array([((i * 37) % 256, (i * 91) % 256, (i * 53) % 256) for i in range(200)], dtype=np.uint8)


def make_clip(
    path, times, *, size=(64, 48), codec="libx264", pix_fmt="yuv420p", rate=10, metadata=None, paint=None, noise=0
):
    """Write one frame a time (seconds, kept to the millisecond), sized (W, H), at the container's own clock."""
    options = (
        {"movflags": "faststart"} if str(path).endswith((".mp4", ".mov")) else {}
    )  # the index in front: can be cut
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, rate) if codec.startswith("mpeg") else Fraction(1, 1000)
        rng = np.random.default_rng(0)
        for i, seconds in enumerate(times):
            pixels = np.empty((size[1], size[0], 3), np.int64)
            pixels[:] = COLOURS[i]
            pixels += rng.integers(-noise, noise + 1, pixels.shape)
            picture = np.clip(pixels, 0, 255).astype(np.uint8) if paint is None else paint
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(seconds / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def which(pixels):
    """The number of the frame whose colour this picture has."""
    distance = np.abs(COLOURS.astype(int) - pixels.mean(axis=(0, 1))).max(axis=1)
    assert distance.min() < 8, f"no frame's colour: {pixels.mean(axis=(0, 1))}"
    return int(distance.argmin())


def taken(path, **how):
    """[(time to the millisecond, frame number), ...] of what decode_video gives."""
    return [(round(seconds, 3), which(pixels)) for seconds, pixels in decode_video(path, **how)]


def on_screen(times, targets):
    """By loops: the last frame not after each target, each frame once, as taken() gives it."""
    expected = []
    for target in targets:
        now = max(i for i, seconds in enumerate(times) if seconds - times[0] <= target + 0.0006)
        if not expected or expected[-1][1] != now:
            expected.append((round(times[now] - times[0], 3), now))
    return expected


# ---- which frames ----


def test_pick_frames_is_truncated_linspace():
    for n in range(1, 90):
        for k in range(1, 40):
            expected = list(range(n)) if n <= k else []
            for j in range(k if n > k else 0):
                expected.append(int(j * ((n - 1) / (k - 1))) if j and j < k - 1 else (n - 1) * (j > 0))
            assert pick_frames(n, k) == expected, (n, k)
    assert pick_frames(30, 12) == [0, 2, 5, 7, 10, 13, 15, 18, 21, 23, 26, 29]


@pytest.mark.parametrize(("n", "k"), [(0, 12), (5, 0)])
def test_pick_frames_of_nothing(n, k):
    with pytest.raises(ValueError, match="at least one"):
        pick_frames(n, k)


@pytest.mark.parametrize(
    ("times", "fps"),
    [
        pytest.param([i / 10 for i in range(35)], 1, id="constant rate"),
        pytest.param([i / 30 for i in range(95)], 3, id="targets between the container's ticks"),
        pytest.param([i / 29.97 for i in range(95)], 1, id="29.97"),
        pytest.param([7.4 + i / 10 for i in range(25)], 2, id="does not start at 0"),
        pytest.param([0, 0.1, 0.2, 0.9, 1.05, 3.7, 3.8, 4.0, 8.2], 1, id="variable rate"),
        pytest.param([0, 1, 2, 3, 4], 1, id="own rate equals fps"),
        pytest.param([0, 2, 4, 6], 1, id="own rate below fps"),
        pytest.param([i / 2 for i in range(9)], 0.3, id="less than one a second"),
        pytest.param([0], 1, id="one frame"),
    ],
)
def test_fps_takes_what_is_on_screen(tmp_path, times, fps):
    clip = make_clip(tmp_path / "clip.mkv", times)
    last_shown = times[-1] - times[0]  # a later target adds the last frame at most, and only if none fell on it yet
    expected = on_screen(times, [j / fps for j in range(int((last_shown + 0.0006) * fps) + 1)])
    assert taken(clip, fps=fps) in (expected, expected + [(round(last_shown, 3), len(times) - 1)])


def test_the_last_frame_is_on_screen_until_its_end(tmp_path):
    pictures = [Image.new("RGB", (64, 48), tuple(map(int, colour))) for colour in COLOURS[:2]]
    for duration, expected in [(900, [(0.0, 0), (0.9, 1)]), (400, [(0.0, 0)])]:  # milliseconds of each
        pictures[0].save(tmp_path / "slow.gif", save_all=True, append_images=pictures[1:], duration=duration)
        assert taken(tmp_path / "slow.gif", fps=1) == expected


@pytest.mark.parametrize("n", [1, 2, 5, 12, 50])
@pytest.mark.parametrize("times", [[3 + i / 10 for i in range(31)], [0, 0.1, 0.2, 0.9, 1.05, 3.7, 3.8, 4.0, 8.2]])
def test_n_is_uniform_over_the_real_duration(tmp_path, times, n):
    clip = make_clip(tmp_path / "clip.mkv", times)
    targets = [0.0] if n == 1 else [j * (times[-1] - times[0]) / (n - 1) for j in range(n)]
    assert taken(clip, n=n) == on_screen(times, targets)


@pytest.mark.parametrize("how", [{}, {"fps": 1, "n": 2}, {"fps": 0}, {"n": -1}])
def test_one_way_of_sampling(how):
    with pytest.raises(ValueError, match="fps or n"):
        decode_video("clip.mp4", **how)


# ---- containers and pixels ----


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("clip.mp4", "libx264", "yuv420p"),
        ("clip.mov", "libx264", "yuv422p"),
        ("clip.avi", "mpeg4", "yuv420p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.mpg", "mpeg2video", "yuv420p"),
        ("clip.gif", "gif", "rgb8"),
        ("clip.ts", "libx264", "yuv420p"),
        ("ten_bits.mp4", "libx264", "yuv420p10le"),
        ("no_subsampling.mkv", "libx264", "yuv444p"),
        ("12:30 a%03d.mkv", "libx264", "yuv420p"),  # no protocol, no pattern
    ],
)
def test_containers_and_pixel_formats(tmp_path, name, codec, pix_fmt):
    rate = 25 if codec == "mpeg2video" else 10
    clip = make_clip(tmp_path / name, [i / rate for i in range(25)], codec=codec, pix_fmt=pix_fmt, rate=rate)
    notes = []
    assert taken(clip, fps=5, notes=notes) == [(j / 5, j * rate // 5) for j in range(-(-125 // rate))]  # 25 frames
    assert not notes


def test_odd_sizes_and_short_side(tmp_path):
    clip = make_clip(tmp_path / "odd.mkv", [0, 1], size=(97, 61), pix_fmt="yuv444p")
    assert [pixels.shape for _, pixels in decode_video(clip, fps=1)] == [(61, 97, 3)] * 2
    assert [pixels.shape for _, pixels in decode_video(clip, fps=1, short_side=40)] == [(40, 64, 3)] * 2
    assert [pixels.shape for _, pixels in decode_video(clip, fps=1, short_side=256)] == [(61, 97, 3)] * 2
    assert taken(clip, fps=1, short_side=40) == [(0.0, 0), (1.0, 1)]


@pytest.mark.parametrize(
    ("matrix", "clockwise"),
    [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270)],
)
def test_rotation_in_the_header_is_applied(tmp_path, matrix, clockwise):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    clip = make_clip(tmp_path / "phone.mp4", [0, 0.1], paint=picture)
    raw = bytearray(clip.read_bytes())
    at = raw.index(b"tkhd") + 44  # the track header's 3 x 3 matrix, fixed point
    a, b, c, d = (value << 16 for value in matrix)
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(raw)
    ((_, pixels),) = decode_video(clip, fps=1)
    expected = np.rot90(picture, -clockwise // 90)
    assert pixels.shape == expected.shape
    inside = np.abs(pixels.astype(int) - expected)[6:-6:6, 6:-6:6]  # but for the blurred borders of the four colours
    assert np.median(inside) < 5


@pytest.mark.parametrize(("tag", "red", "blue"), [(6, 0.299, 0.114), (1, 0.2126, 0.0722)])  # BT.601, BT.709
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_the_tags(tmp_path, tag, red, blue, full_range):
    r, g, b = 200 / 255, 90 / 255, 30 / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = np.array([(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)])
    planes = [luma * 255, *(128 + 255 * chroma)] if full_range else [16 + 219 * luma, *(128 + 224 * chroma)]
    frame = av.VideoFrame.from_ndarray(np.tile(np.uint8(np.round(planes))[:, None, None], (1, 48, 64)), "yuv444p")
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = frame.colorspace = tag
        stream.codec_context.color_range = frame.color_range = 2 if full_range else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    ((_, pixels),) = decode_video(clip, fps=1)
    assert np.abs(pixels.astype(int) - (200, 90, 30)).max() <= 4


# ---- damaged and odd files ----


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.avi"])
def test_truncated_file_keeps_what_decodes_and_says_so(tmp_path, name):
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    clip = make_clip(tmp_path / name, [i / 10 for i in range(60)], codec=codec, noise=20)
    whole = taken(clip, fps=10)
    clip.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.6)])
    notes = []
    part = taken(clip, fps=10, notes=notes)  # which() refuses grey
    assert 10 <= len(part) < 50
    assert part == whole[: len(part)]
    assert any("announced" in note for note in notes)
    assert taken(clip, n=2) == [part[0], part[-1]]


def test_damage_in_the_middle_costs_the_damaged_frames_only(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", [i / 10 for i in range(60)], noise=20)
    whole, raw = taken(clip, fps=10), bytearray(clip.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 300] = bytes(300)
    clip.write_bytes(raw)
    notes = []
    left = taken(clip, fps=10, notes=notes)
    assert 55 <= len(left) < 60
    assert set(left) < set(whole)
    assert "broken" in notes[0]


@pytest.mark.parametrize("content", [b"", b"hello " * 999, b"\xff\xd8\xff\xe0 not really", None])
def test_what_is_no_video_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.mp4"):
        list(decode_video(path, fps=1))


@pytest.mark.parametrize("cover", [False, True])
def test_sound_without_a_video(tmp_path, cover):
    path = tmp_path / "song.flac"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("flac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(black.reformat(format="yuvj420p")))
        tone = av.AudioFrame.from_ndarray(np.zeros((2, 8000), np.int16), format="s16p", layout="stereo")
        tone.sample_rate = 8000
        container.mux(sound.encode(tone))
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    with pytest.raises(InputError, match=r"song\.flac holds no video"):
        list(decode_video(path, fps=1))


def test_joined_recordings_whose_clock_restarts(tmp_path):
    part = make_clip(tmp_path / "part.ts", [i / 10 for i in range(30)])
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part.read_bytes() * 2)
    assert [number for _, number in taken(joined, fps=1)] == [0, 10, 20, 0, 10, 20]
    assert [seconds for seconds, _ in taken(joined, fps=1)] == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.11)


def test_stream_without_time_stamps_counts_by_its_rate(tmp_path):
    bare = make_clip(tmp_path / "bare.h264", [i / 25 for i in range(60)], rate=25)
    assert [number for _, number in taken(bare, fps=1)] == [0, 25, 50]


def test_titles_that_are_not_utf8(tmp_path):
    clip = make_clip(tmp_path / "old.avi", [0, 0.1], codec="mpeg4", metadata={"title": "cafXX"})
    raw = clip.read_bytes()
    assert b"cafXX" in raw
    clip.write_bytes(raw.replace(b"cafXX", b"caf\xe9\xe9"))
    assert taken(clip, fps=1) == [(0.0, 0)]


# ---- jpgs ----


def save_jpg(path, size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size).save(path, quality=95)
    return path


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (97, 61), (32, 32), (33, 32), (300, 47), (20, 31)])
def test_read_frames_is_clips_own_preprocessing(tmp_path, size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    paths = [save_jpg(tmp_path / f"{i}.jpg", size, seed=i) for i in range(3)]
    clips_own = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    pixels = read_frames(paths, Picture(32))
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype.is_floating_point is False
    for i, path in enumerate(paths):
        assert np.array_equal(pixels[i].permute(1, 2, 0).numpy(), np.asarray(clips_own(Image.open(path))))


def test_a_grey_jpg_has_three_channels(tmp_path):
    Image.new("L", (40, 40), 77).save(tmp_path / "grey.jpg")
    assert (read_frames([tmp_path / "grey.jpg"], Picture(32)) == 77).all()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda raw: None, "cannot be read"),
        (lambda raw: b"", "empty"),
        (lambda raw: b"\xff", "no jpg"),
        (lambda raw: b"<html>" + raw, "no jpg"),
        (lambda raw: raw[: len(raw) // 2], "cannot be decoded"),
        (lambda raw: raw[:-300], "cannot be decoded"),
    ],
)
def test_damaged_jpgs_are_named(tmp_path, damage, why):
    path = save_jpg(tmp_path / "00007.jpg")
    raw = damage(path.read_bytes())
    path.unlink() if raw is None else path.write_bytes(raw)
    with pytest.raises(InputError, match=rf"00007\.jpg.*{why}"):
        check_jpg(path)
    with pytest.raises(InputError, match=r"00007\.jpg"):
        read_frames([path], Picture(32))


def test_whole_jpgs_pass(tmp_path):
    path = save_jpg(tmp_path / "0.jpg")
    check_jpg(path)
    path.write_bytes(path.read_bytes() + bytes(20))  # padded behind the end marker
    check_jpg(path)


# ---- the index file ----


def test_frame_path():
    assert frame_path("frames", "a.b", 12) == Path("frames/a.b/00012.jpg")


def test_load_frame_index(tmp_path):
    (tmp_path / "index.jsonl").write_text(
        '{"video": "a", "times": [0, 1.001], "sampling": "1 fps"}\n\n{"video": "b.c", "times": [0.0]}'
    )
    assert load_frame_index(tmp_path) == {"a": [0.0, 1.001], "b.c": [0.0]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "scripts/extract_frames.py"),
        ('{"video": "a", "times": [0]}\n{"video": "b", "ti', r":2: malformed JSON.*run extract_frames again"),
        ('{"video": "a", "ti\n{"video": "b", "times": [0]}\n', ":1: malformed JSON"),
        ('{"video": "a", "times": []}\n', ":1: no .*rising seconds"),
        ('{"video": "a", "times": [1, 0]}\n', ":1: no .*rising seconds"),
        ('{"video": "a", "times": [0, NaN]}\n', ":1: a number is NaN"),
        ('{"video": 7, "times": [0]}\n', ":1: no .*rising seconds"),
        ('{"times": [0]}\n', ":1: no .*rising seconds"),
        ('["a"]\n', ":1: is no object"),
        ('{"video": "a", "times": [0]}\n{"video": "a", "times": [0]}\n', ":2: 'a' stands there twice"),
    ],
)
def test_broken_index_is_named(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "index.jsonl").write_text(lines)
    with pytest.raises(InputError, match=rf"index\.jsonl.*{message}"):
        load_frame_index(tmp_path)


# ---- scripts/extract_frames.py ----


def extract(videos, out, *more):
    extract_frames.main(["--videos", str(videos), "--out", str(out), "--workers", "1", *more])


def tree(folder):
    """Path -> content of every file of a folder, but for its lock."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_extraction(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "frames"
    (videos / "sub").mkdir(parents=True)
    make_clip(videos / "a.b.mp4", [i / 10 for i in range(25)], size=(96, 64))
    make_clip(videos / "sub" / "c.MKV", [5, 7], size=(96, 64))
    (videos / "bad.mp4").write_bytes(b"nothing")
    (videos / "._c.mp4").write_bytes(b"a file manager's")
    (videos / "notes.txt").write_text("no video")
    extract(videos, out, "--short_side", "32")
    assert load_frame_index(out) == {"a.b": [0.0, 1.0, 2.0], "c": [0.0, 2.0]}
    names = ["a.b/00000.jpg", "a.b/00001.jpg", "a.b/00002.jpg", "c/00000.jpg", "c/00001.jpg"]
    assert sorted(tree(out)) == sorted([*names, "failed.jsonl", "index.jsonl"])
    assert sorted(p.name for p in out.iterdir()) == [".lock", "a.b", "c", "failed.jsonl", "index.jsonl"]
    assert [which(np.asarray(Image.open(frame_path(out, "a.b", i)))) for i in range(3)] == [0, 10, 20]
    assert Image.open(frame_path(out, "c", 0)).size == (48, 32)
    (failure,) = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    assert (failure["video"], failure["file"]) == ("bad", "bad.mp4") and "bad.mp4" in failure["why"]
    assert "2 videos, 5 frames" in capsys.readouterr().out

    before = {path: os.stat(out / path).st_mtime_ns for path in names}
    make_clip(videos / "bad.mp4", [0, 1])  # fetched again: tried again, the others are not
    extract(videos, out, "--short_side", "32")
    assert list(load_frame_index(out)) == ["a.b", "bad", "c"]
    assert (out / "failed.jsonl").read_text() == ""
    assert before == {path: os.stat(out / path).st_mtime_ns for path in names}

    with pytest.raises(InputError, match="1 fps.*12 uniform.*another --out"):
        extract(videos, out, "--short_side", "32", "--num_frames", "12")


def test_listed_videos_only(tmp_path):
    for name in "abc":
        make_clip(tmp_path / f"{name}.mp4", [i / 10 for i in range(25)])
    lines = [{"video": "a", "query": "one"}, {"video": "a", "query": "two"}, {"video": "lost", "query": "three"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    extract(tmp_path, tmp_path / "frames", "--list", str(tmp_path / "test.jsonl"), "--num_frames", "4")
    assert load_frame_index(tmp_path / "frames") == {"a": [0.0, 0.8, 1.6, 2.4]}
    assert json.loads((tmp_path / "frames" / "failed.jsonl").read_text())["video"] == "lost"


def test_what_extraction_refuses(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    with pytest.raises(InputError, match="no video in"):
        extract(videos, tmp_path / "frames")
    with pytest.raises(InputError, match="not a folder"):
        extract(tmp_path / "lost", tmp_path / "frames")
    (videos / "a.mp4").write_bytes(b"")
    (tmp_path / "list.jsonl").write_text('{"video": "a"}\n{"id": "b"}\n')
    with pytest.raises(InputError, match=r"list\.jsonl:2"):
        extract(videos, tmp_path / "frames", "--list", str(tmp_path / "list.jsonl"))
    with pytest.raises(InputError, match=r"holds no index\.jsonl"):
        extract(videos, videos)  # would replace what others made
    (videos / "a.avi").write_bytes(b"")
    with pytest.raises(InputError, match="have one id, 'a'"):
        extract(videos, tmp_path / "frames")
    (videos / "a.avi").rename(videos / "index.jsonl.mp4")
    with pytest.raises(InputError, match=r"index\.jsonl\.mp4: the folder of its frames would be called index\.jsonl"):
        extract(videos, tmp_path / "frames")


def test_nothing_extracted_is_exit_status_1(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(SystemExit, match="error: no video gave a frame"):
        extract(tmp_path, tmp_path / "frames")


class DeadlyPath(str):
    """A path on which a worker dies as it would in a decoder's crash, and which its parent can print."""

    def __format__(self, spec):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return str(self)


def test_a_crash_of_the_decoder_costs_one_video(tmp_path):
    good = make_clip(tmp_path / "good.mp4", [0, 1])
    (tmp_path / ".unfinished").mkdir()
    sources = {"a": good, "b": DeadlyPath("b.mp4"), "c": good, "d": good}
    jobs = [extract_frames.Job(video, source, tmp_path, {"fps": 1.0}, 95) for video, source in sources.items()]
    results = {job.video: result for job, result in extract_frames.run_jobs(jobs, 2)}
    assert sorted(results) == ["a", "b", "c", "d"]
    assert "b.mp4: the worker process died" in results.pop("b")["why"]
    assert all(result["times"] == [0.0, 1.0] for result in results.values())


def test_killed_and_run_again_is_one_run(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "frames"
    videos.mkdir()
    clip = make_clip(tmp_path / "clip.mp4", [i / 10 for i in range(21)], size=(96, 64))
    for i in range(9):
        os.link(clip, videos / f"{i}.mp4")
    (videos / "5.mp4").unlink()
    os.mkfifo(videos / "5.mp4")  # nobody writes to it: the worker waits there until the kill
    (videos / "bad.mp4").write_bytes(b"nothing")
    command = [sys.executable, "scripts/extract_frames.py", "--videos", videos, "--workers", "1", "--out"]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen([*command, out], **quiet)
    while not (out / ".unfinished" / "5").exists() or (out / "index.jsonl").read_bytes().count(b"\n") < 5:
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    run.kill()
    run.wait()
    ended = time.monotonic() + 5
    while any(Path("/proc", pid).exists() for pid in workers):
        assert time.monotonic() < ended, "a worker outlives its parent"
        time.sleep(0.01)
    assert list(load_frame_index(out)) == list("01234")  # usable as far as it got
    with open(out / "index.jsonl", "ab") as f:
        f.write(b'{"video": "5", "tim')  # as if killed in the middle of a line
    with pytest.raises(InputError, match=r"index\.jsonl:6: malformed JSON.*run extract_frames again"):
        load_frame_index(out)
    (out / "6").mkdir()  # as if killed between the renaming and the line
    (out / "6" / "00099.jpg").write_bytes(b"stale")
    (out / "2" / "00001.jpg").unlink()  # a frame was lost meanwhile

    (videos / "5.mp4").unlink()
    os.link(clip, videos / "5.mp4")
    for folder in (out, tmp_path / "at_once"):
        assert subprocess.run([*command, folder], check=False, **quiet).returncode == 0
    assert tree(out) == tree(tmp_path / "at_once")
    assert len(load_frame_index(out)) == 9


# ---- real clips ----


@pytest.mark.skipif(not (REAL / "msrvtt" / "videos").is_dir(), reason="no real data beside the repo")
@pytest.mark.parametrize(
    ("name", "seconds"), [("video236.mp4", 30), ("video1820.mp4", 11), ("video9908.mp4", 13)]
)  # 1 fps and 2 fps of their own
def test_real_msrvtt(name, seconds):
    times = [seconds_ for seconds_, _ in decode_video(REAL / "msrvtt" / "videos" / name, fps=1, short_side=64)]
    assert times == [float(j) for j in range(seconds)]


@pytest.mark.skipif(not (REAL / "msvd" / "videos").is_dir(), reason="no real data beside the repo")
def test_real_msvd():
    for path in sorted((REAL / "msvd" / "videos").iterdir())[:2]:
        start, end = map(int, path.stem.split("_")[-2:])
        shown = list(decode_video(path, fps=1))
        assert len(shown) in (end - start, end - start + 1)
        assert np.allclose([seconds for seconds, _ in shown], range(len(shown)), atol=0.07)
        assert len(list(decode_video(path, n=12))) == 12
        assert all(pixels.std() > 5 for _, pixels in shown)  # a picture, not one colour
