"""The four pictures of README.md, from code, a run and a page: docs/pictures/.

  python scripts/make_pictures.py method                                  # the drawing, nothing else is needed
  python scripts/make_pictures.py --run runs/demo --index demo/index      # all, after scripts/demo.sh and its index

method.svg    the two streams, and the joint between what is trained and what has no weights
gallery.png   one answer of the gallery: frames, sentences, and the weights that the filter gives them
demo.png      the demo's loss and its table
search.png    the search page with one query

The last three want the demo's run; gallery and search also chromium and playwright (requirements.txt).
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from html import escape
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

from narvid import InputError
from narvid.files import write_text, writing
from narvid.flags import Parser, command

QUERY = "a scarlet triangle growing at the bottom, followed by a red square flashing on the left"
COLOURS = 96  # of a PNG: a page has few, and a small file is fetched sooner

# ------------------------------------------------------------------------------------------------------- the method

FRAMES, SENTENCES, WORDS, PURE = "#dbeaf7", "#fbe6d0", "#e4e0f3", "#e3f3ec"
BOXES = [  # x, y, width, height, fill, first line, second line
    (20, 60, 118, 56, FRAMES, "video", "K frames"),
    (20, 196, 118, 56, SENTENCES, "narration", "a sentence a frame"),
    (20, 342, 118, 56, WORDS, "query", "a sentence"),
    (170, 60, 100, 56, FRAMES, "image tower", "(K, D)"),
    (170, 196, 100, 56, SENTENCES, "text tower", "(K, D)"),
    (170, 342, 100, 56, WORDS, "text tower", "eos, words"),
    (302, 60, 96, 192, "#eef0f2", "co-attention", "Eq. 2"),
    (430, 60, 104, 56, FRAMES, "temporal", "frames (K, D)"),
    (430, 196, 104, 56, SENTENCES, "temporal", "narration (K, D)"),
    (302, 342, 232, 56, WORDS, "word weights", "from the words alone"),
    (602, 60, 112, 56, PURE, "filter", "weights by cosine"),
    (602, 196, 112, 56, PURE, "filter", "weights by cosine"),
    (746, 60, 112, 56, PURE, "coarse + fine", "S_qv (B, V)"),
    (746, 196, 112, 56, PURE, "coarse + fine", "S_qn (B, V)"),
    (890, 60, 130, 86, "#fdeaea", "training", "NCE of each view", "+ hard negatives"),
    (890, 166, 130, 86, "#f3f3dd", "evaluation", "standardise, add", "(Eq. 11), rank"),
]
ARROWS = [  # points of each line; the last one has the head
    [(138, 88), (170, 88)], [(138, 224), (170, 224)], [(138, 370), (170, 370)],
    [(270, 88), (302, 88)], [(270, 224), (302, 224)], [(270, 370), (302, 370)],
    [(398, 88), (430, 88)], [(398, 224), (430, 224)],
    [(534, 88), (602, 88)], [(534, 224), (602, 224)],
    [(714, 88), (746, 88)], [(714, 224), (746, 224)],
    [(534, 370), (658, 370), (658, 252)], [(658, 196), (658, 116)], [(802, 370), (802, 252)], [(802, 196), (802, 116)],
    [(858, 88), (890, 88)], [(858, 224), (890, 224)],
    [(858, 100), (874, 100), (874, 190), (890, 190)], [(858, 212), (868, 212), (868, 124), (890, 124)],
]
LINES = [[(658, 370), (802, 370)]]
JOINT, WIDTH, HEIGHT = 568, 1040, 440


def method_svg() -> str:
    """The drawing, as text that is the same every time."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
             'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="NarVid: frames and narration are '
             'enhanced once per video, before the joint; the query meets both after it">',
             '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
             '<path d="M0,0 L7,3 L0,6 z" fill="#444"/></marker></defs>',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    parts += [_text(20, 28, "before the joint: trained, one item at a time", size=15, weight="bold"),
              _text(20, 46, "each video and each query is encoded once", colour="#555"),
              _text(602, 28, "after it: pairs, formulas alone", size=15, weight="bold"),
              _text(602, 46, "the same ones in training and in evaluation", colour="#555"),
              f'<line x1="{JOINT}" y1="14" x2="{JOINT}" y2="{HEIGHT - 14}" stroke="#b03030" stroke-width="2" '
              'stroke-dasharray="7 5"/>',
              _text(JOINT + 8, HEIGHT - 18, "the joint", colour="#b03030", weight="bold"),
              _text(20, HEIGHT - 18, "K frames and sentences of a video, D width of all features, B queries, V videos",
                    colour="#555")]
    for points in [*ARROWS, *LINES]:
        path = " ".join(f"{x},{y}" for x, y in points)
        head = "" if points in LINES else ' marker-end="url(#head)"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.5"{head}/>')
    for x, y, width, height, fill, *lines in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="#666"/>')
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            parts.append(_text(x + width / 2, top + 18 * i, line, middle=True, size=13 if i == 0 else 11.5,
                               weight="bold" if i == 0 else "normal", colour="#111" if i == 0 else "#333"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, size: float = 12, weight: str = "normal", colour: str = "#111",
          middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{colour}"{anchor}>'
            f'{escape(text)}</text>')


# ----------------------------------------------------------------------------------------------------- curve and table


def draw_demo(run: Path, out: Path) -> None:
    """Loss over steps on the left, the table of Table 10 on the right."""
    from narvid.report.drawing import pyplot
    from narvid.report.figures import curve_data, read_run

    of_run = read_run(run, run.parent)
    losses, _ = curve_data(of_run)
    if of_run.final is None or not losses:
        raise InputError(f"{run}: has not ended, or logged no step; bash scripts/demo.sh trains it")
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 1.9), width_ratios=(1, 1.5))
    for name, line in losses.items():
        whole = name == "loss"
        left.plot(*zip(*line), label=name, color="black" if whole else None, ls="-" if whole else "--")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    left.legend()
    final = of_run.final["metrics"]
    rows = [[f"{table[direction][name]:.1f}" for direction in ("text_to_video", "video_to_text")
             for name in ("R@1", "R@5", "R@10", "MdR")] for table in final.values()]
    right.axis("off")
    table = right.table(rows, rowLabels=[*final], colLabels=["R@1", "R@5", "R@10", "MdR"] * 2, loc="center",
                        cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    table.scale(1, 1.25)
    right.set_title(f"{of_run.final['queries']} queries, {of_run.final['videos']} videos: text-to-video | "
                    "video-to-text")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    save_png(picture.getvalue(), out / "demo.png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ browser


@contextmanager
def browser(width: int, height: int):
    """A page of a headless browser; InputError where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        raise InputError("no chromium and no chrome is on this machine: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise InputError(f"pictures of pages need playwright ({error}): pip install playwright") from error
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root wants it
        try:
            yield started.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        finally:
            started.close()


def shoot_gallery(run: Path, out: Path) -> None:
    """The gallery of a run: the first answer to the first query that S_fusion finds and S_qv alone does not."""
    from narvid.report import gallery

    with tempfile.TemporaryDirectory() as folder:
        gallery.main(["--run", str(run), "--out", str(Path(folder, "gallery")), "--queries", "100", "--top", "1"])
        with browser(1000, 900) as page:
            page.goto(Path(folder, "gallery", "index.html").as_uri())
            page.locator("#filters button", has_text="gained").click()
            page.wait_for_selector(".answer.right .tile")
            page.add_style_tag(content="body, #sides { display: block } main { padding: 10px 14px }"
                                       "nav, #steps, #note, .side:first-of-type { display: none }"
                                       ".strip { grid-template-columns: repeat(6, 150px) } #query { max-width: none }")
            page.wait_for_timeout(500)  # its pictures
            top, answer = page.locator("#query").bounding_box(), page.locator(".answer.right").last.bounding_box()
            clip = {"x": 0, "y": top["y"] - 8, "width": 1000, "height": answer["y"] + answer["height"] - top["y"] + 18}
            save_png(page.screenshot(clip=clip), out / "gallery.png")


def shoot_search(index: Path, out: Path) -> None:
    """The page of `narvid.search serve` with one query."""
    command_line = [sys.executable, "-m", "narvid.search", "serve", str(index), "--port", "8765"]
    server = subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for("http://127.0.0.1:8765/", server)
        with browser(1000, 620) as page:
            page.goto(f"http://127.0.0.1:8765/?q={quote(QUERY)}")
            page.wait_for_selector("#answers img", timeout=120_000)
            page.wait_for_timeout(3000)  # its pictures
            save_png(page.screenshot(), out / "search.png")
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Until the server answers; InputError with its last words where it ends before."""
    for _ in range(600):
        if server.poll() is not None:
            said = server.stderr.read().strip().splitlines() or [""]
            raise InputError(f"the search page did not start: {said[-1]}")
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise InputError("the search page did not answer within two minutes")


def save_png(picture: bytes, path: Path) -> None:
    """A picture with few colours, as small as PNG makes it."""
    small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    with writing(path, binary=True) as file:
        small.save(file, format="PNG", optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Make those that were asked for."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("which", nargs="*", help="method, gallery, demo, search [all]")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the run of scripts/demo.sh")
    parser.add_argument("--index", type=Path, default=Path("demo/index"),
                        help="its search index, made as scripts/demo.sh says")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    args = parser.parse_args(argv)
    makers = {"method": lambda: write_text(args.out / "method.svg", method_svg()),
              "gallery": lambda: shoot_gallery(args.run, args.out), "demo": lambda: draw_demo(args.run, args.out),
              "search": lambda: shoot_search(args.index, args.out)}
    if unknown := [name for name in args.which if name not in makers]:
        parser.error(f"{unknown[0]}: choose from {', '.join(makers)}")
    for name in args.which or makers:
        makers[name]()
        print(f"{args.out}: {name}")


if __name__ == "__main__":
    command(main)
