"""A query as people write it -> parts: what is an expression, what a sentence, and where a mistake stands."""

import pytest

from narvid import InputError
from narvid.search.parts import MOST, Part, is_expression, parse, parse_arguments, scaled, written


def text(value, weight=1.0):
    return Part(weight, "text", value)


@pytest.mark.parametrize("query, parts", [
    ('"a dog on a beach" - "people" + 0.5*picture.jpg',
     [text("a dog on a beach"), text("people", -1), Part(0.5, "picture", "picture.jpg")]),
    ('2:"golden retriever"+"a pool"', [text("golden retriever", 2), text("a pool")]),
    ('- "people" + "a beach"', [text("people", -1), text("a beach")]),
    ('"one part"', [text("one part")]),
    ("“a dog” - “people”", [text("a dog"), text("people", -1)]),  # a phone's
    ('window:12 - 1.5*clip:"my clip.mkv" + film.webm',
     [Part(1, "window", 12), Part(-1.5, "clip", "my clip.mkv"), Part(1, "clip", "film.webm")]),
    (r'"he says \"go - now\"" - "a back\\slash"', [text('he says "go - now"'), text("a back\\slash", -1)]),
    ("picture:0123abcd", [Part(1, "picture", "0123abcd")]),
], ids=str)
def test_parts(query, parts):
    assert parse(query) == parts and is_expression(query)
    assert parse(written(parts)) == parts


@pytest.mark.parametrize("sentence", [
    "a close-up - man in a car", "1 + 1 = 2 is written on a board", "- a list", "3:00 pm at a station", "red*blue.jpg",
    'he says "go" - and goes', '"Hello" says the man', "'people' + dogs", "window: a man opens it", "it's -5 degrees",
    "window:12 is open", '"well"-known people', "picture.jpg", "äöü – ☺"])
def test_a_sentence_stays_what_it_is(sentence):
    assert parse(sentence) == [text(sentence)] and written([text(sentence)]) == sentence
    assert parse_arguments([sentence]) == [text(sentence)]


def test_a_sentence_that_looks_like_parts_can_be_written():
    for value in ('"a" + "b"', '"open', "window:3", 'a "b" \\ c'):
        assert parse(written([text(value)])) == [text(value)]


@pytest.mark.parametrize("query, where", [
    ('"a dog', 'at character 1, "a dog: this quotation mark is not closed'),
    ('"a dog" - "people', 'at character 11, "people: this quotation mark'),
    ('"a dog" - people', "at character 11, people: put a text into quotes; a file ends in .jpg"),
    ('"a dog" - ', "at its end: a part is missing"),
    ('"a dog" - + "b"', r"at character 11, \+ \"b\": a part is missing"),
    ('"a" "b"', 'at character 5, "b": a . or - must stand before it'),
    ('"a" 0.5*b.jpg', "at character 5, 0.5.b.jpg: a . or - must stand"),
    ('"a" + nan*"b"', "at character 7, nan.*: nan is no weight: it is a number from 0.001 to 1000"),
    ("\"a\" + 1e308*\"b\"", "1e308 is no weight"),
    ('"a" + 0*"b"', "0 is no weight"), ('"a" + 1..2*"b"', "1..2 is no weight"),
    ('-  "a" - "b"', "every part of the query has a minus: say also what to look for"),
    ('"" + "b"', "at character 1, .*: this part is empty"), ('"a" + window:x', "a window is a number"),
    (" + ".join(['"a"'] * (MOST + 1)), f"has {MOST + 1} parts; at most {MOST} are taken"),
], ids=str)
def test_a_mistake_is_named_where_it_stands(query, where):
    with pytest.raises(InputError, match=where) as error:
        parse(query)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_arguments_of_a_command_line():
    assert parse_arguments(["horse", "+", "stripes"]) == [text("horse"), text("stripes")]
    assert parse_arguments(["2:golden retriever", "+", "./pool.JPG", "-", "a: b"]) == [
        text("golden retriever", 2), Part(1, "picture", "./pool.JPG"), text("a: b", -1)]
    assert parse_arguments(["-", "people", "+", '"3:00 pm"', "+", "window:4"]) == [
        text("people", -1), text("3:00 pm"), Part(1, "window", 4)]
    assert parse_arguments(['"a" - "b"']) == [text("a"), text("b", -1)]
    for arguments, where in ((["a", "dog"], 'put the sentence into quotes, "a ..."'), (["a", "-"], "a part is missing"),
                             (["a", "+", "-", "b"], "'. a . -': a part is missing"), (["-", "a"], "has a minus"),
                             (["a", "b", "+", "c"], "at 'b': a lone . or - must stand"),
                             (["a", "+", "nan*b"], "no weight"), (["", "+", "b"], "empty"),
                             (['"a" - "b"', "+", "c"], "every part as an argument of its own")):
        with pytest.raises(InputError, match=where):
            parse_arguments(arguments)


def test_parts_are_added_to_a_query():
    assert parse("a close-up - man", '- picture:ab + 2*clip:cd') == [
        text("a close-up - man"), Part(-1, "picture", "ab"), Part(2, "clip", "cd")]
    assert parse("  ", "window:3") == [Part(1, "window", 3)]
    with pytest.raises(InputError, match="has a minus"):
        parse("", "- window:3")


def test_weights_are_scaled_by_those_with_a_plus():
    assert [part.weight for part in scaled([text("a", 2), text("b", -3), text("c", 4)])] == pytest.approx(
        [1 / 3, -0.5, 2 / 3])
    assert scaled([text("a")]) == [text("a")]
