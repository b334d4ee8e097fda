"""A training goes on from a LoRA of any naming, and ends with a picture with it and one without."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from trainer.lora.converting import convert


def of_type(events, kind):
    return [event for event in events if event["type"] == kind]


@pytest.mark.proves("network_weights", "sample_prompts")
def test_from_a_file_of_diffusers_to_a_proved_one_of_its_own(settings, train, tmp_path):
    train(settings | {"max_train_steps": 2, "learning_rate": 0.1})
    first = tmp_path / "out" / "photo.safetensors"
    given = convert(first, tmp_path / "given.safetensors", to="diffusers").path
    before = load_file(first)
    goes_on = {"network_weights": str(given), "learning_rate": 1e-9, "max_train_steps": 1, "output_name": "second"}
    drawing = {"sample_prompts": "a cat --s 2 --d 3\na dog --s 2", "sample_every_n_steps": 5}
    code, events, folder = train(settings | goes_on | drawing)
    assert code == 0
    after = load_file(tmp_path / "out" / "second.safetensors")
    assert after.keys() == before.keys()
    assert all(np.allclose(after[name], before[name], atol=1e-6) for name in before)

    (verified,) = of_type(events, "verified")
    assert verified["problems"] == [] and verified["loads_in"] == ["diffusers"]
    last = [event for event in of_type(events, "sample") if event["step"] == 1]
    assert [(event["index"], event["strength"]) for event in last] == [(0, 0.0), (0, 1.0)]
    assert last[0]["seed"] == last[1]["seed"] == 3
    without, with_it = (np.asarray(Image.open(folder / event["path"]), dtype=int) for event in last)
    assert np.abs(without - with_it).max() > 5


def test_a_training_from_nothing_has_the_picture_without_it_from_its_start(settings, train):
    drawing = {"sample_prompts": "a cat --s 1\na dog --s 1", "sample_every_n_steps": 5}
    _, events, _ = train(settings | {"max_train_steps": 2} | drawing)
    assert [(event["step"], event["index"], event["strength"]) for event in of_type(events, "sample")] == [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (2, 0, 1.0),
    ]


def test_without_samples_no_picture_is_drawn(settings, train):
    _, events, _ = train(settings | {"max_train_steps": 1, "sample_prompts": "a cat"})
    assert of_type(events, "sample") == []
