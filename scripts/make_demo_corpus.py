"""The embedded corpus: real video files that the project generates itself, annotated in MSR-VTT's own formats.

    python scripts/make_demo_corpus.py videos  --out demo          # videos/, annotations/, truth.jsonl
    python scripts/make_demo_corpus.py narrate --out demo          # narrations.jsonl, once the frames are extracted

A video is three events (`--events`) one after the other on one background. An event is a coloured shape doing something
somewhere: 8 colours x 6 shapes x 5 actions x 5 places. A query (grammar A) names two of them in order, or one, or as it
falls (`--mentioned`); a narration (grammar B) has one sentence a frame, written by an imperfect captioner simulated
from the stored truth. The grammars share no word for a colour, shape, action or place. Everything depends on the seed
and the video's number alone, so neither the order nor the number of workers matters.

What lives here: the grammars, the drawing, the encoding, the annotation files. What must not: anything training reads
that a real corpus does not have. `truth.jsonl` is for the simulated captioner and the tests only.
"""

import argparse
import math
import multiprocessing
import os
import sys
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone that is not installed

from narvid import InputError
from narvid.files import lock, read_csv, read_json, read_json_lines, write_csv, write_json, write_json_lines, writing
from narvid.flags import Parser, command, count, share
from narvid.progress import tqdm

SIDE, FPS = 96, 4  # pixels, frames a second
EVENTS, MENTIONED, CAPTIONS = 3, 2, 20  # of each video, of each query, of each video; the first two by default
GENERATOR = 1  # raised when the same seed would give another corpus
TRUTH_STREAM, PICTURE_STREAM, QUERY_STREAM, NARRATION_STREAM = range(4)  # independent random numbers of one video

# ------------------------------------------------------------------------------------------------- the two grammars
ATTRIBUTES = ("colour", "shape", "action", "place")
RGB = {
    "red": (215, 30, 35), "orange": (250, 135, 15), "yellow": (245, 225, 30), "green": (25, 155, 50),
    "blue": (30, 70, 220), "purple": (140, 40, 170), "white": (250, 250, 250), "black": (12, 12, 12),
}
WORDS = {  # attribute -> value -> (words of a query, words of a narration); the usual word first, then a rarer one
    "colour": {
        "red": (("red", "scarlet"), ("crimson", "ruby")),
        "orange": (("orange", "tangerine"), ("amber", "pumpkin")),
        "yellow": (("yellow", "lemon"), ("golden", "canary")),
        "green": (("green", "emerald"), ("lime", "jade")),
        "blue": (("blue", "azure"), ("cobalt", "navy")),
        "purple": (("purple", "violet"), ("lilac", "plum")),
        "white": (("white", "snowy"), ("ivory", "pale")),
        "black": (("black", "dark"), ("ebony", "charcoal")),
    },
    "shape": {
        "circle": (("circle", "disc"), ("ball", "dot")),
        "square": (("square", "box"), ("block", "tile")),
        "triangle": (("triangle", "wedge"), ("pyramid", "arrowhead")),
        "star": (("star", "spark"), ("starfish", "asterisk")),
        "cross": (("cross", "crucifix"), ("plus", "junction")),
        "crescent": (("crescent", "horn"), ("moon", "sickle")),
    },
    "action": {
        "slide": (("sliding", "gliding"), ("drifts", "skates")),
        "bounce": (("bouncing", "hopping"), ("leaps", "jumps")),
        "spin": (("spinning", "rotating"), ("turns", "whirls")),
        "grow": (("growing", "swelling"), ("expands", "inflates")),
        "flash": (("flashing", "blinking"), ("flickers", "twinkles")),
    },
    "place": {
        "left": (("on the left", "at the left side"), ("in the west", "near the western edge")),
        "right": (("on the right", "at the right side"), ("in the east", "near the eastern edge")),
        "top": (("at the top", "up high"), ("near the ceiling", "in the upper part")),
        "bottom": (("at the bottom", "down low"), ("near the floor", "in the lower part")),
        "middle": (("in the middle", "in the center"), ("amid the picture", "halfway across")),
    },
}
QUERY, NARRATION = 0, 1  # which grammar of WORDS
USUAL = 0.8  # chance of the usual word: people and captioners have habits
QUERY_FRAMES = (  # the two events in the order in which they happen; for a parser, the most special first
    "first {} , then {}", "{} , followed by {}", "{} , and later {}", "{} , and after that {}", "{} , then {}",
)
MENTIONS = ("{article} {colour} {shape} {action} {place}", "{place} {article} {colour} {shape} {action}")
SENTENCES = (
    "{article} {colour} {shape} {action} {place}", "{place} , {article} {colour} {shape} {action}",
    "we see how {article} {colour} {shape} {action} {place}", "{colour} {shape} that {action} {place}",
)


def random_of(seed: int, number: int, stream: int) -> np.random.Generator:
    """The random numbers of one video for one purpose."""
    return np.random.default_rng([seed, number, stream])


def pick(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


def draw_event(rng: np.random.Generator) -> dict:
    """Colour, shape, action and place of one event, uniform and independent."""
    return {attribute: pick(rng, list(WORDS[attribute])) for attribute in ATTRIBUTES}


def say(rng: np.random.Generator, templates, named: dict, grammar: int) -> str:
    """One event in words. `named`: attribute -> value; what is missing is not mentioned (a missing shape: "thing")."""
    words = {attribute: "" for attribute in ATTRIBUTES} | {"shape": "thing"}
    for attribute, value in named.items():
        words[attribute] = WORDS[attribute][value][grammar][int(rng.random() > USUAL)]
    noun = words["colour"] or words["shape"]
    text = pick(rng, templates).format(article="an" if noun[0] in "aeiou" else "a", **words)
    return " ".join(text.split())


def seconds_of(events: int) -> int:
    """How long a video of so many events is."""
    return 2 * events + 2


def make_truth(seed: int, number: int, count: int = EVENTS) -> list[dict]:
    """The events of one video: [{"start", "end" (seconds), "colour", "shape", "action", "place"}].

    At one frame a second, from 0, every event shows in at least two frames, two of them or one in two more in all; a
    cut lies 1-2 frames before a second.
    """
    rng = random_of(seed, number, TRUTH_STREAM)
    longer = [(i, i) for i in reversed(range(count))] + [*combinations(range(count), 2)][::-1]
    chosen = pick(rng, longer)
    lengths = [2 + chosen.count(i) for i in range(count)]  # in frames at 1 fps
    cuts = [second - int(rng.integers(1, 3)) / FPS for second in np.cumsum(lengths)[:-1].tolist()]
    events = [draw_event(rng) for _ in range(count)]
    while any(events[i] == events[j] for i in range(count) for j in range(i)):
        events = [draw_event(rng) for _ in range(count)]
    edges = [0.0, *cuts, float(seconds_of(count))]
    return [{"start": edges[i], "end": edges[i + 1], **events[i]} for i in range(count)]


def make_queries(seed: int, number: int, events: list[dict], count: int = CAPTIONS,
                 mentioned: int = MENTIONED) -> list[tuple[str, list[dict]]]:
    """`count` different captions of one video, each with what it mentions: one of the events or two, in order.

    mentioned 0: one or two, as it falls. A mention names all four attributes in three cases of four, else three.
    """
    rng = random_of(seed, number, QUERY_STREAM)
    queries = {}
    while len(queries) < count:
        named = mentioned or int(rng.integers(1, 3))
        if named == len(events) - 1:
            unmentioned = {rng.integers(len(events))}
        else:
            unmentioned = {*range(len(events))} - {*rng.choice(len(events), named, replace=False).tolist()}
        mentions = []
        for event in (events[i] for i in range(len(events)) if i not in unmentioned):
            left_out = pick(rng, ATTRIBUTES) if rng.random() < 0.25 else None
            mentions.append({attribute: event[attribute] for attribute in ATTRIBUTES if attribute != left_out})
        frames = QUERY_FRAMES if named == 2 else ("{}",)
        text = pick(rng, frames).format(*(say(rng, MENTIONS, mention, QUERY) for mention in mentions))
        queries.setdefault(text, mentions)
    return list(queries.items())


def fits(mentions: list[dict], events: list[dict]) -> bool:
    """Whether a query is true of a video: its one or two mentions agree with as many events, in order."""
    agrees = [[all(event[a] == value for a, value in mention.items()) for event in events] for mention in mentions]
    if len(mentions) == 1:
        return any(agrees[0])
    return any(agrees[0][i] and agrees[1][j] for j in range(len(events)) for i in range(j))


# ------------------------------------------------------------------------------------------------------ the picture
HOME = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}  # y downwards
REACH = 0.27  # of the side: how far the four outer places lie from the middle


def outline_of(shape: str) -> np.ndarray:
    """The corners (n, 2) of a shape of radius about 1 around (0, 0)."""
    if shape == "cross":
        w = 0.36
        right = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        return np.array(right + [(-x, -y) for x, y in right])
    if shape == "crescent":
        outer, inner = np.linspace(0.75, 2 * math.pi - 0.75, 30), np.linspace(2 * math.pi - 1.16, 1.16, 24)
        bite = np.stack([0.42 + 0.75 * np.cos(inner), 0.75 * np.sin(inner)], 1)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), bite]) + (0.3, 0)  # centred
    radius, angles = {
        "circle": (np.full(40, 0.92), np.arange(40) * np.pi / 20),
        "square": (np.full(4, 1.15), (np.arange(4) + 0.5) * np.pi / 2),
        "triangle": (np.full(3, 1.2), -np.pi / 2 + np.arange(3) * 2 * np.pi / 3),
        "star": (np.tile([1.25, 0.5], 5), -np.pi / 2 + np.arange(10) * np.pi / 5),
    }[shape]
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


def put(points: np.ndarray, centre, radius: float, degrees: float = 0.0) -> list[np.ndarray]:
    """Turn, scale and move corners (n, 2); the answer is in sixteenths of a pixel, for cv2 with shift=4."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [np.round((points @ np.array([(c, s), (-s, c)]) * radius + centre) * 16).astype(np.int32)]


def make_background(rng: np.random.Generator) -> np.ndarray:
    """A muted picture (SIDE, SIDE, 3) uint8: two greyish tints mixed by a ramp, stripes, checks or clouds; noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    clouds = cv2.resize(rng.random((5, 5)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    checks = (np.floor(x / period) + np.floor(y / period)) % 2
    mix = pick(rng, [(ramp - ramp.min()) / np.ptp(ramp), 0.5 + 0.5 * np.sin(2 * np.pi * ramp / period), checks, clouds])
    tints = rng.uniform(80, 160, (2, 1)) + rng.uniform(-14, 14, (2, 3))
    picture = tints[0] + mix[..., None] * (tints[1] - tints[0]) + rng.normal(0, rng.uniform(1, 5), (SIDE, SIDE, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def make_look(rng: np.random.Generator, event: dict, background: np.ndarray) -> dict:
    """What the words do not say: exact place, size, tint, tilt, direction, rhythm."""
    home = np.array(HOME[event["place"]])
    colour = np.clip(np.array(RGB[event["colour"]]) + rng.integers(-12, 13, 3), 0, 255)
    along = home[0] if event["action"] == "slide" else home[1]
    return {
        "corners": outline_of(event["shape"]),
        "centre": (0.5 + REACH * home + rng.uniform(-0.035, 0.035, 2)) * SIDE,
        "radius": rng.uniform(0.15, 0.19) * SIDE,
        "colour": colour.tolist(),
        "faint": ((colour + background.mean((0, 1))) / 2).tolist(),  # of a trail
        "tilt": rng.uniform(-12, 12),
        "sense": int(along) or pick(rng, (-1, 1)),  # outwards, so that the trail lies within the picture
        "beat": rng.random(),
    }


def draw_event_in(frame: np.ndarray, action: str, look: dict, phase: float, now: float) -> None:
    """Draw one event into a frame (SIDE, SIDE, 3). `phase`: the share of the event that has passed; `now`: seconds.

    Every action shows in a single frame, by the marks a comic would use: a trail, arcs, rings, rays.
    """
    corners, colour, radius, sense, degrees = (look[k] for k in ("corners", "colour", "radius", "sense", "tilt"))
    fill = partial(cv2.fillPoly, frame, lineType=cv2.LINE_AA, shift=4)
    line = partial(cv2.polylines, frame, lineType=cv2.LINE_AA, shift=4)
    way = {"slide": np.array([sense, 0.0]), "bounce": np.array([0.0, sense])}.get(action)
    swing = phase if action == "slide" else abs(math.sin(math.pi * (1.1 * now + look["beat"])))
    centre = look["centre"] if way is None else look["centre"] + way * (swing - 0.5) * 0.1 * SIDE
    if way is not None:  # a trail behind it: sideways, or below or above it
        for step in (3, 2, 1):
            fill(put(corners, centre - way * step * 0.42 * radius, 0.85 * radius, degrees), color=look["faint"])
    if action == "spin":  # it turns, with two arcs around it
        degrees += sense * 150 * now
        for start in (0, 180):
            arc = np.radians(degrees + start + np.arange(0, 121, 10))
            line(put(np.stack([np.cos(arc), np.sin(arc)], 1), centre, 1.5 * radius), False, colour, 2)
    if action == "grow":  # from small to large, with two rings of its own outline
        radius *= 0.6 + 0.5 * phase
        for ring in (1.45, 1.9):
            line(put(corners, centre, ring * radius, degrees), True, colour, 1)
    if action == "flash":  # filled and hollow in turn, always with rays
        for ray in np.arange(8) * np.pi / 4 + look["beat"]:
            line(put(np.outer((1.4, 1.85), (math.cos(ray), math.sin(ray))), centre, radius), False, colour, 2)
        if math.sin(2 * math.pi * (1.3 * now + look["beat"])) < 0:
            line(put(corners, centre, 0.85 * radius, degrees), True, colour, 3)
            return
    fill(put(corners, centre, radius, degrees), color=colour)


def render(seed: int, number: int, events: list[dict]) -> np.ndarray:
    """The frames (seconds * FPS, SIDE, SIDE, 3) uint8 RGB of one video."""
    rng = random_of(seed, number, PICTURE_STREAM)
    background = make_background(rng)
    looks = [make_look(rng, event, background) for event in events]
    specks = [(rng.random(2), rng.uniform(-0.05, 0.05, 2), rng.uniform(60, 190)) for _ in range(rng.integers(2, 6))]
    drift, rhythm = rng.uniform(0, 0.1), rng.uniform(0, 2 * np.pi)
    frames = np.empty((seconds_of(len(events)) * FPS, SIDE, SIDE, 3), np.uint8)
    for index, frame in enumerate(frames):
        now = index / FPS
        frame[:] = background
        for start, speed, grey in specks:  # small grey distractors that no sentence mentions
            at = np.round(((start + speed * now) % 1) * SIDE * 16).astype(int).tolist()
            cv2.circle(frame, at, 28, (grey,) * 3, -1, cv2.LINE_AA, 4)
        event, look = next(pair for pair in zip(events, looks, strict=True) if now < pair[0]["end"])
        phase = (now - event["start"]) / (event["end"] - event["start"])
        draw_event_in(frame, event["action"], look, phase, now)
        cv2.convertScaleAbs(frame, frame, 1 + drift * math.sin(0.8 * now + rhythm))
    return frames


def encode(frames: np.ndarray, path: Path) -> None:
    """Write frames (n, SIDE, SIDE, 3) uint8 RGB as H.264 mp4."""
    with writing(path, binary=True) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "21"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = SIDE, SIDE, "yuv420p", FPS
        stream.codec_context.thread_count = 1  # the same bytes on every machine; the workers fill the cores
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def make_video(number: int, *, seed: int, events: int, folder: Path) -> None:
    """Write one video: the unit of work of a process."""
    cv2.setNumThreads(1)
    encode(render(seed, number, make_truth(seed, number, events)), folder / f"video{number}.mp4")


# ----------------------------------------------------------------------------------------------------- the annotation
def write_annotations(out: Path, *, seed: int, train: int, val: int, test: int, events_of_video: int = EVENTS,
                      mentioned: int = MENTIONED) -> list[list[dict]]:
    """Write MSRVTT_data.json, the lists of 9k and (with val) full, truth.jsonl; returns what all test captions mention.

    As in MSR-VTT, every video has 20 captions; the query of a test video is its first one in 9k, in full all of them.
    """
    videos, sentences, truth, queries, said = [], [], [], [], []
    split_of = ["train"] * train + ["validate"] * val + ["test"] * test
    for number, split in enumerate(split_of):
        name = f"video{number}"
        events = make_truth(seed, number, events_of_video)
        captions = make_queries(seed, number, events, mentioned=mentioned)
        videos.append({"category": 0, "url": "", "video_id": name, "start time": 0.0, "end time": events[-1]["end"],
                       "split": split, "id": number})
        sentences += [{"caption": text, "video_id": name} for text, _ in captions]
        truth.append({"video": name, "split": split, "events": events})
        if split == "test":
            queries.append((name, captions[0][0]))
            said += [mentions for _, mentions in captions]
    for sen_id, sentence in enumerate(sentences):
        sentence["sen_id"] = sen_id
    info = {"description": "generated by scripts/make_demo_corpus.py", "version": str(GENERATOR), "seed": seed}
    annotations = out / "annotations"
    write_json(annotations / "MSRVTT_data.json", {"info": info, "videos": videos, "sentences": sentences})
    lists = {"train.9k": "train"}
    lists |= {"train.full": "train", "val.full": "validate", "test.full": "test"} if val else {}
    for name, split in lists.items():
        rows = [["video_id"], *([f"video{number}"] for number, of in enumerate(split_of) if of == split)]
        write_csv(annotations / f"MSRVTT_{name}.csv", rows)
    rows = [["key", "vid_key", "video_id", "sentence"]]
    rows += [[f"ret{i}", name.replace("video", "msr"), name, text] for i, (name, text) in enumerate(queries)]
    write_csv(annotations / "MSRVTT_JSFUSION_test.csv", rows)
    write_json_lines(out / "truth.jsonl", truth)
    return said


def ambiguous(mentions_of_query: list[list[dict]], events_of_video: list[list[dict]]) -> list[bool]:
    """Whether each query is true of a video that is not its own; every video has as many queries, in its order."""
    with_event = {}  # what can be said of an event -> the videos that have such a one
    for video, events in enumerate(events_of_video):
        for event in events:
            known = [(attribute, event[attribute]) for attribute in ATTRIBUTES]
            for said in (said for n in range(len(known) + 1) for said in combinations(known, n)):
                with_event.setdefault(frozenset(said), set()).add(video)
    queries_of_video = len(mentions_of_query) // max(len(events_of_video), 1)
    return [any(fits(mentions, events_of_video[video])
                for video in with_event.get(frozenset(mentions[0].items()), ())
                if video != query // queries_of_video)
            for query, mentions in enumerate(mentions_of_query)]


def make_videos(args: argparse.Namespace) -> None:
    settings, wanted = args.out / "generator.json", {"generator": GENERATOR, "seed": args.seed}
    if (args.events, args.mentioned) != (EVENTS, MENTIONED):
        wanted |= {"events": args.events, "mentioned": args.mentioned}
    if args.mentioned >= args.events:
        raise InputError(f"--mentioned {args.mentioned}: a query leaves out at least one of --events {args.events}")
    if settings.is_file() and (found := read_json(settings)) != wanted:
        raise InputError(f"{args.out} holds the corpus of {found}, not of {wanted}: give another --out, or delete it")
    folder, total = args.out / "videos", args.train + args.val + args.test
    write_json(settings, wanted)
    mentions = write_annotations(args.out, seed=args.seed, train=args.train, val=args.val, test=args.test,
                                 events_of_video=args.events, mentioned=args.mentioned)
    missing = [number for number in range(total) if not (folder / f"video{number}.mp4").is_file()]
    work = partial(make_video, seed=args.seed, events=args.events, folder=folder)
    workers = min(args.workers, math.ceil(len(missing) / 8))
    bar = partial(tqdm, total=len(missing), desc="videos", unit="video")
    with lock(folder):  # what a killed run left half written goes
        if workers > 1:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for _ in bar(pool.imap_unordered(work, missing, 8)):
                    pass
        else:
            for number in bar(missing):
                work(number)
    truth = [make_truth(args.seed, number, args.events) for number in range(total - args.test, total)]
    counts = f"{args.train} training, {args.val} validation, {args.test} test videos"
    print(f"{args.out}: {counts}; {len(missing)} of them new")
    asked = {"9k": mentions[::CAPTIONS]} | ({"full": mentions} if args.val else {})
    doubtful = [f"{sum(ambiguous(of, truth))} of {len(of)} (protocol {name})" for name, of in asked.items()]
    print(f"test queries that also fit another test video: {', '.join(doubtful)}")


# ------------------------------------------------------------------------------------------------------ the narration
def unlike(rng: np.random.Generator, attribute: str, value: str) -> str:
    return pick(rng, [other for other in WORDS[attribute] if other != value])


def hallucinate(rng: np.random.Generator, events: list[dict]) -> dict:
    """An event that shares at most one attribute with any event of the video."""
    while True:
        made_up = draw_event(rng)
        if all(sum(made_up[a] == event[a] for a in ATTRIBUTES) <= 1 for event in events):
            return made_up


def narrate_video(rng: np.random.Generator, events: list[dict], times: list[float], rates: dict) -> list[dict]:
    """The captioner on one video: [{"time", "text", "wrong"}], one a frame; "wrong" names the errors made.

    rates: "hallucination" = share of the sentences about something that is nowhere in the video; "colour", "shape" =
    shares of the others with that attribute wrong; "repeat" = chance that another sentence about the same event is the
    last one again, errors included: shown two like frames, a captioner says the same. Repeating changes no rate.
    """
    sentences, last_of_event = [], {}
    for time in times:
        turn = next((i for i, event in enumerate(events) if time < event["end"]), len(events) - 1)
        if rng.random() < rates["hallucination"]:
            text = say(rng, SENTENCES, hallucinate(rng, events), NARRATION)
            sentences.append({"time": time, "text": text, "wrong": ["hallucination"]})
            continue
        if turn not in last_of_event or rng.random() >= rates["repeat"]:
            seen = {attribute: events[turn][attribute] for attribute in ATTRIBUTES}
            wrong = [attribute for attribute in ("colour", "shape") if rng.random() < rates[attribute]]
            seen |= {attribute: unlike(rng, attribute, seen[attribute]) for attribute in wrong}
            last_of_event[turn] = {"text": say(rng, SENTENCES, seen, NARRATION), "wrong": wrong}
        sentences.append({"time": time, **last_of_event[turn]})
    return sentences


def read_truth(path: Path) -> dict[str, list[dict]]:
    """truth.jsonl as {video: events}."""
    if not path.is_file():
        raise InputError(f"{path} is missing: run `make_demo_corpus.py videos` first")
    return {line["video"]: line["events"] for _, line in read_json_lines(path)}


def narrate(args: argparse.Namespace) -> None:
    from narvid.data.frames import load_frame_index  # here, so that the workers of `videos` do not load them
    from narvid.data.narrations import Narration, write_narrations

    truth, frames = read_truth(args.out / "truth.jsonl"), args.frames or args.out / "frames"
    times = load_frame_index(frames)
    if unknown := next((video for video in truth if not times.get(video)), None):
        raise InputError(f"{frames} has no frames of {unknown}: run scripts/extract_frames.py again, then this")
    rates = {name: getattr(args, f"{name}_rate") for name in ("colour", "shape", "hallucination", "repeat")}
    written = {}
    for video, events in tqdm(truth.items(), desc="narrations"):
        rng = random_of(args.seed, int(video.removeprefix("video")), NARRATION_STREAM)
        written[video] = narrate_video(rng, events, times[video], rates)
    write_narrations(args.out / "narrations.jsonl", (
        (video, Narration("simulated", "", [s["time"] for s in sentences], [s["text"] for s in sentences]))
        for video, sentences in written.items()))
    report(written, args.out / "annotations" / "MSRVTT_JSFUSION_test.csv")


def report(written: dict[str, list[dict]], queries: Path) -> None:
    """Print the realised error rates, how often neighbours are equal, and some examples."""
    sentences = [sentence for of_video in written.values() for sentence in of_video]
    others = [sentence for sentence in sentences if "hallucination" not in sentence["wrong"]]
    colour, shape = (sum(name in s["wrong"] for s in others) / max(len(others), 1) for name in ("colour", "shape"))
    equal = [a["text"] == b["text"] for of_video in written.values() for a, b in pairwise(of_video)]
    print(f"{len(sentences)} sentences, {len({s['text'] for s in sentences})} different")
    print(f"hallucinated {1 - len(others) / len(sentences):.1%}; of the others wrong colour {colour:.1%}, "
          f"wrong shape {shape:.1%}; equal neighbours {sum(equal) / max(len(equal), 1):.1%}")
    for _, row in read_csv(queries, ["video_id", "sentence"])[:3]:
        print(f"query of {row['video_id']}: {row['sentence']}")
        for s in written[row["video_id"]]:
            print(f"  {s['time']:4.1f} s  {s['text']}" + (f"   <- wrong {', '.join(s['wrong'])}" if s["wrong"] else ""))


# --------------------------------------------------------------------------------------------------- the command line
def parse_args(argv=None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    form = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    videos = commands.add_parser("videos", help="write videos/, annotations/ and truth.jsonl", **form)
    videos.add_argument("--train", type=count, default=1280, help="training videos")
    videos.add_argument("--val", type=count, default=0, help="validation videos, of protocol full")
    videos.add_argument("--test", type=count, default=250, help="test videos")
    videos.add_argument("--events", type=int, choices=range(2, 9), default=EVENTS, help="of a video, 2 s and more each")
    videos.add_argument("--mentioned", type=int, choices=(0, 1, 2), default=MENTIONED,
                        help="events that a query names; 0: one or two, as it falls")
    videos.add_argument("--workers", type=count, default=os.cpu_count(), help="processes")
    narrator = commands.add_parser("narrate", help="write narrations.jsonl from the truth", **form)
    narrator.add_argument("--frames", type=Path, help="folder of extracted frames; <out>/frames where not given")
    narrator.add_argument("--hallucination_rate", type=share, default=0.05,
                          help="share of sentences about nothing shown")
    narrator.add_argument("--colour_rate", type=share, default=0.08, help="share of the others with a wrong colour")
    narrator.add_argument("--shape_rate", type=share, default=0.08, help="share of the others with a wrong shape")
    narrator.add_argument("--repeat_rate", type=share, default=0.85,
                          help="chance to repeat the last sentence about the same event")
    for parser_of_one in (videos, narrator):
        parser_of_one.add_argument("--out", type=Path, required=True, help="folder of the corpus")
        parser_of_one.add_argument("--seed", type=count, default=0, help="all random choices depend on it")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    {"videos": make_videos, "narrate": narrate}[args.command](args)


if __name__ == "__main__":
    command(main)
