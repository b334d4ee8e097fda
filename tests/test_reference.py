"""Our numbers beside those of sd-scripts, on a full-size SD 1.5 whose weights come from a formula."""

from __future__ import annotations

import json

import pytest
import torch

from tests import reference
from trainer import networks, objective, optim
from trainer.models import Schedule, sd
from trainer.schema.network import Network as Settings
from trainer.schema.objective import Objective
from trainer.schema.optim import Optim

LOSS = reference.read("sd15_loss")
SCHEDULE = reference.read("schedule")
CONFIGS = json.loads(sd.CONFIGS.read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> sd.StableDiffusion:
    unet, vae, text_encoder = sd._empty(CONFIGS)
    for prefix, module in (("unet.", unet), ("text_encoder.text_model.", text_encoder)):
        state = {name: reference.weight(prefix + name, p.shape) for name, p in module.named_parameters()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False).eval()
    unet.to(memory_format=torch.channels_last)
    return sd.StableDiffusion(unet, vae, text_encoder, Schedule.of(CONFIGS["scheduler"]), torch.float32, CPU, 1, 75)


@pytest.fixture(scope="module")
def network(model: sd.StableDiffusion) -> networks.Network:
    made = networks.build(Settings(rank=8, alpha=1.0), model.targets(), {"unet", "text_encoder"})
    with torch.no_grad():
        for name, tensor in made.tensors().items():
            if not name.endswith(".alpha"):
                tensor.copy_(reference.lora_weight(name, tensor.shape))
    made.attach()
    return made


@pytest.fixture(scope="module")
def prediction(model: sd.StableDiffusion, network: networks.Network) -> torch.Tensor:
    """The U-Net's answer with the LoRA, with its graph."""
    return model.predict(*noisy(model), model.text_states(model.tokens(LOSS["captions"])))


def noisy(model: sd.StableDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    shape, t = tuple(LOSS["latents_shape"]), torch.tensor(LOSS["timesteps"])
    return model.schedule.add_noise(reference.normal("latents", shape), reference.normal("noise", shape), t), t


def test_the_file_has_the_names_shapes_and_alphas_of_sd_scripts(network):
    expected = reference.read("sd15_lora_keys")
    found = network.tensors()
    assert {k: list(t.shape) for k, t in found.items()} == {k: shape for k, (shape, _) in expected["tensors"].items()}
    assert {float(t) for k, t in found.items() if k.endswith(".alpha")} == {1.0}
    assert len(found) == 792


def test_token_ids_are_those_of_sd_scripts(model):
    assert model.tokens(LOSS["captions"]).ids[:, 0].tolist() == LOSS["input_ids"]


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_text_states_are_those_of_sd_scripts(model, network, skip, monkeypatch):
    monkeypatch.setattr(model, "clip_skip", skip)
    states = model.text_states(model.tokens(LOSS["captions"]))
    reference.assert_tensor(states, LOSS["text_encoder"][f"clip_skip={skip},lora=on"], 1e-4)
    with network.strength(0):
        if skip < 3:
            states = model.text_states(model.tokens(LOSS["captions"]))
            reference.assert_tensor(states, LOSS["text_encoder"][f"clip_skip={skip},lora=off"], 1e-4)


def test_states_of_long_captions_are_those_of_sd_scripts(model, network, monkeypatch):
    expected = LOSS["text_encoder"]["max_token_length=225,lora=on"]
    monkeypatch.setattr(model, "max_tokens", 225)
    reference.assert_tensor(model.text_states(model.tokens(expected["captions"])), expected, 1e-4)


def test_the_prediction_is_that_of_sd_scripts(model, prediction):
    reference.assert_tensor(prediction, LOSS["prediction"]["clip_skip=unset,lora=on"], 1e-4)
    reference.assert_tensor(noisy(model)[0], LOSS["prediction"]["noisy_latents"], 1e-5)


@pytest.mark.parametrize(
    ("case", "settings", "predicts"),
    [
        ("l2", {}, "epsilon"),
        ("min_snr_gamma=5", {"min_snr_gamma": 5}, "epsilon"),
        ("min_snr_gamma=1", {"min_snr_gamma": 1}, "epsilon"),
        ("v_parameterization", {}, "v_prediction"),
        ("v_parameterization,min_snr_gamma=5", {"min_snr_gamma": 5}, "v_prediction"),
    ],
)
def test_the_loss_is_that_of_sd_scripts(prediction, case, settings, predicts):
    schedule = Schedule.of({**CONFIGS["scheduler"], "prediction_type": predicts})
    shape, t = tuple(LOSS["latents_shape"]), torch.tensor(LOSS["timesteps"])
    wanted = objective.target(reference.normal("latents", shape), reference.normal("noise", shape), t, schedule)
    loss = objective.loss_per_image(prediction.detach(), wanted, t, torch.ones(2), schedule, Objective(**settings))
    assert loss.tolist() == pytest.approx(LOSS["loss"][case]["per_sample"], rel=1e-4)


def test_the_gradients_are_those_of_sd_scripts(model, network, prediction):
    loss = torch.nn.functional.mse_loss(prediction, reference.normal("noise", tuple(LOSS["latents_shape"])))
    loss.backward()
    squares = {p: sum(float(w.grad.square().sum()) for w in network.parameters_of(p)) for p in ("unet", "text_encoder")}
    expected = LOSS["gradients"]
    assert sum(squares.values()) ** 0.5 == pytest.approx(expected["total_norm"], rel=1e-3)
    assert squares["text_encoder"] ** 0.5 == pytest.approx(expected["text_encoder_norm"], rel=1e-3)
    trained = dict(network.layers.named_parameters())
    for name, values in expected["tensors"].items():
        gradient = trained[name].grad.flatten()
        assert float(gradient.norm()) == pytest.approx(values["norm"], rel=1e-3)
        torch.testing.assert_close(
            gradient[values["at"]], torch.tensor(values["values"]), rtol=1e-2, atol=1e-3 * float(gradient.abs().max())
        )


NOISE = {
    '{"noise_offset": 0.1}': {"noise_offset": 0.1},
    '{"noise_offset": 0.05, "adaptive_noise_scale": 0.2}': {"noise_offset": 0.05, "adaptive_noise_scale": 0.2},
    '{"noise_offset": 0.05, "adaptive_noise_scale": -0.2}': {"noise_offset": 0.05, "adaptive_noise_scale": -0.2},
    '{"multires_noise_iterations": 6}': {"noise_type": "Multires", "multires_iterations": 6},
    '{"multires_noise_iterations": 10, "multires_noise_discount": 0.8}': {
        "noise_type": "Multires",
        "multires_iterations": 10,
        "multires_discount": 0.8,
    },
}


@pytest.mark.parametrize("case", NOISE)
def test_noise_is_that_of_sd_scripts_for_the_same_draws(case, monkeypatch):
    """Every random draw is replaced by a formula's value, named by its place in the order."""
    count = 0

    def name() -> str:
        nonlocal count
        count += 1
        return f"draw{count - 1}"

    monkeypatch.setattr(torch, "randn_like", lambda x, **_: reference.normal(name(), x.shape))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: reference.normal(name(), tuple(shape)))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: (reference.uniform(name(), tuple(shape)) + 1) / 2)
    latents = reference.normal("latents", (2, 4, 16, 24)) + torch.tensor([0.5, -1, 0.2, 0]).view(1, 4, 1, 1)
    noise = objective.noise_like(latents, Objective(**NOISE[case]))
    reference.assert_tensor(noise, SCHEDULE["noise"]["cases"][case]["noise"], 1e-4)
