from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from tests import tiny
from trainer import models
from trainer.errors import ModelError
from trainer.models import clip_tokens, facts, sd

CPU = torch.device("cpu")


def load(
    source: Path | str, dtype: torch.dtype = torch.float32, clip_skip: int = 1, tokens: int = 75
) -> sd.StableDiffusion:
    return models.load(str(source), "", dtype, CPU, clip_skip, tokens)


def parts_of(model: sd.StableDiffusion) -> list[torch.nn.Module]:
    return [model.unet, model.vae, *model.text_encoders.values()]


def full_size(name: str) -> sd.StableDiffusion:
    """A model of full size without weights."""
    family = facts.FAMILIES[name]
    parts = sd.empty(family, family.configs)
    encoders = {encoder.key: parts[encoder.part] for encoder in family.encoders}
    schedule = models.Schedule.of(family.configs["scheduler"])
    return sd.StableDiffusion(family, parts["unet"], parts["vae"], encoders, schedule, torch.float32, CPU, 1, 75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers folder."""
    from diffusers import DDIMScheduler

    unet, vae, text_encoder = tiny.modules()
    path = tmp_path_factory.mktemp("diffusers modèle")
    scheduler = DDIMScheduler(**tiny.CONFIGS["scheduler"])
    StableDiffusionPipeline(
        vae, text_encoder, clip_tokens.tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(path)
    return path


@pytest.mark.proves("pretrained_model_name_or_path")
def test_a_single_file_and_a_folder_are_the_same_model(tiny_model, folder):
    one, other = load(tiny_model), load(folder)
    for parts in zip(parts_of(one), parts_of(other), strict=True):
        states = [dict(part.named_parameters()) for part in parts]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def with_tensor(folder: Path, copy: Path, name: str, tensor: torch.Tensor) -> Path:
    """A copy of the folder whose text encoder's file has this tensor, too."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)
    return copy


def test_what_the_model_has_no_use_for_in_a_folder_is_left_there_whatever_it_is(folder, tmp_path):
    more = with_tensor(folder, tmp_path / "more", "seen", torch.zeros(3, dtype=torch.bool))
    for parts in zip(parts_of(load(folder)), parts_of(load(more)), strict=True):
        for one, other in zip(*(part.parameters() for part in parts), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(32, dtype=torch.bool), "stored as BOOL"),
        (torch.zeros(31), "has the shape [31], the model needs [32]"),
    ],
)
def test_a_weight_in_a_folder_that_cannot_be_the_models_is_named(folder, tmp_path, tensor, reason):
    wrong = with_tensor(folder, tmp_path / "wrong", "text_model.final_layer_norm.bias", tensor)
    with pytest.raises(ModelError, match=re.escape(reason)) as refused:
        load(wrong)
    assert "final_layer_norm.bias" in str(refused.value) and "text_encoder" in str(refused.value)


def test_weights_are_loaded_in_the_compute_dtype_and_frozen(tiny_model):
    model = load(tiny_model, torch.bfloat16)
    for part in parts_of(model):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters())
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_short_texts_have_the_states_of_transformers_own_encoder(tiny_model):
    model = load(tiny_model)
    _, _, reference = tiny.modules()
    texts = ["a photo of a cat", "", "a, b, c (d:1.2) 日本語"]
    ids = clip_tokens.tokenizer()(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = reference.eval()(ids["input_ids"]).last_hidden_state
    torch.testing.assert_close(model.text_states(model.tokens(texts)).states, expected)


@pytest.mark.proves("clip_skip")
def test_clip_skip_two_is_the_layer_before_the_last_through_the_final_norm(tiny_model):
    model = load(tiny_model, clip_skip=2)
    _, _, reference = tiny.modules()
    answer = reference.eval()(model.tokens(["a cat"])[0].ids[:, 0], output_hidden_states=True)
    expected = reference.final_layer_norm(answer.hidden_states[-2])
    torch.testing.assert_close(model.text_states(model.tokens(["a cat"])).states, expected)


@pytest.mark.proves("max_token_length")
@pytest.mark.parametrize(("tokens", "length"), [(75, 77), (150, 152), (225, 227)])
def test_long_texts_are_joined_from_chunks_with_their_own_marks(tiny_model, tokens, length):
    model = load(tiny_model, tokens=tokens)
    _, _, reference = tiny.modules()
    text = ", ".join(["cat"] * 60)
    tokens_of_text = model.tokens([text])
    ids = tokens_of_text[0].ids
    assert ids.shape == (1, tokens // 75, 77)
    assert (ids[..., 0] == clip_tokens.BEGIN).all()
    assert (ids[..., -1] == clip_tokens.END).all()
    states = model.text_states(tokens_of_text).states
    assert states.shape == (1, length, 32)
    hidden = [reference.eval()(chunk[None]).last_hidden_state[0] for chunk in ids[0]]
    torch.testing.assert_close(states[0, 0], hidden[0][0])
    torch.testing.assert_close(states[0, -1], hidden[-1][-1])
    for i, chunk in enumerate(hidden):
        torch.testing.assert_close(states[0, 1 + 75 * i : 76 + 75 * i], chunk[1:-1])


def test_targets_are_the_264_layers_of_kohyas_lora_for_the_full_model():
    targets = full_size("sd1").targets()
    places = [(target.part, target.place) for target in targets.values()]
    assert places.count(("text_encoder", "attention")) == 72
    assert places.count(("unet", "attention")) == 192
    assert places.count(("unet", "resnet")) == 86
    assert "lora_te_text_model_encoder_layers_11_mlp_fc2" in targets
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj" in targets


def test_encoding_and_decoding_use_the_models_scale(tiny_model):
    model = load(tiny_model)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = model.encode(pixels, [torch.Generator().manual_seed(0)])
    posterior = model.vae.encode(pixels).latent_dist
    assert latents.shape == (1, 4, 8, 8)
    assert (latents / 0.18215 - posterior.mean).abs().max() < 6 * posterior.std.max()
    expected = model.vae.decode(latents / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(latents), expected)


@pytest.mark.proves("vae")
def test_another_vae_replaces_the_models_own(tiny_model, tmp_path):
    from safetensors.torch import save_file

    _, vae, _ = tiny.modules(seed=5)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    model = models.load(str(tiny_model), str(tmp_path / "vae.safetensors"), torch.float32, CPU, 1, 75)
    assert torch.equal(model.vae.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert not torch.equal(load(tiny_model).vae.encoder.conv_in.weight, vae.encoder.conv_in.weight)


@pytest.mark.proves("xformers")
def test_attention_processors_give_the_same_answer(tiny_model):
    from diffusers.models.attention_processor import AttnProcessor

    model = load(tiny_model)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), models.TextStates(torch.randn(2, 77, 32))
    fast = model.predict(x, t, text)
    assert isinstance(model.unet, UNet2DConditionModel)
    model.unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(model.predict(x, t, text), fast, rtol=1e-4, atol=1e-5)
