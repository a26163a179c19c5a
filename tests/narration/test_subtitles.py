"""narvid/narration/subtitles.py and speech.py: every form with its right sentences, broken ones, the join."""

import json
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from narvid import InputError
from narvid.data.decoding import sound_of
from narvid.data.narrations import load_narrations
from narvid.narration import __main__ as narration
from narvid.narration.speech import said_around
from narvid.narration.subtitles import Timed, read_sentences

SRT = """\ufeff1
00:00:00,500 --> 00:00:01,500
<i>Hello</i> <font color="#ffff00">Anna</font>

2
00:00:02,000 --> 00:00:03,500  X1:40 X2:600 Y1:20 Y2:50
- Where is number 42?
- {\\an8}In the blue box &amp; the red one.

3
00:01:00,000 --> 00:01:01,000
1984

4
01:00:00,000 --> 01:00:01,000
[door slams]
"""
SAID = [Timed(0.5, 1.5, "Hello Anna"), Timed(2.0, 3.5, "Where is number 42? In the blue box & the red one."),
        Timed(60.0, 61.0, "1984")]
VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE 00:00:00.000 --> 00:00:09.000
not said

first
00:00.500 --> 00:01.500 line:90% align:center
<v Bob>Hello <c.yellow>Anna</c></v>

00:00:02.000 --> 00:00:03.500
>> Where is number 42?
&gt;&gt; In the blue box &amp; the red one.

00:01:00.000 --> 00:01:01.000
1984

00:01:02.000 --> 00:01:03.000
♪ (music) ♪
"""
ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:01:00.00,0:01:01.00,Default,,0,0,0,,1984
Dialogue: 0,0:00:00.50,0:00:01.50,Default,,0,0,0,,{\\i1}Hello{\\i0}\\hAnna
Comment: 0,0:00:00.50,0:00:01.50,Default,,0,0,0,,not said
Dialogue: 1,0:00:00.00,0:00:09.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0 100 100{\\p0}
Dialogue: 0,0:00:02.00,0:00:03.50,Default,,0,0,0,,- Where is number 42?\\N- In the blue box & the red one.
"""
# As the large video site's automatic captions are: a line again above the next one, and alone for 10 ms between.
ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.389 align:start position:0%
_
hello<00:00:00.480><c> and</c><00:00:00.960><c> welcome</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello and welcome
_

00:00:02.399 --> 00:00:04.500 align:start position:0%
hello and welcome
the<00:00:02.700><c> number</c><00:00:03.100><c> is</c>

00:00:04.500 --> 00:00:04.510 align:start position:0%
the number is
_

00:00:04.510 --> 00:00:06.000 align:start position:0%
the number is
forty<00:00:05.000><c> two</c>

00:00:09.000 --> 00:00:10.000 align:start position:0%
_
forty<00:00:09.500><c> two</c>
""".replace("_", " ")
UNROLLED = [Timed(0.16, 2.399, "hello and welcome"), Timed(2.399, 4.51, "the number is"), Timed(4.51, 6.0, "forty two"),
            Timed(9.0, 10.0, "forty two")]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- subtitle files ----


@pytest.mark.parametrize("name, text", [("a.srt", SRT), ("a.vtt", VTT), ("a.ass", ASS), ("a.SRT", SRT),
                                        ("a.srt", SRT.replace("\n", "\r\n")), ("a.vtt", VTT.replace("\n", "\r\n")),
                                        ("a.srt", SRT.replace("\n\n", "\n"))])
def test_the_same_sentences_in_every_form(tmp_path, name, text):
    assert read_sentences(write(tmp_path / name, text)) == SAID


def test_captions_that_roll_are_said_once(tmp_path):
    assert read_sentences(write(tmp_path / "a.vtt", ROLLING)) == UNROLLED
    cues = read_sentences(write(tmp_path / "grows.srt", "\n\n".join(
        f"{n}\n00:00:0{n},000 --> 00:00:0{n + 1},000\n{' '.join('the number is forty two'.split()[:n])}"
        for n in range(1, 6)) + "\n"))
    assert cues == [Timed(1.0, 6.0, "the number is forty two")]


def test_what_is_said_twice_is_said_twice(tmp_path):
    """One repeated line among others, and one behind a pause, are no captions that roll."""
    lines = ["No.", "No.", "Why?", "Because.", "I see.", "No."]
    text = "".join(f"{n}\n00:00:{n:02},000 --> 00:00:{n:02},950\n{line}\n\n" for n, line in enumerate(lines, 1))
    assert [cue.text for cue in read_sentences(write(tmp_path / "a.srt", text))] == lines
    apart = "".join(f"{n}\n00:00:{n:02},000 --> 00:00:{n:02},500\nNo.\n\n" for n in range(1, 4))
    assert [cue.text for cue in read_sentences(write(tmp_path / "b.srt", apart))] == ["No."] * 3


@pytest.mark.parametrize("name, text, words", [
    ("a.srt", "once upon a time\n", "a.srt:1: no line of times such as"),
    ("a.vtt", SRT, "a.vtt:1: does not begin with WEBVTT"),
    ("a.ass", "[Script Info]\n", "a.ass:1: no [Events] with a Format line"),
    ("a.ass", ASS.replace("Effect, Text", "Effect, Words"), "a.ass:10: no Dialogue line"),
    ("a.ass", ASS.replace("0:01:00.00", "one minute"), "a.ass:10: no Dialogue line"),
    ("a.ass", ASS.replace("Dialogue: 0,0:01:00.00,0:01:01.00,Default,,0,0,0,,1984", "Dialogue: 0,0:01:00.00"),
     "a.ass:10: no Dialogue line"),
    ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n", "a.srt:3: not UTF-8 text"),
    ("a.srt", "x".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ("a.json", "[", "malformed JSON"), ("a.json", '{"text": "hello"}', 'none of the lists "segments"'),
    ("a.json", '{"segments": [{"start": 0, "end": 1, "text": "a"}, {"start": "0", "end": 1, "text": "a"}]}',
     "its segment 2 has no start, end and text"),
    ("a.json", '{"segments": [7]}', "its segment 1 has no"),
    ("a.json", '{"chunks": [{"timestamp": [null, 1], "text": "a"}]}', "its segment 1 has no"),
    ("a.mp4", "no video", "cannot be opened as a video"),
])
def test_broken_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as refused:
        read_sentences(tmp_path / name)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name, text", [("a.srt", ""), ("a.srt", "\n\n"), ("a.vtt", "WEBVTT"), ("a.vtt", "WEBVTT\n\n"),
                                        ("a.ass", ""), ("a.json", '{"segments": []}')])
def test_a_file_in_which_nothing_is_said(tmp_path, name, text):
    assert read_sentences(write(tmp_path / name, text)) == []


def test_endless_brackets_take_no_endless_time(tmp_path):
    begin = time.process_time()
    for name, text in {"a.srt": SRT + "[" * 200_000, "b.srt": SRT + "(" * 200_000, "c.vtt": VTT + "<" * 200_000,
                       "d.ass": ASS + "Dialogue: 0,0:00:00.50,0:00:01.50,D,,0,0,0,," + "{\\p1" * 100_000}.items():
        read_sentences(write(tmp_path / name, text))
    assert time.process_time() - begin < 5


# ---- transcripts ----


@pytest.mark.parametrize("value", [
    {"text": " ...", "language": "en", "segments": [  # Whisper
        {"id": 0, "start": 0.5, "end": 1.5, "text": " Hello Anna", "tokens": [1], "no_speech_prob": 0.01},
        {"id": 1, "start": 2.0, "end": 3.5, "text": " Where is number 42?"}]},
    {"segments": [  # WhisperX
        {"start": 0.5, "end": 1.5, "text": "Hello Anna", "speaker": "SPEAKER_00", "words": [
            {"word": "Hello", "start": 0.5, "end": 0.9, "score": 0.9}, {"word": "Anna"}]},
        {"start": 2.0, "end": 3.5, "text": "Where is number 42?", "words": []}], "word_segments": []},
    {"text": "...", "chunks": [{"timestamp": [0.5, 1.5], "text": " Hello Anna"},  # transformers
                               {"timestamp": [2.0, 3.5], "text": " Where is number 42?"}]},
    {"systeminfo": "", "transcription": [  # whisper.cpp
        {"timestamps": {"from": "00:00:00,500"}, "offsets": {"from": 500, "to": 1500}, "text": " Hello Anna"},
        {"offsets": {"from": 2000, "to": 3500}, "text": " Where is number 42?"}]},
    [{"start": 2.0, "end": 3.5, "text": "Where is number 42?"}, {"start": 0.5, "end": 1.5, "text": "Hello Anna"}],
])
def test_transcripts(tmp_path, value):
    path = write(tmp_path / "a.json", json.dumps(value))
    assert read_sentences(path) == [Timed(0.5, 1.5, "Hello Anna"), Timed(2.0, 3.5, "Where is number 42?")]


def test_the_last_chunk_may_have_no_end(tmp_path):
    path = write(tmp_path / "a.json", '{"chunks": [{"timestamp": [3.0, null], "text": "Bye"}]}')
    assert read_sentences(path) == [Timed(3.0, 13.0, "Bye")]


# ---- text tracks ----

HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,0

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""
CUES = [(500, 1000, "Hello <i>Anna</i>"), (2000, 1500, "number 42\nin the box")]
OF_CUES = [Timed(0.5, 1.5, "Hello Anna"), Timed(2.0, 3.5, "number 42 in the box")]


def movtext(text):
    return len(text.encode()).to_bytes(2, "big") + text.encode()


def movtext16(text: str) -> bytes:
    return (2 * len(text) + 2).to_bytes(2, "big") + b"\xfe\xff" + text.encode("utf-16-be")


def make_video(path: Path, tracks=(), *, sound: bool = False) -> Path:
    """Four seconds of video with text tracks: (codec, language, payload of a text, cues)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=5)
        video.width = video.height = 64
        streams = []
        for codec, language, payload, cues in tracks:
            stream = container.add_stream(codec)
            stream.codec_context.subtitle_header = HEADER
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            stream.metadata["language"] = language
            streams.append((stream, payload, cues))
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 5)
            container.mux(video.encode(frame))
        for stream, payload, cues in streams:
            for start, length, text in cues:
                packet = av.Packet(payload(text))
                packet.pts = packet.dts = start
                packet.duration, packet.time_base, packet.stream = length, Fraction(1, 1000), stream
                container.mux(packet)
        if audio is not None:
            tone = np.sin(np.arange(64000) * 2 * np.pi * 440 / 16000) * (np.arange(64000) >= 32000)
            frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
        container.mux(video.encode())
    return path


@pytest.mark.parametrize("name, codec, payload", [
    ("a.mp4", "mov_text", movtext), ("a.mp4", "mov_text", movtext16), ("a.mkv", "subrip", str.encode),
    ("a.mkv", "webvtt", str.encode),
    ("a.mkv", "ass", lambda text: f"0,0,Default,,0,0,0,,{text}".replace("\n", "\\N").encode()),
])
def test_text_tracks(tmp_path, name, codec, payload):
    assert read_sentences(make_video(tmp_path / name, [(codec, "eng", payload, CUES)])) == OF_CUES


def test_which_track(tmp_path):
    tracks = [("subrip", "ger", str.encode, [(0, 1000, "Hallo")]), ("subrip", "eng", str.encode, CUES)]
    path = make_video(tmp_path / "a.mkv", tracks)
    assert [cue.text for cue in read_sentences(path)] == ["Hallo"]
    assert read_sentences(path, "en") == OF_CUES
    with pytest.raises(InputError, match=r"no text track in fr \(2 tracks of other kinds or languages\)"):
        read_sentences(path, "fr")
    with pytest.raises(InputError, match=r"holds no text track \(no track of subtitles\)"):
        read_sentences(make_video(tmp_path / "b.mp4"))


# ---- the join with frames ----


def test_a_frame_gets_what_is_said_within_two_seconds():
    sentences = [Timed(0.0, 1.0, "a"), Timed(4.0, 8.0, "b"), Timed(8.5, 9.0, "b"), Timed(9.0, 9.5, "c")]
    assert said_around(sentences, [0.0, 2.0, 3.0, 3.001, 6.4, 8.0, 11.5, 11.6], 2.0) == [
        "a", "a b", "a b", "b", "b", "b c", "c", None]
    assert said_around(sentences, [0.5, 2.0], 0.0) == ["a", None] and said_around([], [1.0], 2.0) == [None]


def make_index(folder: Path, videos: dict[str, int]) -> Path:
    folder.mkdir()
    write(folder / "index.jsonl", "".join(json.dumps({"video": v, "times": [float(t) for t in range(n)]}) + "\n"
                                          for v, n in videos.items()))
    return folder


def run(*argv) -> None:
    narration.main(["import", *map(str, argv)])


def error(*argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    return str(stopped.value)


def test_a_folder_of_everything(tmp_path, capsys):
    frames, out = make_index(tmp_path / "frames", dict.fromkeys("abcdef", 10)), tmp_path / "s.jsonl"
    subs = tmp_path / "subs"
    subs.mkdir()
    write(subs / "a.en.srt", SRT)
    write(subs / "a.de.srt", SRT.replace("Hello", "Hallo"))
    write(subs / "b.vtt", "WEBVTT\n")
    write(subs / "c.json", json.dumps({"segments": [{"start": 3.0, "end": 4.0, "text": "Forty two."}]}))
    write(subs / "d.ass", "[Events]\nDialogue: 0\n")
    write(subs / "stranger.srt", SRT)
    make_video(subs / "e.mkv", [("subrip", "eng", str.encode, CUES)])
    make_video(subs / "c.mkv", [("subrip", "eng", str.encode, CUES)])  # beside its transcript: not looked at
    assert "a.de.srt" in (message := error(subs, "--frames", frames, "--out", out)) and "--language" in message
    run(subs, "--frames", frames, "--out", out, "--language", "en")
    printed = capsys.readouterr().out
    assert "1 files belong to no video" in printed and "stranger.srt" in printed
    assert "1 files give nothing" in printed and "d.ass:2: no Dialogue line" in printed
    said = load_narrations(out)
    assert {video: narrated.source for video, narrated in said.items()} == dict.fromkeys("abce", "speech")
    assert said["a"].captioner == "subtitles within=2" and said["a"].times == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert said["a"].sentences[0] == "Hello Anna Where is number 42? In the blue box & the red one."
    assert said["a"].sentences[5] == "Where is number 42? In the blue box & the red one." and said["b"].sentences == []
    assert (said["c"].times, said["c"].sentences) == ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], ["Forty two."] * 6)
    assert "18 of 60 frames have a sentence, in 3 of 6 videos; 1 are silent, 2 have no file" in printed
    failed = json.loads((tmp_path / "s.failed.jsonl").read_text())
    assert failed["video"] == "d" and failed["file"].endswith("d.ass")
    with pytest.raises(SystemExit) as stopped:
        narration.main(["check", str(out), "--frames", str(frames)])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "30.00%  of 60 frames" in printed
    assert "6  holes: some frames without a sentence" in printed and "0  missing" in printed
    run(subs / "c.json", "--frames", frames, "--out", out, "--within", 0)
    assert load_narrations(out)["c"].times == [3.0, 4.0] and not (tmp_path / "s.failed.jsonl").exists()


def test_imports_that_give_nothing(tmp_path):
    frames, out = make_index(tmp_path / "frames", {"a": 3}), tmp_path / "s.jsonl"
    assert "none of the 1 files belongs to a video" in error(write(tmp_path / "x.srt", SRT), "--frames", frames,
                                                             "--out", out)
    assert "in none of the 1 videos is anything said" in error(write(tmp_path / "a.srt", ""), "--frames", frames,
                                                               "--out", out)
    assert not out.exists()


def test_a_source_that_is_none_is_named(tmp_path):
    line = {"video": "a", "captioner": "c", "prompt": "", "source": "sound", "sentences": []}
    with pytest.raises(InputError, match="n.jsonl:1: a: \"source\" is 'sound'; it is \"speech\", or left out"):
        load_narrations(write(tmp_path / "n.jsonl", json.dumps(line)))


# ---- sound ----


def test_sound_begins_with_the_picture(tmp_path):
    sound = sound_of(make_video(tmp_path / "a.mp4", sound=True), 16000)
    assert sound.dtype == np.float32 and abs(len(sound) - 64000) < 2100
    loud = np.flatnonzero(np.abs(sound) > 0.3)
    assert abs(loud[0] - 32000) < 1200 and np.abs(sound[:30000]).max() < 0.05
    assert len(sound_of(make_video(tmp_path / "b.mp4"), 16000)) == 0
