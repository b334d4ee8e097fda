"""How long the rest of a training takes."""

import pytest

from trainer import forecast
from trainer.forecast import Forecast


def test_what_is_left_is_the_steps_and_the_pauses_still_due(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    left = Forecast({"pictures": [0, 50, 100], "files": [40, 80, 100]})

    def pause(kind, step, seconds):
        with left.pause(kind, step):
            now[0] += seconds

    pause("pictures", 0, 30)
    left.stepped(1, 20.0)  # the first step, which loads what later ones find there
    assert left.seconds_left(1, 100) is None
    left.stepped(9, 18.0)
    assert left.seconds_left(10, 100) == pytest.approx(90 * 2 + 2 * 30)
    pause("files", 40, 3)
    pause("files", 40, 2)  # the state beside it
    pause("pictures", 50, 10)
    assert left.seconds_left(50, 100) == pytest.approx(50 * 2 + 1 * 20 + 2 * 5)
    assert left.seconds_left(100, 100) == 0


def test_a_picture_that_was_asked_for_is_measured_and_not_expected_again():
    left = Forecast({})
    left.stepped(1, 1.0)
    left.stepped(20, 20.0)
    with left.pause("pictures", 21):
        pass
    assert left.seconds_left(21, 31) == pytest.approx(10)
