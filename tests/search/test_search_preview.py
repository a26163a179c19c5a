"""Stretches of video files as mp4s for a browser: from which moment on, with which sound, of which forms."""

from fractions import Fraction

import av
import numpy as np
import pytest

from narvid import InputError
from narvid.search import clips, preview

RATE, SECONDS = 10, 12
FORMS = {  # name -> codecs of picture and sound; whether an mp4 takes over the picture as it is
    "a.mkv": ("libx264", "aac", True), "b.ts": ("libx264", "aac", True), "c.avi": ("mpeg4", "mp3", False),
    "d.mpg": ("mpeg2video", "mp2", False), "e.mkv": ("libx264", "ac3", True), "f.webm": ("libvpx", "libopus", False),
    "g.flv": ("flv", "mp3", False), "h.mkv": ("libsvtav1", "libopus", True), "i.gif": ("gif", None, False),
}


def level(second):
    """The grey of a second."""
    return 20 + 18 * int(second)


def film(path, codec, sound):
    """12 s, a grey a second and a key frame a second, with a tone that begins at 6 s."""
    try:
        container = av.open(str(path), "w")
        video = container.add_stream(codec, rate=25 if codec == "mpeg2video" else RATE)
    except (ValueError, av.FFmpegError):
        pytest.skip(f"this PyAV has no {codec}")
    rate = 25 if codec == "mpeg2video" else RATE
    video.width, video.height = 96, 64
    video.pix_fmt = {"gif": "rgb8"}.get(codec, "yuv420p")
    video.codec_context.gop_size, video.codec_context.max_b_frames = rate, 0
    with container:
        tone = sound and container.add_stream(sound, rate=48000 if sound in ("libopus", "ac3", "mp2") else 44100,
                                              layout="stereo")
        for n in range(rate * SECONDS):
            picture = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level(n / rate), np.uint8), "rgb24")
            container.mux(video.encode(picture))
            if tone:
                samples = tone.codec_context.sample_rate // rate
                times = (n * samples + np.arange(samples)) / tone.codec_context.sample_rate
                wave = np.where(times >= 6, 0.5 * np.sin(2 * np.pi * 440 * times), 0).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
                frame.sample_rate, frame.pts = tone.codec_context.sample_rate, n * samples
                frame.time_base = Fraction(1, tone.codec_context.sample_rate)
                container.mux(tone.encode(frame))
        container.mux(video.encode())
        if tone:
            container.mux(tone.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name):
        if name not in made:
            made[name] = film(folder / name, *FORMS[name][:2])
        return made[name]

    return get


def seen_and_heard(data, path):
    """Of an mp4: the time and grey of each frame; the second at which the sound begins, or None."""
    path.write_bytes(data)
    with av.open(str(path)) as container:
        frames = [(frame.time, float(frame.to_ndarray(format="gray").mean())) for frame in container.decode(video=0)]
    begins = None
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0) if container.streams.audio else ():
            if begins is None and np.abs(frame.to_ndarray()).max() > (0.2 if frame.format.is_planar else 0.2):
                begins = frame.time
    return frames, begins


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["copied", "encoded"])
def test_a_stretch_shows_its_moment_and_sounds_with_it(films, tmp_path, name, kind):
    codec, sound, copies = FORMS[name]
    path, got = films(name), []
    if kind == "copied" and not copies:
        assert clips.begin_of_copy(clips.how_played(path, 0, 0, 12.0), path, 4.5) is None
        return
    begins = preview.key_frame_before(path, 4.5) if kind == "copied" else 4.5
    assert 3.4 <= begins <= 4.5
    for _ in getattr(preview, kind)(path, 4.5, 8.0, got.append):
        pass
    frames, tone = seen_and_heard(b"".join(got), tmp_path / "out.mp4")
    for time, grey in frames:
        assert abs(grey - level(begins + time + 1e-3)) < 12 or abs(grey - level(begins + time - 0.15)) < 12, time
    assert frames[0][0] < 0.15 and 7.5 < begins + frames[-1][0] < 8.6
    if sound:
        assert begins + tone == pytest.approx(6.0, abs=0.15)
    else:
        assert tone is None


def test_bytes_come_while_it_is_made_and_an_end_ends_it(films):
    got, first = [], None
    steps = preview.encoded(films("c.avi"), 1.0, 11.0, got.append)
    for n, _ in enumerate(steps):
        if first is None and sum(map(len, got)) > 1500:
            first = n
    assert first is not None and first < 20 < n  # of a hundred frames
    steps = preview.encoded(films("c.avi"), 1.0, 11.0, got.append)
    next(steps)
    steps.close()


def test_a_file_whose_clock_is_wrong_is_counted_from_its_beginning(films, tmp_path):
    got = []
    for _ in preview.encoded(films("a.mkv"), 4.0, 7.0, got.append, counted=True):
        pass
    frames, tone = seen_and_heard(b"".join(got), tmp_path / "out.mp4")
    assert tone is None and frames[0][1] == pytest.approx(level(4), abs=12)
    assert frames[-1][1] == pytest.approx(level(6), abs=12)


def test_behind_the_end_the_last_frame_stands(films, tmp_path):
    got = []
    for _ in preview.encoded(films("c.avi"), 50.0, 60.0, got.append):
        pass
    [(_, grey)], _ = seen_and_heard(b"".join(got), tmp_path / "out.mp4")
    assert grey == pytest.approx(level(11), abs=12)
    with pytest.raises(InputError, match="c.avi: no frame between 50.0 and 60.0 s"):
        list(preview.encoded(films("c.avi"), 50.0, 60.0, got.append, counted=True))


def test_making_falls_back_keeps_what_is_whole_and_can_be_given_up(films, tmp_path):
    path, place = films("c.avi"), tmp_path / "clips" / "x.encoded.mp4"

    def broken(take):
        raise ValueError("no such mp4")
        yield

    def encode(take):
        return preview.encoded(path, 1.0, 3.0, take)

    making = clips.Making([broken, encode], place)
    data = b"".join(iter(making.read, b""))
    assert place.read_bytes() == data and list(place.parent.iterdir()) == [place]
    place.unlink()
    making = clips.Making([encode], place)
    assert making.read()
    making.close()
    making.close()
    assert making.read() == b"" and not list(place.parent.iterdir())
    with pytest.raises(InputError, match="no clip for browsers could be made .no such mp4"):
        clips.Making([broken], place).read()
    (tmp_path / "file").write_bytes(b"")
    assert b"".join(iter(clips.Making([encode], tmp_path / "file" / "x.mp4").read, b"")) == data
