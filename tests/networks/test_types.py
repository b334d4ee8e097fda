"""What holds for every LoRA type on every kind of layer."""

from __future__ import annotations

import pytest
import torch

from tests.networks.layers import CASES, TYPES, case, change, module_for, randomised, settings_of
from trainer import networks
from trainer.errors import ModelError
from trainer.schema import algorithms
from trainer.schema.algorithms import USES
from trainer.schema.network import Network as Settings

__all__ = ["case"]


@pytest.fixture(params=CASES, ids="-".join)
def settings(request: pytest.FixtureRequest) -> Settings:
    return settings_of(*request.param)


def test_every_type_is_tried_here():
    assert TYPES.keys() == algorithms.TYPES.keys()


def step(module: torch.nn.Module, x: torch.Tensor) -> None:
    """One step of an optimizer towards other outputs, and for DyLoRA one a unit, so that all have moved."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for share in (0.0, 0.3, 0.6, 0.9) if hasattr(module, "draw") else (0.0,):
        if hasattr(module, "draw"):
            module.draw(share)
        (module(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_untrained_module_changes_nothing(case, settings):
    layer, x = case
    module = module_for(layer, settings)
    torch.testing.assert_close(module(x), layer(x), rtol=1e-5, atol=1e-6)
    if "LyCORIS" not in settings.type:
        assert torch.equal(module(x), layer(x))


class Watched(torch.nn.Linear):
    """Answers as ever, and counts who asks for its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.own, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        self.asked += 1
        return self.own


def test_a_types_row_tells_whether_its_modules_read_the_frozen_weight(settings):
    layer = torch.nn.Linear(24, 40).requires_grad_(False)
    layer.own, layer.asked = layer.weight.detach(), 0
    del layer.weight
    layer.__class__ = Watched
    module = module_for(layer, settings)
    layer.asked = 0
    module(torch.ones(3, 24)).sum().backward()
    assert (layer.asked > 0) == algorithms.TYPES[settings.type].reads_weights


@pytest.mark.proves("LoRA_type", "network_alpha")
def test_after_a_step_the_output_is_that_of_the_weights_merged_from_the_files_tensors(case, settings):
    layer, x = case
    module, before = module_for(layer, settings), layer(x)
    step(module, x)
    answer = module.eval()(x)
    saved = {name: tensor.detach() for name, tensor in module.saved().items()}
    layer.weight.add_(networks.weight_update(saved, layer.weight))
    if (bias := networks.bias_update(saved)) is not None:
        layer.bias.add_(bias)
    torch.testing.assert_close(answer, layer(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer, before, rtol=1e-3, atol=1e-3)


def test_the_update_of_a_files_tensors_is_the_papers(case, settings):
    layer, _ = case
    saved = {name: tensor.detach() for name, tensor in randomised(layer, settings).saved().items()}
    expected = layer.weight + change(saved, layer.weight, settings)
    if settings.dora:
        norms = expected.flatten(1).norm(dim=1).view(-1, *[1] * (expected.ndim - 1))
        expected = expected * saved["dora_scale"] / norms
    torch.testing.assert_close(
        networks.weight_update(saved, layer.weight), expected - layer.weight, rtol=1e-4, atol=1e-4
    )


def test_a_file_of_half_precision_is_computed_in_full(case, settings):
    layer, _ = case
    saved = {name: tensor.detach().half() for name, tensor in randomised(layer, settings).saved().items()}
    whole = {name: tensor.float() for name, tensor in saved.items()}
    update = networks.weight_update(saved, layer.weight.half())
    assert update.dtype == torch.float32
    expected = networks.weight_update(whole, layer.weight.half().float())
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-5)


def test_a_type_that_adds_needs_no_more_of_the_base_than_its_shape(case, settings):
    needs_it = ("LyCORIS/iA3", "LyCORIS/GLoRA", "LyCORIS/Diag-OFT", "LyCORIS/BOFT")
    if settings.dora or settings.type in needs_it:
        pytest.skip("the update is one of the frozen weights")
    layer, _ = case
    saved = {name: tensor.detach() for name, tensor in randomised(layer, settings).saved().items()}
    empty = torch.empty(layer.weight.shape, device="meta")
    assert torch.equal(networks.weight_update(saved, empty), networks.weight_update(saved, layer.weight))


def test_tensors_of_no_known_type_are_refused_by_their_names():
    with pytest.raises(ModelError, match=r"no LoRA type.*svd_u, svd_v"):
        networks.weight_update({"svd_v": torch.ones(2, 2), "svd_u": torch.ones(2, 2)}, torch.ones(2, 2))


def test_a_file_without_alpha_has_its_rank_as_alpha():
    down, up = torch.randn(4, 24), torch.randn(40, 4)
    update = networks.weight_update({"lora_down.weight": down, "lora_up.weight": up}, torch.empty(40, 24))
    torch.testing.assert_close(update, up @ down)


def test_a_file_read_back_is_the_same_bit_for_bit(case, settings):
    layer, x = case
    module = randomised(layer, settings).eval()
    other = module_for(layer, settings).eval()
    saved = {name: tensor.detach().clone() for name, tensor in module.saved().items()}
    with torch.no_grad():
        other.take(saved)
    again = other.saved()
    assert saved.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    torch.testing.assert_close(other(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_trainings_state_is_taken_back_exactly(case, settings):
    layer, x = case
    module, other = randomised(layer, settings), module_for(layer, settings)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert dict(other.named_parameters()).keys() <= module.state_dict().keys()


def test_every_trained_tensor_has_a_gradient_and_no_frozen_one(case, settings):
    layer, x = case
    module = randomised(layer, settings)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if settings.type == "LoRA-FA":
        assert trained == {"lora_up.weight"}
    else:
        assert trained == dict(module.named_parameters()).keys()
    if hasattr(module, "draw"):
        module.draw(0.5)
        middle = 4 // settings.unit // 2
        trained = {f"downs.{middle}", f"ups.{middle}"}
    module(x).square().sum().backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == trained
    assert all(p.grad is None for name, p in module.named_parameters() if name not in trained)
    assert all(p.grad is None for p in layer.parameters())


def test_gradients_are_float32_while_the_layer_computes_in_bfloat16(case, settings):
    layer, x = case
    module = randomised(layer.to(torch.bfloat16), settings)
    answer = module(x.bfloat16())
    assert answer.dtype == torch.bfloat16
    answer.float().square().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


def test_a_small_update_is_not_rounded_away_by_large_frozen_weights(settings):
    """Frozen weights of 1 and inputs that sum to 0: the frozen answer is 0, and what is left is the update's."""
    if settings.type in ("LyCORIS/iA3", "LyCORIS/Diag-OFT", "LyCORIS/BOFT"):
        pytest.skip("these change nothing about equal weights and inputs that sum to 0")
    if settings.dora:
        pytest.skip("DoRA's lengths do not let the update be told from the frozen weights")
    layer = torch.nn.Linear(24, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.fill_(1)
    torch.manual_seed(0)
    module = randomised(layer, settings).eval()
    with torch.no_grad():
        module.limit_norm(0.001)
    x = torch.tensor([1.0, -1.0] * 12, dtype=torch.bfloat16)[None]
    delta = change(module.saved(), layer.weight.float(), settings)
    expected = x.float() @ delta.T
    assert not layer(x).any()
    assert 0 < float(delta.abs().max()) < 2**-9  # under half a step of bfloat16 at 1
    torch.testing.assert_close(module(x).float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_strength_zero_is_the_base_bit_for_bit_and_half_is_half(case, settings):
    layer, x = case
    base = layer(x)
    network = networks.Network({"a": randomised(layer, settings)}, {"a": "unet"}, {"a": layer})
    network.attach()
    full = layer(x)
    with network.strength(0):
        assert torch.equal(layer(x), base)
    with network.strength(0.5):
        half = layer(x)
    if settings.dora:  # half of the way between the lengths, at the whole change of direction
        assert float((half - base).norm()) > 0
    else:
        torch.testing.assert_close(half - base, (full - base) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.equal(full, base)
    network.detach()
    assert torch.equal(layer(x), base)


def test_a_norm_above_the_limit_is_shrunk_to_it(case, settings):
    if "scale_weight_norms" not in USES[settings.type]:
        pytest.skip("the type has no such control")
    layer, _ = case
    module = randomised(layer, settings)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}

    def norm():
        return float(change(module.saved(), layer.weight, settings).norm())

    assert norm() > 0.1
    with torch.no_grad():
        module.limit_norm(0.1)
    assert norm() == pytest.approx(0.1, rel=1e-4)
    before = norm()
    with torch.no_grad():
        module.limit_norm(1.0)
    assert norm() == before
    assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in frozen.items())


@pytest.mark.proves("module_dropout")
@pytest.mark.parametrize("algorithm", TYPES)
def test_module_dropout_leaves_out_the_whole_layer_in_its_share_of_the_steps(algorithm):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40).requires_grad_(False), torch.randn(3, 24)
    module = randomised(layer, Settings(type=algorithm, module_dropout=0.3))
    left_out = [torch.equal(module(x), layer(x)) for _ in range(300)]
    assert sum(left_out) / 300 == pytest.approx(0.3, abs=0.08)
    module.eval()
    assert not any(torch.equal(module(x), layer(x)) for _ in range(20))
