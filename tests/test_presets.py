"""Every preset that comes with the program starts and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny

PRESETS = sorted((Path(__file__).parent.parent / "presets").glob("*.json"))


@pytest.fixture
def base_model(tiny_model, tiny_sd2, tiny_sdxl, tmp_path):
    """The tiny model of the family and prediction that a preset is for."""

    def base_model(preset):
        if preset.get("sdxl") and preset.get("v_parameterization"):
            return tiny.write_sdxl(tmp_path / "v.safetensors", prediction="v_prediction", marks=("v_pred", "ztsnr"))
        return tiny_sdxl if preset.get("sdxl") else tiny_sd2 if preset.get("v2") else tiny_model

    return base_model


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_once_it_has_a_model_and_images(path, train, base_model, photographs, tmp_path):
    preset = json.loads(path.read_text())
    preset |= {"pretrained_model_name_or_path": str(base_model(preset)), "train_data_dir": str(photographs)}
    preset |= {"output_dir": str(tmp_path / "out"), "max_train_steps": 2, "max_resolution": "96,96"}
    preset |= {"bucket_reso_steps": 32, "sample_prompts": "", "cache_latents_to_disk": False}
    preset |= {"num_cpu_threads_per_process": 1}
    code, events, _ = train(preset)
    assert code == 0, events[-1]
    assert events[-1]["status"] == "done"


def test_there_is_a_preset_for_each_purpose_and_size_of_memory():
    names = {path.stem for path in PRESETS}
    assert {"first-steps", "sd15-character", "sd15-style", "sd15-concept", "sd15-6gb", "sd15-8gb"} <= names
    assert {"sd15-12gb", "sd15-24gb", "sd15-locon", "sd15-loha", "sd15-lokr"} | {"sd15-continue"} <= names
    assert {"sdxl-character", "sdxl-8gb", "sdxl-pony-illustrious", "sdxl-noobai-vpred", "sd2-768"} <= names
