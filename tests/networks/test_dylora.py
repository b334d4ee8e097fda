"""DyLoRA: one unit of ranks is trained in a step, and the file can be cut behind each."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import reference
from tests.networks.layers import LAYERS, case, randomised
from trainer import loop, networks, optim, schema, state
from trainer.errors import ConfigError, ModelError
from trainer.networks import dylora, standard
from trainer.prepare import prepare
from trainer.run import EXIT_CONFIG, Run
from trainer.schema.network import Network as Settings

__all__ = ["case"]
DYLORA = {"LoRA_type": "Kohya DyLoRA", "conv_dim": 0, "network_dim": 4, "unit": 2}


def cut(saved, ranks: int) -> dict[str, torch.Tensor]:
    """A file's first ranks, with the alpha that they were trained at."""
    down, up = saved["lora_down.weight"], saved["lora_up.weight"]
    return {
        "lora_down.weight": down[:ranks],
        "lora_up.weight": up[:, :ranks],
        "alpha": saved["alpha"] * math.sqrt(ranks / len(down)),
    }


@pytest.mark.proves("unit", "LoRA_type")
@pytest.mark.parametrize("unit", [1, 2, 4])
def test_each_rank_below_the_maximum_is_the_lora_that_was_trained_there(case, unit):
    """In the step that draws the unit ending at rank r, the output is that of the file cut to r ranks."""
    layer, x = case
    module = randomised(layer, Settings(type="Kohya DyLoRA", unit=unit))
    saved = {name: tensor.detach() for name, tensor in module.saved().items()}
    frozen = layer.weight.clone()
    for drawn in range(4 // unit):
        module.draw((drawn + 0.5) * unit / 4)
        answer = module(x)
        ranks = (drawn + 1) * unit
        layer.weight.copy_(frozen + networks.weight_update(cut(saved, ranks), frozen))
        expected = layer(x)
        layer.weight.copy_(frozen)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_the_step_of_the_last_unit_is_that_of_sd_scripts(name):
    """Below it the two differ: there sd-scripts leaves the untrained units above in the output."""
    expected = reference.read("dylora")[name]
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    for part, weight in layer.named_parameters():
        weight.copy_(reference.weight(f"{name}.{part}", weight.shape))
    module = dylora.module_for(layer, 4, 3.0, Settings(type="Kohya DyLoRA", unit=2))
    tensors = {key: reference.lora_weight(f"{name}.{key}", tensor.shape) for key, tensor in module.saved().items()}
    with torch.no_grad():
        module.take(tensors | {"alpha": torch.tensor(3.0)})
    module.draw(0.75)
    answer = module(reference.normal(f"{name}.x", shape))
    reference.assert_tensor(answer, expected["answer"], 1e-5)
    answer.square().sum().backward()
    reference.assert_tensor(module.downs[1].grad, expected["down_gradient"], 1e-5)
    reference.assert_tensor(module.ups[1].grad, expected["up_gradient"], 1e-5)
    assert module.downs[0].grad is None


def test_a_cut_file_is_a_standard_lora(case):
    layer, x = case
    module = randomised(layer, Settings(type="Kohya DyLoRA"))
    for ranks in (1, 2, 3, 4):
        smaller = standard.module_for(layer, ranks, 1.0, Settings())
        with torch.no_grad():
            smaller.take(cut(module.saved(), ranks))
        module.draw((ranks - 0.5) / 4)
        torch.testing.assert_close(smaller(x), module(x), rtol=1e-5, atol=1e-5)


def test_pictures_are_drawn_with_all_ranks(case):
    layer, x = case
    module = randomised(layer, Settings(type="Kohya DyLoRA", unit=2))
    module.draw(0)
    first = module(x)
    whole = standard.module_for(layer, 4, 1.0, Settings())
    with torch.no_grad():
        whole.take(module.saved())
    torch.testing.assert_close(module.eval()(x), whole(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, module(x), atol=1e-2)


def test_adamw_passes_over_the_units_that_were_not_drawn():
    """Neither their weights nor their moments move, decay included; and each unit counts its own steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40).requires_grad_(False)
    module = randomised(layer, Settings(type="Kohya DyLoRA", unit=2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for share in (0.9, 0.9, 0.1):
        module.draw(share)
        moments = {p: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in optimizer.state}
        module(torch.randn(5, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in module.named_parameters()}
    assert steps == {"downs.0": 1, "ups.0": 1, "downs.1": 2, "ups.1": 2}
    assert all(torch.equal(p, at) and torch.equal(optimizer.state[p]["exp_avg"], m) for p, (at, m) in moments.items())
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_rank_that_is_no_multiple_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"unit.*: 3 does not divide Network Rank \(network_dim\) 8"):
        schema.parse(DYLORA | {"network_dim": 8, "unit": 3})
    with pytest.raises(ConfigError, match=r"4 does not divide Convolution Rank \(conv_dim\) 6"):
        schema.parse(DYLORA | {"conv_dim": 6, "unit": 4})
    with pytest.raises(ConfigError, match=r"2 does not divide Block dims \(block_dims\) 3"):
        schema.parse(DYLORA | {"block_dims": ",".join(["3"] + ["4"] * 24)})
    schema.parse({"unit": 3})  # of another type
    with pytest.raises(ModelError, match="rank 6 cannot be cut into units of 4"):
        dylora.module_for(torch.nn.Linear(3, 3), 6, 1.0, Settings(unit=4))


def session(settings, tmp_path, **change):
    return prepare(schema.parse({**settings, **DYLORA, **change}), Run(tmp_path), lambda event: None)


def drawn(s) -> int:
    units = {module.drawn for module in s.network.layers.values()}
    assert len(units) == 1
    return units.pop()


@pytest.mark.proves("unit")
def test_a_step_trains_the_drawn_unit_of_every_layer_and_no_other(settings, tmp_path):
    s = session(settings, tmp_path, optimizer="AdamW", unit=1)
    s.network.attach()
    batches, counts = s.feed.batches(range(6)), Counter()
    for step in range(1, 4):
        before = {name: p.detach().clone() for name, p in s.network.named_parameters()}
        loop.take_step(s, step, batches)
        moved = {name.split(".")[-1] for name, p in s.network.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {str(drawn(s))}
        counts[drawn(s)] += 1
    s.network.detach()
    assert len(counts) > 1


def test_units_are_drawn_evenly_and_by_seed_and_step(settings, tmp_path):
    from trainer.randomness import generator_at

    s = session(settings, tmp_path, unit=1)
    draws = []
    for step in range(400):
        s.network.draw(generator_at(7, "unit", step).random())
        draws.append(drawn(s))
    counts = Counter(draws)
    assert set(counts) == {0, 1, 2, 3}
    assert all(70 < n < 130 for n in counts.values())


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_a_resumed_training_draws_the_same_units_and_ends_with_the_same_file(settings, train, tmp_path, optimizer):
    settings |= DYLORA | {"optimizer": optimizer, "max_train_steps": 5, "unit": 1}
    path = tmp_path / "out" / "photo.safetensors"
    assert train(settings | {"save_state": True, "save_every_n_steps": 2})[0] == 0
    whole = load_file(path)
    path.unlink()
    resumed = settings | {"resume": str(tmp_path / "out" / "photo-step00000002-state")}
    assert train(resumed)[0] == 0
    again = load_file(path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_file_is_kohyas_and_says_the_unit(settings, train, tmp_path):
    for algorithm, argument, module in (
        ("Kohya DyLoRA", "unit", "networks.dylora"),
        ("LyCORIS/DyLoRA", "block_size", "lycoris.kohya"),
    ):
        assert train(settings | DYLORA | {"LoRA_type": algorithm, "max_train_steps": 1})[0] == 0
        path = tmp_path / "out" / "photo.safetensors"
        with safe_open(path, "pt") as file:
            told = file.metadata()
            assert {name.split(".", 1)[1] for name in file.keys()} == {"lora_down.weight", "lora_up.weight", "alpha"}  # noqa: SIM118
        assert told["ss_network_module"] == module
        assert json.loads(told["ss_network_args"])[argument] == "2"
        path.unlink()


def test_a_file_of_another_rank_is_refused_before_the_start(settings, train, tmp_path, capsys):
    train(settings | {"network_dim": 3, "network_alpha": 1, "max_train_steps": 1})
    (tmp_path / "out" / "photo.safetensors").rename(tmp_path / "given.safetensors")
    given = {"network_weights": str(tmp_path / "given.safetensors"), "dim_from_weights": True}
    assert train(settings | DYLORA | given)[0] == EXIT_CONFIG
    assert "2 does not divide rank 3" in capsys.readouterr().err


def test_states_of_units_come_back_where_some_were_never_drawn(settings, tmp_path):
    first, second = (session(settings, tmp_path, optimizer="AdamW", unit=1, seed=seed) for seed in (1, 2))
    first.network.attach()
    loop.take_step(first, 1, first.feed.batches(range(1)))
    first.network.detach()
    parts = state.parts_of(first.network, first.optimizer, first.scheduler, None)
    state.write(tmp_path / "state", 1, 1, 6, first.config, parts, first.pictures)
    state.read(tmp_path / "state").restore(second.network, second.optimizer, second.scheduler, None)
    assert optim.rates(first.optimizer, first.scheduler) == optim.rates(second.optimizer, second.scheduler)
    assert len(first.optimizer.state) == len(second.optimizer.state) == len(list(first.network.parameters())) / 4
