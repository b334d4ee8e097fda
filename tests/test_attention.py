"""Attention as products of matrices: the formula's numbers and gradients, in pieces of any size, and no table kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.test_training import prepared
from trainer import attention, loop
from trainer.attention import Processor, by_products

SIZES = [(2, 3, 12, 12, 4), (1, 2, 10, 7, 8)]  # images, heads, queries, keys, width
PIECES = [10**6, 250, 100, 1]  # all at once; some heads; some rows, the last piece shorter; a row


def inputs(sizes, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    images, heads, queries, keys, width = sizes
    shapes = [(images, n, heads, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def formula(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


@pytest.mark.parametrize("at_once", PIECES)
@pytest.mark.parametrize("sizes", SIZES)
def test_answers_and_gradients_are_the_formulas_however_it_is_cut(sizes, at_once, monkeypatch):
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    given = inputs(sizes)
    torch.testing.assert_close(by_products(*given), formula(*given))
    pull = torch.randn_like(by_products(*given))
    ours, theirs = (torch.autograd.grad(attend(*given), given, pull) for attend in (by_products, formula))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(by_products, given)


@pytest.mark.parametrize("offset", [0, 30])
def test_in_bf16_it_is_three_times_as_coarse_as_pytorchs_at_most_also_where_keys_have_much_in_common(offset):
    exact = inputs((1, 4, 256, 256, 40))
    with torch.no_grad():
        exact[1] += offset * torch.randn(1, 1, 1, 40, dtype=torch.float64)
    given = [x.detach().bfloat16().requires_grad_() for x in exact]
    with torch.no_grad():
        for x, rounded in zip(exact, given, strict=True):
            x.copy_(rounded)
    pull = torch.randn(1, 4, 256, 40).bfloat16()

    def errors(attend):
        wanted = [formula(*exact)]
        wanted += torch.autograd.grad(wanted[0], exact, pull.double())
        found = [attend(*given)]
        found += torch.autograd.grad(found[0], given, pull)
        return [float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, wanted, strict=True)]

    pytorch = errors(F.scaled_dot_product_attention)
    assert all(ours <= 3 * theirs for ours, theirs in zip(errors(by_products), pytorch, strict=True))


def test_the_table_of_scores_is_not_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        by_products(*inputs((1, 2, 20, 20, 4)))
    assert [shape[-2:] for shape in kept] == [(20, 4)] * 3


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("capable", [True, False])
def test_it_is_taken_in_bf16_on_processors_that_multiply_bf16(settings, tmp_path, monkeypatch, capable, precision):
    monkeypatch.setattr(attention, "multiplies_bf16", lambda: capable)
    session = prepared(settings | {"mixed_precision": precision}, tmp_path)
    taken = {processor.attend for processor in session.model.unet.attn_processors.values()}
    assert taken == {by_products if capable and precision == "bf16" else F.scaled_dot_product_attention}


def test_a_step_has_the_loss_of_pytorchs_attention(settings, tmp_path, monkeypatch):
    losses = []
    for capable in (True, False):
        monkeypatch.setattr(attention, "multiplies_bf16", lambda capable=capable: capable)
        session = prepared(settings | {"mixed_precision": "bf16"}, tmp_path / str(capable))
        session.network.attach()
        losses.append([float(loop.take_step(session, n, session.feed.batches(range(n - 1, n)))[0]) for n in (1, 2)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_the_processor_does_what_diffusers_own_does():
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    layer = Attention(query_dim=12, cross_attention_dim=20, heads=3, dim_head=4)
    here, known = torch.randn(2, 9, 12), torch.randn(2, 7, 20)
    answers = []
    for processor in (AttnProcessor2_0(), Processor(F.scaled_dot_product_attention), Processor(by_products)):
        layer.set_processor(processor)
        answers.append(layer(here, encoder_hidden_states=known))
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])
