"""narvid/narration/answers.py: reasoning, refusals, cut and empty answers, and text that a tokenizer would mistake."""

import json
import os
from pathlib import Path

import pytest

from narvid.towers.tokenizer import Tokenizer
from narvid.narration.answers import Cut, Failed, first_sentence, in_a_row, is_refusal, kind_of, sentence

REAL = Path(os.environ.get("NARVID_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "real"))


def cleaned(text, cut=False):
    return sentence(text, cut=cut, limit=77)


@pytest.mark.parametrize("text, expected", [
    ("A red thing.", "A red thing."),
    (" A red\n\tthing\x85 stands\u2028here. \r\n", "A red thing stands here."),
    ("<think>\nLet me look.\n</think>\n\nA red thing.", "A red thing."),
    ("<THINKING>a</THINKING> A red thing. <think>done</think>", "A red thing."),
    ("<reasoning>a</reasoning><thought>b</thought>A red thing.", "A red thing."),
    ("[THINK]a[/THINK]A red thing.", "A red thing."),
    ("◁think▷a◁/think▷A red thing.", "A red thing."),
    ("the prompt opened this block</think>A red thing.", "A red thing."),
    ("<think>a <think>b</think> c</think>A red thing.", "A red thing."),
    ("A red thing.<think>Is that all? I", "A red thing."),
    ("<answer>A red thing.</answer>", "A red thing."),
    ("<s>A <|im_end|>red<end_of_text> thing.<|endoftext|></s><pad>", "A red thing."),
    ("<start_of_text>A red thing.<END_OF_TURN>", "A red thing."),
    ("A red &lt;end_of_text&gt;thing &amp;lt;|endoftext|&amp;gt; here.", "A red thing here."),
    ("A red ＜end_of_text＞ thing.", "A red thing."),
    ("<end_of<pad>_text>A red thing.", "<end_of _text>A red thing."),
    ("A\0 red\x1b[1m thing\x9f.\x7f", "A red [1m thing ."),
    ("half \ud83d a pair", "half ? a pair"),
    ("Tom &amp; Jerry, 3 < 4 > 2, <3, [1], <b>bold</b>", "Tom & Jerry, 3 < 4 > 2, <3, [1], <b>bold</b>"),
    ("一只红色的猫", "一只红色的猫"),
])
def test_what_is_kept_of_an_answer(text, expected):
    assert cleaned(text) == expected
    assert type(cleaned(text)) is str and kind_of(cleaned(text)) == ""
    assert type(cleaned(text, cut=True)) is Cut and cleaned(text, cut=True) == expected
    tokens = Tokenizer({"context_length": 1000})([expected], 1000)[0][0].tolist()
    assert tokens.count(49406) == tokens.count(49407) == 1  # one start, one end


@pytest.mark.parametrize("text, cut, kind, words", [
    (None, False, "empty", "no text"),
    (7, False, "empty", "no text"),
    ("", False, "empty", "empty"),
    (" \n\0 .\u200b", False, "empty", "empty"),
    ("<think>all of it</think>", False, "empty", "empty"),
    ("<end_of_text>", False, "empty", "empty"),
    ("<think>The user wants a caption, let me", True, "cut", "limit of 77 ended the answer in its reasoning"),
    ("<think>The user wants a caption, let me", False, "cut", "--max_new_tokens"),
    ("<think>done</think>\n", True, "cut", "--max_new_tokens"),
    (None, True, "cut", "--max_new_tokens"),
    ("", True, "cut", "--max_new_tokens"),
])
def test_what_is_no_sentence(text, cut, kind, words):
    answer = cleaned(text, cut)
    assert isinstance(answer, Failed) and answer.kind == kind_of(answer) == kind and words in answer.why


REFUSALS = """
I'm sorry, but I can't help with this image 2.
I’m sorry, but I can’t assist with that.
I am really very sorry, but I am unable to describe this image.
Sorry, but I can't assist with that request.
Sorry! I cannot describe this picture.
I'm sorry.
I'm sorry, but this image appears to contain inappropriate content.
**I'm sorry**, but we cannot process this image.
I cannot assist with that.
I can't assist with identifying people in this photo.
I cannot provide a description of this image.
I am unable to process this image.
I'm unable to view images directly.
I won't be able to describe this picture
I cannot and will not describe this image.
I must decline to describe this image.
I'd rather not describe this image.
I can't see the image.
I cannot see any images or visual content.
I don't see any image attached to your message.
As an AI language model, I cannot view images.
As an AI, I don't have the ability to see pictures.
I'm just a language model, so I can't help with that.
Unfortunately, I am not able to assist with this image.
I apologize, but I cannot fulfill this request.
I don't feel comfortable describing this image.
I do not have access to any images.
Thank you for sharing. However, I can't assist with describing this image.
This image may violate our content policy.
Your request was flagged by our moderation system.
No image was provided.
You haven't attached an image.
Please upload an image so that I can describe it.
""".strip().splitlines()
CAPTIONS = """
A man says sorry to a woman.
A woman is sorry for what she did.
A man says sorry, I can't help you, to a woman.
A card that says "I'm sorry, but I can't help" lies on a table.
"I'm sorry" is written on a cake.
A sign reads: I cannot help.
Sorry sign on the door of a shop.
Sorry we are closed, says a sign on a glass door.
As an AI robot walks across the stage, people clap.
As an AI-generated image, it shows a dog.
I can't help but notice a man riding a horse.
I see a man in a red shirt who cannot open a door.
I do not see any people, only a red car on a street.
I cannot see the man's face, but he is riding a horse.
I see a picture of a dog on the wall.
The picture is blocked by a tree.
The image is of a man who can't help laughing.
Unfortunately for the boy, the ball flies into the river.
A man is unable to open the door.
A person refuses to help.
The request of the player was rejected by the referee.
A screenshot of a chat where a user writes I can't help with this image.
The video is filtered in black and white.
No image of a person is there, only a dog.
Please note the man who is dancing.
a man sings i can't help falling in love with you
the girl says i'm sorry but i can't go
""".strip().splitlines()


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert is_refusal(text) and kind_of(text) == kind_of(Cut(text)) == "refused"


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_about_apologies_are_none(text):
    assert not is_refusal(text) and kind_of(text) == ""


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no captions in {REAL}; set NARVID_REAL_DATA")
def test_of_what_people_say_about_videos_nothing_is_a_refusal():
    """ActivityNet's val_1 (17,505 sentences) and DiDeMo's val and test (8,201); of MSR-VTT's 200,000 one is."""
    said = [text for video in json.loads((REAL / "activitynet" / "val_1.json").read_text()).values()
            for text in video["sentences"]]
    said += [entry["description"] for name in ("val", "test")
             for entry in json.loads((REAL / "didemo" / f"{name}_data.json").read_text())]
    assert len(said) > 20_000 and not [text for text in said if is_refusal(text)]


def test_only_a_refused_picture_says_nothing_of_the_next():
    failures = 0
    for answer, expected in ((Failed("down"), 1), (Failed("policy", "refused"), 1), (Failed("", "empty"), 2),
                             (Failed("", "cut"), 3), ("A cat.", 0), (Failed("policy", "refused"), 0)):
        failures = in_a_row(failures, answer)
        assert failures == expected


# ---- one sentence ----


@pytest.mark.parametrize("text, first", [
    ("A man walks. He waves.", "A man walks."), ("A man walks", "A man walks"), ("A man walks.", "A man walks."),
    ("A man walks! He waves.", "A man walks!"), ("Is it a man? Yes.", "Is it a man?"), ("Men... They wave.", "Men..."),
    ("Mr. Smith and Dr. J. Doe walk. They wave.", "Mr. Smith and Dr. J. Doe walk."),
    ("The U.S. army, e.g. tanks, at 3.5 km. It is hot.", "The U.S. army, e.g. tanks, at 3.5 km."),
    ('A sign says "Stop." A man waits.', 'A sign says "Stop."'), ("1. A man walks. 2. He waves.", "1. A man walks."),
    ("一个男人在走路。他挥手。", "一个男人在走路。"), ("... A man walks. He waves.", "... A man walks."), ("", ""),
    ("A plan by St. Mary's, No. 7. It rains.", "A plan by St. Mary's, No. 7."),
])
def test_the_first_full_stop_ends_a_sentence_and_an_abbreviation_does_not(text, first):
    assert first_sentence(text) == first


def test_an_answer_that_was_cut_behind_its_first_sentence_is_whole():
    whole, half = (sentence(text, cut=True, limit=9, one=True) for text in ("A man walks. He wa", "A man wa"))
    assert (whole, type(whole)) == ("A man walks.", str) and (half, type(half)) == ("A man wa", Cut)
    assert sentence("<think>No. Yes.</think> A man walks. He waves.", cut=False, limit=9, one=True) == "A man walks."
    assert sentence("A man walks. He waves.", cut=False, limit=9) == "A man walks. He waves."
