"""narvid/narration/fit.py and judge.py: ranks and margins against loops, chance, texts, the command, refusals."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from narvid.data.frames import frame_path, read_frames
from narvid.data.narrations import Narration, load_narrations, write_narrations
from narvid.narration import __main__ as narration
from narvid.narration import judge
from narvid.narration.fit import area_under_roc, fit, repeated_across, scripts, spread_in_video
from narvid.run.run_dir import load_checkpoint
from narvid.towers import load_towers

# ---- the measures ----


def test_rank_and_margin_of_features_that_are_known():
    frames = torch.eye(4) * torch.tensor([[1.0], [2.0], [3.0], [0.5]])  # two videos of two frames; length is nothing
    sentences = torch.tensor([[3.0, 4, 0, 0], [0, 1, 0, 0], [0, 0, 3, 4]])  # of frames 0, 1 and 2
    got = fit(sentences, frames, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    expected = [(0.6, 1.0, -0.2, 0.0, 0.6), (1.0, 0.0, 1.0, 0.0, 1.0), (0.6, 1.0, -0.2, 0.0, 0.6)]
    assert torch.allclose(torch.stack(got, dim=1), torch.tensor(expected), atol=1e-6)
    # Given the wrong video's frame, a sentence is beaten by one of two frames elsewhere, and ties with the other.
    wrong = fit(sentences[1:2], frames, torch.tensor([2]), torch.tensor([0, 0, 1, 1]))
    assert [x.item() for x in wrong] == pytest.approx([0.0, 0.5, 0.0, 0.75, -0.5])


def test_the_measures_are_those_of_plain_loops():
    rng = np.random.RandomState(0)
    video = np.repeat(np.arange(6), [1, 3, 4, 2, 5, 3])
    frames, sentences = rng.randn(len(video), 8), rng.randn(40, 8)
    frames[2] = frames[1]  # a copy counts half
    own, pool = rng.randint(len(video), size=40), np.arange(0, len(video), 2)
    got = fit(*map(torch.tensor, (sentences, frames, own, video, pool)))

    def unit(x):
        return x / np.linalg.norm(x)

    for row in range(40):
        cosine = [float(unit(sentences[row]) @ unit(frame)) for frame in frames]
        mine, k = cosine[own[row]], own[row]
        inside = [cosine[j] for j in range(len(video)) if video[j] == video[k] and j != k]
        among = [cosine[j] for j in pool if video[j] != video[k]]
        assert got.cosine[row].item() == pytest.approx(mine, abs=1e-6)
        for others, rank, margin in ((inside, got.rank_in_video, got.margin_in_video),
                                     (among, got.rank_among_others, got.margin_among_others)):
            if not others:  # the video of one frame
                assert math.isnan(rank[row]) and math.isnan(margin[row])
                continue
            beaten = sum(1.0 if c > mine + 1e-6 else 0.5 if abs(c - mine) <= 1e-6 else 0.0 for c in others)
            assert rank[row].item() == pytest.approx(beaten / len(others), abs=1e-5)
            assert margin[row].item() == pytest.approx(mine - sum(others) / len(others), abs=1e-5)


def test_sentences_of_other_frames_are_at_chance_and_the_right_ones_are_not():
    rng = np.random.RandomState(1)
    video = torch.tensor(np.repeat(np.arange(100), 6))
    frames = torch.tensor(rng.randn(600, 16), dtype=torch.float32)
    sentences = frames + 0.5 * torch.tensor(rng.randn(600, 16), dtype=torch.float32)
    right = fit(sentences, frames, torch.arange(600), video)
    assert right.rank_among_others.mean() < 0.02 and right.margin_among_others.mean() > 0.7
    permuted = fit(sentences, frames, torch.tensor(rng.permutation(600)), video)
    for rank, margin in ((permuted.rank_among_others, permuted.margin_among_others),
                         (permuted.rank_in_video, permuted.margin_in_video)):
        assert abs(rank.mean() - 0.5) < 0.05 and abs(margin.mean()) < 0.05


def test_how_much_the_sentences_of_a_video_differ():
    sentences = torch.tensor([[2.0, 0], [1, 0], [1, 0], [0, 3], [1, 1]])
    found = spread_in_video(sentences, torch.tensor([7, 7, 8, 8, 9]))
    assert found == {7: pytest.approx(0, abs=1e-6), 8: pytest.approx(1)}  # 9 says one thing
    three = spread_in_video(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([0, 0, 0]))
    assert three[0] == pytest.approx((1 + 2 * (1 - math.sqrt(0.5))) / 3)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.RandomState(2)
    score, positive = rng.randint(6, size=60), rng.rand(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert area_under_roc(score, positive) == pytest.approx(np.mean(pairs))
    assert area_under_roc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert math.isnan(area_under_roc([1, 2], [True, True]))


def test_repeats_across_videos_and_letters_by_script():
    texts = [["A cat.", "a  CAT.", "a dog."], ["a cat.", "a bird."], ["a tree."]]
    assert repeated_across(texts) == pytest.approx(3 / 6)  # within one video it is no repeat across videos
    assert scripts(["ab 12", "кот!", "猫"]) == [("cyrillic", 0.5), ("latin", pytest.approx(1 / 3)),
                                               ("cjk", pytest.approx(1 / 6))]


# ---- the command ----


@pytest.fixture(scope="module")
def weights(corpus, tmp_path_factory):
    """As everywhere, over towers whose texts lie further apart."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("weights") / "start.pt", corpus / "wide.json")


@pytest.fixture(scope="module")
def towers(corpus, weights, tmp_path_factory):
    """Flags of the tiny towers, from a bare state dict."""
    state = load_checkpoint(weights)["model"]
    path = tmp_path_factory.mktemp("towers") / "towers.pt"
    torch.save({key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}, path)
    return ["--towers", str(corpus / "wide.json"), "--clip_pretrained", str(path), "--no-quick_gelu"]


def run(corpus, *more):
    return judge.main([str(x) for x in (corpus / "narrations.jsonl", "--frames", corpus / "frames", *more)])


def test_the_command_measures_what_the_towers_say(corpus, towers, tmp_path, capsys):
    [one] = run(corpus, *towers, "--max_frames", 6, "--out", tmp_path / "out", "--worst", 4)
    said = capsys.readouterr().out
    narrations = load_narrations(corpus / "narrations.jsonl")
    assert (one.captioner, one.row["videos"], one.row["refused"], one.row["letters"]) == ("tiny", 33, 0, "latin 100.0%")
    assert sum(one.histogram) == one.row["sentences"] == len(one.sentences)
    for sentence in one.sentences[::10]:  # each beside its own frame, by time
        at = narrations[sentence.video].times.index(sentence.time)
        assert narrations[sentence.video].sentences[at] == sentence.text and sentence.frame == sentence.time
    pair = load_towers(towers[1], towers[3], quick_gelu=False).eval()
    sentence = one.sentences[17]  # one cosine by hand
    with torch.no_grad():
        frame = pair.encode_frames(read_frames([frame_path(corpus / "frames", sentence.video, sentence.frame)],
                                               pair.picture))
        text = pair.encode_text(pair.tokenize([sentence.text], 77)[0], words=False)[0]
    assert sentence.cosine == pytest.approx(torch.cosine_similarity(frame, text).item(), abs=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "sentences.jsonl").read_text().splitlines()]
    assert len(lines) == len(one.sentences)
    worst = sorted(line["fit"] for line in lines)[:4]
    page = (tmp_path / "out" / "index.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [x["fit"] for x in data["files"][0]["worst"]] == [round(x, 4) for x in worst]
    assert all((tmp_path / "out" / x["picture"]).is_file() for x in data["files"][0]["worst"])
    assert "fit" in said and "33 videos" in said


def test_two_files_stand_side_by_side_on_the_same_videos(corpus, towers, tmp_path, capsys):
    narrations = load_narrations(corpus / "narrations.jsonl")
    other = {video: n._replace(captioner="mute", sentences=["I'm sorry, but I can't see the image."] * len(n.times))
             for video, n in list(narrations.items())[:20]}
    write_narrations(tmp_path / "mute.jsonl", other.items())
    files = [str(corpus / "narrations.jsonl"), str(tmp_path / "mute.jsonl")]
    first, second = judge.main([*files, "--frames", str(corpus / "frames"), *towers])
    assert first.row["videos"] == second.row["videos"] == 20
    assert (second.row["refused"], second.row["repeated"], second.row["differ"]) == (1, 1, pytest.approx(0, abs=1e-5))
    assert first.row["differ"] > 0.01 and "mute" in capsys.readouterr().out


def test_a_checkpoint_judges_with_its_own_towers(corpus, weights, towers):
    [of_test] = run(corpus, *towers, "--only", corpus / "test.jsonl")
    assert {s.video for s in of_test.sentences} == {f"test{n}" for n in range(11)} and of_test.row["videos"] == 11
    [of_run] = run(corpus, "--checkpoint", weights, "--videos", 9)
    [of_file] = run(corpus, *towers, "--videos", 9)
    assert of_run.row["videos"] == 9 and of_run.row["fit"] == pytest.approx(of_file.row["fit"], abs=1e-5)


def test_the_worst_are_dropped_and_each_video_keeps_its_best(corpus, towers, tmp_path, capsys):
    [one] = run(corpus, *towers, "--drop_worst", 0.3, "--kept", tmp_path / "kept.jsonl", "--max_frames", 20)
    before, after = load_narrations(corpus / "narrations.jsonl"), load_narrations(tmp_path / "kept.jsonl")
    gone = {(video, time) for video in before for time in {*before[video].times} - {*after[video].times}}
    assert len(gone) == round(0.3 * len(one.sentences)) and after.keys() == before.keys()
    assert f"{len(gone)} of {len(one.sentences)}" in capsys.readouterr().out
    best = {}
    for sentence in judge.worst_first(one.sentences):
        best[sentence.video] = sentence
    assert not gone & {(sentence.video, sentence.time) for sentence in best.values()}
    order = [s for s in judge.worst_first(one.sentences) if best[s.video] is not s]
    assert gone == {(s.video, s.time) for s in order[:len(gone)]}


def test_what_the_tower_cuts_is_counted_by_its_own_tokenizer(corpus, tmp_path):
    said = ["a picture of red " * 8, "a picture of red"]  # 4 words each time, and an end: 33 and 5 of 24
    write_narrations(tmp_path / "n.jsonl", [("test3", Narration("long", "", [0.0, 1.0], said))])
    flags = tiny.towers_of(corpus, "siglip")
    state = load_towers(flags[1], tokenizer=flags[3]).state_dict()
    torch.save(state, tmp_path / "siglip.pt")
    [one] = judge.main([str(x) for x in (tmp_path / "n.jsonl", "--frames", corpus / "frames", "--towers", flags[1],
                                         "--clip_pretrained", tmp_path / "siglip.pt", "--no-quick_gelu",
                                         "--tokenizer", flags[3])])
    assert one.row["cut"] == 0.5 and one.row["rank, others"] is None  # one video alone


@pytest.mark.parametrize("more, said", [
    ([], "--towers NAME"),
    (["--towers", "ViT-B-32"], "random"),
    (["--towers", "ViT-B-32", "--clip_pretrained", "x", "--drop_worst", "0.1"], "--kept"),
    (["--towers", "no-such", "--clip_pretrained", "x"], "no-such"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--checkpoint", "a.pt", "--clip_pretrained", "x"], "leave --clip_pretrained out"),
])
def test_mistakes_are_one_sentence(corpus, more, said):
    with pytest.raises(SystemExit) as left:
        narration.main(["judge", str(corpus / "narrations.jsonl"), "--frames", str(corpus / "frames"), *more])
    assert said in str(left.value) and "\n" not in str(left.value).strip()


def test_files_without_a_common_video_and_folders_of_others_are_refused(corpus, towers, tmp_path):
    write_narrations(tmp_path / "n.jsonl", [("elsewhere", Narration("c", "", [0.0], ["x"]))])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for more, said in (([tmp_path / "n.jsonl"], "no video with frames"), (["--out", tmp_path / "mine"], "something")):
        with pytest.raises(SystemExit, match=said):
            narration.main(["judge", *map(str, (corpus / "narrations.jsonl", *more, "--frames", corpus / "frames")),
                            *towers])
