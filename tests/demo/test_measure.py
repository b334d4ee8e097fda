"""The measure is itself measured: on pictures whose answer is known."""

import pytest
import torch

from trainer.demo import measure, pictures


@pytest.fixture(scope="module")
def known():
    """One random picture for every style and concept."""
    count = len(pictures.CONCEPTS) * len(measure.STYLES)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def references(known):
    return measure.features(known).unflatten(0, (-1, len(measure.STYLES)))


def test_the_pictures_themselves_are_always_right(known, references):
    chosen = measure.prompts(40)
    drawn = known[[concept * len(measure.STYLES) + style for style, concept in chosen]]
    assert all(measure.nearest_are_right(drawn, chosen, references))


def test_pictures_of_other_concepts_are_right_only_by_chance(known, references):
    chosen = measure.prompts(300)
    drawn = known[[(concept + 1) % len(pictures.CONCEPTS) * len(measure.STYLES) + style for style, concept in chosen]]
    assert sum(measure.nearest_are_right(drawn, chosen, references)) / 300 < 10 / len(pictures.CONCEPTS)


def test_prompts_are_the_same_each_time_and_never_repeat():
    chosen = measure.prompts(200)
    assert chosen == measure.prompts(200)
    assert len(set(chosen)) == 200
    assert [sum(style == s for style, _ in chosen) for s in range(4)] == [50] * 4


def test_features_see_colour_and_outline():
    red, blue = torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    halves = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    halves[..., 16:] = 255
    assert measure.features(red).shape == (1, 5 * 16 * 16)
    assert (measure.features(red) - measure.features(blue)).norm() > 20
    assert measure.features(red)[:, 3 * 256 :].abs().max() == 0
    # One step of lightness 1 between two columns of pixels, in one column of cells 2 pixels wide: 4 · 1 / 2.
    across = measure.features(halves)[:, 3 * 256 : 4 * 256].view(16, 16)
    assert torch.allclose(across.sum(0), torch.eye(16)[7] * 16 * 2.0)


@pytest.mark.parametrize(("colour", "expected"), [((255, 255, 255), 0.0), ((255, 0, 0), 1.0), ((10, 61, 10), 0.2)])
def test_saturation_is_the_spread_of_the_channels(colour, expected):
    image = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert measure.saturation(image) == pytest.approx(expected)
