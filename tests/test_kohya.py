from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer import kohya, schema
from trainer.errors import ConfigError

PRESETS = sorted((Path(__file__).parent.parent / "presets").glob("*.json"))


def notes(flat: dict[str, object]) -> dict[str, str]:
    return {note.key: note.what for note in kohya.read(flat).notes}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_of_ours_is_described_and_valid(path):
    preset = kohya.load(path)
    assert len(preset.description) > 30
    assert preset.notes == ()
    schema.parse(preset.values)


def test_zero_false_and_empty_survive_a_round_trip(tmp_path):
    flat = {
        "max_grad_norm": 0,
        "cache_latents": False,
        "seed": "",
        "text_encoder_lr": "0",
        "vae": "",
        "unheard_of": [1],
    }
    preset = kohya.read(flat)
    kohya.save(tmp_path / "p.json", preset.values, preset.kept)
    again = json.loads((tmp_path / "p.json").read_text())
    assert again == flat
    assert all(type(again[k]) is type(flat[k]) for k in flat)


def test_older_names_are_converted_and_said():
    preset = kohya.read({"lora_network_weights": "/a.safetensors", "stop_text_encoder_training_pct": 30})
    assert preset.values == {"network_weights": "/a.safetensors", "stop_text_encoder_training": 30}
    assert {n.key for n in preset.notes} == {"lora_network_weights", "stop_text_encoder_training_pct"}


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("xformers", True, "xformers"),
        ("xformers", False, "none"),
        ("xformers", "", "none"),
        ("bucket_reso_steps", 1, 8),
        ("lr_scheduler", "Cosine", "cosine"),
        ("optimizer", "adamw8bit", "AdamW8bit"),
    ],
)
def test_older_values_are_converted_and_said(key, old, new):
    preset = kohya.read({key: old})
    assert preset.values[key] == new
    assert notes({key: old}) == {key: "converted"}


def test_the_8bit_switch_of_old_presets_becomes_the_optimizer():
    assert kohya.read({"use_8bit_adam": True}).values["optimizer"] == "AdamW8bit"
    assert kohya.read({"use_8bit_adam": True, "optimizer": "Lion"}).values["optimizer"] == "Lion"


def test_unknown_keys_are_kept_and_named():
    preset = kohya.read({"learning_rat": 1e-4, "epoch": 3})
    assert preset.kept == {"learning_rat": 1e-4}
    assert notes({"learning_rat": 1e-4}) == {"learning_rat": "unknown"}


def test_a_key_that_is_not_supported_is_said_only_where_it_would_have_an_effect():
    assert notes({"log_tracker_config": ""}) == {}
    assert notes({"log_tracker_config": "x.toml"}) == {"log_tracker_config": "not supported"}


def test_no_key_is_both_supported_and_pending():
    assert not set(kohya.PENDING) & set(schema.PARAMETERS)


def test_secrets_never_reach_a_file(tmp_path):
    kohya.save(tmp_path / "p.json", {"epoch": 1}, {"wandb_api_key": "s3cret", "huggingface_token": "t0ken"})
    text = (tmp_path / "p.json").read_text()
    assert "s3cret" not in text
    assert "t0ken" not in text


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "null", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_file_that_is_no_preset_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"bad\.json"):
        kohya.load(path)
    with pytest.raises(ConfigError, match="nowhere"):
        kohya.load(tmp_path / "nowhere.json")


def test_a_byte_order_mark_does_not_matter(tmp_path):
    (tmp_path / "p.json").write_bytes(b'\xef\xbb\xbf{"epoch": 2}')
    assert kohya.load(tmp_path / "p.json").values == {"epoch": 2}


def test_a_key_that_is_nearly_a_parameters_is_asked_about():
    (note,) = kohya.read({"netwrk_dim": 8, "epoch": 2}).notes
    assert (note.what, note.key) == ("unknown", "netwrk_dim") and "(did you mean network_dim?)" in note.message
    for flat in ({"netwrk_dim": 8, "network_dim": 4}, {"gui_theme": "dark"}):
        assert "did you mean" not in kohya.read(flat).notes[0].message
