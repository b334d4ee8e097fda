"""The shipped base model draws what it is asked for, and the demo teaches it a style: short forms of trainer/demo/measure.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import models
from trainer.demo import measure, pictures
from trainer.demo.make_images import HELD_OUT, demo_concepts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base():
    return models.load("", "", torch.float32, torch.device("cpu"), clip_skip=1, max_tokens=75)


@pytest.fixture(scope="module")
def references():
    return measure.read_features(Path(__file__).with_name("features.npz"))


def test_the_base_model_draws_the_concepts_it_is_asked_for(base, references):
    chosen = measure.prompts(24)
    captions = [pictures.caption(measure.STYLES[style], pictures.CONCEPTS[i].name) for style, i in chosen]
    drawn = measure.draw(base, captions, steps=12)
    right = measure.nearest_are_right(drawn, chosen, references)
    assert sum(right) >= 0.6 * len(right)


def test_a_third_of_the_first_steps_teaches_the_style_and_keeps_the_concepts(base, references, tmp_path):
    command = [sys.executable, "-m", "trainer", "train", str(ROOT / "presets" / "first-steps.json")]
    shorter = [
        "--epoch",
        "3",
        "--num_cpu_threads_per_process",
        "1",
        "--sample_every_n_epochs",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    subprocess.run([*command, *shorter, "--run", str(tmp_path / "run")], check=True, cwd=ROOT)
    lora = measure.network_of(tmp_path / "out" / "linocut.safetensors", base)

    concepts = demo_concepts(HELD_OUT)[::5]
    numbers = [pictures.CONCEPTS.index(concept) for concept in concepts]
    captions = [pictures.caption(pictures.UNSEEN_STYLE[0], concept.name) for concept in concepts]
    without = measure.draw(base, captions, steps=12)
    lora.attach()
    drawn = measure.draw(base, captions, steps=12)
    with lora.strength(0):
        at_zero = measure.draw(base, captions, steps=12)
    lora.detach()

    assert torch.equal(at_zero, without)
    # The whole preset goes below a tenth; see measure_style.
    assert measure.saturation(drawn) < 0.25 * measure.saturation(without)
    right_without, right = (
        sum(measure.nearest_in_any_style(images, numbers, references)) for images in (without, drawn)
    )
    assert right >= 2 / 3 * right_without > 0
