from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer import kohya, schema
from trainer.errors import ConfigError
from trainer.schema import PARAMETERS

BLOCKS_SET = ["down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_dims", "block_alphas", "conv_block_dims"]
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
        ("LoRA_type", "LoCon", "LyCORIS/LoCon"),
        ("log_with", True, "wandb"),
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


@pytest.mark.parametrize(
    ("values", "key", "why"),
    [
        ({"keep_tokens": 2}, "keep_tokens", "Shuffle caption (shuffle_caption) is off."),
        ({"huber_c": 0.2}, "huber_c", "Loss type (loss_type) is l2."),
        ({"huber_schedule": "constant"}, "huber_schedule", "Loss type (loss_type) is l2."),
        ({"prior_loss_weight": 0.5}, "prior_loss_weight", "Regularisation folder (reg_data_dir) is empty."),
        ({"noise_offset_type": "Multires", "noise_offset": "0.1"}, "noise_offset", "(noise_offset_type) is Multires."),
        ({"lr_scheduler": "constant", "lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles", "is constant."),
        ({"lr_scheduler": "constant", "lr_scheduler_power": 3}, "lr_scheduler_power", "is constant."),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "lr_warmup_steps", "is constant."),
        ({"lr_warmup": 5, "lr_warmup_steps": 5}, "lr_warmup", "LR warmup steps (lr_warmup_steps) goes before it."),
        ({"min_bucket_reso": 128}, "min_bucket_reso", "(bucket_no_upscale) is on."),
        ({"max_bucket_reso": 512}, "max_bucket_reso", "(bucket_no_upscale) is on."),
        ({"cache_latents": False, "vae_batch_size": 4}, "vae_batch_size", "Cache latents (cache_latents) is off."),
        ({"save_last_n_steps": 100}, "save_last_n_steps", "Save every N steps (save_every_n_steps) is 0."),
        ({"save_last_n_epochs_state": 2}, "save_last_n_epochs_state", "Save training state (save_state) is off."),
        ({"save_every_n_epochs": 0, "save_last_n_epochs": 2}, "save_last_n_epochs", "(save_every_n_epochs) is 0."),
        ({"text_encoder_lr": 0, "stop_text_encoder_training": 5}, "stop_text_encoder_training", "(text_encoder_lr) is 0."),
        (
            {"text_encoder_lr": 0, "loraplus_text_encoder_lr_ratio": 4},
            "loraplus_text_encoder_lr_ratio",
            "Text Encoder learning rate (text_encoder_lr) is 0.",
        ),
        ({"unet_lr": 0, "down_lr_weight": "sine"}, "down_lr_weight", "Unet learning rate (unet_lr) is 0."),
        (
            {"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "unet-transformer-only", "text_encoder_lr": 1e-3},
            "text_encoder_lr",
            "LyCORIS Preset (LyCORIS_preset) unet-transformer-only leaves the text encoder alone.",
        ),
        ({"dim_from_weights": True, "block_dims": "9,9"}, "block_dims", "DIM from weights (dim_from_weights) is on."),
        ({"learning_rate": 3e-4}, "learning_rate", "Set those, or empty them."),
    ],
)  # fmt: skip
def test_what_is_set_and_changes_nothing_is_named_with_the_control_it_depends_on(values, key, why):
    (note,) = kohya.unused(values)
    assert (note.what, note.key) == ("without effect", key)
    assert note.message.startswith(f"{values[key]} has no effect: ") and note.message.endswith(why)


def test_nothing_is_said_of_controls_that_nobody_touched():
    """Nor of what a preset of kohya_ss holds that says no more than an empty box."""
    untouched = {
        "max_bucket_reso": 2048,
        "multires_noise_discount": 0.3,
        "lr_scheduler_num_cycles": "1",
        "lr_scheduler_power": 1,
        "lr_scheduler": "constant",
        "lr_warmup": 0,
    }
    assert kohya.unused(schema.defaults()) == []
    assert kohya.unused(schema.defaults() | untouched) == []


def test_much_without_effect_is_one_note():
    values = {"LoRA_type": "LyCORIS/LoHa"} | dict.fromkeys(BLOCKS_SET, "2")
    (note,) = kohya.unused(values)
    assert note.key == "" and str(note).startswith(f"{len(BLOCKS_SET)} settings change nothing with the others: ")
    assert all(f"{PARAMETERS[key].label} ({key})" in note.message for key in BLOCKS_SET)
    assert len(kohya.unused({"LoRA_type": "LyCORIS/LoHa"} | dict.fromkeys(BLOCKS_SET[1:], "2"))) == 5


def test_a_secret_is_not_told_as_without_effect():
    assert kohya.unused({"wandb_api_key": "s3cret"}) == []


def test_a_key_that_is_nearly_a_parameters_is_asked_about():
    (note,) = kohya.read({"netwrk_dim": 8, "epoch": 2}).notes
    assert (note.what, note.key) == ("unknown", "netwrk_dim") and "(did you mean network_dim?)" in note.message
    for flat in ({"netwrk_dim": 8, "network_dim": 4}, {"gui_theme": "dark"}):
        assert "did you mean" not in kohya.read(flat).notes[0].message
