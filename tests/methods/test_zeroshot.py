"""narvid.methods.zeroshot: cosines of mean-pooled CLIP features against loops, and Table 9's four rows through the
trainer, which trains nothing.

B queries, V videos, K frames of a video and sentences of its narration, D joint dimension; masks True = real.
"""

import numpy as np
import pytest
import reference_clip4clip as slow
import tiny
import torch
from reference import cosine, fuse, retrieval_metrics

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid.methods.zeroshot import ZeroShot

D, K = 64, 3
CONFIG = clip.ClipConfig(D, tiny.CLIP["vision_cfg"], {**tiny.CLIP["text_cfg"], "vocab_size": 50})
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)  # (4, K)
NARRATED = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)  # holes; the last has none
FRAMES = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (4, K, 3, 32, 32)).astype(np.uint8))
SENTENCES = torch.tensor([[48, 3, 49, 0, 0], [48, 7, 7, 12, 49], [48, 5, 49, 0, 0]])  # 49 ends; (U, M)
SENTENCE_OF_FRAME = torch.tensor([[0, 2, 1], [1, 0, 0], [2, 2, 0], [0, 0, 0]])
TOKENS = torch.tensor([[48, 9, 9, 49], [48, 49, 0, 0]])  # (2, 4)


@pytest.fixture(scope="module")
def model():
    """Towers whose every weight has life, in float64."""
    torch.manual_seed(0)
    towers = clip.build_towers(CONFIG).double()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ZeroShot(towers, use_narration=True).eval()


@torch.no_grad()
def scores(model, frames=FRAMES, mask=MASK, sentence_of_frame=SENTENCE_OF_FRAME, narrated=NARRATED, tokens=TOKENS):
    videos = model.encode_videos(frames, mask, SENTENCES, sentence_of_frame, narrated)
    return model.score(model.encode_queries(tokens, tokens > 0), videos)


def test_both_views_are_cosines_of_means(model):
    with torch.no_grad():
        eos = model.clip.encode_text(TOKENS)[0].numpy()
        frames = model.clip.encode_frames(FRAMES.flatten(0, 1)).view(4, K, D).numpy()
        sentences = model.clip.encode_text(SENTENCES)[0].numpy()
    got = scores(model)
    assert list(got) == ["video", "narration"] and got["video"].shape == (2, 4)
    for b in range(2):
        for v in range(4):
            pooled = slow.mean_pool(frames[v], MASK[v])
            assert got["video"][b, v].item() == pytest.approx(cosine(eos[b], pooled), abs=1e-12)
            if NARRATED[v].any():
                sentence = slow.mean_pool(sentences[SENTENCE_OF_FRAME[v]], NARRATED[v])
                assert got["narration"][b, v].item() == pytest.approx(cosine(eos[b], sentence), abs=1e-12)
    assert (got["narration"][:, 3] == 0).all()  # no sentence, no opinion


def test_padding_changes_nothing_and_videos_do_not_see_each_other(model):
    def twice(x):
        return torch.cat([x, x.flip(0)], dim=1)

    longer, order = [torch.cat([mask, torch.zeros_like(mask)], dim=1) for mask in (MASK, NARRATED)], [2, 0, 3, 1]
    padded = scores(model, twice(FRAMES), longer[0], twice(SENTENCE_OF_FRAME), longer[1])
    shuffled = scores(model, FRAMES[order], MASK[order], SENTENCE_OF_FRAME[order], NARRATED[order])
    for view, expected in scores(model).items():
        torch.testing.assert_close(padded[view], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shuffled[view], expected[:, order], rtol=1e-9, atol=1e-12)


def test_a_checkpoint_lends_its_towers(model, corpus, weights):
    """Of a NarVid, say; and what holds no towers is refused."""
    config = clip.ClipConfig(**tiny.CLIP)
    other = ZeroShot(clip.build_towers(config), use_narration=False)
    state = torch.load(weights, weights_only=True)["model"]
    other.load_release(state, "narvid.pt")
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="heads.pt: weights of another model"):
        other.load_release({"frame_position_embeddings.weight": torch.zeros(77, D)}, "heads.pt")


# --------------------------------------------------------------------------------------------------------- the trainer


def flags(corpus, output_dir, *more):
    return ["--method", "zeroshot", "--data_dir", str(corpus), "--clip_model", str(corpus / "clip.json"),
            "--output_dir", str(output_dir), "--max_frames", "6", "--num_workers", "0", "--precision", "fp32", *more]


def test_the_trainer_gives_the_four_rows_and_trains_nothing(corpus, tmp_path):
    returned = trainer.main(flags(corpus, tmp_path / "run", "--save_similarity"))
    assert list(returned) == ["S_qv", "S_qn", "S_sum", "S_fusion"]
    assert not list((tmp_path / "run").glob("*.pt"))
    arrays = np.load(tmp_path / "run" / "similarity.npz")
    s_video, s_narration, of_query = (arrays[name] for name in ("S_qv", "S_qn", "video_of_query"))
    for name, matrix in zip(returned, (s_video, s_narration, s_video + s_narration, fuse(s_video, s_narration))):
        for direction, numbers in retrieval_metrics(matrix, of_query).items():
            assert returned[name][direction] == pytest.approx(numbers)


def test_without_a_narration_the_video_alone_is_scored_the_same(corpus, tmp_path):
    both = trainer.main(flags(corpus, tmp_path / "both"))
    alone = trainer.main(flags(corpus, tmp_path / "alone", "--no-use_narration", "--narrations", "nowhere"))
    assert alone == {"S_qv": both["S_qv"]}
