"""Dropout of values, ranks and layers, and the limit on norms: while training, and only then."""

from __future__ import annotations

import math
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file

from trainer import networks
from trainer.models import Target
from trainer.networks import standard
from trainer.run import EXIT_DONE
from trainer.schema.network import Network as Settings

LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 20), (64, 7, 12)),
    "linear of vectors": (lambda: torch.nn.Linear(12, 20), (64, 12)),
    "conv": (lambda: torch.nn.Conv2d(12, 20, 3, padding=1), (64, 12, 4, 5)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


def module_with(layer: torch.nn.Module, rank: int = 8, **settings) -> torch.nn.Module:
    module = standard.module_for(layer, rank, float(rank), Settings(**settings))
    torch.nn.init.normal_(module.lora_up.weight)
    return module


def ranks_seen(module, layer, x) -> torch.Tensor:
    """The share of each rank in the update of each image, [B, …, rank], by way of an up matrix that is the identity."""
    rank = module.rank
    with torch.no_grad():
        module.lora_up.weight.zero_()
        module.lora_up.weight[:rank, :rank].flatten(1).copy_(torch.eye(rank))
        module.lora_up.weight.view(20, rank)[:rank] = torch.eye(rank)
    update = (module(x) - layer(x)).movedim(1, -1) if x.ndim == 4 else module(x) - layer(x)
    module.eval()
    whole = (module(x) - layer(x)).movedim(1, -1) if x.ndim == 4 else module(x) - layer(x)
    module.train()
    return (update / whole)[..., :rank]


@pytest.mark.proves("network_dropout")
def test_network_dropout_leaves_out_values_and_scales_the_rest(case):
    layer, x = case
    share = ranks_seen(module_with(layer, dropout=0.25), layer, x)
    dropped = share.abs() < 1e-3
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(share[~dropped], torch.full_like(share[~dropped], 1 / 0.75), rtol=1e-2, atol=1e-2)


@pytest.mark.proves("rank_dropout")
def test_rank_dropout_leaves_out_a_rank_for_a_whole_image_and_scales_the_rest(case):
    layer, x = case
    share = ranks_seen(module_with(layer, rank_dropout=0.4), layer, x)
    share = share.reshape(len(x), -1, share.shape[-1])
    dropped = share.abs() < 1e-3
    assert (dropped.all(1) | ~dropped.any(1)).all()
    assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.07)
    torch.testing.assert_close(share[~dropped], torch.full_like(share[~dropped], 1 / 0.6), rtol=1e-2, atol=1e-2)


@pytest.mark.proves("module_dropout")
def test_module_dropout_leaves_out_the_whole_layer_in_its_share_of_the_steps(case):
    layer, x = case
    module = module_with(layer, module_dropout=0.3)
    base = layer(x)
    left_out = [torch.equal(module(x), base) for _ in range(300)]
    assert sum(left_out) / 300 == pytest.approx(0.3, abs=0.08)
    module.eval()
    assert not any(torch.equal(module(x), base) for _ in range(20))


def test_nothing_is_dropped_in_pictures(case):
    layer, x = case
    dropped = {"dropout": 0.5, "rank_dropout": 0.5, "module_dropout": 0.5}
    module = module_with(layer, **dropped)
    network = networks.Network({"a": module}, {"a": "unet"}, {"a": layer})
    plain = module_with(layer)
    plain.load_state_dict(module.state_dict())
    with network.without_dropout():
        assert torch.equal(module(x), plain(x))
    assert not torch.equal(module(x), plain(x))


def test_samples_are_drawn_without_dropout(settings, train, monkeypatch):
    from trainer import sampling

    modes = []
    drop, draw = standard.LoRALayer.drop, sampling.draw

    def noted_drop(self, inner, images):
        modes.append("dropping" if self.training else "whole")
        return drop(self, inner, images)

    def noted_draw(*arguments):
        modes.append("drawing")
        return draw(*arguments)

    monkeypatch.setattr(standard.LoRALayer, "drop", noted_drop)
    monkeypatch.setattr(sampling, "draw", noted_draw)
    sample = {"sample_every_n_steps": 1, "sample_prompts": "a cat --s 1", "max_train_steps": 1}
    train(settings | sample | {"network_dropout": 0.5})
    assert [mode for mode, _ in groupby(modes)] == ["drawing", "whole", "dropping", "drawing", "whole"]


@pytest.mark.proves("network_dropout", "rank_dropout", "module_dropout")
@pytest.mark.parametrize("key", ["network_dropout", "rank_dropout", "module_dropout"])
def test_each_dropout_changes_what_is_learned_and_the_seed_fixes_it(settings, train, tmp_path, key):
    def trained(change):
        train(settings | change | {"max_train_steps": 3})
        return load_file(tmp_path / "out" / "photo.safetensors")

    plain, first, second = trained({}), trained({key: 0.5}), trained({key: 0.5})
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], plain[k]) for k in first)


@pytest.mark.proves("module_dropout")
def test_a_step_without_any_module_is_one_without_a_gradient(settings, train):
    only_the_middle = ",".join("4" if i == 12 else "0" for i in range(25))
    settings |= {
        "text_encoder_lr": 0,
        "block_dims": only_the_middle,
        "module_dropout": 0.99,
        "optimizer": "SGDNesterov",
    }
    code, events, _ = train(settings)
    assert code == EXIT_DONE
    assert [e["step"] for e in events if e["type"] == "step"] == [1, 2, 3, 4, 5, 6]


def norm(module: torch.nn.Module) -> float:
    down, up = module.lora_down.weight.detach(), module.lora_up.weight.detach()
    return float((up.flatten(1) @ down.flatten(1)).norm()) * module.scale


def test_a_norm_above_the_limit_is_shrunk_to_it_by_both_matrices_alike(case):
    layer, _ = case
    large, small = module_with(layer), module_with(layer)
    with torch.no_grad():
        small.lora_up.weight.mul_(1e-3)
    before = {m: (m.lora_down.weight.clone(), m.lora_up.weight.clone(), norm(m)) for m in (large, small)}
    assert before[large][2] > 2 > before[small][2]
    modules = {"large": large, "small": small}
    targets = dict.fromkeys(modules, Target("unet", layer))
    network = networks.Network(modules, dict.fromkeys(modules, "unet"), {n: t.layer for n, t in targets.items()})
    network.limit_norms(2.0)
    assert norm(large) == pytest.approx(2.0, rel=1e-5)
    share = math.sqrt(2 / before[large][2])
    torch.testing.assert_close(large.lora_down.weight, before[large][0] * share)
    torch.testing.assert_close(large.lora_up.weight, before[large][1] * share)
    assert torch.equal(small.lora_down.weight, before[small][0])
    assert torch.equal(small.lora_up.weight, before[small][1])


def test_an_update_of_nothing_stays_nothing(case):
    layer, _ = case
    module = standard.module_for(layer, 4, 1.0, Settings())
    down = module.lora_down.weight.detach().clone()
    with torch.no_grad():
        module.limit_norm(1.0)
    assert torch.equal(module.lora_down.weight, down)


@pytest.mark.proves("scale_weight_norms")
def test_no_layer_of_the_file_exceeds_scale_weight_norms(settings, train, tmp_path):
    def largest(change):
        train(settings | change | {"learning_rate": 0.1, "lr_scheduler": "constant"})
        tensors = load_file(tmp_path / "out" / "photo.safetensors")
        names = [k.removesuffix(".alpha") for k in tensors if k.endswith(".alpha")]
        return max(
            float((tensors[f"{n}.lora_up.weight"].flatten(1) @ tensors[f"{n}.lora_down.weight"].flatten(1)).norm())
            for n in names
        )

    assert largest({}) > 1
    assert largest({"scale_weight_norms": 0.5}) == pytest.approx(0.5, rel=1e-4)


def loraplus(settings, tmp_path, **ratios):
    from trainer import schema
    from trainer.prepare import prepare
    from trainer.run import Run

    values = {**settings, "unet_lr": 1e-3, "text_encoder_lr": 1e-4, "lr_scheduler": "constant", **ratios}
    return prepare(schema.parse({**values, "optimizer_args": "weight_decay=0"}), Run(tmp_path), lambda event: None)


@pytest.mark.proves("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
@pytest.mark.parametrize(
    ("ratios", "unet", "text_encoder"),
    [
        ({"loraplus_lr_ratio": 16}, 16, 16),
        ({"loraplus_unet_lr_ratio": 4}, 4, 1),
        ({"loraplus_text_encoder_lr_ratio": 8}, 1, 8),
        ({"loraplus_lr_ratio": 16, "loraplus_text_encoder_lr_ratio": 2}, 16, 2),
    ],
)
def test_loraplus_gives_the_up_weights_a_multiple_of_the_rate(settings, tmp_path, ratios, unet, text_encoder):
    s = loraplus(settings, tmp_path, **ratios)
    names = {id(p): name for name, p in s.network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in s.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        own, ratio = (1e-4, text_encoder) if "lora_te" in name else (1e-3, unet)
        assert rate == pytest.approx(own * (ratio if "lora_up" in name else 1)), name


@pytest.mark.proves("loraplus_unet_lr_ratio")
def test_a_step_with_loraplus_moves_the_up_weights_that_much_further(settings, tmp_path):
    """AdamW's first step moves a weight by its rate."""
    from trainer import loop

    moved = {}
    for ratio in (0, 16):
        s = loraplus(settings, tmp_path, loraplus_unet_lr_ratio=ratio)
        s.network.attach()
        before = {name: p.detach().clone() for name, p in s.network.named_parameters()}
        _, rates = loop.take_step(s, 1, s.feed.batches(range(1)))
        s.network.detach()
        assert rates["unet"] == pytest.approx(1e-3)
        moved[ratio] = {
            part: max(
                float((p.detach() - before[name]).abs().max())
                for name, p in s.network.named_parameters()
                if part in name and "lora_up" in name
            )
            for part in ("lora_unet", "lora_te")
        }
    assert moved[16]["lora_unet"] == pytest.approx(16 * moved[0]["lora_unet"], rel=1e-2)
    assert moved[16]["lora_te"] == pytest.approx(moved[0]["lora_te"], rel=1e-2)
