"""The LyCORIS types: files that lycoris-lora itself reads, and what each control does."""

from __future__ import annotations

import json

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file

from tests.networks import layers
from tests.networks.layers import CASES, LAYERS, case, module_for, randomised
from tests.networks.test_blocks import full_model_targets
from trainer import networks, schema
from trainer.models import Target
from trainer.networks.blocks import block_of, from_settings
from trainer.schema.algorithms import USES
from trainer.schema.network import Network as Settings

__all__ = ["case"]
THEIRS = {
    "LyCORIS/LoCon": LoConModule,
    "LyCORIS/LoHa": LohaModule,
    "LyCORIS/LoKr": LokrModule,
    "LyCORIS/iA3": IA3Module,
    "LyCORIS/GLoRA": GLoRAModule,
    "LyCORIS/Diag-OFT": DiagOFTModule,
    "LyCORIS/BOFT": ButterflyOFTModule,
    "LyCORIS/Native Fine-Tuning": FullModule,
}


@pytest.fixture(params=THEIRS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[case for case in CASES if case[0] in THEIRS], ids="-".join)
def settings_of(request: pytest.FixtureRequest) -> Settings:
    return layers.settings_of(*request.param)


@torch.no_grad()
def test_lycoris_itself_makes_the_same_of_the_file(case, settings_of):
    layer, x = case
    if settings_of.type == "LyCORIS/LoKr" and (
        settings_of.decompose_both or (settings_of.cp and layer.weight.shape[2:] == (3, 3))
    ):
        pytest.skip("lycoris-lora's own reader takes such files for ones of another size")
    module = randomised(layer, settings_of)
    theirs = THEIRS[settings_of.type]
    tensors = {f"x.{name}": tensor for name, tensor in module.saved().items()}
    assert theirs.algo_check(tensors, "x")
    given = theirs.extract_state_dict(tensors, "x")
    if settings_of.type == "LyCORIS/iA3":
        if settings_of.on_input:
            pytest.skip("lycoris-lora's own reader takes no file that was trained on the input")
        given = given[:1]
    read = theirs.make_module_from_state_dict("x", layer, *given)
    torch.testing.assert_close(read(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.proves("rank_dropout", "rank_dropout_scale")
@pytest.mark.parametrize("scaled", [False, True])
def test_rank_dropout_leaves_out_rows_of_the_update_and_may_scale_the_rest(algorithm, scaled):
    if "rank_dropout" not in USES[algorithm]:
        pytest.skip("the type has no such control")
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 400).requires_grad_(False)
    module = randomised(layer, Settings(type=algorithm, rank_dropout=0.25, rank_dropout_scale=scaled))
    x = torch.randn(5, 24)
    update = module(x) - layer(x)
    module.eval()
    share = (update / (module(x) - layer(x))).detach()
    dropped = (update == 0).all(0)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.08)
    expected = 1 / (1 - float(dropped.float().mean())) if scaled else 1.0
    assert float(share[:, ~dropped].median()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.proves(
    "use_tucker", "use_cp", "decompose_both", "factor", "use_scalar", "dora_wd", "train_on_input", "rescaled"
)
@pytest.mark.parametrize(
    ("algorithm", "key", "value", "layer", "shapes"),
    [
        ("LyCORIS/LoHa", "tucker", True, "conv3", {"hada_w1_a": (2, 40), "hada_t1": (2, 2, 3, 3)}),
        ("LyCORIS/LoHa", "tucker", False, "conv3", {"hada_w1_a": (40, 2), "hada_w1_b": (2, 216)}),
        ("LyCORIS/LoKr", "cp", True, "conv3", {"lokr_w2_a": (2, 8), "lokr_t2": (2, 2, 3, 3)}),
        ("LyCORIS/LoKr", "factor", -1, "linear", {"lokr_w1": (5, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 6)}),
        ("LyCORIS/LoKr", "factor", 2, "linear", {"lokr_w1": (2, 2), "lokr_w2_a": (20, 2), "lokr_w2_b": (2, 12)}),
        ("LyCORIS/LoKr", "decompose_both", True, "linear", {"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 4)}),
        ("LyCORIS/LoHa", "dora", True, "linear", {"dora_scale": (40, 1)}),
        ("LyCORIS/LoHa", "scalar", True, "linear", {"hada_w1_a": (40, 2)}),
        (
            "LyCORIS/LoCon",
            "tucker",
            True,
            "conv3",
            {"lora_down.weight": (2, 24, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
        ),
        ("LyCORIS/LoCon", "tucker", False, "conv3", {"lora_down.weight": (2, 24, 3, 3)}),
        ("LyCORIS/LoCon", "dora", True, "conv3", {"dora_scale": (40, 1, 1, 1)}),
        ("LyCORIS/iA3", "on_input", True, "linear", {"weight": (24,)}),
        ("LyCORIS/iA3", "on_input", False, "linear", {"weight": (40,)}),
        ("LyCORIS/Diag-OFT", "rescaled", True, "conv3", {"oft_blocks": (20, 2, 2), "rescale": (40, 1, 1, 1)}),
        # 40 = 8 · 5 rows cannot be cut into blocks under 2 · 5.
        ("LyCORIS/BOFT", "rescaled", True, "linear", {"oft_blocks": (3, 4, 10, 10), "rescale": (40, 1)}),
    ],
)
def test_each_control_shapes_the_file(algorithm, key, value, layer, shapes):
    made = module_for(LAYERS[layer][0]().requires_grad_(False), Settings(type=algorithm, **{key: value}), rank=2)
    found = {name: tuple(tensor.shape) for name, tensor in made.saved().items()}
    assert {name: found[name] for name in shapes} == shapes
    assert ("scalar" in dict(made.named_parameters())) == (key == "scalar")


@pytest.mark.proves("constrain")
@pytest.mark.parametrize("algorithm", ["LyCORIS/Diag-OFT", "LyCORIS/BOFT"])
def test_a_constraint_holds_the_rotation_small_and_none_lets_it_grow(algorithm):
    sizes = []
    for constraint in (0.0, 0.01, 0.001):
        torch.manual_seed(0)
        layer = torch.nn.Linear(24, 40).requires_grad_(False)
        module = randomised(layer, Settings(type=algorithm, constraint=constraint))
        sizes.append(float(module.update().norm() / layer.weight.norm()))
    assert sizes[0] > 0.5
    assert sizes[1] < 0.4
    assert sizes[2] == pytest.approx(sizes[1] / 10, rel=0.1)


REACHED = {
    # Of SD 1.5: text encoder, attention, small layers of resnets (22 embeddings, 14 shortcuts), 3×3
    # convolutions of the blocks (44 in resnets, 3 up, 3 down), edges.
    "full": (72, 192, 36, 50, 4),
    "full-lin": (72, 192, 36, 0, 2),
    "attn-mlp": (72, 192, 0, 0, 0),
    "attn-only": (48, 128, 0, 0, 0),
    "unet-transformer-only": (0, 192, 0, 0, 0),
    "unet-convblock-only": (0, 0, 36, 50, 2),
}


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    return full_model_targets()


@pytest.mark.proves("LyCORIS_preset", "LoRA_type")
@pytest.mark.parametrize("preset", REACHED)
def test_a_lycoris_preset_says_which_layers_of_sd15_are_trained(targets, preset):
    config = schema.parse({"LoRA_type": "LyCORIS/LoKr", "LyCORIS_preset": preset, "conv_dim": 4})
    size_of = from_settings(config, None)
    reached = {name: target for name, target in targets.items() if size_of(name, target).rank}
    large = {n for n, t in reached.items() if getattr(t.layer, "kernel_size", (1, 1)) != (1, 1)}
    kinds = [
        "text" if t.part == "text_encoder" else "3×3" if n in large and t.place == "resnet" else t.place
        for n, t in reached.items()
    ]
    assert tuple(kinds.count(kind) for kind in ("text", "attention", "resnet", "3×3", "edge")) == REACHED[preset]
    assert {size_of(name, reached[name]).rank for name in large} <= {4}


@pytest.mark.proves("LoRA_type")
def test_a_training_writes_a_file_that_says_its_type(settings, train, tmp_path, algorithm):
    settings |= {
        "LoRA_type": algorithm,
        "network_dim": 2,
        "network_alpha": 1,
        "conv_dim": 2,
        "unet_lr": 1e-2,
        "max_train_steps": 1,
    }
    code, _, _ = train(settings)
    assert code == 0
    path = tmp_path / "out" / "photo.safetensors"
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == "lycoris.kohya"
    arguments = json.loads(told["ss_network_args"])
    algo = algorithm.removeprefix("LyCORIS/").lower().replace("native fine-tuning", "full")
    assert (arguments["algo"], arguments["preset"]) == (algo, "full")
    tensors = load_file(path)
    assert {None, 1, 3, 12, 17} <= {block_of(name) for name in tensors}
    assert any(name.startswith("lora_unet_conv_in.") for name in tensors)
    assert not any(name.endswith("_norm") for name in tensors)


@pytest.mark.proves("train_norm")
def test_training_norms_moves_those_of_the_unets_blocks_by_the_names_of_lycoris(settings, train, tmp_path):
    from trainer.networks.norm import NormModule

    norms = {"LoRA_type": "LyCORIS/LoCon", "LyCORIS_preset": "attn-mlp", "train_norm": True, "max_train_steps": 2}
    assert train(settings | norms)[0] == 0
    path = tmp_path / "out" / "photo.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"])["train_norm"] == "True"
    tensors = load_file(path)
    found = {name.removesuffix(".w_norm") for name in tensors if name.endswith(".w_norm")}
    block = "lora_unet_mid_block_attentions_0"
    assert {f"{block}_norm", *(f"{block}_transformer_blocks_0_norm{i}" for i in (1, 2, 3))} <= found
    assert all("_attentions_" in name and f"{name}.b_norm" in tensors for name in found)
    assert all(tensors[f"{name}.w_norm"].any() for name in found)
    layer = torch.nn.GroupNorm(32, 64)
    given = NormModule.extract_state_dict(tensors, f"{block}_norm")
    with torch.no_grad():
        theirs = NormModule.make_module_from_state_dict("x", layer, *given)
        x = torch.randn(2, 64, 3, 3)
        expected = theirs(x)
        layer.weight.add_(networks.weight_update({"w_norm": given[0]}, layer.weight))
        layer.bias.add_(networks.bias_update({"b_norm": given[1]}))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_lokr_with_the_immense_rank_of_presets_in_the_wild_trains_whole_matrices(settings, train, tmp_path):
    settings |= {"LoRA_type": "LyCORIS/LoKr", "network_dim": 100000, "conv_dim": 100000, "max_train_steps": 1}
    settings |= {"save_precision": "fp16"}  # which has no 100,000
    assert train(settings)[0] == 0
    names = load_file(tmp_path / "out" / "photo.safetensors")
    assert {float(alpha) for name, alpha in names.items() if name.endswith(".alpha")} == {100000}
    assert {tensor.dtype for name, tensor in names.items() if not name.endswith(".alpha")} == {torch.float16}
    assert not any("lokr_w1_a" in name or "lokr_w2_a" in name for name in names)
    assert any("lokr_w2" in name for name in names)
