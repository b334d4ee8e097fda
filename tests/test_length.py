"""How many steps and epochs a training has."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.length import Length
from trainer.schema.training import Training


def length(batches, **settings):
    found = Length.of(batches, Training(**settings))
    return found.total_steps, found.epochs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (10, 1)),
        ({"epochs": 3}, (30, 3)),
        ({"epochs": 3, "accumulation": 4}, (8, 3)),  # 30 batches, the last step takes 2
        ({"epochs": 3, "max_epochs": 2}, (20, 2)),
        ({"epochs": 1, "max_epochs": 5}, (50, 5)),
        ({"epochs": 3, "max_epochs": 0, "max_steps": 0}, (30, 3)),
        ({"epochs": 3, "max_epochs": 2, "max_steps": 25}, (25, 3)),
        ({"max_steps": 7}, (7, 1)),
        ({"max_steps": 7, "accumulation": 3}, (7, 3)),  # 21 batches
    ],
)
def test_steps_go_before_the_limit_of_epochs_and_that_before_the_epochs(settings, expected):
    assert length(10, **settings) == expected


@settings(deadline=None)
@given(
    batches=st.integers(1, 40),
    accumulation=st.integers(1, 50),
    epochs=st.integers(1, 6),
    max_steps=st.none() | st.integers(1, 60),
)
def test_the_steps_take_every_batch_once_and_epochs_end_where_their_batches_do(
    batches, accumulation, epochs, max_steps
):
    found = Length.of(batches, Training(epochs=epochs, accumulation=accumulation, max_steps=max_steps))
    taken = [batch for step in range(1, found.total_steps + 1) for batch in found.batches_of(step)]
    assert taken == list(range(found.total_batches))
    assert all(found.batches_of(step) for step in range(1, found.total_steps + 1))
    if max_steps is None:
        assert found.total_steps == math.ceil(batches * epochs / accumulation)
        assert found.epochs_done(found.total_steps) == epochs
    else:
        assert found.total_steps == max_steps
        assert found.total_batches == max_steps * accumulation
    for step in range(1, found.total_steps + 1):
        last = found.batches_of(step)[-1]
        assert found.epoch_of(step) == last // batches + 1
        assert found.epochs_done(step) == (last + 1) // batches
    assert found.epoch_of(found.total_steps) == found.epochs
    assert found.epochs_done(0) == 0
