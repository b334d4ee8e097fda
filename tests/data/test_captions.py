"""What a caption becomes when it is read."""

import json
import random
from pathlib import Path

import pytest

from trainer.data.captions import draw, tag_frequency
from trainer.data.folders import Dataset, Picture
from trainer.schema.data import Captions

CAPTION = "sks cat, sitting,roof ,  evening sky"


def drawn(settings, caption=CAPTION, reads=200, epoch=1, seed=0):
    rng = random.Random(seed)
    return [draw(caption, settings, rng, epoch) for _ in range(reads)]


def test_a_caption_is_left_as_it_is():
    assert set(drawn(Captions())) == {CAPTION}


def test_shuffling_gives_every_order_of_the_same_parts():
    orders = set(drawn(Captions(shuffle=True), reads=600))
    assert len(orders) == 24
    assert {frozenset(order.split(", ")) for order in orders} == {
        frozenset({"sks cat", "sitting", "roof", "evening sky"})
    }


def test_kept_parts_stay_in_front():
    orders = set(drawn(Captions(shuffle=True, keep_tokens=2), reads=100))
    assert orders == {"sks cat, sitting, roof, evening sky", "sks cat, sitting, evening sky, roof"}


def test_keeping_more_parts_than_there_are_changes_nothing():
    assert set(drawn(Captions(shuffle=True, keep_tokens=9))) == {"sks cat, sitting, roof, evening sky"}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_dropped_captions_is_the_rate(rate):
    dropped = drawn(Captions(dropout_rate=rate), reads=10_000).count("")
    assert dropped / 10_000 == pytest.approx(rate, abs=0.02)


def test_a_rate_of_one_drops_all():
    assert set(drawn(Captions(dropout_rate=1))) == {""}


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
