"""Our numbers beside those of sd-scripts, on a full-size SD 1.5 whose weights come from a formula."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from trainer import networks, objective
from trainer.models import Schedule, facts, sd
from trainer.schema.network import Network as Settings
from trainer.schema.objective import Objective

LOSS = reference.read("sd15_loss")
SCHEDULE = reference.read("schedule")
FAMILY = facts.FAMILIES["sd1"]
CONFIGS = FAMILY.configs
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> sd.StableDiffusion:
    parts = sd.empty(FAMILY, CONFIGS)
    for part, prefix in (("unet", "unet."), ("text_encoder", "text_encoder.text_model.")):
        module = parts[part]
        state = {name: reference.weight(prefix + name, p.shape) for name, p in module.named_parameters()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False).eval()
    parts["unet"].to(memory_format=torch.channels_last)
    encoders = {"te": parts["text_encoder"]}
    schedule = Schedule.of(CONFIGS["scheduler"])
    return sd.StableDiffusion(FAMILY, parts["unet"], parts["vae"], encoders, schedule, torch.float32, CPU, 1, 75)


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
    assert model.tokens(LOSS["captions"])[0].ids[:, 0].tolist() == LOSS["input_ids"]


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_text_states_are_those_of_sd_scripts(model, network, skip, monkeypatch):
    monkeypatch.setattr(model, "clip_skip", skip)
    states = model.text_states(model.tokens(LOSS["captions"])).states
    reference.assert_tensor(states, LOSS["text_encoder"][f"clip_skip={skip},lora=on"], 1e-4)
    with network.strength(0):
        if skip < 3:
            states = model.text_states(model.tokens(LOSS["captions"])).states
            reference.assert_tensor(states, LOSS["text_encoder"][f"clip_skip={skip},lora=off"], 1e-4)


def test_states_of_long_captions_are_those_of_sd_scripts(model, network, monkeypatch):
    expected = LOSS["text_encoder"]["max_token_length=225,lora=on"]
    monkeypatch.setattr(model, "max_tokens", 225)
    states = model.text_states(model.tokens(expected["captions"])).states
    reference.assert_tensor(states, expected, 1e-4)


@pytest.mark.parametrize("length", [75, 225])
def test_states_of_weighted_captions_are_those_of_sd_scripts(model, network, length, monkeypatch):
    name = "weighted_captions,lora=on" if length == 75 else "weighted_captions,max_token_length=225,lora=on"
    expected = LOSS["text_encoder"][name]
    monkeypatch.setattr(model, "max_tokens", length)
    states = model.text_states(model.tokens(expected["captions"], weighted=True)).states
    reference.assert_tensor(states, expected, 1e-4)


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
        ("v_parameterization,scale_v_pred_loss_like_noise_pred", {"scale_v_loss": True}, "v_prediction"),
        ("v_pred_like_loss=0.5", {"v_like_loss": 0.5}, "epsilon"),
        ("debiased_estimation_loss", {"debiased": True}, "epsilon"),
        ("v_parameterization,debiased_estimation_loss", {"debiased": True}, "v_prediction"),
        ("l1", {"loss_type": "l1"}, "epsilon"),
        (
            "huber,snr,c=0.1,scale=1,min_snr_gamma=5",
            {"loss_type": "huber", "huber_schedule": "snr", "min_snr_gamma": 5},
            "epsilon",
        ),
        *[
            (
                f"{kind},{schedule},c={c:g},scale={scale}",
                {"loss_type": kind, "huber_schedule": schedule, "huber_c": c, "huber_scale": scale},
                "epsilon",
            )
            for kind in ("huber", "smooth_l1")
            for schedule in ("snr", "exponential", "constant")
            for c, scale in ((0.1, 1), (0.05, 2))
        ],
    ],
)
@pytest.mark.proves(
    "loss_type",
    "huber_schedule",
    "huber_c",
    "huber_scale",
    "min_snr_gamma",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "debiased_estimation_loss",
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
    "{}": {},
    '{"noise_offset": 0.1}': {"noise_offset": 0.1},
    '{"noise_offset": 0.1, "noise_offset_random_strength": true}': {"noise_offset": 0.1, "noise_offset_random": True},
    '{"noise_offset": 0.05, "adaptive_noise_scale": 0.2}': {"noise_offset": 0.05, "adaptive_noise_scale": 0.2},
    '{"noise_offset": 0.05, "adaptive_noise_scale": -0.2}': {"noise_offset": 0.05, "adaptive_noise_scale": -0.2},
    '{"multires_noise_iterations": 6}': {"noise_type": "Multires", "multires_iterations": 6},
    '{"multires_noise_iterations": 10, "multires_noise_discount": 0.8}': {
        "noise_type": "Multires",
        "multires_iterations": 10,
        "multires_discount": 0.8,
    },
    '{"ip_noise_gamma": 0.1}': {"ip_noise_gamma": 0.1},
    '{"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": true}': {
        "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random": True,
    },
    '{"min_timestep": 200, "max_timestep": 600}': {"min_timestep": 200, "max_timestep": 600},
    '{"min_timestep": 500, "max_timestep": 500}': {"min_timestep": 500, "max_timestep": 500},
}


@pytest.mark.proves(
    "noise_offset",
    "noise_offset_random_strength",
    "adaptive_noise_scale",
    "multires_noise_iterations",
    "multires_noise_discount",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "min_timestep",
    "max_timestep",
)
@pytest.mark.parametrize("case", NOISE)
def test_noise_is_that_of_sd_scripts_for_the_same_draws(case, monkeypatch):
    """Every random draw is replaced by a formula's value, named by its place in the order."""
    count = 0

    def name() -> str:
        nonlocal count
        count += 1
        return f"draw{count - 1}"

    def fraction(shape: tuple[int, ...]) -> torch.Tensor:
        return (reference.uniform(name(), tuple(shape)) + 1) / 2

    monkeypatch.setattr(torch, "randn_like", lambda x, **_: reference.normal(name(), x.shape))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: reference.normal(name(), tuple(shape)))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: fraction(shape))
    monkeypatch.setattr(
        torch, "randint", lambda low, high, shape, **_: (fraction(shape) * (high - low) + low).to(torch.int64)
    )
    expected, settings = SCHEDULE["noise"]["cases"][case], Objective(**NOISE[case])
    schedule = Schedule.of(CONFIGS["scheduler"])
    latents = reference.normal("latents", (2, 4, 16, 24)) + torch.tensor([0.5, -1, 0.2, 0]).view(1, 4, 1, 1)
    noise = objective.noise_like(latents, settings)
    reference.assert_tensor(noise, expected["noise"], 1e-4)
    timesteps = objective.draw_timesteps(2, schedule, settings)
    assert timesteps.tolist() == expected["timesteps"]
    noisy = schedule.add_noise(latents, objective.perturbed(noise, settings), timesteps)
    reference.assert_tensor(noisy, expected["noisy_latents"], 1e-4)
