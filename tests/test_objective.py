from __future__ import annotations

import math

import pytest
import torch

from tests import reference
from trainer import objective
from trainer.models import Schedule
from trainer.schema.objective import Objective

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(params=["epsilon", "v_prediction"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return Schedule.of({**BETAS, "prediction_type": request.param})


def test_the_schedule_is_that_of_diffusers(schedule):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**schedule.config)
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-6, atol=0)
    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    torch.testing.assert_close(schedule.add_noise(x, noise, t), reference.add_noise(x, noise, t))
    torch.testing.assert_close(schedule.velocity(x, noise, t), reference.get_velocity(x, noise, t))


def test_the_target_is_noise_or_velocity(schedule):
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    expected = noise if schedule.prediction == "epsilon" else schedule.velocity(x, noise, t)
    assert torch.equal(objective.target(x, noise, t, schedule), expected)


@pytest.mark.proves("zero_terminal_snr")
def test_with_zero_terminal_snr_the_last_step_is_noise_alone_and_the_first_stays(schedule):
    """√ᾱ is shifted and stretched evenly: differences keep their ratios (Lin et al. 2023, algorithm 1)."""
    before, after = schedule.alphas_cumprod.sqrt(), schedule.with_zero_terminal_snr().alphas_cumprod.sqrt()
    assert float(after[-1]) == 0
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after.diff(), before.diff() * before[0] / (before[0] - before[-1]), rtol=1e-3, atol=1e-7)
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**schedule.config, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(after.square(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.proves("scale_v_pred_loss_like_noise_pred", "debiased_estimation_loss", "v_parameterization")
def test_velocity_losses_are_weighted_by_their_closed_forms_down_to_no_signal():
    schedule = Schedule.of({**BETAS, "prediction_type": "v_prediction"}).with_zero_terminal_snr()
    t = torch.tensor([0, 500, 999])
    prediction, wanted = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    squares = (prediction - wanted).square().mean((1, 2, 3))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    assert float(snr[2]) == 0
    for settings, weight in (
        (Objective(scale_v_loss=True), snr.clamp(max=1000) / (snr.clamp(max=1000) + 1)),
        (Objective(debiased=True), 1 / (snr.clamp(max=1000) + 1)),
        (Objective(min_snr_gamma=5), snr.clamp(max=5) / (snr + 1)),
    ):
        loss = objective.loss_per_image(prediction, wanted, t, torch.ones(3), schedule, settings)
        torch.testing.assert_close(loss, squares * weight)


@pytest.mark.proves("noise_offset", "noise_offset_type")
def test_offset_noise_adds_one_value_per_image_and_channel():
    latents = torch.randn(2, 4, 8, 8)
    torch.manual_seed(3)
    plain = torch.randn_like(latents)
    shift = torch.randn(2, 4, 1, 1)
    torch.manual_seed(3)
    noise = objective.noise_like(latents, Objective(noise_offset=0.1))
    torch.testing.assert_close(noise, plain + 0.1 * shift)


@pytest.mark.proves("adaptive_noise_scale")
def test_the_adaptive_scale_follows_each_channels_mean_and_never_turns_negative():
    latents = torch.zeros(1, 4, 8, 8)
    latents[:, 0] = -2.0
    torch.manual_seed(3)
    plain, shift = torch.randn_like(latents), torch.randn(1, 4, 1, 1)
    strength = torch.tensor([0.1 + 0.05 * 2.0, 0.1, 0.1, 0.1]).view(1, 4, 1, 1)
    torch.manual_seed(3)
    noise = objective.noise_like(latents, Objective(noise_offset=0.1, adaptive_noise_scale=0.05))
    torch.testing.assert_close(noise, plain + strength * shift)
    torch.manual_seed(3)
    noise = objective.noise_like(latents, Objective(noise_offset=0.1, adaptive_noise_scale=-1))
    torch.testing.assert_close(noise[:, 0], plain[:, 0])


@pytest.mark.proves("multires_noise_iterations", "noise_offset_type")
def test_multires_noise_has_unit_variance_and_coarse_parts():
    torch.manual_seed(0)
    latents = torch.zeros(4, 4, 64, 64)
    white = objective.noise_like(latents, Objective(noise_type="Multires", multires_iterations=0))
    noise = objective.noise_like(
        latents, Objective(noise_type="Multires", multires_iterations=6, multires_discount=0.8)
    )
    assert float(noise.std()) == pytest.approx(1, abs=1e-3)

    def low(x: torch.Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d(x, 16).std())

    assert low(noise) > 3 * low(white)


@pytest.mark.proves("multires_noise_discount")
def test_a_multires_discount_of_zero_means_its_default():
    def noise(discount: float) -> torch.Tensor:
        torch.manual_seed(1)
        settings = Objective(noise_type="Multires", multires_iterations=6, multires_discount=discount)
        return objective.noise_like(torch.zeros(1, 4, 32, 32), settings)

    assert torch.equal(noise(0), noise(0.3))
    assert not torch.equal(noise(0), noise(0.8))


def test_offset_settings_have_no_effect_on_the_other_type():
    torch.manual_seed(1)
    plain = torch.randn(1, 4, 8, 8)
    torch.manual_seed(1)
    assert torch.equal(objective.noise_like(plain, Objective(noise_type="Multires", noise_offset=0.5)), plain)


@pytest.mark.proves("min_snr_gamma")
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_the_loss_by_the_papers_formula(schedule, gamma):
    t = torch.tensor([1, 250, 999])
    prediction, wanted = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    loss = objective.loss_per_image(prediction, wanted, t, torch.ones(3), schedule, Objective(min_snr_gamma=gamma))
    for i, step in enumerate(t.tolist()):
        a = float(schedule.alphas_cumprod[step])
        snr = a / (1 - a)
        divisor = snr if schedule.prediction == "epsilon" else snr + 1
        mse = float((prediction[i] - wanted[i]).square().mean())
        assert float(loss[i]) == pytest.approx(mse * min(snr, gamma) / divisor, rel=1e-4)


@pytest.mark.proves("prior_loss_weight")
def test_prior_weights_multiply_each_images_own_loss(schedule):
    x, y, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    plain = objective.loss_per_image(x, y, t, torch.ones(2), schedule, Objective())
    weighted = objective.loss_per_image(x, y, t, torch.tensor([1.0, 0.25]), schedule, Objective())
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.25]))


def test_timesteps_cover_the_whole_schedule(schedule):
    torch.manual_seed(0)
    drawn = objective.draw_timesteps(20000, schedule, Objective())
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 999
    assert float(drawn.float().mean()) == pytest.approx(499.5, abs=3 * 1000 / math.sqrt(12 * 20000))


@pytest.mark.proves("min_timestep", "max_timestep")
@pytest.mark.parametrize(
    ("low", "high", "least", "most"),
    [(200, 600, 200, 599), (500, 500, 500, 500), (0, 0, 0, 999), (990, 1000, 990, 999)],
)
def test_timesteps_stay_within_their_bounds(schedule, low, high, least, most):
    torch.manual_seed(0)
    drawn = objective.draw_timesteps(20000, schedule, Objective(min_timestep=low, max_timestep=high))
    assert (int(drawn.min()), int(drawn.max())) == (least, most)
    assert drawn.dtype == torch.int64


@pytest.mark.proves("ip_noise_gamma", "ip_noise_gamma_random_strength")
def test_the_input_gets_more_noise_than_the_target(schedule):
    noise = torch.randn(2, 4, 8, 8)
    assert torch.equal(objective.perturbed(noise, Objective(ip_noise_gamma_random=True)), noise)
    torch.manual_seed(3)
    more = torch.randn_like(noise)
    torch.manual_seed(3)
    torch.testing.assert_close(objective.perturbed(noise, Objective(ip_noise_gamma=0.1)), noise + 0.1 * more)
    torch.manual_seed(3)
    strength = 0.1 * torch.rand(1)
    more = torch.randn_like(noise)
    torch.manual_seed(3)
    found = objective.perturbed(noise, Objective(ip_noise_gamma=0.1, ip_noise_gamma_random=True))
    torch.testing.assert_close(found, noise + strength * more)


@pytest.mark.proves("masked_loss")
def test_a_mask_weighs_places_and_leaves_the_mean_over_all(schedule):
    prediction, wanted, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    masks = torch.rand(2, 8, 8)
    found = objective.loss_per_image(prediction, wanted, t, torch.ones(2), schedule, Objective(), masks)
    expected = ((prediction - wanted).square() * masks[:, None]).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    settings = Objective(loss_type="huber", min_snr_gamma=5)
    whole = objective.loss_per_image(prediction, wanted, t, torch.ones(2), schedule, settings, torch.ones(2, 8, 8))
    torch.testing.assert_close(
        whole, objective.loss_per_image(prediction, wanted, t, torch.ones(2), schedule, settings)
    )


@pytest.mark.proves("loss_type", "huber_schedule", "huber_c", "huber_scale")
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_large_difference_weighs_less_than_its_square(schedule, kind):
    wanted, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])

    def loss(size: float, **settings: object) -> float:
        chosen = Objective(loss_type=kind, huber_schedule="constant", **settings)
        return float(objective.loss_per_image(wanted + size, wanted, t, torch.ones(1), schedule, chosen)[0])

    assert loss(10) / loss(5) == pytest.approx(2, rel=0.05)  # straight far out
    assert loss(1e-2) / loss(5e-3) == pytest.approx(4, rel=0.05)  # square near 0
    assert loss(1, huber_c=0.5) == pytest.approx(loss(1, huber_c=0.25, huber_scale=2))
    assert loss(1, huber_c=0.5) != pytest.approx(loss(1, huber_c=0.25))


HUBER_C = {
    (name.split(",")[0], float(name.split("c=")[1].split(",")[0]), float(name.split("scale=")[1])): values
    for name, values in reference.read("schedule")["huber_c"].items()
}


@pytest.mark.proves("huber_schedule", "huber_c", "huber_scale")
@pytest.mark.parametrize("case", HUBER_C)
def test_the_huber_threshold_is_that_of_sd_scripts_at_every_timestep(case):
    kind, c, scale = case
    settings = Objective(loss_type="huber", huber_schedule=kind, huber_c=c, huber_scale=scale)
    t = torch.tensor(reference.read("schedule")["timesteps"])
    found = objective.huber_threshold(t, Schedule.of({**BETAS, "prediction_type": "epsilon"}), settings)
    assert found.tolist() == pytest.approx(HUBER_C[case], rel=1e-5)
