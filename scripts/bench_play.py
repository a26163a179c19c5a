"""From a click on an answer to its first picture, in a real browser, for every answer to one query.

  narvid-search serve INDEX          and, while it runs:
  python scripts/bench_play.py --address http://127.0.0.1:8000 --query "a man talks"

Printed for each: the seconds, whether it is the file or a preview of it, and whether sound was decoded. Chromium or
Chrome must be installed, and playwright.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from narvid import InputError
from narvid.flags import Parser, command, positive, positive_float

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOWN = "() => { const v = document.querySelector('video'); return v && v.readyState > 1 && v.videoWidth > 0; }"
WHAT = "() => { const v = document.querySelector('video'); return [v.currentSrc, v.webkitAudioDecodedByteCount > 0]; }"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--address", required=True, metavar="URL", help="of a running narvid-search serve")
    add("--query", required=True, metavar="TEXT", help="what is searched for")
    add("--top", type=positive, default=24, help="answers that are clicked, at most 24 [24]")
    add("--longest", type=positive_float, default=20.0, help="seconds after which a click has failed [20]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Click them all and print."""
    args = parse_args(argv)
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise InputError("playwright is not installed: pip install playwright") from error
    if browser is None:
        raise InputError(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        page = playwright.chromium.launch(executable_path=browser, args=flags).new_page()
        try:
            page.goto(f"{args.address.rstrip('/')}/?{urlencode({'q': args.query})}")
            cards = page.locator("#answers .card")
            cards.first.wait_for()
        except Error as error:
            raise InputError(f"--address {args.address}: no page with answers there ({error.message[:80]})") from error
        for n in range(min(args.top, cards.count())):
            name, start = cards.nth(n).locator(".name").inner_text(), time.perf_counter()
            cards.nth(n).locator("button").click()
            try:
                page.wait_for_function(SHOWN, timeout=1000 * args.longest, polling=20)
            except Error:
                print(f"{name:30}  nothing in {args.longest:g} s")
            else:
                took = time.perf_counter() - start
                page.wait_for_timeout(500)  # for some sound
                address, sound = page.evaluate(WHAT)
                kind = "preview" if "/preview/" in address else "file"
                print(f"{name:30}  {took:5.2f} s  {kind:7}  {'sound' if sound else 'no sound'}", flush=True)
            page.keyboard.press("Escape")


if __name__ == "__main__":
    command(main)
