"""What a file was trained on and with comes out as settings that a training accepts."""

from __future__ import annotations

import json

import pytest
import torch

from tests import reference
from tests.lora.conftest import KOHYA, TEXT, cloneofsimo, pair, plain
from tests.test_any_settings import values_of
from trainer import kohya
from trainer.lora import settings as kept
from trainer.lora.inspecting import inspect
from trainer.schema import PARAMETERS, read
from trainer.schema.algorithms import TYPES, types_using

SD_SCRIPTS = reference.read("sd15_lora_keys")


@pytest.fixture
def of_sd_scripts(write):
    """A file with the metadata of one that sd-scripts wrote; `other` has those of another training."""

    def of_sd_scripts(**changes):
        return inspect(write(plain(), SD_SCRIPTS["metadata"] | changes))

    return of_sd_scripts


def test_the_settings_of_a_training_with_sd_scripts(of_sd_scripts):
    preset = of_sd_scripts().preset
    expected = {
        "LoRA_type": "Standard", "network_dim": 4, "network_alpha": 2.0, "learning_rate": 1e-4, "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5, "epoch": 1, "max_train_steps": 10, "optimizer": "AdamW", "optimizer_args": "",
        "lr_scheduler": "constant", "lr_warmup": 0, "lr_warmup_steps": 0, "mixed_precision": "no", "seed": 42,
        "max_resolution": "256,256", "enable_bucket": True, "bucket_no_upscale": False, "min_bucket_reso": 128,
        "max_bucket_reso": 512, "train_batch_size": 1, "clip_skip": 1, "max_token_length": 75, "save_precision": "float",
        "output_name": "my_lora", "noise_offset": 0, "noise_offset_type": "Original", "min_snr_gamma": 0,
        "v2": False, "sdxl": False, "v_parameterization": False, "cache_latents": True, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert expected.items() <= preset.items()
    assert "metadata_title" not in preset


def test_the_settings_of_another_training_with_sd_scripts(of_sd_scripts):
    preset = of_sd_scripts(**SD_SCRIPTS["metadata_with_other_settings"]).preset
    expected = {
        "LoRA_type": "Standard", "conv_dim": 4, "conv_alpha": 1, "network_dropout": 0.1, "optimizer": "AdamW8bit",
        "optimizer_args": "weight_decay=0.01 betas=(0.9,0.99)", "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        "clip_skip": 2, "max_token_length": 225, "shuffle_caption": True, "keep_tokens": 1, "flip_aug": True,
        "caption_dropout_rate": 0.1, "noise_offset": 0.05, "min_snr_gamma": 5.0, "loss_type": "huber",
        "min_timestep": 100, "max_timestep": 900, "gradient_checkpointing": True, "training_comment": "hello",
        "metadata_author": "somebody", "max_train_steps": 2,
    }  # fmt: skip
    assert expected.items() <= preset.items()


def test_the_settings_are_a_preset_that_the_form_takes(of_sd_scripts):
    preset = of_sd_scripts(**SD_SCRIPTS["metadata_with_other_settings"]).preset
    read_back = kohya.read(json.loads(json.dumps(preset)))
    assert not read_back.kept and not read_back.notes
    config, problems = read(read_back.values)
    assert problems == []
    assert config.network.rank == 4 and config.optim.arguments == {"weight_decay": 0.01, "betas": (0.9, 0.99)}


def test_our_own_file_gives_back_the_preset_that_made_it(settings, train, tmp_path):
    """Every setting that reaches the metadata, with values of its own."""
    given = settings | {
        "LoRA_type": "LyCORIS/LoHa", "network_dim": 3, "network_alpha": 2, "conv_dim": 2, "conv_alpha": 1.5,
        "LyCORIS_preset": "attn-mlp", "use_scalar": True, "module_dropout": 0.1, "unet_lr": 2e-3, "text_encoder_lr": 3e-4,
        "optimizer": "AdamW", "optimizer_args": "weight_decay=0.1", "lr_scheduler": "linear", "lr_warmup_steps": 1,
        "keep_tokens": 1, "shuffle_caption": True, "clip_skip": 2, "noise_offset_type": "Multires",
        "multires_noise_iterations": 4, "multires_noise_discount": 0.25, "min_snr_gamma": 5, "seed": 7,
        "max_timestep": 900, "training_comment": "trigger: zwx", "max_train_steps": 2, "save_precision": "bf16",
    }  # fmt: skip
    code, _, _ = train(given)
    assert code == 0
    found = inspect(tmp_path / "out" / "photo.safetensors")
    said = {key: value for key, value in given.items() if key in found.preset}
    assert {key: found.preset[key] for key in said} == said
    assert len(said) >= 25
    assert found.defaults == ()
    assert found.tags["2_photo"]["a cat"] == 1


@pytest.mark.parametrize("key", sorted(kept.keys()))
def test_every_setting_that_weights_depend_on_comes_back(write, key):
    p = PARAMETERS[key]
    among = {"LoRA_type": (types_using(key) or ("Standard",))[0]}

    def held(values):
        return getattr(getattr(read(among | values)[0], p.group), p.name)

    changed = next({key: value} for value in (*values_of(p), 32) if held({key: value}) != held({}))
    config, _ = read(among | changed)
    tensors = pair(KOHYA, config.network.rank) | pair(TEXT, config.network.rank, out=768)
    program = TYPES[config.network.type].program
    found = inspect(write(tensors, {kept.ENTRY: kept.written(config), "ss_network_module": program}))
    assert held(found.preset) == held(changed)


def test_arguments_come_back_as_they_are_entered():
    given = "betas=0.9,0.99 weight_decay=0.1 amsgrad=True foreach=None"
    config, _ = read({"optimizer": "AdamW", "optimizer_args": given})
    assert kept.read(kept.written(config))["optimizer_args"] == given


def test_no_place_secret_or_prompt_is_kept_in_a_file_and_none_is_taken_from_one():
    private = {
        "pretrained_model_name_or_path": "/private/model", "train_data_dir": "/private/images", "vae": "/private/vae",
        "reg_data_dir": "/private/others", "network_weights": "/private/lora", "output_dir": "/private/out",
        "logging_dir": "/private/logs", "resume": "/private/state", "sample_prompts": "private prompt",
        "wandb_api_key": "private key", "additional_parameters": "--training_comment private",
    }  # fmt: skip
    assert "private" not in kept.written(read(private)[0])
    assert kept.read(json.dumps(private | {"network_dim": [8], "epoch": 3})) == {"epoch": 3}
    assert kept.read("[1]") == kept.read("{") == kept.read("") == {}


def test_ranks_taken_from_a_file_are_told_and_not_the_ones_that_were_overruled(settings, train, tmp_path):
    first = settings | {"network_dim": 2, "network_alpha": 1, "max_train_steps": 1}
    assert train(first)[0] == 0
    start = tmp_path / "out" / "photo.safetensors"
    again = {"network_weights": str(start), "dim_from_weights": True, "network_dim": 32, "block_dims": "9" + ",9" * 24}
    assert train(first | again | {"output_name": "again"})[0] == 0
    found = inspect(tmp_path / "out" / "again.safetensors")
    assert found.about.metadata["ss_network_dim"] == "2" and found.about.metadata["ss_network_alpha"] == "1"
    assert "block_dims" not in found.about.metadata.get("ss_network_args", "")
    assert (found.preset["network_dim"], found.preset["network_alpha"]) == (2, 1)
    assert "block_dims" not in found.preset and "dim_from_weights" not in found.preset


def test_the_tensors_are_believed_where_the_metadata_say_another_rank(write, of_sd_scripts):
    assert of_sd_scripts(ss_network_dim="Dynamic", ss_network_alpha="Dynamic").preset["network_dim"] == 4
    several = pair(KOHYA, 2) | pair(TEXT, 4, out=768)
    found = inspect(write(several, SD_SCRIPTS["metadata"] | {"ss_network_dim": "Dynamic"}))
    assert "network_dim" not in found.preset and "several, 2, 4" in " ".join(found.unsaid)


def test_the_metadata_say_what_ran(settings, train, tmp_path):
    """Adafactor chose the rates, and fp16 needs a GPU."""
    given = settings | {"optimizer": "Adafactor", "mixed_precision": "fp16", "max_train_steps": 1}
    assert train(given)[0] == 0
    found = inspect(tmp_path / "out" / "photo.safetensors")
    said = found.about.metadata
    assert said["ss_lr_scheduler"] == "adafactor"
    assert {said[f"ss_{rate}"] for rate in ("learning_rate", "unet_lr", "text_encoder_lr")} == {"None"}
    ran = "fp16" if torch.cuda.is_available() else "bf16"
    assert said["ss_mixed_precision"] == found.preset["mixed_precision"] == ran
    assert (found.preset["lr_scheduler"], found.preset["learning_rate"]) == ("cosine", 1e-2)


def test_rates_that_adafactor_chose_are_none_and_its_parts_are_trained(of_sd_scripts):
    rates = {"ss_learning_rate": "None", "ss_unet_lr": "None", "ss_text_encoder_lr": "None"}
    preset = of_sd_scripts(
        **rates, ss_optimizer="transformers.optimization.Adafactor", ss_lr_scheduler="adafactor:0.0005"
    ).preset
    assert (preset["lr_scheduler"], preset["learning_rate"], preset["unet_lr"]) == ("adafactor", 5e-4, "")
    assert read(preset)[1] == []


def test_what_the_file_does_not_say_is_listed(of_sd_scripts):
    found = of_sd_scripts()
    unsaid = " ".join(found.unsaid)
    assert "sd15.safetensors (SHA-256 bed795db43)" in unsaid
    assert "2_photo (8 images × 2)" in unsaid
    assert PARAMETERS["caption_extension"].label in unsaid
    assert "Bucket resolution steps" in found.defaults and "Network Rank (Dimension)" not in found.defaults
    assert "LoKr factor" not in found.defaults


def test_facts_in_words_and_tags_by_frequency(of_sd_scripts):
    found = of_sd_scripts()
    facts = dict(found.facts)
    assert facts["Made for"] == "Stable Diffusion 1.x" and facts["Ranks"] == "4" and facts["Alphas"] == "2"
    assert facts["Trained"] == "10 steps, 1 of 1 epochs" and facts["Resolution"] == "256 × 256"
    assert next(iter(found.tags["2_photo"])) == "photo" and found.tags["2_photo"]["photo"] == 7


def test_several_data_sets_of_a_configuration_file(of_sd_scripts):
    one = {
        "resolution": [512, 768],
        "batch_size_per_device": 3,
        "enable_bucket": True,
        "tag_frequency": {"a": {"x": 2}},
    }
    found = of_sd_scripts(ss_datasets=json.dumps([one, one | {"tag_frequency": {"b": {"y": 1}}}]))
    assert found.preset["max_resolution"] == "512,768" and found.preset["train_batch_size"] == 3
    assert found.tags["a"] == {"x": 2} and found.tags["b"] == {"y": 1}
    assert "2 data sets" in " ".join(found.unsaid)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr", "factor": "8"}'}, "LyCORIS/LoKr"),
        ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lora"}'}, "LyCORIS/LoCon"),
        ({"ss_network_module": "lycoris.kohya"}, "LyCORIS/LoCon"),
        ({"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "4"}'}, "Kohya DyLoRA"),
        ({"ss_network_module": "networks.lora_fa"}, "LoRA-FA"),
        ({"ss_network_module": "networks.lora", "ss_network_args": "not JSON"}, "Standard"),
    ],
)
def test_the_type_by_what_the_training_program_called_it(of_sd_scripts, changes, expected):
    assert of_sd_scripts(**changes).preset["LoRA_type"] == expected


def test_an_optimizer_that_is_not_known_is_said(of_sd_scripts):
    found = of_sd_scripts(ss_optimizer="my.own.Optimizer(a=1)")
    assert "optimizer" not in found.preset and "my.own.Optimizer" in " ".join(found.unsaid)


def test_a_file_that_says_nothing_gives_what_its_tensors_tell(write):
    found = inspect(write(*cloneofsimo()))
    assert "says nothing" in found.unsaid[0]
    assert found.preset["network_dim"] == 4 and found.preset["unet_lr"] == 0
    assert dict(found.facts)["Alphas"] == "4"


def test_sdxl_and_convolutions_are_told_by_the_tensors(write):
    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", wide=2048) | {
        f"{conv}.lora_down.weight": torch.ones(2, 8, 3, 3),
        f"{conv}.lora_up.weight": torch.ones(8, 2, 1, 1),
        f"{conv}.alpha": torch.tensor(1.0),
    }
    found = inspect(write(tensors))
    assert found.preset["sdxl"] and found.preset["LoRA_type"] == "Kohya LoCon" and found.preset["conv_dim"] == 2
    assert KOHYA not in found.about.layers
