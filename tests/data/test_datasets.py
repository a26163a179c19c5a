"""narvid.data.datasets: joining by time, tokens, batches, the sampler, the frame cache.

B queries, V videos, K frames of a video, L words, M tokens of a sentence, U distinct sentences of a batch.
"""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from narvid import InputError
from narvid.data.datasets import FrameDataset, collate, load_split
from narvid.data.frames import Picture
from narvid.towers.tokenizer import Tokenizer
from narvid.data.loader import PairSampler, make_loader
from narvid.data.narrations import Narration

START, END, EXCLAMATION_MARK = 49406, 49407, 0
TIMES = {"a": [0.0, 2.0, 4.0, 6.0, 8.0], "b": [0.0, 1.0], "c": [0.0], "unused": [0.0]}
PAIRS = [("b", "a dog"), ("a", "two cats sleep"), ("b", "dogs"), ("c", "one moment")]


def narrate(times, text="at {:.0f}"):
    return Narration("test", "", list(times), [text.format(time) for time in times])


NARRATIONS = {video: narrate(times) for video, times in TIMES.items()}


@pytest.fixture
def corpus(tmp_path):
    """train.jsonl and jpgs of three videos, each frame of another grey, some wider than high."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"video": v, "query": q}) + "\n" for v, q in PAIRS))
    for number, (video, times) in enumerate(TIMES.items()):
        (tmp_path / "frames" / video).mkdir(parents=True)
        for k in range(len(times)):
            picture = Image.new("RGB", (40 + 8 * number, 40), (40 * number, 40 * k, 100))
            picture.save(tmp_path / "frames" / video / f"{k:05d}.jpg")
    return tmp_path


def load(corpus, narrations=NARRATIONS, max_frames=3, **options):
    options = {"max_frames": max_frames, "narrations_path": corpus / "narrations.jsonl", **options}
    return load_split(corpus / "train.jsonl", corpus / "frames", TIMES, narrations=narrations, **options)


# ---- splits ----


def test_a_split_lists_queries_in_order_and_each_video_once(corpus):
    split = load(corpus)
    assert split.queries == [query for _, query in PAIRS]
    assert split.videos == ["b", "a", "c"]
    assert [split.videos[v] for v in split.video_of_query] == [video for video, _ in PAIRS]
    assert split.picks == [[0, 1], [0, 2, 4], [0]]  # at most three, first and last among them
    assert split.sentences == [["at 0", "at 1"], ["at 0", "at 4", "at 8"], ["at 0"]]
    assert split.skipped == [] and load(corpus, None).sentences is None


def test_sentences_are_joined_by_time_not_by_position(corpus):
    """A file that starts a frame late and ends a frame later: by position every sentence would be wrong."""
    split = load(corpus, {**NARRATIONS, "a": narrate([2.0, 4.0, 6.0, 8.0, 10.0])})
    assert split.sentences[1] == [None, "at 4", "at 8"]
    split = load(corpus, {**NARRATIONS, "a": narrate([0.4, 2.4, 4.4, 6.4, 8.4], "near {:.1f}")})
    assert split.sentences[1] == ["near 0.4", "near 4.4", "near 8.4"]  # within a quarter of the 2 s between frames
    with pytest.raises(InputError, match="another clock"):
        load(corpus, {**NARRATIONS, "a": narrate([0.6, 2.6, 4.6, 6.6, 8.6])})


def test_a_blank_sentence_is_none(corpus):
    blank = Narration("test", "", TIMES["a"], ["at 0", "at 2", " ", "at 6", ""])
    assert load(corpus, {**NARRATIONS, "a": blank}).sentences[1] == ["at 0", None, None]


@pytest.mark.parametrize("narration", [None, narrate([]), narrate([0.0, 1.0], "  ")])
def test_a_video_without_any_sentence_is_refused_or_skipped_with_its_queries(corpus, narration):
    narrations = {**NARRATIONS, "b": narration}
    if narration is None:
        del narrations["b"]
    with pytest.raises(InputError) as refused:
        load(corpus, narrations)
    assert all(word in str(refused.value) for word in ("narrations.jsonl", "video b", ":1)", "skip-video"))
    split = load(corpus, narrations, missing_narration="skip-video")
    assert split.videos == ["a", "c"] and split.skipped == ["b"]
    assert split.queries == ["two cats sleep", "one moment"] and split.video_of_query.tolist() == [0, 1]
    assert len(split.picks) == len(split.sentences) == 2


def test_skipping_every_video_is_refused(corpus):
    with pytest.raises(InputError, match="no query is left"):
        load(corpus, {}, missing_narration="skip-video")


# ---- tokens ----


def test_tokens_are_clips_and_the_mask_ends_at_the_end_token():
    texts = ["a dog", "Two cats sleep on a mat!", ""]
    tokens, mask = Tokenizer({})(texts, 20)
    whole = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert tokens.shape == mask.shape == (3, 9)  # as long as the longest: start, seven pieces, end
    assert torch.equal(tokens, whole[:, :9]) and not whole[:, 9:].any()
    assert mask.sum(dim=1).tolist() == [4, 9, 2]
    assert (tokens[:, 0] == START).all() and (tokens[torch.arange(3), mask.sum(dim=1) - 1] == END).all()


def test_an_exclamation_mark_is_a_word_though_it_has_the_padding_id():
    tokens, mask = Tokenizer({})(["!; wow", "wow", "wow !;"], 20)
    assert EXCLAMATION_MARK in tokens[0, mask[0]].tolist()
    assert mask.sum(dim=1).tolist() == [5, 3, 5]
    assert tokens[0, 1] == tokens[2, 2] == tokens[1, 3] == EXCLAMATION_MARK  # two words, and padding


def test_a_long_text_is_cut_and_keeps_its_end_token():
    tokens, mask = Tokenizer({})(["dog " * 100, "a dog"], 8)
    assert tokens.shape == (2, 8) and mask[0].all() and mask[1].sum() == 4
    assert tokens[0, 0] == START and tokens[0, -1] == END and len(set(tokens[0, 1:-1].tolist())) == 1


# ---- batches ----


def batch_of(split, items, **options):
    dataset = FrameDataset(split, split.video_of_query, Picture(32))
    options = {"max_words": 20, "max_frames": 4, "with_queries": True, **options}
    return collate([dataset[i] for i in items], split=split, tokenize=Tokenizer({}), **options)


def test_a_batch_holds_its_items_padded_and_masked(corpus):
    split = load(corpus)
    batch = batch_of(split, [3, 1, 2])
    assert batch.item.tolist() == [3, 1, 2] and batch.video.tolist() == [2, 1, 0]
    assert batch.frames.shape == (3, 4, 3, 32, 32) and batch.frames.dtype == torch.uint8
    assert batch.mask.dtype == batch.narration_mask.dtype == torch.bool
    assert batch.mask.sum(dim=1).tolist() == [1, 3, 2] and batch.mask[:, 0].all()  # real frames come first
    assert not batch.frames[~batch.mask].any() and batch.frames[batch.mask].any(dim=(1, 2, 3)).all()
    want, mask = Tokenizer({})([split.queries[i] for i in (3, 1, 2)], 20)
    assert torch.equal(batch.tokens, want) and torch.equal(batch.word_mask, mask)


def test_equal_sentences_of_a_batch_are_encoded_once_and_find_their_frames(corpus):
    split = load(corpus)  # "at 0" stands in all three videos
    batch = batch_of(split, [0, 1, 2, 3])
    said = [split.sentences[v] for v in batch.video.tolist()]
    distinct = list(dict.fromkeys(sentence for sentences in said for sentence in sentences))
    assert len(batch.sentences) == len(distinct) == 4
    for row, sentences in enumerate(said):
        assert batch.narration_mask[row].tolist() == [True] * len(sentences) + [False] * (4 - len(sentences))
        for k, sentence in enumerate(sentences):
            want, _ = Tokenizer({})([sentence], 20)
            got = batch.sentences[batch.sentence_of_frame[row, k]]
            assert torch.equal(got[: want.shape[1]], want[0]) and not got[want.shape[1] :].any()


def test_a_missing_sentence_is_masked_and_its_frame_is_not(corpus):
    blank = Narration("test", "", TIMES["a"], ["at 0", "at 2", " ", "at 6", "at 8"])
    batch = batch_of(load(corpus, {**NARRATIONS, "a": blank}), [1])
    assert batch.mask[0].tolist() == [True, True, True, False]
    assert batch.narration_mask[0].tolist() == [True, False, True, False]
    assert batch.sentence_of_frame.max() < len(batch.sentences) == 2  # masked slots point somewhere too


def test_without_narrations_or_queries_a_batch_has_none(corpus):
    batch = batch_of(load(corpus, None), [0, 1])
    assert batch.sentences is batch.sentence_of_frame is batch.narration_mask is None
    batch = batch_of(load(corpus), [0, 1], with_queries=False)
    assert batch.tokens is batch.word_mask is None and batch.to(torch.device("cpu")).tokens is None


def test_the_pixels_of_an_item_are_those_of_the_picked_files(corpus):
    split = load(corpus)
    i, video, frames, _ = FrameDataset(split, split.video_of_query, Picture(32))[1]
    assert (i, split.videos[video], frames.shape) == (1, "a", (3, 3, 32, 32))
    greens = frames[:, 1].float().mean(dim=(1, 2)).round().int().tolist()
    assert all(abs(got - want) <= 2 for got, want in zip(greens, (0, 80, 160)))  # frames 0, 2 and 4 of a


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_gives_what_the_files_give(corpus, num_workers):
    split = load(corpus)
    plain = FrameDataset(split, split.video_of_query, Picture(32))
    cached = FrameDataset(split, split.video_of_query, Picture(32), cache=True)
    loader = make_loader(cached, list, [[0, 1], [2, 3]], num_workers=num_workers)
    for _ in range(2):  # filled, then read
        for items in loader:
            for i, video, frames, _ in items:
                assert video == plain[i][1] and torch.equal(frames, plain[i][2])
    assert cached.filled.tolist() == [True] * 3  # by the workers, seen here: the memory is shared
    for video in ("a", "b", "c"):
        for path in (corpus / "frames" / video).iterdir():
            path.unlink()
    del loader
    assert [len(cached[i][2]) for i in range(4)] == [2, 3, 2, 1]  # no file is read again


# ---- the sampler ----


def global_batches(n, batch_size, world_size, *, epoch=0, step=0, **options):
    """Each batch over all ranks, in order of rank, as a list of index lists."""
    ranks = []
    for rank in range(world_size):
        sampler = PairSampler(n, batch_size, rank=rank, world_size=world_size, seed=5, **options)
        sampler.set(epoch, step)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_ranks_sees_the_same_global_batches(accumulation):
    one = global_batches(37, 8, 1, accumulation=accumulation)
    assert [len(batch) for batch in one] == [8 // accumulation] * (4 * accumulation)
    for world_size in (2, 4):
        assert global_batches(37, 8, world_size, accumulation=accumulation) == one


def test_accumulation_cuts_the_same_steps_into_micro_batches():
    whole, cut = global_batches(37, 8, 2), global_batches(37, 8, 2, accumulation=4)
    assert [set(batch) for batch in whole] == [set(sum(cut[4 * i : 4 * i + 4], [])) for i in range(len(whole))]


def test_an_epoch_has_every_index_at_most_once_and_drops_less_than_a_batch():
    drawn = sum(global_batches(37, 8, 2), [])
    assert len(drawn) == len(set(drawn)) == 32 and set(drawn) <= set(range(37))
    assert sorted(sum(global_batches(32, 8, 2), [])) == list(range(32))
    left_out = {tuple(sorted(set(range(37)) - set(sum(global_batches(37, 8, 1, epoch=e), [])))) for e in range(5)}
    assert len(left_out) == 5  # other ones in each epoch


def test_the_order_comes_from_seed_and_epoch_alone():
    assert global_batches(37, 8, 1) == global_batches(37, 8, 1)
    assert global_batches(37, 8, 1) != global_batches(37, 8, 1, epoch=1)
    one, other = (PairSampler(37, 8, rank=0, world_size=1, seed=seed) for seed in (5, 6))
    state = np.random.get_state()[1].copy()
    assert list(one) != list(other)
    assert np.array_equal(state, np.random.get_state()[1])  # nothing drawn from the global generator


@pytest.mark.parametrize("accumulation", [1, 2])
def test_going_on_from_a_step_gives_the_rest_of_the_epoch(accumulation):
    whole = global_batches(37, 8, 2, epoch=3, accumulation=accumulation)
    for step in range(5):
        assert global_batches(37, 8, 2, epoch=3, step=step, accumulation=accumulation) == whole[step * accumulation :]


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "accumulation", "words"),
    [
        (3, 4, 4, 1, ["3 training pairs", "batch of 4", "4 processes"]),  # more processes than samples
        (7, 8, 1, 1, ["7 training pairs", "batch of 8", "--batch_size"]),
        (37, 8, 3, 1, ["--batch_size 8", "3 processes"]),
        (37, 8, 2, 3, ["--batch_size 8", "2 processes", "3 accumulation steps"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused(n, batch_size, world_size, accumulation, words):
    with pytest.raises(InputError) as refused:
        PairSampler(n, batch_size, rank=0, world_size=world_size, seed=0, accumulation=accumulation)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
