"""Every preset that comes with the program starts and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PRESETS = sorted((Path(__file__).parent.parent / "presets").glob("*.json"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_once_it_has_a_model_and_images(path, train, tiny_model, photographs, tmp_path):
    preset = json.loads(path.read_text())
    preset |= {"pretrained_model_name_or_path": str(tiny_model), "train_data_dir": str(photographs)}
    preset |= {"output_dir": str(tmp_path / "out"), "max_train_steps": 2, "max_resolution": "64,64"}
    preset |= {"bucket_reso_steps": 32, "sample_prompts": "", "cache_latents_to_disk": False}
    code, events, _ = train(preset)
    assert code == 0, events[-1]
    assert events[-1]["status"] == "done"


def test_there_is_a_preset_for_each_purpose_and_size_of_memory():
    names = {path.stem for path in PRESETS}
    assert {"first-steps", "sd15-character", "sd15-style", "sd15-concept", "sd15-6gb", "sd15-8gb"} <= names
    assert {"sd15-12gb", "sd15-24gb", "sd15-locon", "sd15-loha", "sd15-lokr"} | {"sd15-continue"} <= names
