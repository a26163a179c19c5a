"""A released NarVid checkpoint through the trainer: evaluated, it gives what numpy computes from frames and words up to
the metrics; continued, it starts from those weights. The file holds no config: --clip_model says the architecture.

The heads' keys come from test_heads.py, the towers' are OpenAI's under "clip."; the numpy side shares nothing with the
package but the tokenizer's ids.
"""

import functools
import json

import numpy as np
import open_clip
import pytest
import reference
import test_heads
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from PIL import Image

import main_task_retrieval as trainer
from narvid import InputError
from narvid.towers import __main__ as towers_command

D, K, SIDE, MAX_WORDS = 64, 3, 32, 12
ARCHITECTURE = {
    "embed_dim": D,
    "vision_cfg": {"image_size": SIDE, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
TIMES = {"dog": [0.0, 1.0, 2.0, 3.0, 4.0], "cat": [0.0, 1.0], "fish": [0.0, 1.0, 2.0]}  # 3 picked of 5, 2, 3
PICKED = {"dog": [0, 2, 4], "cat": [0, 1], "fish": [0, 1, 2]}  # linspace(0, n - 1, 3)
SENTENCES = {
    "dog": ["a dog", "no frame is shown of this", "a dog runs in the snow", "nor of this", "the end!"],
    "cat": ["a cat on a mat", "a cat on a mat"],
    "fish": ["one fish", " ", "red fish, blue fish"],  # a blank one is none
}
QUERIES = [("dog", "a dog runs"), ("fish", "fish of two colours swim around in a very large bowl of water"),
           ("cat", "a cat sits"), ("dog", "snow!"), ("cat", "it sits on a mat")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three videos of noise, already as small as the towers want them; the same pairs to train and to test on."""
    folder = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(0)
    for video, times in TIMES.items():
        (folder / "frames" / video).mkdir(parents=True)
        for k in range(len(times)):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            Image.fromarray(pixels).save(folder / "frames" / video / f"{k:05d}.jpg", quality=95)
    narrations = [
        {"video": video, "captioner": "test", "prompt": "",
         "sentences": [{"time": t, "text": s} for t, s in zip(TIMES[video], said)]}
        for video, said in SENTENCES.items()
    ]
    write_lines(folder / "narrations.jsonl", narrations)
    write_lines(folder / "frames" / "index.jsonl", [{"video": v, "times": t} for v, t in TIMES.items()])
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [{"video": video, "query": query} for video, query in QUERIES])
    (folder / "clip.json").write_text(json.dumps(ARCHITECTURE))
    return folder


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def released_state():
    """Every key of a released checkpoint: towers in OpenAI's dtypes under "clip.", heads with those nothing uses."""
    torch.manual_seed(0)
    towers = CLIP(**ARCHITECTURE, quick_gelu=True)
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if name != "logit_scale":
                around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # LayerNorm
                parameter.copy_(around + 0.15 * torch.randn_like(parameter))
    convert_weights_to_lp(towers, torch.float16)
    heads = {key: value for key, value in test_heads.released(D, seed=3).items() if not key.startswith("clip.")}
    return {**{f"clip.{key}": value for key, value in towers.state_dict().items()}, **heads}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "narvid_released.bin"
    torch.save(released_state(), path)
    return path


def run(corpus, checkpoint, out, *more):
    """main() with fp32 everywhere and the released checkpoint -> its metrics."""
    flags = ["--data_dir", corpus, "--checkpoint", checkpoint, "--clip_model", corpus / "clip.json"]
    flags += ["--output_dir", out, "--max_frames", K, "--max_words", MAX_WORDS, "--precision", "fp32"]
    flags += ["--num_workers", 0, "--batch_size", 5, "--eval_batch_size", 2, "--epochs", 1, "--allow_leak", *more]
    return trainer.main([str(x) for x in flags])


# ---- the same in numpy ----


def picture(path):
    """A jpg as CLIP sees it, (3, SIDE, SIDE)."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).transpose(2, 0, 1) / 255
    mean, std = (np.array(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (pixels - mean) / std


def ids(text):
    """Start, word pieces cut to MAX_WORDS - 2, end."""
    return [49406, *tokenizer().encode(text)[: MAX_WORDS - 2], 49407]


@functools.cache
def tokenizer():
    return open_clip.SimpleTokenizer()


def numpy_scores(corpus, state, fidelity):
    """S_qv and S_qn (B, V): frames and words -> CLIP -> heads -> filter -> match, one query and one video at a time."""
    towers = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
    videos = list(dict.fromkeys(video for video, _ in QUERIES))
    enhanced = {}
    for video in videos:
        said = [SENTENCES[video][k] for k in PICKED[video]]
        mask = [True] * len(said)
        files = [corpus / "frames" / video / f"{k:05d}.jpg" for k in PICKED[video]]
        frames = [reference.clip_image(towers, picture(path)) for path in files]
        narration = [reference.clip_text(towers, ids(s))[0] for s in said]
        narrated = [not s.isspace() for s in said]
        features = reference.enhance(state, np.array(frames), np.array(narration), mask, narrated)
        enhanced[video] = features, mask, narrated
    scores = np.zeros((2, len(QUERIES), len(videos)))
    for b, (_, query) in enumerate(QUERIES):
        eos, words = reference.clip_text(towers, ids(query))
        real = [True] * len(words)
        weights = reference.word_weights(state, words, real)
        for v, video in enumerate(videos):
            features, *masks = enhanced[video]
            for view in (0, 1):
                scores[view, b, v] = reference.score(eos, words, real, weights, features[view], masks[view],
                                                     p=0.4, temperature=0.1, fidelity=fidelity)
    return *scores, np.array([videos.index(video) for video, _ in QUERIES])


@pytest.mark.parametrize("fidelity", ["reported", "paper"])
def test_a_released_checkpoint_scores_as_numpy_does_from_pixels_to_metrics(corpus, checkpoint, tmp_path, fidelity):
    metrics = run(corpus, checkpoint, tmp_path / "run", "--eval_only", "--save_similarity", "--fidelity", fidelity)
    state = {key: value.double().numpy() for key, value in released_state().items()}
    s_video, s_narration, video_of_query = numpy_scores(corpus, state, fidelity)
    saved = np.load(tmp_path / "run" / "similarity.npz")
    assert saved["video_of_query"].tolist() == video_of_query.tolist()
    assert saved["queries"].tolist() == [query for _, query in QUERIES]
    np.testing.assert_allclose(saved["S_qv"], s_video, rtol=0, atol=1e-4)
    np.testing.assert_allclose(saved["S_qn"], s_narration, rtol=0, atol=1e-4)
    assert s_video.std() > 0.01 and s_narration.std() > 0.01  # or 1e-4 would prove little
    want = {"S_qv": s_video, "S_qn": s_narration, "S_sum": s_video + s_narration,
            "S_fusion": reference.fuse(s_video, s_narration)}
    assert metrics.keys() == want.keys()
    for name, matrix in want.items():
        for direction, numbers in reference.retrieval_metrics(matrix, video_of_query).items():
            assert metrics[name][direction] == pytest.approx(numbers), (name, direction)


def test_the_two_fidelities_differ_here(corpus):
    state = {key: value.double().numpy() for key, value in released_state().items()}
    reported, paper = (numpy_scores(corpus, state, fidelity)[0] for fidelity in ("reported", "paper"))
    assert np.abs(reported - paper).max() > 0.01


def test_continuing_starts_from_the_released_weights(corpus, checkpoint, tmp_path):
    """With rates of 0 an epoch changes nothing: the run's checkpoint is the release, and scores as it did."""
    before = run(corpus, checkpoint, tmp_path / "eval", "--eval_only")
    after = run(corpus, checkpoint, tmp_path / "run", "--lr", 0, "--clip_lr", 0)
    assert after == before
    model = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    state = released_state()
    for key in ("clip.visual.conv1.weight", "clip.token_embedding.weight", "clip.text_projection"):
        assert torch.equal(model[key], state[key].float())
    assert torch.equal(model["heads.temporal_narration.positions"], state["caption_position_embeddings.weight"])
    assert torch.equal(model["heads.word_weight_mlp.2.weight"], state["text_weight_fc.2.weight"])


def test_one_epoch_moves_it_and_its_own_checkpoint_needs_no_flag_again(corpus, checkpoint, tmp_path):
    trained = run(corpus, checkpoint, tmp_path / "run", "--lr", 1e-3, "--clip_lr", 1e-4, "--epochs", 2)
    model = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    state = released_state()
    assert not torch.equal(model["heads.temporal_frames.blocks.0.mlp.c_fc.weight"],
                           state["transformerClip.resblocks.0.mlp.c_fc.weight"])
    flags = ["--eval_only", "--checkpoint", tmp_path / "run" / "best.pt", "--data_dir", corpus, "--output_dir",
             tmp_path / "eval", "--num_workers", 0]
    assert trainer.main([str(x) for x in flags]) == trained


def test_the_towers_of_a_release_have_quick_gelu_without_a_flag(corpus, checkpoint, tmp_path):
    run(corpus, checkpoint, tmp_path / "run", "--lr", 0, "--clip_lr", 0)
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["clip_config"]["quick_gelu"] is True


# ---- what is refused ----


def refusal(corpus, path, out, *more):
    with pytest.raises(SystemExit) as left:
        run(corpus, path, out, "--eval_only", *more)
    assert left.value.code.startswith("error: ") and "\n" not in left.value.code
    return left.value.code


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("clip.ln_final.weight"), ["1 are missing", "ln_final.weight"]),
        (lambda s: s.pop("text_weight_fc.0.weight"), ["text_weight_fc.0.weight", "no released NarVid checkpoint"]),
        (lambda s: s.pop("transformerCaption.resblocks.1.ln_1.bias"), ["1 are missing", "temporal_narration.blocks.1"]),
        (lambda s: s.update({"clip.visual.proj": torch.zeros(64, 128)}), ["another shape", "visual.proj", "(64, 128)"]),
    ],
)
def test_a_release_that_lacks_something_is_refused(corpus, tmp_path, edit, words):
    state = released_state()
    edit(state)
    torch.save(state, tmp_path / "released.bin")
    message = refusal(corpus, tmp_path / "released.bin", tmp_path / "run")
    assert "released" in message and all(word in message for word in words), message


def test_a_release_of_another_architecture_is_refused(corpus, checkpoint, tmp_path):
    other = json.loads(json.dumps(ARCHITECTURE))
    other["vision_cfg"]["patch_size"] = 8
    (tmp_path / "other.json").write_text(json.dumps(other))
    message = refusal(corpus, checkpoint, tmp_path / "run", "--clip_model", tmp_path / "other.json")
    assert "narvid_released.bin" in message and "another shape" in message


def test_check_release_says_what_a_file_holds_and_that_it_scores(corpus, checkpoint, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        towers_command.main(["check-release", str(checkpoint), "--clip_model", str(corpus / "clip.json")])
    out = capsys.readouterr().out
    assert not left.value.code
    state = torch.load(checkpoint, weights_only=True)
    of_clip = sum(key.startswith("clip.") for key in state)
    assert f"{len(state)} tensors, {of_clip} of CLIP (0 of them unread), {len(state) - of_clip} of the heads" in out
    assert "D 64" in out and "noise: finite" in out
    for broken, sentence in ((lambda s: s.pop("clip.visual.conv1.weight"), "has heads and no towers"),
                             (lambda s: s.pop("text_weight_fc.0.weight"), "text_weight_fc|word_weight_mlp|missing")):
        changed = dict(state)
        broken(changed)
        torch.save(changed, tmp_path / "broken.bin")
        with pytest.raises(InputError, match=sentence) as error:
            towers_command.main(["check-release", str(tmp_path / "broken.bin")])
        assert "broken.bin" in str(error.value)
    with pytest.raises(InputError, match="name it with --clip_model"):
        towers_command.main(["check-release", str(checkpoint)])
