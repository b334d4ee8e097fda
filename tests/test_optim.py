from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from tests import reference
from trainer import optim, schema
from trainer.errors import ConfigError
from trainer.schema.optim import Optim, parse_arguments
from trainer.schema.optimizers import OPTIMIZERS

TOTAL, WARMUP = 100, 10


def rates(**settings: object) -> list[float]:
    """The rate of each of 100 steps, as a share of the base rate 1e-3."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    chosen = Optim(**{"optimizer": "AdamW", "warmup_percent": 10, "learning_rate": 1e-3, **settings})
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
    "cosine of two halves": (
        {"scheduler": "cosine", "scheduler_arguments": "num_cycles=1"},
        after_warmup(lambda p: (1 + math.cos(2 * math.pi * p)) / 2),
    ),
    "cosine_with_restarts": (
        {"cycles": 3},
        after_warmup(lambda p: (1 + math.cos(math.pi * ((3 * p) % 1))) / 2),
    ),
    "polynomial": ({"power": 2}, after_warmup(lambda p: (1 - 1e-4) * (1 - p) ** 2 + 1e-4)),
    "inverse_sqrt": ({}, [k / WARMUP if k < WARMUP else 1 / math.sqrt(k / WARMUP) for k in range(TOTAL)]),
    "cosine_with_min_lr": (
        {"scheduler_arguments": "min_lr=2e-4"},
        after_warmup(lambda p: 0.2 + 0.8 * (1 + math.cos(math.pi * p)) / 2),
    ),
    "piecewise_constant": (
        {"scheduler_arguments": 'step_rules="1:50,0.1"'},
        [min(1, k / WARMUP) * (1.0 if k < 50 else 0.1) for k in range(TOTAL)],
    ),
    "warmup_stable_decay": (
        {"scheduler_arguments": "num_decay_steps=40"},
        [k / 10 if k < 10 else 1.0 if k < 60 else (1 + math.cos(math.pi * (k - 60) / 40)) / 2 for k in range(TOTAL)],
    ),
}


@pytest.mark.proves("lr_scheduler", "lr_warmup", "lr_scheduler_args")
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_rate_of_every_step_is_the_closed_form(name):
    settings, expected = CLOSED_FORMS[name]
    assert rates(**{"scheduler": name, **settings}) == pytest.approx(expected, abs=2e-4)


@pytest.mark.proves("lr_scheduler_num_cycles", "lr_scheduler_power")
def test_the_restarts_and_power_default_to_one():
    assert rates(scheduler="cosine_with_restarts") == pytest.approx(rates(scheduler="cosine_with_restarts", cycles=1))
    assert rates(scheduler="polynomial") == pytest.approx(rates(scheduler="polynomial", power=1))


@pytest.mark.proves("lr_warmup_steps")
def test_warmup_steps_go_before_the_percentage():
    found = rates(scheduler="constant_with_warmup", warmup_steps=20)
    assert found[10] == pytest.approx(0.5)
    assert found[20] == 1


def test_constant_ignores_the_warmup():
    assert rates(scheduler="constant", warmup_percent=50)[0] == 1


def made_of(case):
    """The settings that mean what sd-scripts' options of a reference case mean."""
    warmup = case.get("lr_warmup_steps", 0)
    share = {"warmup_percent": warmup * 100} if isinstance(warmup, float) else {"warmup_percent": 0}
    arguments = list(case.get("lr_scheduler_args", []))
    name = case["lr_scheduler"].partition(":")[0]
    if "lr_scheduler_min_lr_ratio" in case:
        ratio = "min_lr_rate" if name == "cosine_with_min_lr" else "min_lr_ratio"
        arguments.append(f"{ratio}={case['lr_scheduler_min_lr_ratio']}")
    if "lr_decay_steps" in case:
        arguments.append(f"num_decay_steps={case['lr_decay_steps']}")
    if "lr_scheduler_timescale" in case:
        arguments.append(f"timescale={case['lr_scheduler_timescale']}")
    return Optim(
        optimizer="Adafactor" if name == "adafactor" else "AdamW",
        learning_rate=float(case["lr_scheduler"].partition(":")[2] or 1),
        scheduler=name,
        warmup_steps=warmup if isinstance(warmup, int) else 0,
        cycles=case.get("lr_scheduler_num_cycles"),
        power=case.get("lr_scheduler_power"),
        scheduler_arguments=" ".join(arguments),
        **share,
    )


# Ours: a scheduler that knows no warmup ignores it; one that needs an argument says so by its name;
# piecewise_constant warms up as the contract has it; schedules from other libraries are not offered.
COMPARED = [
    case
    for case in reference.read("schedule")["lr"]["cases"]
    if "values" in case
    and "lr_scheduler_type" not in case
    and not (case["lr_scheduler"] == "piecewise_constant" and case.get("lr_warmup_steps"))
]


@pytest.mark.proves(
    "lr_scheduler", "lr_warmup", "lr_warmup_steps", "lr_scheduler_args", "lr_scheduler_num_cycles", "lr_scheduler_power"
)
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: " ".join(f"{v}" for k, v in case.items() if k != "values"))
def test_the_rates_are_those_of_sd_scripts(case):
    expected = reference.read("schedule")["lr"]
    settings = made_of(case)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 1.0}], settings)
    scheduler = optim.make_scheduler(optimizer, settings, expected["max_train_steps"])
    found = []
    for _ in range(max(expected["at"]) + 1):
        found.append(optim.rates(optimizer, scheduler)["unet"])
        optimizer.step()
        scheduler.step()
    assert [found[i] for i in expected["at"]] == pytest.approx(case["values"], rel=1e-6, abs=1e-9)


def regression(name: str, steps: int, **settings: object) -> tuple[list[float], torch.Tensor]:
    """The losses of fitting 128 × 80 weights, and how far the weights went."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(64, 80)) for _ in range(2)]
    start = torch.cat(weights).detach().clone()
    x = torch.randn(256, 80)
    y = x @ torch.randn(128, 80).T
    chosen = Optim(**{"optimizer": name, "scheduler": "constant", **settings})
    rate = 1.0 if chosen.row.adapts or "SGD" in name else 3e-2
    groups = [{"name": str(i), "params": [weight], "lr": rate} for i, weight in enumerate(weights)]
    optimizer = optim.make_optimizer(groups, chosen)
    scheduler = optim.make_scheduler(optimizer, chosen, steps)
    losses = []
    for _ in range(steps):
        loss = (x @ torch.cat(weights).T - y).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, torch.cat(weights).detach() - start


@pytest.mark.proves("optimizer")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_of_a_small_regression(name):
    losses, moved = regression(name, 300 if OPTIMIZERS[name].adapts else 100)
    assert losses[-1] < 0.9 * losses[0]
    assert all(part.any() for part in moved.chunk(2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_listed_arguments_are_those_of_the_class(name):
    row = OPTIMIZERS[name]
    listed = set(row.arguments.split())
    left_out = {"args", "fused"} if row.name == "SGD" else {"args"}
    assert optim.signature(row) - left_out == listed | set(row.fixed)
    assert set(row.defaults) <= listed


def test_presets_spellings_of_other_libraries_reach_the_optimizer():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    settings = Optim(optimizer="DAdaptAdam", arguments="decouple=True use_bias_correction=True weight_decay=0.1")
    made = optim.make_optimizer(group, settings).param_groups[0]
    assert (made["weight_decouple"], made["bias_correction"], made["weight_decay"]) == (True, True, 0.1)


def test_momentum_belongs_to_nesterovs_sgd():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    for name in ("SGDNesterov", "SGDNesterov8bit"):
        made = optim.make_optimizer(group, Optim(optimizer=name))
        assert made.param_groups[0]["momentum"] == 0.9
        with pytest.raises(ConfigError, match="no argument nesterov"):
            schema.parse({"optimizer": name, "optimizer_args": "nesterov=False"})


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.one_rate])
def test_an_optimizer_that_finds_its_rate_has_one_for_all_groups_and_tells_it(name):
    weights = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    groups = [
        {"name": "text_encoder", "params": [weights[0]], "lr": 0.5},
        {"name": "unet", "params": [weights[1]], "lr": 1.0},
        {"name": "unet", "params": [weights[2]], "lr": 16.0, "rate_factor": 16.0},
    ]
    settings = Optim(optimizer=name, scheduler="constant")
    optimizer = optim.make_optimizer(groups, settings)
    scheduler = optim.make_scheduler(optimizer, settings, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5]
    told = optim.rates(optimizer, scheduler)
    assert told == pytest.approx({"text_encoder": 0.5, "unet": 0.5, "d*lr/text_encoder": 5e-7, "d*lr/unet": 5e-7})
    for _ in range(20):
        for weight in weights:
            weight.grad = 2 * weight.detach()
        optimizer.step()
        scheduler.step()
    assert optim.rates(optimizer, scheduler)["d*lr/unet"] > 5e-7


FREE = [name for name, row in OPTIMIZERS.items() if row.schedule_free]


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_optimizers_show_averaged_weights_and_train_on_their_own(name):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    settings = Optim(optimizer=name, scheduler="cosine", warmup_percent=50)
    optimizer = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 0.1}], settings)
    scheduler = optim.make_scheduler(optimizer, settings, 10)
    for _ in range(10):
        assert optim.rates(optimizer, scheduler)["unet"] == 0.1  # no scheduler, no warmup
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        scheduler.step()
    trained = weight.detach().clone()
    with optim.averaged(optimizer):
        averaged = weight.detach().clone()
    assert not torch.equal(averaged, trained)
    assert torch.equal(weight.detach(), trained)


def test_other_optimizers_have_one_kind_of_weights():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 1e-2}], Optim(optimizer="AdamW"))
    before = weight.detach().clone()
    with optim.averaged(optimizer):
        assert torch.equal(weight, before)


def test_only_a_schedule_free_optimizers_weights_are_copied_for_a_save_or_a_picture(monkeypatch):
    def copied(name):
        weight = torch.nn.Parameter(torch.randn(8, 8))
        own = optim.make_optimizer([{"name": "unet", "params": [weight], "lr": 1e-2}], Optim(optimizer=name))
        optimizer = Accelerator().prepare(own)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        copies = []
        with monkeypatch.context() as patch:
            clone = torch.Tensor.clone
            patch.setattr(torch.Tensor, "clone", lambda tensor, **how: copies.append(tensor) or clone(tensor, **how))
            with optim.averaged(optimizer):
                pass
        return [tensor.shape for tensor in copies]

    assert copied("AdamW") == []
    assert (8, 8) in copied("AdamWScheduleFree")


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


@pytest.mark.proves("optimizer_args")
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


@pytest.mark.proves("optimizer_args")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unknown_argument_is_refused_with_the_list_of_valid_ones(name):
    with pytest.raises(ConfigError, match=r"\(optimizer_args\).*no argument wieght_decay.*weight_decay"):
        schema.parse({"optimizer": name, "optimizer_args": "wieght_decay=0.1"})


def test_a_value_that_the_optimizer_cannot_use_is_refused_by_the_controls_name():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    with pytest.raises(ConfigError, match=r"optimizer_args.*beta"):
        optim.make_optimizer(group, Optim(optimizer="AdamW", arguments="betas=2,3"))


@pytest.mark.proves("optimizer_args", "lr_scheduler_args")
def test_words_for_yes_no_and_nothing_are_read_in_any_case():
    assert parse_arguments("a=true b=FALSE c=None d=True e=none f=nono") == {
        "a": True, "b": False, "c": None, "d": True, "e": None, "f": "nono"
    }  # fmt: skip


@pytest.mark.proves("optimizer_args")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Prodigy", "use_bias_correction=no", 'use_bias_correction "no" is not allowed; it must be True or False'),
        ("AdamW", "amsgrad=1", 'amsgrad "1" is not allowed; it must be True or False'),
        ("AdamW", "foreach=no", 'foreach "no" is not allowed; it must be a number, True, False or None'),
        ("AdamW", "weight_decay=abc", 'weight_decay "abc" is not allowed; it must be a number'),
        ("Lion", "weight_decay=true", 'weight_decay "True" is not allowed; it must be a number'),
        ("AdamW8bit", "betas=0.9", 'betas "0.9" is not allowed; it must be 2 numbers separated by commas'),
        ("DAdaptAdam", "decouple=maybe", 'decouple "maybe" is not allowed; it must be True or False'),
    ],
)
def test_a_value_of_another_kind_than_the_arguments_is_refused_naming_it(name, arguments, message):
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 1.0}]
    with pytest.raises(ConfigError) as caught:
        optim.make_optimizer(group, Optim(optimizer=name, arguments=arguments))
    assert message in str(caught.value) and "optimizer_args" in str(caught.value)


@pytest.mark.proves("lr_scheduler_args")
@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("warmup_stable_decay", "num_decay_steps=abc", "num_decay_steps"),
        ("cosine_with_min_lr", "min_lr=abc", "min_lr"),
        ("polynomial", "power=yes", "power"),
    ],
)
def test_a_schedulers_arguments_are_of_their_kind_too(name, arguments, argument):
    with pytest.raises(
        ConfigError, match=rf'\(lr_scheduler_args\): {argument} "\w+" is not allowed; it must be a number'
    ):
        rates(scheduler=name, scheduler_arguments=arguments)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_its_own_defaults(name):
    defaults = optim.defaults_of(optim.load(OPTIMIZERS[name]))
    assert optim.unfit(defaults, defaults) == []


def test_the_rate_of_what_is_not_trained_any_more_is_0():
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("text_encoder", "unet")}
    groups = [{"name": name, "params": [weight], "lr": 1e-3} for name, weight in weights.items()]
    settings = Optim(optimizer="AdamW", scheduler="constant")
    optimizer = optim.make_optimizer(groups, settings)
    scheduler = optim.make_scheduler(optimizer, settings, TOTAL)
    weights["text_encoder"].requires_grad_(False)
    assert optim.rates(optimizer, scheduler) == {"text_encoder": 0, "unet": 1e-3}


@pytest.mark.parametrize(("name", "valid"), [("linear", "takes none"), ("polynomial", "power, lr_end")])
def test_an_unknown_scheduler_argument_is_refused_too(name, valid):
    with pytest.raises(ConfigError, match=rf"lr_scheduler_args.*no argument gamma.*{valid}"):
        schema.parse({"optimizer": "AdamW", "lr_scheduler": name, "lr_scheduler_args": "gamma=0.1"})


def test_adafactor_warms_up_only_with_rates_of_its_own():
    group = [{"name": "unet", "params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 1e-2}]
    settings = Optim(optimizer="Adafactor", arguments="relative_step=False warmup_init=True")
    made = optim.make_optimizer(group, settings).param_groups[0]
    assert (made["relative_step"], made["warmup_init"], made["lr"]) == (True, True, None)


def test_adafactors_rates_belong_to_their_groups_also_when_one_rests():
    weights = [torch.nn.Parameter(torch.full((4, 4), value)) for value in (1.0, 3.0)]
    groups = [{"name": name, "params": [w], "lr": 1.0} for name, w in zip(("a", "b"), weights, strict=True)]
    settings = Optim(optimizer="Adafactor")
    optimizer = optim.make_optimizer(groups, settings)
    scheduler = optim.make_scheduler(optimizer, settings, 10)
    for resting in (False, True):
        weights[0].grad = None if resting else torch.ones(4, 4)
        weights[1].grad = torch.ones(4, 4)
        optimizer.step()
        scheduler.step()
    # 1 % of each group's own root mean square
    assert optim.rates(optimizer, scheduler) == pytest.approx({"a": 0.01, "b": 0.03}, rel=0.05)


def test_a_fused_step_is_the_plain_one_and_is_left_to_who_chooses_another_way_or_has_a_scaler():
    def trained(settings, fused):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        group = {"name": "unet", "params": [weight], "lr": 1e-2}
        optimizer = optim.make_optimizer([group], settings, fused=fused)
        for step in range(4):
            weight.grad = torch.cos(weight.detach() * (step + 1))
            optimizer.step()
        return optimizer.param_groups[0].get("fused"), weight.detach()

    (one, expected), (other, found) = (trained(Optim(optimizer="AdamW"), fused) for fused in (False, True))
    assert not one
    assert other is True
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)
    chosen = Optim(optimizer="AdamW", arguments="foreach=True")
    assert trained(chosen, True)[0] is None
    assert trained(Optim(optimizer="Lion"), True)[0] is None


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_may_have_its_first_gradient_later_than_others(name):
    """Module dropout leaves some out of a step, DyLoRA all units but one."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    optimizer = optim.make_optimizer(
        [{"name": "unet", "params": weights, "lr": 1e-2}], Optim(optimizer=name), fused=True
    )
    for present in ([0], [0, 1], [1]):
        for place, weight in enumerate(weights):
            weight.grad = torch.ones_like(weight) if place in present else None
        optimizer.step()
    assert all(torch.isfinite(weight).all() for weight in weights)
