"""narvid/search with towers of other families: which are taken, what is said of them, queries in other languages."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image

from narvid import InputError
from narvid.search.__main__ import main
from narvid.search.towers import choose, describe
from narvid.towers import load_towers


def test_what_is_taken_where_nothing_is_named():
    assert choose(None, None, gpu=False) == ("ViT-B-32", "laion2b_s34b_b79k")
    assert choose(None, None, gpu=True) == ("PE-Core-B-16", "meta")
    assert choose(None, "weights.pt", gpu=True) == ("ViT-B-32", "weights.pt")
    assert choose("ViT-B-16", None, gpu=False) == ("ViT-B-16", "openai")
    assert choose("ViT-B-16-SigLIP2", None, gpu=False) == ("ViT-B-16-SigLIP2", "webli")
    assert choose("my.json", None, gpu=False) == ("my.json", None)
    with pytest.raises(InputError, match="say which weights with --clip_pretrained, laion2b_s32b_b79k"):
        choose("ViT-H-14", None, gpu=False)


def test_what_is_said_before_anything_is_fetched(corpus):
    said = describe("PE-Core-B-16", "meta")
    assert "PE-Core-B-16, weights meta (fetched once" in said and "448 million parameters, 1.8 GB" in said
    assert "151 million" in describe("ViT-B-32", "openai")
    assert "random" in describe(str(corpus / "clip.json"), None)


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """Four videos of one colour each, and weights with which a text tower of another family tells them apart."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("languages")
    (folder / "videos").mkdir()
    for name in ("red", "green", "blue", "yellow"):
        with av.open(str(folder / "videos" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 64
            for _ in range(12):
                frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), tiny.COLOURS[name]))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    torch.manual_seed(0)
    torch.save(load_towers(str(corpus / "siglip.json")).state_dict(), folder / "siglip.pt")
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    return folder


def ask(capsys, *argv):
    capsys.readouterr()
    main(list(map(str, argv)))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_other_towers_and_other_languages_from_files_to_answers(corpus, home, tmp_path, capsys):
    index = tmp_path / "index"
    towers = ["--clip_model", corpus / "siglip.json", "--clip_pretrained", home / "siglip.pt"]
    main(list(map(str, ["index", home / "videos", "--out", index, *towers, "--tokenizer", home / "tokenizer"])))
    assert "4 files new" in capsys.readouterr().out
    queries = tmp_path / "queries.txt"
    queries.write_text("ein roter Stern wächst\nмужчина готовит еду\n一只狗在海滩上跑\nred below\n")
    answers = ask(capsys, "query", index, "--queries", queries, "--json")
    assert [of["query"] for of in answers] == queries.read_text().splitlines()
    assert all(len(of["answers"]) == 4 for of in answers)

    (home / "tokenizer").rename(tmp_path / "moved")  # where it lies is free, what it holds is not
    try:
        again = ask(capsys, "query", index, "--queries", queries, "--json", "--tokenizer", tmp_path / "moved")
    finally:
        (tmp_path / "moved").rename(home / "tokenizer")
    assert again == answers

    # The index keeps its towers: nothing has to be named again.
    shutil.copy(home / "videos" / "red.mp4", home / "videos" / "again.mp4")
    try:
        main(["index", str(home / "videos"), "--out", str(index)])
    finally:
        (home / "videos" / "again.mp4").unlink()
    assert "1 files new, 0 changed, 0 removed, 4 as before" in capsys.readouterr().out
