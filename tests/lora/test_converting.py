"""The same LoRA under another naming: nothing is lost on the way there and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.lora.conftest import KOHYA, adapted_unet, cloneofsimo, delta, pair, plain
from trainer.errors import ModelError
from trainer.lora.converting import convert
from trainer.lora.names import Layer, kohya
from trainer.lora.reading import read
from trainer.lora.verifying import verify

CONV = "lora_unet_mid_block_resnets_0_conv1"


def convolution(rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        f"{CONV}.lora_down.weight": torch.randn(rank, 8, 3, 3),
        f"{CONV}.lora_up.weight": torch.randn(8, rank, 1, 1),
        f"{CONV}.alpha": torch.tensor(alpha),
    }


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(t.dtype == two[n].dtype and torch.equal(t, two[n]) for n, t in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohya_to_diffusers_and_back_is_the_same_to_the_bit(write, tmp_path, dtype):
    tensors = {n: t.to(dtype) for n, t in (plain() | convolution(alpha=0.3)).items()}
    given = write(tensors, {"ss_steps": "3", "ss_output_name": "x"})
    there = convert(given, tmp_path / "there.safetensors", to="diffusers")
    assert there.layers == 3
    assert all(name.startswith(("unet.", "text_encoder.")) for name in load_file(there.path))
    back = convert(there.path, tmp_path / "back.safetensors", to="kohya")
    assert back.naming == "PEFT" and same(load_file(back.path), tensors)
    assert metadata(back.path)["ss_steps"] == "3"
    assert not [p for p in verify(back.path).problems if "hash" in p]


def test_ranks_and_alphas_of_their_own_stand_in_the_settings(write, tmp_path):
    tensors = plain() | pair("lora_unet_mid_block_attentions_0_proj_in", rank=8, alpha=8.0)
    path = convert(write(tensors), tmp_path / "there.safetensors", to="diffusers").path
    settings = json.loads(metadata(path)["lora_adapter_metadata"])
    assert settings["text_encoder.r"] == 4 and settings["text_encoder.lora_alpha"] == 2.0
    exceptions = settings["unet.rank_pattern"] | settings["unet.alpha_pattern"]
    assert len(exceptions) == 1
    assert same(dict(read(path).tensors), tensors)


def test_diffusers_own_file_comes_back_the_same(tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    unet = adapted_unet(alpha=2)
    state = get_peft_model_state_dict(unet)
    settings = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=settings)
    given = tmp_path / "pytorch_lora_weights.safetensors"
    ours = convert(given, tmp_path / "kohya.safetensors", to="kohya").path
    back = convert(ours, tmp_path / "back.safetensors", to="diffusers").path
    assert same(load_file(back), load_file(given))


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_what_was_converted_for_it_as_the_same_update(write, tmp_path, dora):
    """Every tensor is used, and each layer's ΔW is that of kohya's file."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from tests import tiny

    unet = adapted_unet(alpha=2, pattern={"conv1": 8}, dora=dora)
    expected = {n: delta(m) for n, m in unet.named_modules() if hasattr(m, "lora_A")}
    tensors = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            key = kohya(Layer("unet", name), "sd1")
            tensors[f"{key}.lora_down.weight"] = module.lora_A["default"].weight.detach()
            tensors[f"{key}.lora_up.weight"] = module.lora_B["default"].weight.detach()
            tensors[f"{key}.alpha"] = torch.tensor(8.0 if name.endswith("conv1") else 2.0)
            if dora:
                lengths = module.lora_magnitude_vector["default"].weight.detach() * 1.1
                module.lora_magnitude_vector["default"].weight.data.copy_(lengths)
                tensors[f"{key}.dora_scale"] = lengths.reshape(-1, *[1] * (module.lora_A["default"].weight.ndim - 1))
    path = convert(write(tensors), tmp_path / "there.safetensors", to="diffusers").path
    torch.manual_seed(1)
    fresh = UNet2DConditionModel(**tiny.CONFIGS["unet"])
    state, alphas, settings = StableDiffusionPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    assert not alphas and len(state) == len(load_file(path))
    fresh.load_lora_adapter(state, prefix="unet", metadata=settings)
    loaded = {n: m for n, m in fresh.named_modules() if hasattr(m, "lora_A")}
    assert loaded.keys() == expected.keys()
    sample, step, states = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert torch.allclose(fresh(sample, step, states).sample, unet(sample, step, states).sample, atol=1e-5)
    for name, module in loaded.items():
        assert torch.allclose(delta(module), expected[name], atol=1e-6), name


def test_cloneofsimos_file_becomes_one_that_web_uis_load(write, tmp_path):
    path = convert(write(*cloneofsimo()), tmp_path / "kohya.safetensors").path
    assert verify(path).loads_in == ("A1111", "Forge", "ComfyUI", "diffusers", "sd-scripts")
    assert metadata(path)["ss_base_model_version"] == "sd_v1"
    assert metadata(path)["ss_network_dim"] == "4"


def test_a_file_without_alpha_is_mended_on_request(write, tmp_path):
    given = write(pair(KOHYA, alpha=None))
    with pytest.raises(ModelError, match="--alpha rank"):
        convert(given, tmp_path / "out.safetensors")
    path = convert(given, tmp_path / "out.safetensors", alpha="rank").path
    assert float(load_file(path)[f"{KOHYA}.alpha"]) == 4
    assert verify(path).good


def test_what_diffusers_cannot_hold_is_refused_by_name(write, tmp_path):
    loha = {f"{KOHYA}.{role}": torch.ones(2, 2) for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    with pytest.raises(ModelError, match="hada_w1_a"):
        convert(write(loha | {f"{KOHYA}.alpha": torch.tensor(1.0)}), tmp_path / "out.safetensors", to="diffusers")
    assert not (tmp_path / "out.safetensors").exists()
