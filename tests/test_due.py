"""What is due after which steps, told beforehand as it will be step by step."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from trainer.due import files_due, forecast_files, forecast_samples, samples_due
from trainer.length import Length
from trainer.schema.training import Training

few = st.integers(0, 5)


def session(batches, accumulation, epochs, every_steps, every_epochs, first_step):
    """What of a session says when something is due."""
    length = Length.of(batches, Training(accumulation=accumulation, epochs=epochs))
    every = SimpleNamespace(name="photo", every_n_steps=every_steps, every_n_epochs=every_epochs)
    config = SimpleNamespace(saving=every, samples=every)
    team = SimpleNamespace(leads=True)
    return SimpleNamespace(config=config, length=length, team=team, prompts=["a cat"], first_step=first_step)


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), few, few, st.integers(1, 9))
def test_what_is_forecast_is_what_comes_due_step_by_step(batches, accumulation, epochs, every, epochal, first):
    s = session(batches, accumulation, epochs, every, epochal, first)
    steps = range(first, s.length.total_steps + 1)
    if steps:
        assert forecast_files(s) == [step for step in steps if files_due(s, step, set())]
    assert forecast_samples(s) == [step for step in steps if samples_due(s, step, set())]


def test_a_training_of_a_hundred_million_steps_begins_at_once():
    s = session(100, 1, 1_000_000, 0, 100_000, 1)
    assert forecast_files(s) == [10_000_000 * n for n in range(1, 11)]
