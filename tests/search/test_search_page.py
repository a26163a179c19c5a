"""The page of narvid.search in a real browser: typing, keys, clips, going back, a phone's width, hostile names.

Where axe-core lies (npm install axe-core in the top folder, or $NARVID_AXE) it looks for what a screen reader misses.

One headless browser for the whole file; the server and its index are those of test_search_server.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from test_search_server import HOSTILE, HOSTILE_SENTENCE, FakeEngine, make_index, put, running

from narvid.search import server
from narvid.search.store import Store

BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSERS, reason="no chromium and no chrome on this machine")]
AXE = Path(os.environ.get("NARVID_AXE", Path(__file__).resolve().parents[2] / "node_modules/axe-core/axe.min.js"))
SIDEWAYS = "() => document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def served(index):
    """The engine and the address of a running server."""
    with Store(index, read_only=True) as store:
        engine = FakeEngine(store)
        with running(server.create_app(store, engine)) as port:
            yield engine, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def tab(served):
    """One tab for all tests, and what went wrong in it; it may ask nobody but our server."""
    wrong = []
    with sync_api.sync_playwright() as playwright:
        # Chromium asks for --no-sandbox as root; the page is ours.
        browser = playwright.chromium.launch(executable_path=BROWSERS[0], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 800}, accept_downloads=True)
        page.set_default_timeout(5000)
        page.on("request", lambda request: request.url.startswith((served[1], "data:", "blob:", "http://127.0.0.1:"))
                or wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: message.type == "error" and "Failed to load resource" not in message.text
                and wrong.append(message.text))
        yield page, wrong
        browser.close()


@pytest.fixture
def opened(tab, served):
    """Opens the page at an address -> the page; at the end nothing may have gone wrong in it."""
    page, wrong = tab

    def open_page(address="/"):
        page.goto(served[1] + address)
        return page

    yield open_page
    assert not wrong
    page.set_viewport_size({"width": 1000, "height": 800})


def cards(page):
    page.locator("#answers .card").first.wait_for()
    return page.locator("#answers .card")


def names(page):
    return cards(page).locator(".name").all_inner_texts()


def open_card(page, text):
    """Open the first card whose name holds this -> the dialog."""
    cards(page).filter(has_text=text).first.locator("button").click()
    return page.locator("#answer")


def test_a_query_gives_cards_in_words_and_numbers_behind_why(opened):
    page = opened()
    page.locator("#start").wait_for()
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("a red field")
    page.keyboard.press("Enter")
    assert names(page) == ["plain.mp4", "old.avi", HOSTILE, "third.mp4"]
    assert "“a red field”: 4 videos" in page.locator("#status").inner_text()
    card = cards(page).first
    assert card.locator(".words").inner_text() == "0:02 to 0:06 it stays red"
    assert card.locator(".tag").all_inner_texts() == ["0:08", "1 more moment"]
    loaded = "(card) => [...card.querySelectorAll('img')].every((image) => image.complete && image.naturalWidth === 32)"
    page.wait_for_function(loaded, arg=card.element_handle())
    detail = open_card(page, "plain.mp4")
    assert detail.locator(".strip li").count() == 4 and detail.locator(".strip .dropped").count() == 2
    assert not detail.locator(".scores").is_visible()
    detail.locator("summary").click()
    assert [word in detail.inner_text() for word in ("2.00", "0.500", "0.250", "Because of")] == 4 * [True]
    assert detail.locator(".sentences li:visible .line_text").all_text_contents() == [
        "kept, weight 0.25: " + HOSTILE_SENTENCE, "kept, weight 0.75: it stays red"]
    detail.get_by_role("button", name="All sentences").click()
    assert detail.locator(".sentences li:visible").count() == 4
    assert detail.locator(".moments button").count() == 1
    page.keyboard.press("Escape")
    page.locator("#answer").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.closest('.card') !== null")


def test_what_is_said_is_shown_and_played(opened):
    page = opened("/?q=x")
    assert cards(page).locator(".spoken").all_inner_texts() == [f"0:05 said: “he says {HOSTILE_SENTENCE}”"]
    page.locator("#speaks input").check()
    page.wait_for_function("() => document.querySelectorAll('#answers .card').length === 1")
    assert "has_speech=1" in page.url and names(page) == [HOSTILE]
    detail = open_card(page, "onerror")
    at = "(s) => { const v = document.querySelector('dialog video'); return v.currentTime > s && v.readyState >= 2; }"
    page.wait_for_function(at, arg=4.9)  # what is said counts for most of the score
    detail.locator("video").evaluate("(video) => { video.pause(); video.currentTime = 0; }")
    detail.locator("button", has=page.locator(".spoken")).click()
    page.wait_for_function(at, arg=4.9)
    detail.locator("summary").click()
    assert detail.locator(".scores").inner_text().endswith("speech\n1.80")
    page.keyboard.press("Escape")
    page.locator("#unheard summary").click()
    assert page.locator("#unheard li").all_inner_texts() == ["plain.mp4: plain.srt is amiss"]
    page.locator("#clear").click()
    page.wait_for_function("() => document.querySelectorAll('#answers .card').length === 4")
    assert not page.locator("#has_speech").is_checked()


def test_a_thumbnail_moves_while_it_is_pointed_at(opened):
    page = opened("/?q=x")
    image = cards(page).first.locator("img")
    first = image.get_attribute("src")
    cards(page).first.hover()
    page.wait_for_function("([image, src]) => !image.src.endsWith(src)", arg=[image.element_handle(), first])
    page.mouse.move(0, 0)
    page.wait_for_function("([image, src]) => image.src.endsWith(src)", arg=[image.element_handle(), first])


def test_hostile_names_and_sentences_are_text(opened, tab):
    page = opened("/?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    assert HOSTILE in names(page)
    open_card(page, "onerror").locator("summary").click()
    assert page.locator("main script, dialog script, main img[src=x], dialog img[src=x]").count() == 0
    assert page.locator("dialog svg, main svg").count() == 0 and "run" not in page.title()
    markup = "() => { document.body.innerHTML = '<img src=x>'; }"
    with pytest.raises(sync_api.Error, match="TrustedHTML"):  # even our own script may not make text into markup
        page.evaluate(markup)
    page.wait_for_function("() => document.title")  # the browser's word on it has arrived
    assert len(tab[1]) == 1 and "TrustedHTML" in tab[1].pop()


def test_an_answer_plays_from_its_moment_and_jumps_to_a_frame(opened):
    page = opened("/?q=x")
    detail = open_card(page, "plain.mp4")
    video = detail.locator("video")
    at = "([video, time]) => video.readyState > 1 && !video.seeking && Math.abs(video.currentTime - time) < 0.9"
    page.wait_for_function(at, arg=[video.element_handle(), 4.0])  # the frame with the largest weight
    assert video.evaluate("(video) => video.controls && video.videoWidth") == 64
    assert not detail.locator(".label", has_text="preview").is_visible()
    video.evaluate("(video) => video.pause()")
    detail.locator(".strip button").nth(1).click()
    page.wait_for_function(at, arg=[video.element_handle(), 2.0])


def test_what_browsers_cannot_play_is_a_preview_and_a_lost_file_says_so(opened, served, index):
    page = opened("/?q=x")
    detail = open_card(page, "old.avi")
    video = detail.locator("video")
    shown = "(video) => video.readyState > 1 && video.videoWidth && video.currentTime < 1.5"
    page.wait_for_function(shown, arg=video.element_handle())  # it begins with the moment
    assert detail.locator(".label", has_text="preview").is_visible()
    lost = index.parent / "videos" / "sub" / "deep" / "third.mp4"
    lost.rename(index.parent / "moved.mp4")
    try:
        page.keyboard.press("Escape")
        detail = open_card(page, "third.mp4")
        detail.locator(".problem").wait_for()
        assert "is not there any more" in detail.locator(".problem").inner_text()
    finally:
        (index.parent / "moved.mp4").rename(lost)


def test_keys(opened):
    page = opened("/?q=x")
    cards(page)
    at = "[...document.querySelectorAll('#answers .card')].indexOf(document.activeElement.closest('.card'))"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(at) == 0
    page.keyboard.press("ArrowRight")
    assert page.evaluate(at) == 1
    stops = page.locator("#answers button[tabindex='0']")
    assert stops.count() == 1  # the grid is one stop of the Tab key
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.locator("#answer_title").inner_text() == "1. plain.mp4"
    playing = "() => { const v = document.querySelector('video'); return !v.paused && v.readyState > 1; }"
    page.wait_for_function(playing)
    page.locator("#answer").evaluate("(dialog) => { document.activeElement.blur(); dialog.focus(); }")
    page.keyboard.press("ArrowRight")
    assert page.locator("#answer_title").inner_text() == "2. old.avi"
    page.keyboard.press("Escape")
    page.locator("#answer").wait_for(state="hidden")
    assert page.evaluate(at) == 1
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"


def test_more_like_this_says_what_it_means_and_the_back_button_goes_back(opened, served):
    engine, home = served
    page = opened("/?q=first")
    second = names(page)[1]
    cards(page).nth(1).locator("button").focus()
    page.keyboard.press("m")
    page.locator("#status", has_text="Like").wait_for()
    assert "like=" in page.url and second not in names(page) and second in page.locator("#status").inner_text()
    assert page.locator("#source img").count() == 4 and "look like these frames" in page.locator("#source").inner_text()
    page.select_option("#folder", "sub")
    page.wait_for_function("() => document.querySelectorAll('#answers .card').length < 3")
    assert engine.asked[-1][2] == "sub" and "folder=sub" in page.url and "like=" in page.url
    page.select_option("#length", "300-1200")
    page.locator("#status", has_text="No answer in this folder and of this length; widen").wait_for()
    assert engine.asked[-1][3:] == (300.0, 1200.0)
    asked = len(engine.asked)
    for _ in range(3):
        page.go_back()
    page.wait_for_function("() => document.querySelectorAll('#answers .card').length === 4")
    assert page.input_value("#q") == "first" and page.input_value("#folder") == "" and page.url == home + "/?q=first"
    assert len(engine.asked) == asked  # what was there is shown at once


def test_a_link_with_filters_fills_the_form(opened, served):
    engine, _ = served
    page = opened("/?q=shared&folder=sub&min_seconds=3&max_seconds=9&moments=1&since=946684800")
    assert len(names(page)) == 2 and engine.asked[-1] == ("shared", 24, "sub", 3.0, 9.0) and not engine.one_a_file
    assert engine.since[0] == 946684800
    assert page.input_value("#q") == "shared" and page.locator("#folder option:checked").inner_text() == "sub"
    assert page.locator("#length option:checked").inner_text() == "3 to 9 seconds" and page.is_checked("#moments")
    assert page.input_value("#since") in ("1999-12-31", "2000-01-01")
    page.click("#clear")
    page.wait_for_function("() => document.querySelectorAll('#answers .card').length === 4")
    assert engine.asked[-1] == ("shared", 24, "", 0.0, float("inf")) and engine.one_a_file
    page.fill("#until", "1990-01-01")
    page.locator("#status", has_text="No answer of these days").wait_for()


def test_scrolling_brings_more_below(opened, served, monkeypatch):
    engine, _ = served
    many = type(engine).search

    def search(self, queries, *, top, skip=0, **same):
        [answers] = many(self, queries, top=100, **same)
        found = [answers[n % 4]._replace(rank=n + 1) for n in range(60)][skip:skip + top]
        answers[:], answers.total = found, 60
        return [answers]

    monkeypatch.setattr(type(engine), "search", search)
    page = opened("/?q=many")
    assert cards(page).count() >= 24
    for _ in range(40):
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(60)
        if cards(page).count() == 60:
            break
    assert cards(page).count() == 60 and not page.locator("#more").is_visible()
    before = page.evaluate("scrollY")
    assert before > 500
    cards(page).last.locator("button").focus()
    page.keyboard.press("m")
    page.locator("#status", has_text="Like").wait_for()
    page.go_back()  # to all of them, where it was
    page.locator("#status", has_text="many").wait_for()
    assert cards(page).count() == 60 and page.evaluate("scrollY") >= before


def test_a_picture_is_searched_by_also_after_a_reload(opened, served, tmp_path):
    engine, _ = served
    Image.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "green.png")
    (tmp_path / "text.png").write_text("no picture")
    page = opened()
    page.set_input_files("#file", tmp_path / "green.png")
    cards(page)
    for _ in range(2):
        page.locator("#source img").wait_for()
        assert engine.asked[-1][0].startswith("picture of")
        assert "picture=" in page.url
        page.reload()
        cards(page)
    page.set_input_files("#file", tmp_path / "text.png")
    page.locator("#status.wrong", has_text="cannot be read").wait_for()


def test_chosen_moments_become_files(opened, tmp_path):
    page = opened("/?q=x")
    page.evaluate("localStorage.clear()")
    for text in ("plain.mp4", "onerror"):
        detail = open_card(page, text)
        detail.get_by_role("button", name="Choose").click()
        assert detail.get_by_role("button", name="Choose").get_attribute("aria-pressed") == "true"
        page.keyboard.press("Escape")
    assert page.locator("#chosen .count").inner_text() == "2"
    page.click("#chosen")
    texts = {}
    for kind in ("edl", "csv"):
        with page.expect_download() as download:
            page.click(f"#{kind}")
        texts[kind] = Path(download.value.path()).read_text()
    assert texts["csv"].splitlines()[:2] == ["file,start,end,words", "plain.mp4,0.000,8.000,0:02 to 0:06: it stays red"]
    assert texts["edl"].splitlines()[3:6] == [
        "001  AX       V     C        00:00:00:00 00:00:08:00 00:00:00:00 00:00:08:00", "* FROM CLIP NAME: plain.mp4",
        "* SOURCE FILE: plain.mp4"]
    assert "002  AX       V     C        00:00:00:00 00:00:08:00 00:00:08:00 00:00:16:00" in texts["edl"]
    page.click("#forget")
    assert not page.locator("#chosen").is_visible()


def test_the_start_shows_what_was_searched_and_what_is_there(opened, served):
    page = opened("/?q=one+query")
    cards(page)
    page = opened("/")
    page.locator("#wall .card").first.wait_for()
    assert page.locator("#wall .card").count() == 4 and page.locator("#title").inner_text() == "4 videos, 32 seconds"
    assert "a red field" in page.locator("#examples").inner_text()
    assert page.locator("#history option").first.get_attribute("value") == "one query"
    page.locator("#recent button", has_text="one query").click()
    assert cards(page).count() == 4 and "q=one+query" in page.url


def test_nonsense_is_not_answered_with_confidence(opened):
    page = opened("/?q=gibberish")
    page.locator("#status.poor", has_text="Nothing here fits well").wait_for()
    assert cards(page).count() == 4  # what comes nearest is shown all the same


RATIO = """(names) => {
    const style = getComputedStyle(document.documentElement);
    const light = (name) => {
        const hex = style.getPropertyValue("--" + name).trim();
        const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
            .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
    };
    const [a, b] = names.map(light);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}"""  # WCAG's contrast of two colours


def test_a_phone_in_light_and_dark(opened):
    page = opened("/?q=" + 60 * "x")
    page.set_viewport_size({"width": 360, "height": 740})
    cards(page)
    assert page.evaluate(SIDEWAYS) <= 0
    page.click("#more_filters")
    small = """() => [...document.querySelectorAll("button, select, a.button")]
        .filter((x) => x.offsetParent).map((x) => [x.className || x.id, x.offsetWidth, x.offsetHeight])
        .filter(([, width, height]) => width < 40 || height < 40)"""
    assert not page.evaluate(small)
    page.evaluate("() => { document.querySelector('.name').textContent = 'x'.repeat(300); }")
    assert page.evaluate(SIDEWAYS) <= 0
    cards(page).first.locator("button").click()
    page.locator(".strip").wait_for()
    assert page.locator("#answer").evaluate("(dialog) => dialog.scrollWidth - dialog.clientWidth") <= 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for paper in ("paper", "wash", "card"):
            assert all(page.evaluate(RATIO, [text, paper]) > 4.5 for text in ("ink", "soft", "wrong")), scheme
        assert all(page.evaluate(RATIO, [drawn, "paper"]) > 3 for drawn in ("frame", "sentence", "edge")), scheme
        assert page.evaluate(RATIO, ["go", "on_go"]) > 4.5
    page.emulate_media(color_scheme=None)


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: npm install axe-core, or set NARVID_AXE")
def test_a_screen_reader_misses_nothing_that_axe_knows(tab, served):
    page = tab[0].context.browser.new_context(bypass_csp=True).new_page()
    look = "async () => (await axe.run(document)).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"

    def assert_clean():
        page.context.new_cdp_session(page).send("Runtime.evaluate", {"expression": AXE.read_text() + ";0"})
        assert page.evaluate(look) == []

    for path in ("/", "/?q=x", "/?q=gibberish", "/?like=1", "/api"):
        page.goto(served[1] + path)
        page.wait_for_load_state("networkidle")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert_clean()
    page.goto(served[1] + "/?q=x")
    cards(page).first.locator("button").click()
    page.locator("details.why summary").click()
    assert_clean()
    page.context.close()


def test_the_page_for_programs_shows_every_address(opened):
    page = opened("/api")
    page.locator("#paths h2").first.wait_for()
    shown = page.locator("#paths h2").all_inner_texts()
    assert "GET /api/search" in shown and "POST /api/picture" in shown and len(shown) == 15


def test_the_time_from_a_click_to_a_picture_is_measured(served):
    """In a process of its own: this one's Playwright is in use."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_play.py"
    done = subprocess.run([sys.executable, script, "--address", served[1], "--query", "x", "--top", "2"], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[3]) for line in lines] == [("plain.mp4", "file"), ("old.avi", "preview")]
    assert all(0 < float(line[1]) < 15 for line in lines)


def test_a_password_is_asked_for(tab, served):
    engine, _ = served
    page = tab[0].context.browser.new_context().new_page()
    with running(server.create_app(engine.store, engine, password="sesame", local=False)) as port:
        page.goto(f"http://127.0.0.1:{port}/?q=x")
        page.fill("#password", "wrong")
        page.keyboard.press("Enter")
        page.locator(".problem", has_text="not the password").wait_for()
        page.fill("#password", "sesame")
        page.keyboard.press("Enter")
        page.locator("#title", has_text="4 videos").wait_for()
        page.goto("about:blank")
    page.context.close()


def test_no_answer_and_an_error_are_said(opened):
    opened("/?q=none").locator("#status", has_text="No answer").wait_for()
    opened("/?q=busy").locator("#status.wrong", has_text="being written by another process").wait_for()


def test_an_empty_index_and_one_of_frames_alone_are_said(tab, index, tmp_path):
    page, wrong = tab
    with Store(index, read_only=True) as filled:
        settings = filled.settings | {"captioner": None}
    with Store(tmp_path / "index", create=settings) as store:
        with running(server.create_app(store, FakeEngine(store))) as port:
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("#start", has_text="Nothing is indexed yet").wait_for()
            put(store, "plain.mp4", path=index.parent / "videos" / "plain.mp4")
            page.reload()
            page.locator("#notice", has_text="frames alone").wait_for()
            page.goto("about:blank")
    assert not wrong


def test_a_picture_and_a_clip_are_combined_with_words(opened, served, tmp_path, index):
    """Each is a chip with a sign and a weight; the address holds them all."""
    engine, _ = served
    Image.new("RGB", (16, 16), (0, 0, 200)).save(tmp_path / "blue.png")
    page = opened("/?q=a+red+field")
    cards(page)
    page.set_input_files("#file", tmp_path / "blue.png")
    page.locator("#parts li").first.wait_for()
    cards(page)
    assert engine.asked[-1][0].startswith('"a red field" + picture:')
    page.set_input_files("#file", index.parent / "videos" / "plain.mp4")
    page.locator("#parts li").nth(1).wait_for(timeout=60_000)  # a process is started to read it
    page.get_by_label("like this clip; turn around").click()
    page.get_by_label("unlike this clip").wait_for()
    page.get_by_label("how much this clip counts").select_option("0.5")
    page.locator("#status", has_text="“a red field” + your picture − 0.5 × your clip").wait_for()
    assert engine.asked[-1][0].endswith(' - 0.5*clip:"4 frames"') and "parts=" in page.url
    page.wait_for_function("() => [...document.querySelectorAll('#parts img')].every((i) => i.naturalWidth > 0)")
    page.reload()
    cards(page)
    assert page.locator("#parts li").count() == 2 and page.input_value("#q") == "a red field"
    page.fill("#q", '"a red field" - "people"')
    page.keyboard.press("Enter")
    page.locator("#status", has_text="“a red field” − “people” + your picture − 0.5 × your clip").wait_for()
    page.get_by_label("take this picture out of the query").click()
    page.locator("#status", has_text="“a red field” − “people” − 0.5 × your clip").wait_for()
    page.get_by_label("take this clip out of the query").click()
    page.locator("#status", has_text="“a red field” − “people”:").wait_for()
    assert not page.locator("#parts").is_visible()
    page.fill("#q", '"a red field" - people')
    page.keyboard.press("Enter")
    page.locator("#status.wrong", has_text="at character 17, people: put a text into quotes").wait_for()


def test_a_moment_is_added_to_the_query(opened, served):
    engine, _ = served
    page = opened("/?q=at+night")
    open_card(page, "old.avi").get_by_role("button", name="Add to query").click()
    page.locator("#parts", has_text="old.avi 0:00").wait_for()
    assert engine.asked[-1][0] == '"at night" + window:2' and page.locator("#parts img").count() == 1
    page.get_by_label("like this window; turn around").click()
    page.locator("#status", has_text="“at night” − old.avi 0:00").wait_for()
    assert engine.asked[-1][0] == '"at night" - window:2'
