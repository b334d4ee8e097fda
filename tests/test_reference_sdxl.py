"""SDXL and SD 2.x beside sd-scripts: tiny models whose weights come from a formula, with a LoRA attached."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from trainer import networks
from trainer.models import Schedule, facts, layout, sd, sdxl
from trainer.schema.network import Network as Settings

CPU = torch.device("cpu")
CLIP = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
XL_UNET = facts.FAMILIES["sdxl"].configs["unet"] | {
    "block_out_channels": [32, 64, 128],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 96,
    "projection_class_embeddings_input_dim": 32 + 6 * 256,
}
SD2_UNET = facts.FAMILIES["sd2"].configs["unet"] | {
    "block_out_channels": [32, 64, 64, 64],
    "attention_head_dim": [1, 2, 2, 4],
    "cross_attention_dim": 48,
}


def clip(width: int, layers: int, heads: int, act: str = "gelu") -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    return CLIP | sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act}


def filled(module: torch.nn.Module, name_of) -> torch.nn.Module:
    state = {name: reference.weight(name_of(name), p.shape) for name, p in module.named_parameters()}
    module.load_state_dict(state, strict=False, assign=True)
    return module.requires_grad_(False).eval()


def made(family_name: str, kind: type, unet: dict, encoders: dict[str, dict]) -> sd.StableDiffusion:
    family = facts.FAMILIES[family_name]
    parts = sd.empty(family, family.configs | {"unet": unet} | encoders)
    original = {ours: theirs.removeprefix(layout.UNET_PREFIX) for theirs, ours in layout.unet_names(unet).items()}
    # Both name the U-Net's weights as sd-scripts does: by the original layout for SDXL.
    filled(parts["unet"], lambda name: "unet." + (original[name] if family.original_names else name))
    for encoder in family.encoders:
        inner = "" if encoder.projected else "text_model."
        filled(parts[encoder.part], lambda name, e=encoder, i=inner: f"{e.key}.{i}{name}")
    by_key = {encoder.key: parts[encoder.part] for encoder in family.encoders}
    schedule = Schedule.of(family.configs["scheduler"])
    model = kind(family, parts["unet"], None, by_key, schedule, torch.float32, CPU, 1, 75)
    network = networks.build(Settings(rank=4, alpha=1.0), model.targets(), {"unet", "text_encoder"})
    with torch.no_grad():
        for name, tensor in network.tensors().items():
            if not name.endswith(".alpha"):
                tensor.copy_(reference.lora_weight(name, tensor.shape))
    network.attach()
    return model


@pytest.fixture(scope="module")
def xl() -> sd.StableDiffusion:
    encoders = {"text_encoder": clip(64, 12, 4, "quick_gelu"), "text_encoder_2": clip(32, 3, 2)}
    return made("sdxl", sdxl.StableDiffusionXL, XL_UNET, encoders)


@pytest.fixture(scope="module")
def sd2() -> sd.StableDiffusion:
    return made("sd2", sd.StableDiffusion, SD2_UNET, {"text_encoder": clip(48, 4, 3)})


def captions_of(case: str, numbers: dict) -> list[str]:
    short, long, weighted, full = (numbers[key] for key in ("captions", "long", "weighted", "full"))
    return {
        "long": [long, short[0], full],
        "weighted": [weighted, short[0]],
        "weighted short": [short[1]],
    }.get(case, short)


@pytest.mark.proves("sdxl", "v2", "weighted_captions", "max_token_length")
@pytest.mark.parametrize("family", ["xl", "sd2"])
@pytest.mark.parametrize("case", ["short", "long", "weighted", "weighted short", "clip_skip=2"])
@torch.no_grad()
def test_token_ids_and_text_states_are_those_of_sd_scripts(request, family, case, monkeypatch):
    numbers = reference.read({"xl": "sdxl", "sd2": "sd2"}[family])
    if case not in numbers["text"]:
        pytest.skip("not for this family")
    model = request.getfixturevalue(family)
    monkeypatch.setattr(model, "max_tokens", 225 if case in ("long", "weighted") else 75)
    monkeypatch.setattr(model, "clip_skip", 2 if case == "clip_skip=2" else 1)
    captions = captions_of(case, reference.read("sdxl"))
    tokens = model.tokens(captions, weighted=case.startswith("weighted"))
    assert tokens[-1].rows.tolist() == [reference.expanded(row) for row in numbers["ids"][case]]
    text = model.text_states(tokens)
    expected = numbers["text"][case]
    assert list(text.states.shape) == expected["states"]["shape"]
    reference.assert_tensor(text.states, expected["states"], 1e-4)
    if "pooled" in expected:
        assert list(text.pooled.shape) == expected["pooled"]["shape"]
        reference.assert_tensor(text.pooled, expected["pooled"], 1e-4)


@pytest.mark.proves("sdxl", "v2", "v_parameterization")
@pytest.mark.parametrize("family", ["xl", "sd2"])
@torch.no_grad()
def test_the_prediction_and_its_loss_are_those_of_sd_scripts(request, family):
    numbers = reference.read({"xl": "sdxl", "sd2": "sd2"}[family])
    model = request.getfixturevalue(family)
    shape, t = tuple(numbers["latents_shape"]), torch.tensor(numbers["timesteps"])
    latents, noise = reference.normal("latents", shape), reference.normal("noise", shape)
    sizes = torch.tensor(numbers["sizes"]) if "sizes" in numbers else None
    text = model.text_states(model.tokens(numbers["captions"]))
    answer = model.predict(model.schedule.add_noise(latents, noise, t), t, text, sizes)
    reference.assert_tensor(answer, numbers["prediction"], 1e-4)
    targets = {"epsilon": noise, "v_prediction": model.schedule.velocity(latents, noise, t)}
    for kind, expected in numbers["loss"].items():
        loss = torch.nn.functional.mse_loss(answer, targets[kind], reduction="none").mean([1, 2, 3])
        assert loss.tolist() == pytest.approx(expected, rel=1e-4)
