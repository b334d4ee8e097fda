from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from tests import reference
from trainer.checkpoint import hashes

OF_ITS_OWN = {
    # validation, and the exact source of sd-scripts: ours has neither
    "ss_num_validation_images",
    "ss_validate_every_n_epochs",
    "ss_validate_every_n_steps",
    "ss_validation_seed",
    "ss_validation_split",
    "ss_max_validation_steps",
    "ss_sd_scripts_commit_hash",
    "ss_resize_interpolation",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_model, photographs):
    """A trained file's metadata and path."""
    from accelerate.state import AcceleratorState

    from trainer.__main__ import main

    folder = tmp_path_factory.mktemp("metadata")
    preset = {
        "pretrained_model_name_or_path": str(tiny_model),
        "train_data_dir": str(photographs),
        "output_dir": str(folder),
        "output_name": "photo",
        "caption_extension": "txt",
        "max_resolution": "64,64",
        "bucket_reso_steps": 32,
        "mixed_precision": "no",
        "optimizer_args": "weight_decay=0.1",
        "optimizer": "AdamW",
        "training_comment": "trigger: zwx",
        "max_train_steps": 2,
        "min_timestep": 5,
        "max_timestep": 0,
        "num_cpu_threads_per_process": 1,
        "seed": 5,
    }
    (folder / "preset.json").write_text(json.dumps(preset))
    assert main(["train", str(folder / "preset.json"), "--run", str(folder / "run")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    path = folder / "photo.safetensors"
    with safe_open(path, "pt") as opened:
        return opened.metadata(), path


def test_the_range_of_timesteps_is_the_one_that_was_trained(file):
    """0 is taken as all 1000."""
    assert file[0]["modelspec.timestep_range"] == "5,1000"


def test_every_key_of_sd_scripts_is_there(file):
    metadata, _ = file
    expected = set(reference.read("sd15_lora_keys")["metadata"]) - OF_ITS_OWN
    assert expected - set(metadata) == set()
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.proves("training_comment")
def test_the_values_say_what_was_trained(file):
    metadata, _ = file
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_seed"] == "5"
    assert metadata["ss_steps"] == "2"
    assert metadata["ss_resolution"] == "(64, 64)"
    assert metadata["ss_optimizer"] == "AdamW(weight_decay=0.1)"
    assert metadata["ss_training_comment"] == "trigger: zwx"
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "2_photo": {"a woman": 1, "space suit": 1, "a cat": 1, "a rocket": 1, "night": 1}
    }
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_photo": {"n_repeats": 2, "img_count": 3}}
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert sum(bucket["count"] for bucket in buckets.values()) == 6
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_the_metadata_holds_names_but_no_paths(file, photographs, tiny_model):
    text = json.dumps(file[0])
    assert metadata_name(file) == tiny_model.name
    assert str(photographs) not in text
    assert str(tiny_model.parent) not in text


def metadata_name(file) -> str:
    return file[0]["ss_sd_model_name"]


def test_the_base_models_hashes_are_those_of_its_file(file, tiny_model):
    data = tiny_model.read_bytes()
    assert file[0]["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    assert file[0]["ss_sd_model_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_the_files_own_hash_is_that_of_its_tensors_under_the_ss_entries(file):
    metadata, path = file
    tensors = load_file(path)
    assert metadata["sshs_model_hash"] == hashes(tensors, metadata)["sshs_model_hash"]
    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


def test_the_hash_changes_with_the_tensors_and_not_with_the_title():
    tensors = {"a": torch.ones(3)}
    one = hashes(tensors, {"ss_seed": "1", "modelspec.title": "x"})
    assert one == hashes(tensors, {"ss_seed": "1", "modelspec.title": "y"})
    assert one["sshs_model_hash"] != hashes({"a": torch.zeros(3)}, {"ss_seed": "1"})["sshs_model_hash"]
