"""What a caption becomes when it is read."""

import itertools
import json
import random
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.captions import draw, split_outside_brackets, tag_frequency, weigh
from trainer.data.folders import Dataset, Picture
from trainer.schema import read
from trainer.schema.data import Captions
from trainer.schema.rules import cached_states

CAPTION = "sks cat, sitting,roof ,  evening sky"


def drawn(settings, caption=CAPTION, reads=200, epoch=1, seed=0):
    rng = random.Random(seed)
    return [draw(caption, settings, rng, epoch) for _ in range(reads)]


def test_a_caption_is_left_as_it_is():
    assert set(drawn(Captions())) == {CAPTION}


@pytest.mark.proves("shuffle_caption")
def test_shuffling_gives_every_order_of_the_same_parts():
    orders = set(drawn(Captions(shuffle=True), reads=600))
    assert len(orders) == 24
    assert {frozenset(order.split(", ")) for order in orders} == {
        frozenset({"sks cat", "sitting", "roof", "evening sky"})
    }


@pytest.mark.proves("keep_tokens")
def test_kept_parts_stay_in_front():
    orders = set(drawn(Captions(shuffle=True, keep_tokens=2), reads=100))
    assert orders == {"sks cat, sitting, roof, evening sky", "sks cat, sitting, evening sky, roof"}


def test_keeping_more_parts_than_there_are_changes_nothing():
    assert set(drawn(Captions(shuffle=True, keep_tokens=9))) == {"sks cat, sitting, roof, evening sky"}


@pytest.mark.proves("caption_dropout_rate")
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_dropped_captions_is_the_rate(rate):
    dropped = drawn(Captions(dropout_rate=rate), reads=10_000).count("")
    assert dropped / 10_000 == pytest.approx(rate, abs=0.02)


def test_a_rate_of_one_drops_all():
    assert set(drawn(Captions(dropout_rate=1))) == {""}


@pytest.mark.proves("caption_dropout_every_n_epochs")
def test_every_nth_epoch_counted_from_one_has_no_captions():
    settings = Captions(dropout_every_n_epochs=3)
    without = [epoch for epoch in range(1, 10) if drawn(settings, reads=1, epoch=epoch) == [""]]
    assert without == [3, 6, 9]


def test_the_same_random_state_gives_the_same_text():
    settings = Captions(shuffle=True, dropout_rate=0.3)
    assert drawn(settings, seed=4) == drawn(settings, seed=4)
    assert drawn(settings, seed=4) != drawn(settings, seed=5)


def test_no_caption_is_an_empty_one():
    assert draw(None, Captions(shuffle=True), random.Random(0), 1) == ""


def test_tags_are_counted_by_folder_in_lower_case_without_repeats():
    def picture(caption, folder):
        return Picture(Path("x.png"), caption, 10, (1, 1), folder, False, "cat")

    data = Dataset(
        (picture("Cat, roof,", "3_a"), picture("cat ,sky", "3_a"), picture("cat", "1_b"), picture(None, "1_c")), ()
    )
    assert tag_frequency(data) == {"3_a": {"cat": 2, "roof": 1, "sky": 1}, "1_b": {"cat": 1}, "1_c": {}}


REFERENCE = json.loads((Path(__file__).parent / "reference" / "captions.json").read_text())
OURS = {"shuffle_caption", "keep_tokens", "caption_dropout_rate", "caption_dropout_every_n_epochs"}
CASES = [
    case
    for case in REFERENCE["process_caption"] + REFERENCE["shuffled"]
    # Of several lines only the first is taken already when the file is read.
    if set(case["set"]) <= OURS and "\n" not in case["caption"]
]


@pytest.mark.parametrize("case", CASES)
def test_the_same_random_numbers_make_of_a_caption_what_sd_scripts_makes(case):
    rng = random.Random(case.get("python_random_seed", 0))
    assert draw(case["caption"], Captions(**case["set"]), rng, case.get("epoch", 0)) == case["result"]


def test_there_are_reference_captions_for_each_setting():
    assert {key for case in CASES for key in case["set"]} == OURS


AS_IN_THE_WEBUI = "(x: 1.2)"  # see below
WEIGHED = [c for c in REFERENCE["weighted_parse"] if "raises" not in c and c["prompt"] != AS_IN_THE_WEBUI]


@pytest.mark.proves("weighted_captions")
@pytest.mark.parametrize("case", WEIGHED, ids=lambda case: case["prompt"])
def test_brackets_weigh_as_in_sd_scripts(case):
    assert weigh(case["prompt"]) == [(text, pytest.approx(weight)) for text, weight in case["result"]]


@pytest.mark.parametrize("text", ["(x:1.2.3)", "(x:.)", "(x:1234567)", "(x:1 .2)", "(x:nan)"])
def test_a_weight_that_is_no_number_is_text_in_a_plain_bracket(text):
    """sd-scripts ends with an error at the first two."""
    assert weigh(text) == [(text[1:-1], pytest.approx(1.1))]


@pytest.mark.parametrize("text", [AS_IN_THE_WEBUI, "(x:1.2 )", "(x:\t1.2\n)"])
def test_blanks_around_a_weight_do_not_count(text):
    """As the WebUI reads them; sd-scripts takes such a weight for text."""
    assert weigh(text) == [("x", pytest.approx(1.2))]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a, b,c", ["a", " b", "c"]),
        ("(a, b:1.2), c", ["(a, b:1.2)", " c"]),
        ("[a, (b, c)], d", ["[a, (b, c)]", " d"]),
        (r"\(a, b\), c", [r"\(a", r" b\)", " c"]),
        ("a), b", ["a)", " b"]),
        ("a, (b, c", ["a", " (b, c"]),
        ("", [""]),
        (",", ["", ""]),
    ],
)
def test_commas_inside_brackets_do_not_part(text, parts):
    assert split_outside_brackets(text) == parts


def test_shuffling_tears_no_bracket_of_a_weighted_caption():
    caption = "first, (black, white:1.2), cat, [sky, cloud]"
    for text in drawn(Captions(shuffle=True, weighted=True, keep_tokens=1), caption):
        first, *rest = split_outside_brackets(text)
        assert first == "first"
        assert {part.strip() for part in rest} == {"(black, white:1.2)", "cat", "[sky, cloud]"}
    torn = drawn(Captions(shuffle=True), caption)
    assert any("(black, white:1.2)" not in text for text in torn)


# Brackets, commas, escapes and weights far more often than other text has them.
bracketed = st.text(st.sampled_from("()[]\\:,.0123456789+- ab\n日")) | st.text()


@settings(deadline=None, max_examples=300)
@given(bracketed)
def test_any_text_is_weighed_and_split_without_losing_any(text):
    runs = weigh(text)
    assert runs
    assert all(isinstance(weight, float) for _, weight in runs)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(runs))
    kept = "".join(run for run, _ in runs)
    assert len(kept) <= len(text)
    if not set(text) & set("()[]\\"):
        assert runs == [(text, 1.0)]
    assert ",".join(split_outside_brackets(text)) == text


@settings(deadline=None, max_examples=200)
@given(bracketed, st.builds(Captions, shuffle=st.booleans(), weighted=st.booleans(), keep_tokens=st.integers(0, 3)))
def test_any_caption_can_be_drawn(caption, settings):
    text = draw(caption, settings, random.Random(0), 1)
    words = sorted("".join(caption.split()))
    assert sorted("".join(text.split())) == words


def values_of(field):
    """Some that a parameter can have: the default and one that may matter."""
    if field.annotation is bool:
        return (False, True)
    if choices := get_args(field.annotation):
        return choices
    return {int: (field.default, 2), float: (field.default, 0.5)}.get(field.annotation, (field.default,))


def test_where_the_text_encoders_answers_may_be_cached_a_caption_is_the_same_at_every_read():
    frozen = read({"text_encoder_lr": 0})[0]
    fields = Captions.model_fields
    cached = 0
    for values in itertools.product(*map(values_of, fields.values())):
        captions = Captions(**dict(zip(fields, values, strict=True)))
        config = frozen.model_copy(update={"captions": captions})
        if captions.cache_states and not list(cached_states(config)):
            cached += 1
            texts = {draw(CAPTION, captions, random.Random(epoch), epoch) for epoch in range(1, 7)}
            assert len(texts) == 1, (captions, texts)
    assert cached
