"""The name tables against diffusers' own converters, on full-size configs without their weights."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import tiny
from trainer.errors import ModelError
from trainer.models.facts import FAMILIES
from trainer.models.layout import (
    clip_names,
    encoder_names,
    from_original,
    given,
    taken,
    to_original,
    unet_names,
    vae_names,
)
from trainer.models.sd import empty

CROSS, PLAIN, UP_CROSS, UP_PLAIN = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"

UNETS = {
    "sd15": {
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
        "up_block_types": [UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": [PLAIN, CROSS, CROSS],
        "up_block_types": [UP_CROSS, UP_CROSS, UP_PLAIN],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "small": {
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "down_block_types": [CROSS, CROSS, PLAIN],
        "up_block_types": [UP_PLAIN, UP_CROSS, UP_CROSS],
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "two levels of one width": {
        "block_out_channels": [32, 32],
        "layers_per_block": 3,
        "down_block_types": [PLAIN, CROSS],
        "up_block_types": [UP_CROSS, UP_PLAIN],
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
}

VAES = {
    "sd15": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    "small": {"block_out_channels": [32, 32, 64], "layers_per_block": 1},
    "no quantisation layers": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}

TEXT_ENCODERS = {
    "sd15": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "small": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


def unet(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def vae(config):
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    with torch.device("meta"):
        return AutoencoderKL(**config, **blocks)


def text_encoder(config):
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**config))


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_names_cover_every_weight_and_agree_with_diffusers(config):
    expected = unet(config).state_dict()
    names = unet_names(config)
    assert set(names.values()) == set(expected) and len(names) == len(expected)

    # The converter moves whatever stands under a name, so let each weight carry the name it belongs under.
    converted = convert_ldm_unet_checkpoint(dict(names), config)
    assert {name: names[original] for original, name in names.items()} == converted


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_names_cover_every_weight_and_agree_with_diffusers(config):
    expected = vae(config).state_dict()
    names = vae_names(config)
    assert set(names.values()) == set(expected) and len(names) == len(expected)

    numbered = {original: torch.tensor([[float(i)]])[:, :, None] for i, original in enumerate(names)}
    levels = ["any"] * len(config["block_out_channels"])
    converted = convert_ldm_vae_checkpoint(numbered, config | {"down_block_types": levels, "up_block_types": levels})
    assert {name: converted[name].item() for name in converted} == {
        name: float(i) for i, name in enumerate(names.values())
    }


@pytest.mark.parametrize("config", TEXT_ENCODERS.values(), ids=TEXT_ENCODERS)
def test_text_encoder_names_cover_every_weight(config):
    expected = text_encoder(config).state_dict()
    names = clip_names("cond_stage_model.transformer.text_model.", config)
    assert set(names.values()) == set(expected)
    assert all(original == f"cond_stage_model.transformer.text_model.{name}" for original, name in names.items())


@pytest.mark.parametrize("hidden", [96, 64])
def test_open_clip_names_cover_every_weight_and_agree_with_diffusers(hidden):
    """SDXL's second encoder: q, k and v in one tensor, the projection transposed."""
    config = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": hidden}
    config |= {"intermediate_size": 64, "vocab_size": 10}
    encoder = FAMILIES["sdxl"].encoders[1]
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    expected = model.state_dict()
    names = encoder_names(encoder, config)
    original = {theirs: given(theirs, expected, ours) for theirs, ours in names.items()}
    assert original[encoder.prefix + "transformer.resblocks.1.attn.in_proj_weight"].shape == (3 * hidden, hidden)
    converted = convert_open_clip_checkpoint(model, original, encoder.prefix)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    restored = dict(pair for theirs, ours in names.items() for pair in taken(theirs, original[theirs], ours))
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], expected[name]) for name in expected)


@pytest.fixture(params=FAMILIES)
def small(request):
    family = FAMILIES[request.param]
    configs = {"sd1": tiny.CONFIGS, "sd2": tiny.SD2_CONFIGS, "sdxl": tiny.SDXL_CONFIGS}[family.name]
    parts = empty(family, configs)
    torch.manual_seed(0)
    states = {
        part: {name: torch.randn(w.shape) for name, w in model.state_dict().items() if "token_embedding" not in name}
        for part, model in parts.items()
    }
    for part, state in states.items():
        if part.startswith("text"):
            inner = "text_model." if part == "text_encoder_2" else ""
            state[f"{inner}embeddings.token_embedding.weight"] = torch.randn(5, 3)
    return family, configs, states


def test_to_original_and_back_changes_nothing(small):
    family, configs, states = small
    restored = from_original(to_original(states, configs, family), configs, family)
    assert restored.keys() == states.keys()
    for part, state in states.items():
        assert state.keys() == restored[part].keys()
        assert all(torch.equal(state[name], restored[part][name]) for name in state)


def test_the_vae_attention_is_a_convolution_in_the_original(small):
    family, configs, states = small
    original = to_original(states, configs, family)
    assert original["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert original["first_stage_model.encoder.mid.attn_1.q.bias"].shape == (32,)


def test_weights_that_no_table_names_are_left_out(small):
    family, configs, states = small
    original = to_original(states, configs, family) | {"model_ema.decay": torch.zeros(())}
    restored = from_original(original, configs, family)
    assert all("ema" not in name for state in restored.values() for name in state)


def test_a_missing_weight_is_named(small):
    family, configs, states = small
    original = to_original(states, configs, family)
    del original["model.diffusion_model.out.2.bias"]
    with pytest.raises(ModelError, match=r"lacks 1 of .* U-Net: model\.diffusion_model\.out\.2\.bias"):
        from_original(original, configs, family)
