"""Videos as people have them: one door, one clock, one picture, for frames, small videos, the index and its clips.

The clips of test_frames.py are used where a colour a frame says which one it is; `paint` shows four quadrants.
"""

import io
import struct
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from test_frames import COLOURS, make_clip, taken

from narvid import InputError
from narvid.data.frames import Picture, check_jpg, read_frames
from narvid.data.videos import compress_video, decode_video, read_video
from narvid.search import clips
from narvid.search.reading import windows_of

QUADRANTS = np.array([[(220, 30, 30), (30, 160, 60)], [(30, 60, 220), (240, 220, 30)]])  # red, green; blue, yellow
GREEN, MAGENTA, WHITE = (20, 160, 60), (255, 0, 255), (255, 255, 255)


def quadrants(size=(64, 48)):
    return np.repeat(np.repeat(QUADRANTS, size[1] // 2, 0), size[0] // 2, 1).astype(np.uint8)


def corners(pixels):
    """The colours (2, 2, 3) in the middle of the four quarters of a picture (H, W, 3)."""
    height, width = pixels.shape[:2]
    return pixels[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2].astype(int)


def write(path, frames, *, codec, pixels, source="rgb24", rate=10, options=None, tags=None):
    """One picture (H, W, C) a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pixels)
            for name, value in (tags or {}).items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def through_both(path, tmp_path):
    """The first picture of a video, and that of the small video made of it."""
    ((_, pixels), *_) = decode_video(path, fps=1)
    compress_video(path, tmp_path / "small.mp4")
    ((_, small), *_) = decode_video(tmp_path / "small.mp4", fps=1)
    return pixels, small


# ---- the door ----


@pytest.fixture
def plain(tmp_path):
    return make_clip(tmp_path / "plain.mp4", [i / 10 for i in range(20)])


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile link\n",
        "ffconcat version 1.0\n" + "file plain.mp4\n" * 2000,
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nplain.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "text that is no video\n" * 50,
    ],
    ids=["playlist", "playlist of one file", "HLS", "SDP", "text"],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.ts"])
def test_a_playlist_is_no_video(tmp_path, plain, text, name):
    (tmp_path / "link").symlink_to(plain)
    path = tmp_path / name
    path.write_text(text)
    for read in (lambda: list(decode_video(path, n=2)), lambda: compress_video(path, tmp_path / "s.mp4"),
                 lambda: read_video(path), lambda: clips.how_played(path, 0, 0)):
        with pytest.raises(InputError, match=f"{name} cannot be opened as a video"):
            read()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_is_no_video(tmp_path, kind):
    Image.fromarray(quadrants()).save(tmp_path / "picture.mp4", kind)
    with pytest.raises(InputError, match=r"picture\.mp4 cannot be opened as a video"):
        list(decode_video(tmp_path / "picture.mp4", fps=1))
    (tmp_path / "00001.jpg").write_bytes((tmp_path / "picture.mp4").read_bytes())
    with pytest.raises(InputError, match="cannot be opened as a video"):  # a pattern is a name
        list(decode_video(tmp_path / "%05d.jpg", fps=1))


def two_streams(path, frames, disposition=None):
    """A small stream before one of 96 x 64; frames: of each. The small one is grey, the other green."""
    with av.open(str(path), "w") as container:
        streams = []
        for size, codec in (((32, 32), "mpeg4"), ((96, 64), "mjpeg" if disposition else "mpeg4")):
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        if disposition:
            streams[1].disposition = disposition
        for stream, colour, count in zip(streams, ((90, 90, 90), GREEN), frames):
            picture = np.full((stream.height, stream.width, 3), colour, np.uint8)
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def test_the_largest_stream_is_the_video(tmp_path):
    path = two_streams(tmp_path / "two.mp4", (5, 20))
    pixels, small = through_both(path, tmp_path)
    assert pixels.shape == small.shape == (64, 96, 3)
    assert np.abs(pixels.mean(axis=(0, 1)) - GREEN).max() < 8
    assert read_video(path).seconds == pytest.approx(2, abs=0.02)
    assert clips.how_played(path, 0, 0).kind != "file"  # a browser shows the first


@pytest.mark.parametrize("disposition", [av.stream.Disposition.attached_pic.value, None])
def test_a_large_cover_is_not_the_video(tmp_path, disposition):
    path = two_streams(tmp_path / "cover.mp4", (20, 1), disposition)
    ((_, pixels), _) = decode_video(path, fps=1)
    assert pixels.shape == (32, 32, 3)


def test_sound_that_goes_on_is_no_video_and_no_damage(tmp_path):
    path = tmp_path / "talk.mkv"
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        picture.width, picture.height = 64, 48
        for i in range(20):
            pixels = np.full((48, 64, 3), COLOURS[i], np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(picture.encode())
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 2 * 60), np.int16), format="s16", layout="stereo")
        tone.sample_rate = 8000
        container.mux(sound.encode(tone))
        container.mux(sound.encode())
    clip = read_video(path)
    assert (clip.note, clip.seconds, len(clip.times)) == ("", pytest.approx(2, abs=0.02), 2)


# ---- the clock ----


def tenths(count):
    return [i / 10 for i in range(count)]


LEAP = 95_443.0  # seconds; as long as a transport stream counts before it begins anew


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    "times",
    [
        pytest.param([t + LEAP * (t >= 10) for t in tenths(200)], id="ahead"),
        pytest.param([t + LEAP * (i > 0) for i, t in enumerate(tenths(200))], id="at the second frame"),
        pytest.param([t + LEAP * (t >= 5) + 700 * (t >= 10) for t in tenths(200)], id="twice"),
        pytest.param([t + 300 * (t >= 10) for t in tenths(200)], id="five minutes"),
    ],
)
def test_a_leap_of_the_clock_is_no_length(tmp_path, suffix, times):
    path = make_clip(tmp_path / f"jump.{suffix}", times)
    notes = []
    assert taken(path, fps=1, notes=notes) == [(float(n), 10 * n) for n in range(20)]
    assert len(notes) == 1 and "the time stamps leap by" in notes[0]
    notes = []
    assert compress_video(path, tmp_path / "small.mp4", notes=notes) == 60 and len(notes) == 1
    clip = read_video(path)
    assert clip.seconds == pytest.approx(20, abs=0.2) and clip.note == notes[0]
    assert len(windows_of(clip, 30, 1, 12)) == 1
    assert clips.how_played(path, 0, 0, clip.seconds).counted  # a browser would follow its clock
    assert [time for time, _ in taken(path, n=3)] == [0, pytest.approx(9.9, abs=0.1), 19.9]


def with_stamps(path, times):
    """A clip of `times` (seconds) written with a regular clock first, so that the muxer takes what is impossible."""
    plain = make_clip(path.with_name("regular.mkv"), tenths(len(times)), codec="mpeg4")
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(packet for packet in source.demux() if packet.size):
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.dts, packet.pts = 100 * i - 1000 * 3600, round(1000 * times[i])  # far below, or it is refused
            out.mux(packet)
    return path


def test_a_leap_ahead_and_back_costs_one_frame_its_time(tmp_path):
    times = tenths(100)
    for i in (30, 60, 61):
        times[i] += LEAP
    notes = []
    got = taken(with_stamps(tmp_path / "glitch.mkv", times), fps=1, notes=notes)
    assert got == [(float(n), 10 * n) for n in range(10)]
    assert any("leap by" in note for note in notes)


def test_a_leap_back_and_ahead(tmp_path):
    times = [t + 100 for t in tenths(100)]
    times[35] = times[36] = 0.0
    notes = []
    got = taken(with_stamps(tmp_path / "glitch.mkv", times), fps=1, notes=notes)
    assert got == [(float(n), 10 * n) for n in range(10)]
    assert any("leap by" in note for note in notes)


def test_stamps_that_stand_still(tmp_path):
    times = [min(t, 2.0) for t in tenths(40)] + [t + 4 for t in tenths(60)]
    notes = []
    path = with_stamps(tmp_path / "still.mkv", times)
    got = taken(path, fps=1, notes=notes)
    assert got[-5:] == [(float(n), 10 * n) for n in range(5, 10)]  # as before, once the clock goes on
    assert all(abs(10 * seconds - number) <= 12 for seconds, number in got) and len(got) >= 9
    assert any("stand still" in note for note in notes)
    times = [min(t, 2.0) for t in tenths(100)]
    assert [seconds for seconds, _ in taken(with_stamps(tmp_path / "stopped.mkv", times), n=3)] == [
        0.0, pytest.approx(4.5, abs=1.2), pytest.approx(9.9, abs=1.2)]
    double = [i // 2 / 5 for i in range(60)]  # each stamp twice is a rate, not a clock that stands
    notes = []
    assert len(taken(with_stamps(tmp_path / "double.mkv", double), fps=1, notes=notes)) == 6 and not notes


@pytest.mark.parametrize("start", [-5.0, -0.1, 3600.0])
@pytest.mark.parametrize("suffix", ["mkv", "nut"])
def test_time_0_is_the_first_frame(tmp_path, suffix, start):
    path = with_stamps(tmp_path / f"early.{suffix}", [t + start for t in tenths(50)])
    notes = []
    assert taken(path, fps=1, notes=notes) == [(float(n), 10 * n) for n in range(5)] and not notes
    assert read_video(path).seconds == pytest.approx(5, abs=1.01)


@pytest.mark.parametrize(
    "times",
    [
        pytest.param([0, 4, 1800, 1803], id="four slides in half an hour"),
        pytest.param([*range(0, 200, 10), *range(2000, 2200, 10)], id="a break"),
        pytest.param([*tenths(20), 30, *(t + 31 for t in tenths(20)), 75, 76], id="a screen"),
        pytest.param([*tenths(30), *(t + 50 for t in tenths(30))], id="lost in between"),
    ],
)
def test_a_pause_is_a_pause(tmp_path, times):
    path = make_clip(tmp_path / "slides.mp4", times)
    notes = []
    numbers = dict(taken(path, fps=1, notes=notes))
    assert not notes and all(numbers.get(float(t), i) == i for i, t in enumerate(times))
    clip = read_video(path)
    assert clip.seconds == pytest.approx(times[-1], abs=10.1) and clip.times[-1] == pytest.approx(times[-1], abs=1)


def test_a_pause_through_which_sound_goes_on(tmp_path):
    path = tmp_path / "talk.mkv"
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=800)
        picture.width, picture.height = 64, 48
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), COLOURS[i], np.uint8), format="rgb24")
            frame.pts, frame.time_base = i + 3000 * (i >= 20), Fraction(1, 10)
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 800 * 304), np.int16), format="s16", layout="stereo")
        tone.sample_rate = 800
        container.mux(sound.encode(tone))
        container.mux(sound.encode())
    clip = read_video(path)
    assert clip.note == "" and clip.times == [0.0, 1.0, 1.9, 302.0, 303.0]


# ---- the picture ----


MATRICES = {  # a, b, c, d of a display matrix -> what it does to an array (H, W)
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, -1, 0): lambda x: np.rot90(x, -1, (0, 1)),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1, (0, 1)),
    (0, 1, 1, 0): lambda x: np.swapaxes(x, 0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(np.swapaxes(x, 0, 1), 2, (0, 1)),
}


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_mirrored_and_turned(tmp_path, matrix):
    path = make_clip(tmp_path / "plain.mp4", [0, 0.1], paint=quadrants())
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 7 << 16, 0, 1 << 30)
    path.write_bytes(raw)
    for pixels in through_both(path, tmp_path):
        assert pixels.shape[:2] == ((64, 48) if a == 0 else (48, 64))
        assert np.abs(corners(pixels) - MATRICES[matrix](QUADRANTS)).max() < 12


SDR = np.array([[(220, 30, 30), (30, 160, 60)], [(30, 60, 220), WHITE]])
BT2020_OF_BT709 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
HDR = {"PQ": 16, "HLG": 18, "SDR": 14}  # FFmpeg's numbers of their transfers


def coded(srgb, transfer):
    """sRGB bytes (..., 3), white at 203 nits, in BT.2020's primaries and coded by a transfer of HDR: 0..1."""
    srgb = np.asarray(srgb) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ np.transpose(BT2020_OF_BT709)
    if transfer == "SDR":
        return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    if transfer == "PQ":
        power = (203 * linear / 10000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    light = 0.203 * linear  # of a display of 1,000 nits, which brightens the scene by an exponent of 1.2
    scene = light * (light @ [0.2627, 0.6780, 0.0593])[..., None] ** (1 / 1.2 - 1)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


def write_hdr(path, colours, transfer, codec="libx265"):
    """Four colours (2, 2, 3) in ten bits, BT.2020."""
    r, g, b = np.moveaxis(np.repeat(np.repeat(coded(colours, transfer), 32, 0), 32, 1), 2, 0)
    luma = 0.2627 * r + 0.6780 * g + 0.0593 * b
    planes = [64 + 876 * luma, 512 + 896 * (b - luma) / 1.8814, 512 + 896 * (r - luma) / 1.4746]
    planes = [planes[0], *(plane[::2, ::2] for plane in planes[1:])]
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": HDR[transfer], "color_range": 1}
    with av.open(str(path), "w") as container:
        options = {"x265-params": "log-level=none:crf=5"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        for plane, values in zip(frame.planes, planes):
            padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
            padded[:, : values.shape[1]] = np.round(values)
            plane.update(padded.tobytes())
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("transfer", "codec", "name"),
    [
        ("PQ", "libx265", "a.mp4"),
        ("PQ", "ffv1", "a.mkv"),
        ("HLG", "libx265", "a.mp4"),
        ("HLG", "ffv1", "a.mkv"),
        ("SDR", "ffv1", "a.mkv"),
    ],
)
def test_hdr_and_wide_colours_are_shown_as_srgb(tmp_path, transfer, codec, name):
    path = write_hdr(tmp_path / name, SDR, transfer, codec)
    for pixels in through_both(path, tmp_path):
        assert np.abs(corners(pixels) - SDR).max() < 12
    notes = []
    list(decode_video(path, fps=1, notes=notes))
    assert not notes


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_lights_brighter_than_paper_keep_their_order_and_colour(tmp_path, transfer):
    greys = np.array([[[60] * 3, [180] * 3], [[255] * 3, [400] * 3]])  # the last one is 600 nits
    ((_, pixels),) = decode_video(write_hdr(tmp_path / "a.mkv", greys, transfer, "ffv1"), fps=1)
    shown = corners(pixels)
    assert np.ptp(shown, axis=2).max() <= 3  # grey stays grey
    assert np.abs(shown[0] - greys[0]).max() <= 3 and 235 <= shown[1, 0, 0] < shown[1, 1, 0] <= 255
    warm = np.array([[(500, 250, 60), (60, 60, 60)]] * 2)
    ((_, pixels),) = decode_video(write_hdr(tmp_path / "b.mkv", warm, transfer, "ffv1"), fps=1)
    red, green, blue = corners(pixels)[0, 0]
    assert red > 250 and 100 < green < 170 and blue < 60  # orange, not yellow


def transparent():
    """Green of which a quarter is hidden: beneath alpha 0 there is magenta."""
    picture = np.full((64, 64, 4), (*GREEN, 255), np.uint8)
    picture[:32, :32] = (*MAGENTA, 0)
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("alpha.mov", "qtrle", "argb"),
        ("prores.mov", "prores_ks", "yuva444p10le"),
        ("png.mov", "png", "rgba"),
        ("ffv1.mkv", "ffv1", "yuva420p"),
        ("ut.avi", "utvideo", "gbrap"),
        ("raw.avi", "rawvideo", "bgra"),
        ("nine.webm", "libvpx-vp9", "yuva420p"),
        ("eight.webm", "libvpx", "yuva420p"),
    ],
)
def test_transparent_is_white(tmp_path, name, codec, pixels):
    options = {"profile": "4"} if codec == "prores_ks" else {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    path = write(tmp_path / name, [transparent()] * 12, codec=codec, pixels=pixels, source="rgba", options=options)
    for got in through_both(path, tmp_path):
        assert np.abs(corners(got) - [[WHITE, GREEN], [GREEN, GREEN]]).max() < 12
    notes = []
    ((_, small), (time, _)) = decode_video(path, fps=1, short_side=16, notes=notes)
    assert small.shape == (16, 16, 3) and time == 1.0 and not notes
    edge = small.reshape(-1, 3).astype(int)  # hidden magenta would be redder than it is green
    assert (edge[:, 0] - edge[:, 1]).max() < 12


def test_a_gif_and_its_index_are_over_white(tmp_path):
    Image.fromarray(transparent()).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGBA", (64, 64))])
    with Image.open(io.BytesIO(read_video(tmp_path / "a.gif").jpegs[0])) as first:
        assert np.abs(corners(np.asarray(first)) - [[WHITE, GREEN], [GREEN, GREEN]]).max() < 12


def test_a_fourth_byte_that_is_no_alpha(tmp_path):
    picture = np.dstack([quadrants((64, 64)), np.zeros((64, 64), np.uint8)])
    path = write(tmp_path / "old.avi", [picture] * 3, codec="rawvideo", pixels="bgra", source="rgba")
    ((_, pixels),) = decode_video(path, fps=1)
    assert np.abs(corners(pixels) - QUADRANTS).max() < 4


@pytest.mark.parametrize(("tag", "note"), [(8, "BT.709"), (10, "BT.2020"), (13, "BT.2020"), (14, "BT.2020")])
def test_an_unusual_colour_matrix_costs_no_file(tmp_path, tag, note):
    path = write(tmp_path / "a.mp4", [quadrants()] * 15, codec="libx264", pixels="yuv444p",
                 options={"crf": "5"}, tags={"colorspace": tag})
    for pixels in through_both(path, tmp_path):
        assert np.abs(corners(pixels) - QUADRANTS).max() < 45  # that of BT.601's, which swscale wrote
    notes = []
    assert len(list(decode_video(path, fps=1, notes=notes))) == 2
    assert notes == [f"colour matrix {tag} cannot be read, {note} is taken"]
    clip = read_video(path)
    assert clip.note == notes[0] and clip.seconds == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("options", [{"bf": "3", "b_strategy": "0"}, {"flags": "+ildct+ilme", "x264-params": "tff=1"}])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "ts", "mkv"])
def test_frames_out_of_order_and_interlaced(tmp_path, suffix, options):
    path = tmp_path / f"clip.{suffix}"
    pictures = [np.full((48, 64, 3), colour, np.uint8) for colour in COLOURS[:50]]
    write(path, pictures, codec="libx264", pixels="yuv420p", options=options)
    notes = []
    times = taken(path, fps=1, notes=notes)
    assert not notes and [number for _, number in times] == pytest.approx(range(0, 50, 10), abs=1)
    assert [seconds for seconds, _ in times] == pytest.approx(range(5), abs=0.11)


def test_what_x264_cannot_write_is_named(tmp_path):
    path = write(tmp_path / "wide.avi", [np.full((16, 20000, 3), 90, np.uint8)], codec="ffv1", pixels="yuv420p")
    with pytest.raises(InputError, match=r"wide\.avi cannot be written as h264"):
        compress_video(path, tmp_path / "small.mp4", short_side=None)


# ---- pictures ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_says_which_side_is_up(orientation, kind):
    upright = Image.fromarray(quadrants((64, 64)))
    stored = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_270}
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    (upright.transpose(stored[orientation]) if orientation > 1 else upright).save(file, kind, exif=exif, quality=95)
    (pixels,) = read_frames([file], Picture(32))
    assert np.abs(corners(pixels.permute(1, 2, 0).numpy()) - QUADRANTS).max() < 12


@pytest.mark.parametrize("size", [(1, 10_000), (100_000, 1), (2, 65_535), (3, 301)])
def test_a_line_of_pixels_is_cropped_before_it_is_resized(tmp_path, size):
    wide = size[0] > size[1]
    ramp = np.linspace(0, 200, max(size)).round().astype(np.uint8)[:, None].repeat(min(size), 1)
    Image.fromarray(ramp.T if wide else ramp).save(tmp_path / "line.png")
    tracemalloc.start()
    (pixels,) = read_frames([tmp_path / "line.png"], Picture(32))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert pixels.shape == (3, 32, 32) and np.abs(pixels.numpy().astype(int) - 100).max() <= 2  # its middle


def test_a_header_that_promises_too_much(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    raw = bytearray(file.getvalue())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">2H", 65_000, 65_000)
    path = tmp_path / "00003.jpg"
    for end in (b"", b"\0"):  # the second is decoded to be checked
        path.write_bytes(raw + end)
        with pytest.raises(InputError, match=r"00003\.jpg"):
            read_frames([path], Picture(32))
    with pytest.raises(InputError, match=r"00003\.jpg"):
        check_jpg(path)


def test_transparent_and_deep_pictures(tmp_path):
    Image.fromarray(transparent()).save(tmp_path / "rgba.png")
    palette = Image.fromarray(transparent()[..., :3]).quantize(2)
    hidden = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png", transparency=hidden)
    for name in ("rgba.png", "palette.png"):
        (pixels,) = read_frames([tmp_path / name], Picture(32))
        assert np.abs(corners(pixels.permute(1, 2, 0).numpy()) - [[WHITE, GREEN], [GREEN, GREEN]]).max() < 12, name
    Image.fromarray(np.full((40, 40), 100 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert (read_frames([tmp_path / "deep.png"], Picture(32)) == 100).all()


# ---- pixels that are not square, and pictures of two fields ----


def ellipse(width, height, ratio):
    """A white disc as a file with such pixels holds it, (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) * ratio) ** 2 + (y - height / 2) ** 2 < (0.4 * height) ** 2
    return np.repeat(255 * inside[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("ratio", [Fraction(64, 45), Fraction(2), Fraction(8, 9), Fraction(1, 2)])
def test_a_circle_stays_round(tmp_path, ratio):
    path = tmp_path / "disc.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 180, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ellipse(180, 96, float(ratio)), format="rgb24")))
        container.mux(stream.encode())
    shown = [*through_both(path, tmp_path), np.asarray(Image.open(io.BytesIO(read_video(path).jpegs[0])))]
    for pixels in shown:
        assert abs(pixels.shape[1] / pixels.shape[0] - 180 * float(ratio) / 96) < 0.03
        white = pixels[..., 1] > 127
        wide, high = np.flatnonzero(white.any(axis=0)), np.flatnonzero(white.any(axis=1))
        assert abs(np.ptp(wide) / np.ptp(high) - 1) < 0.06
    (_, small), *_ = decode_video(path, fps=1, short_side=48)
    assert min(small.shape[:2]) == 48


def test_a_ratio_that_no_pixel_has_is_noted_and_square(tmp_path):
    path = tmp_path / "odd.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(6, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format="rgb24")))
        container.mux(stream.encode())
    notes = []
    ((_, pixels),) = decode_video(path, fps=1, notes=notes)
    assert pixels.shape == (48, 64, 3) and notes == ["pixels 6 times as wide as high are taken as square"]


def test_two_fields_become_one_picture(tmp_path):
    """A bar that moves from field to field has no comb, every frame is there once and at its time."""
    path = tmp_path / "fields.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={
            "crf": "5", "flags": "+ilme+ildct", "x264-params": "tff=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for k in range(15):
            pixels = np.zeros((96, 96, 3), np.uint8)
            for field in (0, 1):
                at = 2 * (2 * k + field)
                pixels[field::2, at : at + 12] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    taken = list(decode_video(path, fps=25))
    assert [round(time, 3) for time, _ in taken] == [round(k / 25, 3) for k in range(15)] and len(stored) == 15
    combs = [np.abs(np.diff(pixels.astype(int)[8:-8], axis=0)).mean() for _, pixels in taken]
    assert max(combs) < 1 < min(np.abs(np.diff(pixels[8:-8], axis=0)).mean() for pixels in stored)
    for k, (_, pixels) in enumerate(taken):  # where the first field's bar is, or between the two
        bar = np.flatnonzero(pixels[48, :, 1] > 127)
        assert 4 * k - 1 <= bar.min() <= 4 * k + 3


def test_what_a_phone_trimmed_is_neither_shown_nor_missed(tmp_path):
    """An edit list names the part of the file that is shown: here 2 of 4 seconds, from the second one on."""
    path = make_clip(tmp_path / "whole.mp4", [i / 10 for i in range(40)])
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 12  # of one part: its length in the file's clock, where it begins in the picture's
    clocks = [data.find(name) + 16 for name in (b"mvhd", b"mdhd")]
    film, picture = (struct.unpack(">I", data[at : at + 4])[0] for at in clocks)
    length, begins = struct.unpack(">Ii", data[entry : entry + 8])
    assert abs(length / film - 4) < 0.2
    data[entry : entry + 8] = struct.pack(">Ii", 2 * film, begins + picture)
    (tmp_path / "trimmed.mp4").write_bytes(data)
    notes = []
    shown = taken(tmp_path / "trimmed.mp4", fps=2, notes=notes)
    assert shown == [(round(time - 1, 3), name) for time, name in taken(path, fps=2) if 1 <= time < 3] and notes == []


@pytest.mark.parametrize("seconds", [2, 9])
def test_a_clock_that_wraps(tmp_path, seconds):
    """33 bits of 1/90,000 s: a recorder's clock starts again after 26.5 hours, here within the file."""
    path = tmp_path / "wraps.ts"
    start = 2**33 - 90_000 * seconds
    with av.open(str(path), "w", options={"mpegts_copyts": "1"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0", "g": "10", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        for i in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = start + 9000 * i, Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    notes = []
    shown = list(decode_video(path, fps=1, notes=notes))
    assert [round(time, 3) for time, _ in shown] == list(range(12)) and notes == []
    assert all(abs(pixels.mean() - 20 * k) < 4 for k, (_, pixels) in enumerate(shown))


def test_a_size_that_changes_within_a_file(tmp_path):
    """A screen that is turned: frames keep their shape, a small video keeps its first one's, with black around."""
    parts = [write(tmp_path / f"{number}.ts", 20 * [quadrants(size)], codec="libx264", pixels="yuv420p",
                   options={"crf": "5", "g": "10"}) for number, size in enumerate([(160, 120), (120, 160)])]
    path = tmp_path / "turned.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    shapes = [pixels.shape for _, pixels in decode_video(path, fps=1)]
    assert shapes == 2 * [(120, 160, 3)] + 2 * [(160, 120, 3)]
    assert compress_video(path, tmp_path / "small.mp4") == 12
    shown = [pixels for _, pixels in decode_video(tmp_path / "small.mp4", fps=1)]
    assert [pixels.shape for pixels in shown] == 4 * [(120, 160, 3)]
    for pixels in shown[2:]:
        assert pixels[:, :30].max() < 20 > pixels[:, -30:].max()  # 90 x 120 in the middle
        assert np.abs(corners(pixels[:, 38:122]) - QUADRANTS).max() < 8
