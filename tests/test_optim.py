from __future__ import annotations

import math

import pytest
import torch

from trainer import optim
from trainer.errors import ConfigError
from trainer.schema.optim import Optim

TOTAL, WARMUP = 100, 10


def rates(**settings: object) -> list[float]:
    """The rate of each of 100 steps, as a share of the base rate 1e-3."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    chosen = Optim(**{"optimizer": "AdamW", "warmup_percent": 10, **settings})
    optimizer = optim.make_optimizer([{"name": "unet", "params": [parameter], "lr": 1e-3}], chosen)
    scheduler = optim.make_scheduler(optimizer, chosen, TOTAL)
    found = []
    for _ in range(TOTAL):
        found.append(optim.rates(optimizer, scheduler)["unet"] / 1e-3)
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    return found


def after_warmup(shape):
    """The closed form behind ten steps of climbing from 0; `shape` maps 0…1 of the rest to a factor."""
    return [k / WARMUP if k < WARMUP else shape((k - WARMUP) / (TOTAL - WARMUP)) for k in range(TOTAL)]


CLOSED_FORMS = {
    "constant": ({}, [1.0] * TOTAL),
    "constant_with_warmup": ({}, after_warmup(lambda p: 1.0)),
    "linear": ({}, after_warmup(lambda p: 1 - p)),
    "cosine": ({}, after_warmup(lambda p: (1 + math.cos(math.pi * p)) / 2)),
    "cosine_with_restarts": (
        {"cycles": 3},
        after_warmup(lambda p: (1 + math.cos(math.pi * ((3 * p) % 1))) / 2),
    ),
    "polynomial": ({"power": 2}, after_warmup(lambda p: (1 - 1e-4) * (1 - p) ** 2 + 1e-4)),
    "inverse_sqrt": ({}, [k / WARMUP if k < WARMUP else 1 / math.sqrt(k / WARMUP) for k in range(TOTAL)]),
    "piecewise_constant": (
        {"scheduler_arguments": 'step_rules="1:50,0.1"'},
        [min(1, k / WARMUP) * (1.0 if k < 50 else 0.1) for k in range(TOTAL)],
    ),
    "warmup_stable_decay": (
        {"scheduler_arguments": "num_decay_steps=40"},
        [k / 10 if k < 10 else 1.0 if k < 60 else (1 + math.cos(math.pi * (k - 60) / 40)) / 2 for k in range(TOTAL)],
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_rate_of_every_step_is_the_closed_form(name):
    settings, expected = CLOSED_FORMS[name]
    assert rates(scheduler=name, **settings) == pytest.approx(expected, abs=2e-4)


def test_the_restarts_and_power_default_to_one():
    assert rates(scheduler="cosine_with_restarts") == pytest.approx(rates(scheduler="cosine_with_restarts", cycles=1))
    assert rates(scheduler="polynomial") == pytest.approx(rates(scheduler="polynomial", power=1))


def test_warmup_steps_go_before_the_percentage():
    found = rates(scheduler="constant_with_warmup", warmup_steps=20)
    assert found[10] == pytest.approx(0.5)
    assert found[20] == 1


def test_constant_ignores_the_warmup():
    assert rates(scheduler="constant", warmup_percent=50)[0] == 1


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_of_a_small_regression(name):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 80))
    x = torch.randn(256, 80)
    y = x @ torch.randn(64, 80).T
    settings = Optim(optimizer=name, scheduler="constant")
    optimizer = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 1e-2}], settings)
    scheduler = optim.make_scheduler(optimizer, settings, 60)
    losses = []
    for _ in range(60):
        loss = (x @ weight.T - y).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_adamw_8bit_holds_its_moments_in_bytes():
    weight = torch.nn.Parameter(torch.randn(64, 80))
    optimizer = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 1e-2}], Optim(optimizer="AdamW8bit"))
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


def test_adafactor_chooses_its_own_rate_unless_told_otherwise():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    group = [{"name": "unet", "params": [weight], "lr": 1e-2}]
    own = Optim(optimizer="Adafactor", scheduler="adafactor")
    optimizer = optim.make_optimizer(group, own)
    assert optimizer.param_groups[0]["lr"] is None
    scheduler = optim.make_scheduler(optimizer, own, 10)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    scheduler.step()
    assert optim.rates(optimizer, scheduler)["unet"] > 0
    told = Optim(optimizer="Adafactor", scheduler="constant", arguments="relative_step=False scale_parameter=False")
    assert optim.make_optimizer(group, told).param_groups[0]["lr"] == 1e-2


def test_arguments_reach_the_optimizer_quoted_or_not():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    for text in (
        '"weight_decay=0.1" "betas=0.9,0.99"',
        "weight_decay=0.1 betas=0.9,0.99",
        "betas=(0.9,0.99) weight_decay=.1",
    ):
        made = optim.make_optimizer(group, Optim(optimizer="AdamW", arguments=text)).param_groups[0]
        assert made["weight_decay"] == 0.1
        assert tuple(made["betas"]) == (0.9, 0.99)


def test_an_unknown_argument_is_refused_with_the_list_of_valid_ones():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    with pytest.raises(ConfigError, match=r"optimizer_args.*no argument wieght_decay.*weight_decay"):
        optim.make_optimizer(group, Optim(optimizer="AdamW", arguments="wieght_decay=0.1"))
