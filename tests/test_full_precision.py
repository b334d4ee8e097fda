"""LoRA weights in 16 bit, attention without its table, and what the user says about the file."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import loop, schema
from trainer.errors import ConfigError
from trainer.prepare import prepare
from trainer.randomness import set_torch_to
from trainer.run import EXIT_DONE, Run


def session(settings, tmp_path, **change):
    return prepare(schema.parse({**settings, **change}), Run(tmp_path), lambda event: None)


@pytest.mark.proves("full_bf16")
@pytest.mark.parametrize("full", [True, False])
def test_full_bf16_holds_weights_gradients_and_optimizer_state_in_bf16(settings, tmp_path, full):
    s = session(settings, tmp_path, mixed_precision="bf16", full_bf16=full)
    s.network.attach()
    seen = set()
    for p in s.network.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.add((p.dtype, p.grad.dtype)))
    before = {name: p.detach().clone() for name, p in s.network.named_parameters()}
    loss, _ = loop.take_step(s, 1, s.feed.batches(range(1)))
    s.network.detach()
    dtype = torch.bfloat16 if full else torch.float32
    assert seen == {(dtype, dtype)}
    states = [v for state in s.optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
    assert {state.dtype for state in states} == {dtype}
    assert torch.isfinite(loss)
    assert any(not torch.equal(p, before[name]) for name, p in s.network.named_parameters())


@pytest.mark.proves("full_bf16", "full_fp16")
@pytest.mark.parametrize(
    ("key", "precision"), [("full_bf16", "no"), ("full_bf16", "fp16"), ("full_fp16", "bf16"), ("full_fp16", "no")]
)
def test_full_precision_needs_its_mixed_precision(key, precision):
    with pytest.raises(ConfigError) as caught:
        schema.parse({key: True, "mixed_precision": precision})
    (problem,) = caught.value.problems
    assert problem.key == key
    assert "mixed_precision" in problem.message


@pytest.mark.proves("full_fp16")
def test_full_fp16_on_a_processor_becomes_bf16_with_a_warning(settings, train):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, events, _ = train(settings | {"mixed_precision": "fp16", "full_fp16": True, "max_train_steps": 1})
    assert code == EXIT_DONE
    assert any("bf16 is used instead" in event.get("message", "") for event in events)


@pytest.mark.proves("full_fp16")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_full_fp16_trains_on_a_gpu(settings, tmp_path):
    s = session(settings, tmp_path, mixed_precision="fp16", full_fp16=True, learning_rate=1e-3)
    s.network.attach()
    batches = s.feed.batches(range(6))
    losses = [float(loop.take_step(s, step, batches)[0]) for step in range(1, 7)]
    assert {p.dtype for p in s.network.parameters()} == {torch.float16}
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(p.abs().sum() > 0 for name, p in s.network.named_parameters() if "lora_up" in name)


@pytest.mark.proves("mem_eff_attn")
def test_memory_efficient_attention_never_keeps_the_table_and_answers_the_same(settings, tmp_path):
    """What is kept for the backward pass of self-attention at [h·w] positions: [h·w, h·w] for each head, or not."""
    kept, losses = {}, {}
    for name, change in {"none": {}, "efficient": {"mem_eff_attn": True}}.items():
        s = session(settings, tmp_path, xformers="none", **change)
        s.network.attach()
        batch = s.feed[0]
        positions = batch.latents.shape[2] * batch.latents.shape[3]
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t)
        set_torch_to(1, "x")
        with hooks, sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # not the fallback that keeps the table
            losses[name] = float(loop.batch_loss(s, batch).detach())
        s.network.detach()
        kept[name] = any(tuple(shape[-2:]) == (positions, positions) for shape in sizes)
    assert kept == {"none": True, "efficient": False}
    assert losses["efficient"] == pytest.approx(losses["none"], rel=1e-5)


def metadata(tmp_path) -> dict[str, str]:
    with safe_open(tmp_path / "out" / "photo.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.proves("metadata_title", "metadata_author", "metadata_description", "metadata_license", "metadata_tags")
def test_what_the_user_says_about_the_lora_is_in_the_file(settings, train, tmp_path):
    said = {"title": "Zwx's photographs", "author": "someone", "description": "trigger: zwx", "license": "CC-BY-4.0"}
    train(settings | {f"metadata_{k}": v for k, v in said.items()} | {"metadata_tags": "a, b", "max_train_steps": 1})
    found = metadata(tmp_path)
    assert {k: found[f"modelspec.{k}"] for k in said} == said
    assert found["modelspec.tags"] == "a, b"


def test_without_a_word_the_title_is_the_files_name_and_the_rest_is_missing(settings, train, tmp_path):
    train(settings | {"max_train_steps": 1})
    found = metadata(tmp_path)
    assert found["modelspec.title"] == "photo"
    assert not {f"modelspec.{k}" for k in ("author", "description", "license", "tags")} & set(found)


def test_the_networks_settings_are_in_the_file_as_sd_scripts_writes_them(settings, train, tmp_path):
    network = {
        "LoRA_type": "Kohya LoCon",
        "conv_dim": 4,
        "conv_alpha": 1,
        "network_dropout": 0.1,
        "scale_weight_norms": 1,
        "down_lr_weight": "sine+.25",
        "loraplus_lr_ratio": 4,
    }
    train(settings | network | {"max_train_steps": 1, "mixed_precision": "bf16", "full_bf16": True})
    found = metadata(tmp_path)
    assert found["ss_network_args"] == (
        '{"conv_dim": "4", "conv_alpha": "1", "down_lr_weight": "sine+0.25", "loraplus_lr_ratio": "4", "dropout": 0.1}'
    )
    assert found["ss_network_dropout"] == "0.1"
    assert found["ss_scale_weight_norms"] == "1.0"
    train(settings | {"max_train_steps": 1})
    assert "ss_network_args" not in metadata(tmp_path)
    assert metadata(tmp_path)["ss_network_dropout"] == "None"
