"""The page of narvid.search in a real browser: typing, keys, clips, going back, a phone's width, hostile names.

One headless browser for the whole file; the server and its index are those of test_search_server.py.
"""

import shutil

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from test_search_server import HOSTILE, HOSTILE_SENTENCE, FakeEngine, make_index, put, running

from narvid.search import server
from narvid.search.store import Store

BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSERS, reason="no chromium and no chrome on this machine")]
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
        page = browser.new_page(viewport={"width": 1000, "height": 800})
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
    page.locator(".answer").first.wait_for()
    return page.locator(".answer")


def names(page):
    return cards(page).locator(".name").all_inner_texts()


def test_a_query_gives_cards_with_scores_frames_sentences_and_reasons(opened):
    page = opened()
    page.locator("#start").wait_for()
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("a red field")
    page.keyboard.press("Enter")
    assert names(page) == ["plain.mp4", "sub/old.avi", HOSTILE, "sub/deep/third.mp4"]
    card = cards(page).first
    assert "4 answers for “a red field”" in page.locator("#status").inner_text()
    assert [part in card.inner_text() for part in ("0:00–0:08", "2.00", "0.500", "0.250", "Because of")] == 5 * [True]
    assert card.locator(".strip li").count() == 4 and card.locator(".strip .dropped").count() == 2
    assert card.locator(".sentences li:visible .text").all_text_contents() == [
        "kept, weight 0.25: " + HOSTILE_SENTENCE, "kept, weight 0.75: it stays red"]
    card.get_by_role("button", name="All sentences").click()
    assert card.locator(".sentences li:visible").count() == 4
    loaded = "(card) => [...card.querySelectorAll('img')].every((image) => image.complete && image.naturalWidth === 32)"
    page.wait_for_function(loaded, arg=card.element_handle())


def test_hostile_names_and_sentences_are_text(opened, tab):
    page = opened("/?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    assert HOSTILE in names(page)
    assert page.locator("main script, main svg, main img[src=x]").count() == 0 and "run" not in page.title()
    markup = "() => { document.body.innerHTML = '<img src=x>'; }"
    with pytest.raises(sync_api.Error, match="TrustedHTML"):  # even our own script may not make text into markup
        page.evaluate(markup)
    page.wait_for_function("() => document.title")  # the browser's word on it has arrived
    assert len(tab[1]) == 1 and "TrustedHTML" in tab[1].pop()


def test_a_clip_starts_at_the_moment_and_jumps_to_a_frame(opened):
    page = opened("/?q=x")
    card = cards(page).filter(has_text="plain.mp4").first
    moment = "(video) => new Promise((done) => video.addEventListener('seeked', () => done(video.currentTime)))"
    video = card.locator("video")
    assert video.evaluate("(video) => [video.preload, video.networkState <= 1, video.paused]") == ["none", True, True]
    video.evaluate("(video) => { window.first = new Promise((done) => video.addEventListener('seeked', "
                   "() => done(video.currentTime), { once: true })); }")
    card.locator(".start").click()
    assert page.evaluate("first") == pytest.approx(4.0, abs=0.3)  # the frame with the largest weight
    assert video.evaluate("(video) => video.controls && video.videoWidth") == 64
    video.evaluate("(video) => video.pause()")
    video.evaluate(f"(video) => {{ window.second = ({moment})(video); }}")
    card.locator(".strip button").nth(1).click()
    assert page.evaluate("second") == pytest.approx(2.0, abs=0.3)


def test_what_browsers_cannot_play_plays_and_a_lost_file_says_so(opened, served, index):
    page = opened("/?q=x")
    card = cards(page).filter(has_text="old.avi").first
    card.locator(".start").click()
    video = card.locator("video").element_handle()
    page.wait_for_function("(video) => video.readyState > 1 && video.videoWidth", arg=video)
    lost = index.parent / "videos" / "sub" / "deep" / "third.mp4"
    lost.rename(index.parent / "moved.mp4")
    card = cards(page).filter(has_text="third.mp4").first
    card.locator(".start").click()
    card.locator(".problem").wait_for()
    assert "is not there any more" in card.locator(".problem").inner_text()
    (index.parent / "moved.mp4").rename(lost)


def test_keys(opened):
    page = opened("/?q=x")
    cards(page)
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("answer 1")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("answer 2")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("s")
    assert cards(page).first.evaluate("(card) => card.classList.contains('all')")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    cards(page).first.evaluate("(card) => { card.querySelector('video').muted = true; card.focus(); }")
    page.keyboard.press(" ")
    playing = "(card) => { const video = card.querySelector('video'); return !video.paused && video.currentTime > 0; }"
    page.wait_for_function(playing, arg=cards(page).first.element_handle())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"


def test_more_like_this_filters_and_the_back_button(opened, served):
    engine, home = served
    page = opened("/?q=first")
    second = names(page)[1]
    cards(page).nth(1).focus()
    page.keyboard.press("m")
    page.wait_for_function("() => document.getElementById('status').textContent.includes(' like ')")
    assert "like=" in page.url and second not in names(page) and second in page.locator("#status").inner_text()
    page.select_option("#folder", "sub")
    page.wait_for_function("() => document.querySelectorAll('.answer').length < 3")
    assert engine.asked[-1][2] == "sub" and "folder=sub" in page.url and "like=" in page.url
    page.select_option("#length", "300-1200")
    page.locator("#status", has_text="No answer").wait_for()
    assert engine.asked[-1][3:] == (300.0, 1200.0)
    asked = len(engine.asked)
    for _ in range(3):
        page.go_back()
    page.wait_for_function("() => document.querySelectorAll('.answer').length === 4")
    assert page.input_value("#q") == "first" and page.input_value("#folder") == "" and page.url == home + "/?q=first"
    assert len(engine.asked) == asked  # what was there is shown at once


def test_a_link_with_filters_fills_the_form(opened, served):
    engine, _ = served
    page = opened("/?q=shared&folder=sub&min_seconds=3&max_seconds=9&top=1")
    assert len(names(page)) == 1 and engine.asked[-1] == ("shared", 1, "sub", 3.0, 9.0)
    assert page.input_value("#q") == "shared" and page.locator("#folder option:checked").inner_text() == "sub"
    assert page.locator("#length option:checked").inner_text() == "3 to 9 seconds"
    page.get_by_role("button", name="Show more").click()
    page.wait_for_function("() => document.querySelectorAll('.answer').length === 2")


def test_a_picture_is_searched_by(opened, served, tmp_path):
    engine, _ = served
    Image.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "green.png")
    (tmp_path / "text.png").write_text("no picture")
    page = opened()
    page.set_input_files("#file", tmp_path / "green.png")
    cards(page)
    assert engine.asked[-1][0].startswith("picture of") and page.locator("#preview").is_visible()
    page.set_input_files("#file", tmp_path / "text.png")
    page.locator("#status.wrong", has_text="cannot be read").wait_for()
    page.reload()
    page.locator("#status.wrong", has_text="no longer here").wait_for()


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
    assert page.evaluate(SIDEWAYS) == 0
    small = page.evaluate("""() => [...document.querySelectorAll("button, select, label.button")]
        .filter((x) => x.offsetParent).map((x) => [x.className || x.id, x.offsetWidth, x.offsetHeight])
        .filter(([, width, height]) => width < 40 || height < 40)""")
    assert not small
    page.evaluate("() => { document.querySelector('.name').textContent = 'x'.repeat(300); }")
    assert page.evaluate(SIDEWAYS) == 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert all(page.evaluate(RATIO, [text, "paper"]) > 4.5 for text in ("ink", "soft", "wrong")), scheme
        assert all(page.evaluate(RATIO, [drawn, "paper"]) > 3 for drawn in ("frame", "sentence", "edge")), scheme


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
