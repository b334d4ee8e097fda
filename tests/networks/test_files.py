"""A file of every LoRA type, in every variant, tells all that is needed to go on from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.networks.layers import CASES, settings_of
from trainer import models, networks, schema
from trainer.errors import ModelError
from trainer.networks.blocks import from_file, from_settings, settings_of_file
from trainer.schema.network import Network as Settings

PARTS = {"unet", "text_encoder"}
SIZES = {"network_dim": 2, "conv_dim": 4, "network_alpha": 1, "conv_alpha": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors")
    model = models.load(str(path), "", torch.float32, torch.device("cpu"), 1, 75)
    targets = model.targets
    model.targets = lambda **wanted: dict(list(targets(**wanted).items())[::4])  # of all kinds, and four times as fast
    return model


def answer(model) -> torch.Tensor:
    torch.manual_seed(5)
    states = model.text_states(model.tokens(["a cat"]))
    return model.predict(torch.randn(1, 4, 8, 8), torch.tensor([300]), states)


def built(model, settings: Settings) -> networks.Network:
    config = schema.Config(network=settings.model_copy(update={"rank": 2, "alpha": 1.0}))
    config = config.model_copy(
        update={"network": config.network.model_copy(update={"conv_rank": 4, "conv_alpha": 2.0, "reach": "full"})}
    )
    return networks.build(settings, model.targets(norms=settings.norms), PARTS, from_settings(config, None))


def trained(model, network: networks.Network) -> torch.Tensor:
    """One step away from what the base answers; the answer after it."""
    network.attach()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.05)
    network.draw(0.9)
    answer(model).square().mean().backward()
    optimizer.step()
    with network.without_dropout(), torch.no_grad():
        after = answer(model)
    network.detach()
    return after


@pytest.mark.proves("network_weights", "dim_from_weights", "train_norm")
@pytest.mark.parametrize(("algorithm", "variant"), CASES)
def test_training_goes_on_from_a_file_of_every_type_with_its_sizes_and_switches(
    model, tmp_path: Path, algorithm, variant
):
    torch.manual_seed(0)
    norms = algorithm.startswith("LyCORIS") and algorithm != "LyCORIS/iA3"
    settings = settings_of(algorithm, variant).model_copy(update={"norms": norms})
    network = built(model, settings)
    expected = trained(model, network)
    save_file({name: t.contiguous() for name, t in network.tensors().items()}, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert norms == any(name.endswith(".w_norm") for name in tensors)

    others = Settings(type=algorithm, rank=7, conv_rank=3, unit=settings.unit)
    others = settings_of_file(others, tensors)
    again = networks.build(others, model.targets(norms=others.norms), PARTS, from_file(tensors))
    with torch.no_grad():
        again.read(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.tensors().items())
    again.attach()
    with again.without_dropout(), torch.no_grad():
        found = answer(model)
        with again.strength(0):
            base = answer(model)
    again.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((base - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("factor", [-1, 2, 4])
def test_lokrs_factor_is_found_in_the_file(model, factor):
    from trainer.networks.lokr import factor_of

    tensors = built(model, Settings(type="LyCORIS/LoKr", factor=factor)).tensors()
    assert factor_of(tensors) == factor


@pytest.mark.parametrize(
    ("made", "wanted", "message"),
    [
        ({"dora": True}, {}, r"DoRA Weight Decompose \(dora_wd\) makes the difference"),
        ({}, {"tucker": True}, r"Use Tucker decomposition \(use_tucker\) makes the difference"),
        ({"norms": True}, {}, r"Train Norm \(train_norm\) makes the difference"),
    ],
)
def test_a_file_made_with_another_switch_is_refused_naming_it(model, made, wanted, message):
    tensors = built(model, Settings(type="LyCORIS/LoCon", **made)).tensors()
    with pytest.raises(ModelError) as caught:
        built(model, Settings(type="LyCORIS/LoCon", **wanted)).read(tensors)
    assert re.search(message, caught.value.hint)
