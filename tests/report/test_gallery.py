"""scripts/make_gallery.py: the page shows what was measured, hostile text stays text, keys and filters work.

The last two are tried in a browser, where one is installed: a driver at the end of a copy of the page presses keys and
writes down what it sees.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import reference
import tiny
import torch
import yaml
from PIL import Image

import main_task_retrieval as trainer
from narvid import InputError
from narvid.towers.tokenizer import Tokenizer
from narvid.report import gallery as make_gallery

HOSTILE_VIDEO = "<img src=x onerror=alert(1)> & 'co' #1?"
HOSTILE_QUERY = '</script><script>document.title="run"</script><!-- <b>&amp; \u2028 "'
HOSTILE_SENTENCE = "<svg onload=document.title='run'> __DATA__ ${1} \\u003c"
# Chromium asks for it as root; the page is ours.
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, corpus, weights):
    """The tiny corpus with hostile names, a run evaluated on it, its gallery -> corpus, run, gallery folder."""
    home = tmp_path_factory.mktemp("gallery")
    data = shutil.copytree(corpus, home / "data")
    (data / "frames" / "test1").rename(data / "frames" / HOSTILE_VIDEO)
    for name in ("test.jsonl", "narrations.jsonl", "frames/index.jsonl"):
        entries = [json.loads(line) for line in (data / name).read_text().splitlines()]
        for entry in entries:
            if entry["video"] == "test1":
                entry["video"] = HOSTILE_VIDEO
                if "query" in entry:
                    entry["query"] = HOSTILE_QUERY
                if "sentences" in entry:
                    entry["sentences"][0]["text"] = HOSTILE_SENTENCE
        (data / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    trainer.main(tiny.flags(data, home / "run", "--eval_only", "--checkpoint", weights, "--clip_model",
                            corpus / "clip.json", "--filter_p", 0.6))
    make_gallery.main(["--run", str(home / "run"), "--out", str(home / "page"), "--top", "3"])
    return data, home / "run", home / "page"


def page_data(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', (page / "index.html").read_text(),
                     re.DOTALL).group(1)
    return json.loads(text)


def test_ranks_and_counts_are_those_that_the_run_wrote_down(gallery):
    _, run, page = gallery
    data = page_data(page)
    lines = list(make_gallery.read_ranks(run, "S_qv")[1]), list(make_gallery.read_ranks(run, "S_fusion")[1])
    assert [side["matrix"] for side in data["sides"]] == ["S_qv", "S_fusion"]
    assert [query["ranks"] for query in data["queries"]] == [list(pair) for pair in zip(*lines)]
    status = [("kept" if b == 1 else "lost") if a == 1 else ("gained" if b == 1 else "failed") for a, b in zip(*lines)]
    assert [query["status"] for query in data["queries"]] == status
    assert data["counts"] == {name: status.count(name) for name in ("gained", "lost", "failed", "kept")}
    final = tiny.results(run)[-1]["metrics"]
    for side in data["sides"]:
        assert side["recall"][0] == pytest.approx(final[side["matrix"]]["text_to_video"]["R@1"], abs=0.05)


def test_answers_stand_by_their_score_and_the_right_one_is_always_there(gallery):
    data = page_data(gallery[2])
    names = data["sides"][0]["scores"]
    assert names == ["S_qv", "S_qn", "S_fusion"]
    beyond = 0
    for query in data["queries"]:
        for i, (side, rank) in enumerate(zip(data["sides"], query["ranks"])):
            answers = query["answers"][i]
            by = [answer["scores"][names.index(side["matrix"])] for answer in answers]
            assert by == sorted(by, reverse=True)
            assert [a["rank"] for a in answers] == [1, 2, 3] + [rank] * (rank > 3)
            assert [a["rank"] for a in answers if a["video"] == query["right"]] == [rank]
            beyond += rank > 3
    assert beyond


def test_weights_are_the_filters_as_the_reference_computes_them(gallery):
    """Features from the trainer, cosines and filter from slow numpy."""
    _, run, page = gallery
    data = page_data(page)
    measured = make_gallery.measure(make_gallery.trainer_args(run, None, page), trainer.distributed.start())
    model, queries, videos, encoding, _ = measured.kept.args
    with encoding.autocast(), torch.no_grad():
        all_eos = model.encode_queries(*Tokenizer({})(queries, encoding.max_words)).eos
    dropped = 0
    for number, query in enumerate(data["queries"]):
        for answer in query["answers"][1]:
            v = answer["video"]
            for view, features, mask in (("frames", videos.frames, videos.mask),
                                         ("sentences", videos.narration, videos.narration_mask)):
                cosines = [reference.cosine(all_eos[number].numpy(), x) for x in features[v].numpy()]
                expected = reference.filter_weights(cosines, mask[v].numpy(), p=0.6)
                got = answer[view]
                assert len(got) == len(data["videos"][str(v)]["sources"][0]["tiles"])
                np.testing.assert_allclose(got, expected[:len(got)], rtol=0.006)
                assert [x > 0 for x in got] == [x > 0 for x in expected[:len(got)]]
                dropped += sum(x == 0 for x in got)
    assert dropped


def test_frames_times_and_sentences_of_a_video_belong_together(gallery):
    folder, _, page = gallery
    videos = {video["id"]: video for video in page_data(page)["videos"].values()}
    narrations = {x["video"]: x for x in map(json.loads, (folder / "narrations.jsonl").read_text().splitlines())}
    for name, video in videos.items():
        source, of_time = video["sources"][0], {x["time"]: x["text"] for x in narrations[name]["sentences"]}
        assert source["times"] == [float(video["frames"][tile]) for tile in source["tiles"]]  # one frame a second
        assert source["sentences"] == [of_time.get(t) if of_time.get(t, "").strip() else None for t in source["times"]]
        strip = Image.open(page / video["strip"])
        assert strip.size == (make_gallery.TILE * len(video["frames"]), make_gallery.TILE)
        for tile, number in enumerate(video["frames"]):
            shown = np.asarray(strip)[:, tile * make_gallery.TILE:][:, :make_gallery.TILE].astype(float)
            path = folder / "frames" / name / f"{number:05d}.jpg"
            frame = make_gallery.read_frames([path], make_gallery.Picture(make_gallery.TILE))
            assert abs(shown - frame[0].permute(1, 2, 0).numpy()).mean() < 6  # jpg twice


def test_hostile_text_is_in_the_data_and_never_markup(gallery):
    page = gallery[2]
    html, template = (page / "index.html").read_text(), make_gallery.TEMPLATE.read_text()
    assert html.count("</script") == template.count("</script") and html.count("<!--") == template.count("<!--")
    assert html.count("<img") == html.count("<svg") == 0
    for forbidden in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "fetch("):
        assert forbidden not in template
    data = page_data(page)
    assert HOSTILE_QUERY in [query["text"] for query in data["queries"]]
    video = next(video for video in data["videos"].values() if video["id"] == HOSTILE_VIDEO)
    assert HOSTILE_SENTENCE in video["sources"][0]["sentences"]
    assert re.fullmatch(r"pictures/[0-9a-f]{16}\.jpg", video["strip"])


def test_two_runs_stand_side_by_side_from_moved_data(gallery, weights, tmp_path, capsys):
    """A baseline without filter or sentences beside NarVid; the corpus has moved since."""
    folder, run, _ = gallery
    config = yaml.safe_load((run / "config.yaml").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    old = str(tmp_path / "gone")
    here = {x: str(config[x]).replace(str(folder), old) for x in ("data_dir", "frames", "narrations")}
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | here))
    trainer.main([str(x) for x in (
        "--method", "zeroshot", "--no-use_narration", "--data_dir", moved, "--clip_model", folder / "clip.json",
        "--output_dir", tmp_path / "zero", "--max_frames", 4, "--max_words", 24, "--num_workers", 0, "--precision",
        "fp32")])
    capsys.readouterr()
    make_gallery.main([str(x) for x in ("--run", tmp_path / "run", "--other", tmp_path / "zero", "--data_dir", moved,
                                        "--queries", 7, "--out", tmp_path / "page")])
    assert "zero" in (said := capsys.readouterr().out) and "of S_fusion are those of its ranks.csv" in said
    data = page_data(tmp_path / "page")
    assert [(side["run"], side["method"]) for side in data["sides"]] == [("zero", "zeroshot"), ("run", "narvid")]
    assert len(data["queries"]) == 7 and data["of"]["videos"] == 11
    left, right = data["queries"][0]["answers"]
    assert "frames" not in left[0] and "frames" in right[0]
    for video in data["videos"].values():
        for source in video["sources"]:
            assert source["times"] == [float(video["frames"][tile]) for tile in source["tiles"]]
    some = next(video["sources"] for video in data["videos"].values() if len(video["frames"]) > 6)
    assert len(some[0]["tiles"]) == 4 and some[0]["sentences"] is None and len(some[1]["tiles"]) == 6


@pytest.mark.parametrize("name", tiny.OTHER_TOWERS)
def test_a_run_over_other_towers_is_shown_with_the_ranks_it_wrote_down(corpus, tmp_path, name):
    """Their own tokenizer, pictures of another size and mean; all of it is found again from the run alone."""
    trainer.main(tiny.flags(corpus, tmp_path / "run", *tiny.towers_of(corpus, name), "--epochs", 1, "--select_on",
                            "last"))
    make_gallery.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    data = page_data(tmp_path / "page")
    lines = [list(make_gallery.read_ranks(tmp_path / "run", matrix)[1]) for matrix in ("S_qv", "S_fusion")]
    assert [query["ranks"] for query in data["queries"]] == [list(pair) for pair in zip(*lines)]
    assert len({tuple(query["ranks"]) for query in data["queries"]}) > 3  # and they say something
    for query in data["queries"]:
        answers = query["answers"][1]
        assert [a["rank"] for a in answers if a["video"] == query["right"]] == [query["ranks"][1]]


def test_mistakes_are_one_sentence(gallery, tmp_path):
    _, run, page = gallery
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for argv, said in ((("--run", tmp_path, "--out", tmp_path / "new"), "config.yaml: cannot be read"),
                       (("--run", run, "--out", tmp_path / "mine"), "holds something else than a gallery"),
                       (("--run", run, "--out", tmp_path / "new", "--left", "S_fusion"), "the same run"),
                       (("--run", run, "--out", tmp_path / "new", "--right", "S_xy"), "has S_qv, S_qn")):
        with pytest.raises(InputError, match=said):
            make_gallery.main([str(x) for x in argv])
    assert not (tmp_path / "new").exists()


DRIVER = """
<script>
const seen = { errors: [], steps: [] };
const press = (key, at) => (at || document.body).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const look = (what) => seen.steps.push([what, byId("query").textContent, byId("place").textContent]);
const type = (text) => { byId("search").value = text; byId("search").dispatchEvent(new Event("input")); };
window.addEventListener("error", (event) => seen.errors.push(event.message));
look("start"); press("j"); look("j"); press("ArrowRight"); look("right"); press("k"); look("k");
press("ArrowLeft"); look("left"); press("k"); look("at the first");
press("j", byId("search")); look("j in the search field");
for (const chip of byId("filters").children) { chip.click(); look(chip.dataset.status); }
byId("filters").children[0].click();
type("no such words"); look("no such"); type("ONERROR=alert"); look("hostile"); type("");
const text = byId("query").textContent;
seen.hostile = { title: document.title, elements: document.querySelectorAll("main img, main svg, main b").length,
                 names: [...document.querySelectorAll(".name")].map((name) => name.textContent) };
press("s"); seen.all = !document.body.classList.contains("kept"); press("s");
seen.live = byId("live").textContent; seen.text = text;
seen.marked = document.querySelectorAll(".answer.right").length;
seen.unlabelled = [...document.querySelectorAll("button, input, [role=img]")].filter(
  (x) => !x.textContent.trim() && !x.getAttribute("aria-label") && !(x.labels && x.labels.length)).length;
document.body.append(make("pre", "seen", "SEEN" + JSON.stringify(seen) + "SEEN"));
</script>
"""


@pytest.mark.skipif(not BROWSERS, reason="no chromium on this machine")
def test_in_a_browser(gallery, tmp_path):
    page = shutil.copytree(gallery[2], tmp_path / "page")
    data, index = page_data(page), page / "index.html"
    index.write_text(index.read_text().replace("</body>", DRIVER + "</body>"))
    got = subprocess.run([BROWSERS[0], "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/c",
                          "--dump-dom", index.as_uri()], capture_output=True, text=True, timeout=60)
    found = re.search("SEEN({.*})SEEN", got.stdout, re.DOTALL).group(1)
    seen = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    texts, n = [query["text"] for query in data["queries"]], len(data["queries"])
    of = {status: [q["text"] for q in data["queries"] if q["status"] == status] for status in data["counts"]}
    expected = [("start", 0), ("j", 1), ("right", 2), ("k", 1), ("left", 0), ("at the first", 0),
                ("j in the search field", 0), ("all", 0)]
    assert seen["steps"][:8] == [[what, texts[i], f"{i + 1} of {n}"] for what, i in expected]
    for status, text, place in seen["steps"][8:12]:
        assert text in (of[status] or ["No query fits"])
        assert place.endswith(f"of {len(of[status])}")
    assert seen["steps"][12][1:] == ["No query fits", "0 of 0"]
    assert seen["steps"][13][1:] == [HOSTILE_QUERY, f"1 of {texts.count(HOSTILE_QUERY)}"]
    assert seen["hostile"]["title"] == "NarVid gallery" and seen["hostile"]["elements"] == 0
    assert HOSTILE_VIDEO in seen["hostile"]["names"]
    assert seen["all"] and HOSTILE_QUERY in seen["live"] and seen["marked"] == 2
    assert seen["errors"] == [] and seen["unlabelled"] == 0
