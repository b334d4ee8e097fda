"""What tests/test_card.py runs with the card in place (`pytest -p tests.card tests/on_card.py`)."""

from __future__ import annotations

import pytest
import torch

from tests import card
from tests.test_training import prepared
from trainer import loop, optim, schema
from trainer.schema.algorithms import TYPES
from trainer.schema.optimizers import OPTIMIZERS
from trainer.transfer import send

pytestmark = pytest.mark.skipif(not card.inserted(), reason="needs pytest -p tests.card")
WAYS = {
    "masked, offset noise, min-SNR": {
        "masked_loss": True,
        "noise_offset": 0.1,
        "adaptive_noise_scale": 0.1,
        "min_snr_gamma": 5,
        "ip_noise_gamma": 0.1,
    },
    "Huber, noise of several sizes": {
        "loss_type": "smooth_l1",
        "huber_schedule": "snr",
        "noise_offset_type": "Multires",
        "multires_noise_iterations": 3,
        "multires_noise_discount": 0.3,
    },
    "fp8": {"fp8_base": True, "mixed_precision": "bf16"},
    "int8": {"base_weights": "int8", "mixed_precision": "bf16"},
    "nf4": {"base_weights": "nf4", "mixed_precision": "bf16"},
    "full bf16": {"full_bf16": True, "mixed_precision": "bf16", "optimizer": "AdamW"},
    "uncached, in full precision": {"cache_latents": False, "sdxl_no_half_vae": True, "mixed_precision": "bf16"},
    "weighted captions in several batches": {"weighted_captions": True, "gradient_accumulation_steps": 2},
    "8 bits": {"optimizer": "AdamW8bit"},
    "any gradient": {"max_grad_norm": 0},
    "largest norm and gradient": {"scale_weight_norms": 0.5, "max_grad_norm": 0.1},
}


def train_two_steps(settings, folder, parts=1) -> None:
    """What is trained stays on the card, and the second step waits for nothing."""
    session = prepared(settings, folder)
    session.parts = parts
    session.network.attach()
    batches = session.feed.batches(range(3 * session.length.accumulation))
    first, _ = loop.take_step(session, 1, batches)
    card.waits.clear()
    second, _ = loop.take_step(session, 2, batches)
    assert not card.waits or not session.config.data.cache_latents
    assert torch.isfinite(first + second)
    assert {weight.device.type for weight in session.network.parameters()} == {"card"}


def test_what_is_in_two_memories_is_refused_and_what_the_host_waits_for_is_counted():
    there, here = torch.ones(3, device="card"), torch.ones(3)
    for mix in (lambda: there + here, lambda: here @ there, lambda: here[torch.tensor([0], device="card")]):
        with pytest.raises(RuntimeError, match="not on the card"):
            mix()
    assert (there * 2.0)[torch.tensor([1, 2])].device.type == "card"
    card.waits.clear()
    assert (there + send(here, there.device)).cpu().sum() == 6
    assert sum(card.waits.values()) == 1, "what is sent is not waited for, what comes back is"
    assert (there + here.to("card")).sum().item() == 6 and there.tolist() == [1, 1, 1]
    assert sum(card.waits.values()) == 4
    assert len(there[there > 0]) == len(there.nonzero()) == 3 and torch.equal(there, there)
    assert sum(card.waits.values()) == 7


@pytest.mark.parametrize("name", TYPES)
def test_every_type_trains(settings, tmp_path, name):
    train_two_steps(settings | {"LoRA_type": name, "text_encoder_lr": 0}, tmp_path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_its_states_beside_the_weights(name):
    weight = torch.nn.Parameter(torch.ones(8, 8, device="card"))
    groups = [{"name": "unet", "lr": 1e-2, "params": [weight]}]
    optimizer = optim.make_optimizer(groups, schema.parse({"optimizer": name}).optim, fused=True)
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [t for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor) and t.dim()]
    assert {t.device.type for t in [weight, *states]} == {"card"} and weight.isfinite().all()


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_compute_trains(settings, tmp_path, name):
    train_two_steps(settings | WAYS[name], tmp_path)


def test_a_batch_in_parts_trains(settings, tmp_path):
    train_two_steps(settings | {"enable_bucket": False, "train_batch_size": 3, "masked_loss": True}, tmp_path, parts=2)
