"""What a training does for SD 2.x and SDXL, and where families differ: conditioning, names, caches, check."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import tiny
from tests.test_training import of_type, prepared
from trainer import loop, sampling
from trainer.check import problems
from trainer.kohya import Preset
from trainer.networks.blocks import block_of
from trainer.prompts import Prompt
from trainer.run import EXIT_CONFIG, EXIT_DONE
from trainer.schema import Config
from trainer.schema.blocks import rate_weights

SDXL = {"sdxl": True, "text_encoder_lr": 1e-3, "unet_lr": 1e-3, "max_resolution": "96,96"}
FAMILIES = {"sd2": {"v2": True}, "sd2_v": {"v2": True, "v_parameterization": True}, "sdxl": SDXL}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_sd2, tiny_sdxl):
    base = tiny.write_sd2(tmp_path_factory.mktemp("model") / "tiny_sd2_base.safetensors", prediction="epsilon")
    return {"sd2": base, "sd2_v": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture
def settings_of(settings, models):
    def settings_of(family, **changes):
        model = {"pretrained_model_name_or_path": str(models[family])}
        return settings | model | FAMILIES[family] | {"learning_rate": 1e-3} | changes

    return settings_of


@pytest.fixture
def sdxl(settings_of):
    return settings_of("sdxl")


@pytest.mark.proves("sdxl", "v2", "v_parameterization", "resume")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_samples_saves_and_goes_on_from_its_state(settings_of, train, tmp_path, family):
    settings = settings_of(
        family, max_train_steps=3, save_every_n_steps=2, save_state=True, sample_prompts="a cat --n bad --s 2"
    )
    code, events, folder = train(settings | {"sample_every_n_steps": 3})
    assert code == EXIT_DONE, events[-1]
    before, after = ((folder / e["path"]).read_bytes() for e in of_type(events, "sample"))
    assert before != after
    whole = load_file(tmp_path / "out" / "photo.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in whole.items() if "lora_up" in name)
    state = str(tmp_path / "out" / "photo-step00000002-state")
    code, events, _ = train(settings | {"resume": state, "sample_prompts": ""})
    assert [event["step"] for event in of_type(events, "step")] == [3]
    resumed = load_file(tmp_path / "out" / "photo.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_sdxls_file_has_both_text_encoders_and_the_original_names_of_the_unet(sdxl, train, tmp_path):
    train(sdxl | {"max_train_steps": 1})
    path = tmp_path / "out" / "photo.safetensors"
    modules = {name.split(".")[0] for name in load_file(path)}
    assert {name.split("_")[1] for name in modules} == {"te1", "te2", "unet"}
    assert "lora_te2_text_model_encoder_layers_2_mlp_fc2" in modules
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in modules
    assert "lora_unet_middle_block_1_proj_in" in modules
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["ss_max_bucket_reso"] == "2048"


def test_sd2_with_velocity_says_so_in_its_metadata(settings_of, train, tmp_path):
    train(settings_of("sd2_v", max_train_steps=1))
    with safe_open(tmp_path / "out" / "photo.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v"


def test_each_image_s_own_size_reaches_the_unet_and_changes_its_answer(sdxl, tmp_path):
    session = prepared(sdxl, tmp_path)
    batch = session.feed[0]
    seen = []
    predict = session.model.predict
    session.model.predict = lambda *given: (seen.append(given), predict(*given))[1]
    loop.batch_loss(session, batch)
    assert torch.equal(seen[0][3], batch.sizes)
    latents, timesteps, text, sizes = seen[0]
    with torch.no_grad():
        assert not torch.allclose(
            predict(latents, timesteps, text, sizes), predict(latents, timesteps, text, sizes + 64)
        )


# Cached text states

CACHED = {"text_encoder_lr": 0, "sdxl_cache_text_encoder_outputs": True}


@pytest.mark.proves("sdxl_cache_text_encoder_outputs")
@pytest.mark.parametrize("family", ["sd2_v", "sdxl"])
def test_cached_text_states_train_and_draw_the_same_and_free_the_text_encoders(settings_of, train, tmp_path, family):
    settings = settings_of(family, max_train_steps=2, sample_every_n_steps=2, sample_prompts="a dog --n bad --s 2")
    pictures, files = [], []
    for change in ({"text_encoder_lr": 0}, CACHED):
        _, events, folder = train(settings | change)
        pictures.append((folder / of_type(events, "sample")[-1]["path"]).read_bytes())
        files.append(load_file(tmp_path / "out" / "photo.safetensors"))
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert pictures[0] == pictures[1]
    session = prepared(settings | CACHED, tmp_path)
    for encoder in session.model.text_encoders.values():
        assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"shuffle_caption": True}, "shuffle_caption"),
        ({"caption_dropout_rate": 0.1}, "caption_dropout_rate"),
        ({"caption_dropout_every_n_epochs": 2}, "caption_dropout_every_n_epochs"),
        ({"no_token_padding": True}, "no_token_padding"),
        ({"text_encoder_lr": 1e-4}, "sdxl_cache_text_encoder_outputs"),
    ],
)
def test_what_cached_text_states_exclude_is_refused_by_name(sdxl, change, key):
    (problem,) = problems(Preset({**sdxl, **CACHED, **change}), decode=False).errors
    assert problem.key == key
    assert "sdxl_cache_text_encoder_outputs" in f"{problem.key} {problem.message}"
    assert next(iter(change)) in f"{problem.key} {problem.message}"


def test_the_disk_cache_of_text_states_needs_the_one_in_memory(sdxl):
    preset = Preset({**sdxl, "cache_text_encoder_outputs_to_disk": True})
    assert "(sdxl_cache_text_encoder_outputs), which is off" in str(problems(preset, decode=False).errors[0])


# The VAE's precision


@pytest.mark.proves("sdxl_no_half_vae")
def test_the_vae_computes_in_full_precision_where_asked(sdxl, tmp_path):
    dtypes = [
        prepared(sdxl | {"mixed_precision": "bf16", "sdxl_no_half_vae": full}, tmp_path).model.vae.dtype
        for full in (False, True)
    ]
    assert dtypes == [torch.bfloat16, torch.float32]


# Blocks


def sizes_by_block(path):
    found: dict[int | None, set[tuple[int, float]]] = {}
    tensors = load_file(path)
    for key in tensors:
        if key.endswith(".alpha"):
            name = key.removesuffix(".alpha")
            down = tensors[f"{name}.lora_down.weight"]
            kind = "conv" if down.shape[2:] == (3, 3) else "linear"
            found.setdefault((block_of(name), kind), set()).add((len(down), float(tensors[key])))
    return found


@pytest.mark.proves("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
def test_sdxls_23_block_dims_are_the_ranks_in_the_file(sdxl, train, tmp_path):
    numbers = {
        "block_dims": [1 + i for i in range(23)],
        "block_alphas": [0.5 + i for i in range(23)],
        "conv_block_dims": [24 - i for i in range(23)],
        "conv_block_alphas": [2] * 23,
    }
    listed = {key: ",".join(map(str, values)) for key, values in numbers.items()}
    train(sdxl | listed | {"max_train_steps": 1, "text_encoder_lr": 0})
    found = sizes_by_block(tmp_path / "out" / "photo.safetensors")
    linear = {block: sizes for (block, kind), sizes in found.items() if kind == "linear"}
    conv = {block: sizes for (block, kind), sizes in found.items() if kind == "conv"}
    assert {5, 6, 8, 9, 11, 13, 14, 15, 16, 17, 18} <= set(linear)
    assert linear == {block: {(1 + block, 0.5 + block)} for block in linear}
    assert set(range(2, 22)) - {11} == set(conv)  # only the middle attention has none
    assert conv == {block: {(24 - block, 2)} for block in conv}


@pytest.mark.proves("down_lr_weight", "mid_lr_weight", "up_lr_weight")
def test_sdxls_block_weights_are_the_rates_of_its_9_and_3_and_9_blocks(sdxl, tmp_path):
    given = {
        "down_lr_weight": "0,0,0,0,0.25,0.5,0,0.75,1",
        "mid_lr_weight": "1,2,3",
        "up_lr_weight": "zeros+0.125",
    }
    session = prepared(sdxl | given, tmp_path)
    weights = rate_weights(session.config.blocks, session.model.family.blocks)
    rates = {g["block"]: g["rate_factor"] for g in session.optimizer.param_groups if g["name"] == "unet"}
    assert rates == {block: weights[block] for block in rates}
    assert (rates[5], rates[8], rates[11], rates[13]) == (0.25, 0.75, 2, 0.125)
    assert 4 not in rates
    assert {block_of(name) for name in session.network.layers if "lora_unet" in name} == set(rates)


# What the file says against what the form says


@pytest.mark.parametrize(
    ("family", "change", "key", "words"),
    [
        ("sdxl", {"sdxl": False}, "sdxl", "is off, but Pretrained model name or path"),
        ("sd2_v", {"v2": False}, "v2", "is off, but"),
        ("sd2_v", {"v_parameterization": False}, "v_parameterization", "predicts velocity by its own word"),
        ("sd2", {"v_parameterization": True}, "v_parameterization", "that predicts noise"),
        ("sdxl", {"v2": True}, "v2", "an SDXL model"),
    ],
)
def test_a_contradiction_to_the_file_is_refused_naming_both(settings_of, family, change, key, words):
    errors = problems(Preset(settings_of(family, **change)), decode=False).errors
    problem = next(p for p in errors if p.key == key and words in p.message)
    assert "pretrained_model_name_or_path" in problem.message


def test_sdxl_ignores_clip_skip_and_says_so(sdxl, train, tmp_path):
    checked = problems(Preset(sdxl | {"clip_skip": 2}), decode=False)
    assert not checked.errors
    assert any(p.key == "clip_skip" and "no effect on SDXL" in p.message for p in checked.problems)
    plain, skipped = (prepared(sdxl | {"clip_skip": skip}, tmp_path).model for skip in (1, 2))
    states = [model.text_states(model.tokens(["a cat"])).states for model in (plain, skipped)]
    assert torch.equal(*states)


@pytest.mark.proves("clip_skip")
def test_sd2s_clip_skip_counts_from_the_layer_that_its_config_ends_with(settings_of, tmp_path):
    for skip in (1, 2):
        model = prepared(settings_of("sd2", clip_skip=skip), tmp_path).model
        encoder, tokens = model.text_encoders["te"], model.tokens(["a cat"])
        hidden = encoder(tokens[0].ids[:, 0], output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.text_states(tokens).states, encoder.final_layer_norm(hidden[-skip]))


# Velocity and zero terminal SNR


@pytest.mark.proves("zero_terminal_snr")
def test_zero_terminal_snr_trains_and_every_sampler_starts_from_pure_noise(settings_of, tmp_path):
    settings = settings_of("sd2_v", zero_terminal_snr=True, min_snr_gamma=5, min_timestep=999, sample_prompts="a cat")
    session = prepared(settings, tmp_path)
    assert float(session.model.schedule.alphas_cumprod[-1]) == 0
    loss = loop.batch_loss(session, session.feed[0])
    assert float(loss.detach()) == 0  # min(SNR, γ) / (SNR + 1), of no signal
    for name in sampling.SAMPLERS:
        if name.startswith("k_"):  # the same by another name
            continue
        sampler = sampling.make_sampler(name, session.model.schedule)
        sampler.set_timesteps(4)
        assert int(sampler.timesteps[0]) >= (990 if name == "dpmsingle" else 999), name
        image = sampling.draw(session.model, Prompt("a cat", steps=2), name, (64, 64), 1)
        assert image.size == (64, 64)


def test_zero_terminal_snr_without_velocity_is_refused(sdxl):
    (problem,) = problems(Preset(sdxl | {"zero_terminal_snr": True}), decode=False).errors
    assert problem.key == "zero_terminal_snr"
    assert "(v_parameterization), which is off" in problem.message


def test_a_file_with_the_mark_of_zero_terminal_snr_asks_for_it(sdxl, tmp_path):
    path = tiny.write_sdxl(tmp_path / "noob.safetensors", prediction="v_prediction", marks=("v_pred", "ztsnr"))
    preset = sdxl | {"pretrained_model_name_or_path": str(path), "v_parameterization": True}
    checked = problems(Preset(preset), decode=False)
    assert [p.key for p in checked.problems if p.severity == "warning"].count("zero_terminal_snr") == 1
    checked = problems(Preset(preset | {"zero_terminal_snr": True}), decode=False)
    assert "zero_terminal_snr" not in {p.key for p in checked.problems}


@pytest.mark.proves("max_bucket_reso")
@pytest.mark.parametrize(("change", "largest"), [({}, 1024), ({"sdxl": True}, 2048), ({"max_bucket_reso": 1536}, 1536)])
def test_an_empty_largest_bucket_is_1024_and_2048_for_sdxl(change, largest):
    from trainer import schema

    config: Config = schema.parse(change)
    assert config.data.max_bucket_side == largest


def test_two_families_at_once_are_refused(settings_of, train, capsys):
    code, _, _ = train(settings_of("sdxl", v2=True))
    assert code == EXIT_CONFIG
    assert "SDXL (sdxl) are both on" in capsys.readouterr().err
