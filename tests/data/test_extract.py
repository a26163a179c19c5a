"""Small videos (--compress), cut videos (--max_seconds), the flags of scripts/extract_frames.py, its benchmark.

What decoding takes, and extraction to jpgs, is tested in test_frames.py, whose clips are used here: frame i of a clip
has the colour COLOURS[i].
"""

import json
import math
import os
import struct
import subprocess
import sys
import time
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from test_frames import COLOURS, REAL, ROOT, extract, make_clip, on_screen, taken, tree, which

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.data.videos import compress_video, decode_video

sys.path.insert(0, str(ROOT / "scripts"))
import bench_extract
from narvid.data import extraction as extract_frames

VARIABLE = [0, 0.1, 0.2, 0.9, 1.05, 3.7, 3.8, 4.0, 8.2]


def by_opencv(path):
    """(frames a second, the number of each frame) as OpenCV reads a file."""
    video = cv2.VideoCapture(str(path))
    numbers = []
    while (read := video.read())[0]:
        numbers.append(which(read[1][:, :, ::-1]))
    assert len(numbers) == video.get(cv2.CAP_PROP_FRAME_COUNT)
    return video.get(cv2.CAP_PROP_FPS), numbers


# ---- small videos ----


@pytest.mark.parametrize("fps", [3, 0.5, 2.5])
@pytest.mark.parametrize(
    "times",
    [
        pytest.param([i / 10 for i in range(35)], id="10 fps"),
        pytest.param([round(i / 29.97, 3) for i in range(95)], id="29.97 fps"),
        pytest.param([7.4 + i / 10 for i in range(25)], id="does not start at 0"),
        pytest.param(VARIABLE, id="variable rate"),
        pytest.param([0, 2, 4], id="slower than fps"),
        pytest.param([0], id="one frame"),
    ],
)
def test_a_small_video_shows_the_same_at_every_tick(tmp_path, times, fps):
    clip, small = make_clip(tmp_path / "clip.mkv", times), tmp_path / "small.mp4"
    count = compress_video(clip, small, fps=fps)
    expected = [max(i for i, t in enumerate(times) if t - times[0] <= j / fps + 0.0006) for j in range(count)]
    assert expected[-1] == len(times) - 1 or times[-1] - times[0] > (count - 1) / fps
    assert 0 <= count / fps - (times[-1] - times[0]) < 1 / fps + 0.11  # the last frame's own time: a tenth at most
    with av.open(str(small)) as container:
        (stream,) = container.streams  # no sound, no data
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(fps), count)
        assert (stream.start_time, stream.duration * stream.time_base) == (0, count / Fraction(fps))
        frames = list(container.decode(stream))
    assert [frame.pts * frame.time_base for frame in frames] == [j / Fraction(fps) for j in range(count)]
    assert [which(frame.to_ndarray(format="rgb24")) for frame in frames] == expected
    assert by_opencv(small) == (fps, expected)


@pytest.mark.parametrize("rate", [10, 30])
def test_frames_of_a_small_video_are_those_of_the_original(tmp_path, rate):
    clip = make_clip(tmp_path / "clip.mp4", [i / rate for i in range(5 * rate)], rate=rate, size=(96, 64))
    compress_video(clip, tmp_path / "small.mp4")
    assert taken(tmp_path / "small.mp4", fps=1) == taken(clip, fps=1)
    assert [t for t, _ in taken(clip, fps=1)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_pictures_of_a_small_video(tmp_path):
    bench_extract.make_clip(tmp_path / "clip.mp4", 4, 160, 120, seed=0)
    compress_video(tmp_path / "clip.mp4", tmp_path / "fine.mp4")
    compress_video(tmp_path / "clip.mp4", tmp_path / "coarse.mp4", crf=40)
    original = np.stack([pixels for _, pixels in decode_video(tmp_path / "clip.mp4", fps=1)]).astype(int)
    errors = []
    for name in ("fine.mp4", "coarse.mp4"):
        small = np.stack([pixels for _, pixels in decode_video(tmp_path / name, fps=1)])
        assert abs((small - original).mean(axis=(0, 1, 2))).max() < 1  # no shift of brightness or colour
        errors.append(abs(small - original).mean())
    assert errors[0] < 3 < errors[1]
    assert (tmp_path / "fine.mp4").stat().st_size > 2 * (tmp_path / "coarse.mp4").stat().st_size


def test_small_videos_have_even_sides_and_stand_upright(tmp_path):
    picture = np.zeros((61, 97, 3), np.uint8)
    picture[:30, :48], picture[:30, 48:], picture[30:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    clip, small = make_clip(tmp_path / "phone.mp4", [0, 0.1], size=(97, 61), pix_fmt="yuv444p", paint=picture), "s.mp4"
    raw = bytearray(clip.read_bytes())
    at = raw.index(b"tkhd") + 44  # the track header's matrix: a quarter turn clockwise
    raw[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    clip.write_bytes(raw)
    for short_side, shape in [(None, (96, 60)), (40, (64, 40)), (41, (66, 40))]:
        compress_video(clip, tmp_path / small, short_side=short_side)
        ((_, pixels),) = decode_video(tmp_path / small, fps=1)
        assert pixels.shape[:2] == shape
        corners = [pixels[8, 8], pixels[8, -8], pixels[-8, 8], pixels[-8, -8]]
        assert np.abs(np.array(corners, int) - [(0, 0, 255), (255, 0, 0), (0, 0, 0), (0, 255, 0)]).max() < 25


def test_sound_is_left_out(tmp_path):
    with av.open(str(tmp_path / "talk.mkv"), "w") as container:
        picture, sound = container.add_stream("libx264", rate=3), container.add_stream("pcm_s16le", rate=8000)
        picture.width, picture.height = 64, 48
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="stereo")
        tone.sample_rate = 8000
        container.mux(sound.encode(tone))
        for colour in COLOURS[:3]:
            pixels = np.ascontiguousarray(np.broadcast_to(colour, (48, 64, 3)))
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(sound.encode())
        container.mux(picture.encode())
    compress_video(tmp_path / "talk.mkv", tmp_path / "small.mp4")
    with av.open(str(tmp_path / "talk.mkv")) as before, av.open(str(tmp_path / "small.mp4")) as after:
        assert ([s.type for s in before.streams], [s.type for s in after.streams]) == (["video", "audio"], ["video"])


# ---- the beginning of a video ----


@pytest.mark.parametrize("how", [{"fps": 1}, {"fps": 3}, {"n": 1}, {"n": 7}, {"n": 50}])
@pytest.mark.parametrize("times", [[3 + i / 10 for i in range(61)], VARIABLE])
def test_max_seconds_is_the_video_cut_there(tmp_path, times, how):
    clip = make_clip(tmp_path / "clip.mkv", times)
    kept = [t for t in times if t - times[0] < 3.75]
    if "n" in how:
        targets = np.linspace(0, kept[-1] - kept[0], how["n"]).tolist()
    else:
        targets = [j / how["fps"] for j in range(math.ceil(3.75 * how["fps"]))]
    assert taken(clip, max_seconds=3.75, **how) == on_screen(kept, targets)
    assert taken(clip, max_seconds=99, **how) == taken(clip, **how)


def test_a_frame_at_max_seconds_is_out_and_the_first_is_in(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", [i / 10 for i in range(40)])
    assert [t for t, _ in taken(clip, fps=1, max_seconds=3)] == [0.0, 1.0, 2.0]
    assert taken(clip, fps=1, max_seconds=1e-9) == [(0.0, 0)]
    slow = make_clip(tmp_path / "slow.mkv", [0, 1.5, 9])  # the second frame's first target is 2
    assert taken(slow, fps=1, max_seconds=2) == [(0.0, 0)]
    assert compress_video(clip, tmp_path / "small.mp4", max_seconds=2) == 6


def test_damage_counts_where_it_is_asked_for(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", [i / 10 for i in range(60)], noise=20)
    raw = bytearray(clip.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 300] = bytes(300)
    clip.write_bytes(raw[: len(raw) * 8 // 10])  # and the end is lost
    for seconds, words in [(1, []), (4, ["broken"]), (99, ["broken", "announced"])]:
        notes = []
        assert taken(clip, fps=10, max_seconds=seconds, notes=notes)
        assert [word in note for word, note in zip(words, notes, strict=True)] == [True] * len(words)


def test_one_frame_of_no_length_is_a_frame(tmp_path):
    with av.open(str(tmp_path / "one.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=90000)
        stream.width, stream.height = 64, 48
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            packet.duration = 1
            container.mux(packet)
    assert [t for t, _ in decode_video(tmp_path / "one.mp4", fps=1)] == [0.0]


# ---- scripts/extract_frames.py ----


def test_compressing(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "small"
    (videos / "sub").mkdir(parents=True)
    make_clip(videos / "a.b.mp4", [i / 10 for i in range(25)], size=(96, 64), noise=20)
    make_clip(videos / "sub" / "c.MKV", [5, 7], size=(96, 64))
    cut = (videos / "a.b.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(cut[: len(cut) * 6 // 10])
    (videos / "bad.mp4").write_bytes(b"nothing")
    how = ["--compress", "--short_side", "32"]
    extract(videos, out, *how)
    names = [".lock", "a.b.mp4", "c.mp4", "cut.mp4", "failed.jsonl", "videos.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == names  # no temporary folder
    lines = {line["video"]: line for line in map(json.loads, (out / "videos.jsonl").read_text().splitlines())}
    assert list(lines) == ["a.b", "c", "cut"]
    size = (out / "c.mp4").stat().st_size
    settings = {"sampling": "3 fps", "short_side": 32, "crf": 18}
    assert lines["c"] == {"video": "c", "frames": 7, "bytes": size, **settings, "source": "sub/c.MKV",
                          **extract_frames.state_of(videos / "sub/c.MKV")}
    assert "announced" in lines["cut"]["note"]
    (failure,) = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    assert (failure["video"], failure["file"]) == ("bad", "bad.mp4") and "bad.mp4" in failure["why"]
    assert f"3 videos, {7 + 8 + lines['cut']['frames']} frames" in capsys.readouterr().out

    extract(out, tmp_path / "frames")  # small videos are videos
    assert load_frame_index(tmp_path / "frames")["c"] == [0.0, 1.0, 2.0]
    whole, before = tree(out), os.stat(out / "a.b.mp4").st_mtime_ns
    (out / "c.mp4").write_bytes(b"half")
    extract(videos, out, *how)
    assert tree(out) == whole
    assert before == os.stat(out / "a.b.mp4").st_mtime_ns  # not made twice
    for other in (["--fps", "2"], ["--crf", "20"], ["--short_side", "30"], ["--max_seconds", "31"]):
        with pytest.raises(InputError, match="was made with .*this run asks for.*another --out"):
            extract(videos, out, *how, *other)
    with pytest.raises(InputError, match=r"holds no index\.jsonl"):
        extract(videos, out)
    with pytest.raises(InputError, match=r"holds no videos\.jsonl"):
        extract(videos, tmp_path / "frames", "--compress")
    with pytest.raises(InputError, match="lies in --videos"):
        extract(videos, videos / "small", "--compress")


def test_max_seconds_is_one_of_the_settings(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "frames"
    videos.mkdir()
    make_clip(videos / "a.mp4", [i / 10 for i in range(45)])
    extract(videos, out, "--max_seconds", "2.5")
    assert load_frame_index(out) == {"a": [0.0, 1.0, 2.0]}
    assert '"sampling": "1 fps, first 2.5 s"' in (out / "index.jsonl").read_text()
    for more in ([], ["--max_seconds", "3"]):
        with pytest.raises(InputError, match="first 2.5 s.*another --out"):
            extract(videos, out, *more)
    extract(videos, tmp_path / "small", "--compress", "--max_seconds", "2")
    assert taken(tmp_path / "small" / "a.mp4", fps=1) == [(0.0, 0), (1.0, 10)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fps", "2", "--num_frames", "3"], "--num_frames stands in place of --fps"),
        (["--compress", "--num_frames", "3"], "--compress takes --fps and --crf"),
        (["--compress", "--quality", "80"], "--compress takes --fps and --crf"),
        (["--crf", "0"], "--crf is the quality of --compress"),
        (["--compress", "--crf", "52"], "--crf"),
        (["--max_seconds", "0"], "--max_seconds: 0 is not a number above 0"),
        (["--fps", "nan"], "--fps: nan is not a number above 0"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        extract(tmp_path, tmp_path / "out", *flags)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away here")
def test_workers_are_the_cores_this_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert extract_frames.parse_args(["--videos", "v", "--out", "o"]).workers == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert extract_frames.parse_args(["--videos", "v", "--out", "o"]).workers == len(mine)


def test_compressing_killed_and_run_again_is_one_run(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "small"
    videos.mkdir()
    clip = make_clip(tmp_path / "clip.mp4", [i / 10 for i in range(21)], size=(96, 64))
    for i in (0, 1, 2, 4):
        os.link(clip, videos / f"{i}.mp4")
    os.mkfifo(videos / "3.mp4")  # nobody writes to it: the worker waits there until the kill
    command = [sys.executable, "scripts/extract_frames.py", "--videos", videos, "--compress", "--workers", "1", "--out"]
    run = subprocess.Popen([*command, out], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / ".unfinished" / "3").exists() or (out / "videos.jsonl").read_bytes().count(b"\n") < 3:
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert sorted(p.name for p in out.glob("*.mp4")) == ["0.mp4", "1.mp4", "2.mp4"]
    with open(out / "videos.jsonl", "ab") as f:
        f.write(b'{"video": "4", "fra')  # as if killed in the middle of a line
    (out / ".unfinished" / "3" / "3.mp4").write_bytes(b"half")  # and of a video
    (out / "4.mp4").write_bytes(b"no line in the index")
    assert list(extract_frames.find_videos(out)) == ["0", "1", "2", "4"]  # nothing half made

    (videos / "3.mp4").unlink()
    os.link(clip, videos / "3.mp4")
    shown = subprocess.run([*command, out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "5 videos, 35 frames" in shown.stdout and "(2 videos new)" in shown.stdout
    assert shown.stderr == ""  # short work draws no bar in a log file (narvid/progress.py)
    extract(videos, tmp_path / "at_once", "--compress")
    assert tree(out) == tree(tmp_path / "at_once")


def test_the_benchmark_compares_the_same_pictures(capsys):
    ratios = bench_extract.main(["--clips", "1", "--seconds", "3", "--size", "64x48", "--repeats", "1"])
    assert [len(ratios[what]) for what in ("decoding", "decoding and jpgs")] == [2, 2]
    printed = capsys.readouterr().out
    assert "pictures of 3 of 3 seconds compared: mean absolute difference 0.0" in printed
    assert "4 videos: " in printed


# ---- real clips ----


@pytest.mark.skipif(not (REAL / "msvd" / "videos").is_dir(), reason="no real data beside the repo")
def test_a_small_real_video(tmp_path):
    clip = min((REAL / "msvd" / "videos").iterdir())
    compress_video(clip, tmp_path / "small.mp4")
    before = list(decode_video(clip, fps=1, short_side=224))
    after = list(decode_video(tmp_path / "small.mp4", fps=1))
    assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=0.07)
    assert [t for t, _ in after] == list(range(len(before)))
    for (_, a), (_, b) in zip(before, after):
        a = np.asarray(Image.fromarray(a).resize((b.shape[1], b.shape[0])))  # by a column at most
        assert abs(a.astype(int) - b).mean() < 4
