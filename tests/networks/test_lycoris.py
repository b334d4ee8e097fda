"""The LyCORIS types: the identity at the start, the formula of ΔW, files that LyCORIS reads, and what each control does."""

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

from tests.networks.test_blocks import full_model_targets
from trainer import networks, schema
from trainer.models import Target
from trainer.networks.blocks import block_of, from_settings
from trainer.schema.algorithms import USES
from trainer.schema.network import Network as Settings

LAYERS = {
    "linear": (lambda: torch.nn.Linear(24, 40), (3, 7, 24)),
    "conv1": (lambda: torch.nn.Conv2d(24, 40, 1), (2, 24, 6, 5)),
    "conv3": (lambda: torch.nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 6, 5)),
}
VARIANTS = {
    "plain": {},
    "tucker": {"tucker": True, "cp": True},
    "scalar": {"scalar": True},
    "dora": {"dora": True},
    "both": {"decompose_both": True, "factor": 4},
    "output": {"on_input": False},
    "rescaled": {"rescaled": True},
    "constrained": {"constraint": 0.01, "rescaled": True},
}
THEIRS = {
    "LyCORIS/LoCon": (LoConModule, "plain tucker scalar dora"),
    "LyCORIS/LoHa": (LohaModule, "plain tucker scalar dora"),
    "LyCORIS/LoKr": (LokrModule, "plain tucker scalar dora both"),
    "LyCORIS/iA3": (IA3Module, "plain output"),
    "LyCORIS/GLoRA": (GLoRAModule, "plain scalar"),
    "LyCORIS/Diag-OFT": (DiagOFTModule, "plain rescaled constrained"),
    "LyCORIS/BOFT": (ButterflyOFTModule, "plain rescaled constrained"),
    "LyCORIS/Native Fine-Tuning": (FullModule, "plain"),
}
CASES = [(algorithm, variant) for algorithm, (_, variants) in THEIRS.items() for variant in variants.split()]


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


@pytest.fixture(params=THEIRS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES, ids="-".join)
def settings_of(request: pytest.FixtureRequest) -> Settings:
    algorithm, variant = request.param
    return Settings(type=algorithm, **VARIANTS[variant])


def module_for(layer: torch.nn.Module, settings: Settings, rank: int = 4, alpha: float = 1.0) -> torch.nn.Module:
    return networks.algorithm(settings.type).module_for(layer, rank, alpha, settings)


def randomised(layer: torch.nn.Module, settings: Settings) -> torch.nn.Module:
    module = module_for(layer, settings)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in ("scalar", "dora_scale"):
                parameter.normal_(std=0.5)
        if settings.scalar:
            module.scalar.fill_(0.7)
        if settings.dora:
            module.dora_scale.mul_(1.3)
    return module


def change(saved: dict[str, torch.Tensor], frozen: torch.Tensor, settings: Settings) -> torch.Tensor:
    """ΔW from a file's tensors, as the papers have it."""
    s = {name: tensor.detach() for name, tensor in saved.items()}
    shape = frozen.shape
    out = shape[0]

    def product(a: str, b: str, t: str) -> torch.Tensor:
        if t in s:
            return torch.einsum("ijkl,ip,jr->prkl", s[t], s[a], s[b])
        return s[a] @ s[b]

    def rotation(block: torch.Tensor, norm: float) -> torch.Tensor:
        q = block - block.T
        if settings.constraint and norm > settings.constraint * out:
            q = q * settings.constraint * out / norm
        one = torch.eye(len(q))
        return torch.linalg.solve(one - q, one + q)

    if "diff" in s:
        return s["diff"]
    if "on_input" in s:
        factors = s["weight"].flatten()
        return torch.einsum("oi...,i->oi..." if s["on_input"] else "oi...,o->oi...", frozen, factors)
    if "oft_blocks" in s:
        norm = float((s["oft_blocks"] - s["oft_blocks"].mT).norm())
        rescale = s.get("rescale", torch.ones(out, *[1] * (len(shape) - 1)))
        whole = torch.eye(out)
        if s["oft_blocks"].ndim == 3:
            whole = torch.block_diag(*(rotation(block, norm).T for block in s["oft_blocks"]))
        else:
            for level, blocks in enumerate(s["oft_blocks"]):
                near = butterfly(out, 2**level * blocks.shape[-1] // 2)
                whole = near.T @ torch.block_diag(*(rotation(block, norm) for block in blocks)) @ near @ whole
        return (whole @ frozen.flatten(1)).view(shape) * rescale - frozen
    if "a1.weight" in s:
        a1, a2, b1, b2 = (s[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        delta = torch.tensordot(frozen, a1 @ a2, dims=([1], [0])).movedim(-1, 1) + (b1 @ b2).view(shape)
        rank = len(a2)
    elif "lora_mid.weight" in s:
        mid, up, down = (s[f"lora_{name}.weight"] for name in ("mid", "up", "down"))
        delta = torch.einsum("rskl,or,si->oikl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
        rank = len(down)
    elif "lora_down.weight" in s:
        delta = s["lora_up.weight"].flatten(1) @ s["lora_down.weight"].flatten(1)
        rank = len(s["lora_down.weight"])
    elif "hada_w1_b" in s:
        delta = product("hada_w1_a", "hada_w1_b", "hada_t1") * product("hada_w2_a", "hada_w2_b", "hada_t2")
        rank = 4
    else:
        one = s["lokr_w1"] if "lokr_w1" in s else s["lokr_w1_a"] @ s["lokr_w1_b"]
        two = s["lokr_w2"] if "lokr_w2" in s else product("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        if len(shape) == 4:
            two = two.reshape(shape[0] // one.shape[0], shape[1] // one.shape[1], *shape[2:])
            one = one[:, :, None, None]
        delta = torch.kron(one, two.contiguous())
        rank = 4
    return delta.reshape(shape) * float(s["alpha"]) / rank


def butterfly(rows: int, distance: int) -> torch.Tensor:
    """The permutation that brings rows that are `distance` apart side by side, in each run of two distances."""
    order = torch.arange(rows).view(-1, 2, distance).mT.flatten()
    return torch.eye(rows)[order]


def test_an_untrained_module_changes_nothing(case, settings_of):
    layer, x = case
    torch.testing.assert_close(module_for(layer, settings_of)(x), layer(x), rtol=1e-5, atol=1e-6)


def test_the_output_is_that_of_the_merged_weight(case, settings_of):
    layer, x = case
    module = randomised(layer, settings_of)
    answer = module(x)
    saved = dict(module.saved())
    merged = layer.weight + change(saved, layer.weight, settings_of)
    if settings_of.dora:
        norms = merged.flatten(1).norm(dim=1).view(-1, *[1] * (merged.ndim - 1))
        merged = merged * saved["dora_scale"].detach() / norms
    layer.weight.copy_(merged)
    if "diff_b" in saved:
        layer.bias.add_(saved["diff_b"].detach())
    torch.testing.assert_close(answer, layer(x), rtol=1e-4, atol=1e-4)


def test_a_file_read_back_is_the_same_bit_for_bit(case, settings_of):
    layer, x = case
    module = randomised(layer, settings_of)
    other = module_for(layer, settings_of)
    with torch.no_grad():
        other.take({name: tensor.detach().clone() for name, tensor in module.saved().items()})
    assert all(torch.equal(other.saved()[name], tensor) for name, tensor in module.saved().items())
    torch.testing.assert_close(other(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_trainings_state_is_taken_back_exactly(case, settings_of):
    layer, x = case
    module, other = randomised(layer, settings_of), module_for(layer, settings_of)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert dict(other.named_parameters()).keys() <= module.state_dict().keys()


@torch.no_grad()
def test_lycoris_itself_makes_the_same_of_the_file(case, settings_of):
    layer, x = case
    if settings_of.type == "LyCORIS/LoKr" and (
        settings_of.decompose_both or (settings_of.cp and layer.weight.shape[2:] == (3, 3))
    ):
        pytest.skip("lycoris-lora's own reader takes such files for ones of another size")
    module = randomised(layer, settings_of)
    theirs = THEIRS[settings_of.type][0]
    tensors = {f"x.{name}": tensor for name, tensor in module.saved().items()}
    assert theirs.algo_check(tensors, "x")
    given = theirs.extract_state_dict(tensors, "x")
    if settings_of.type == "LyCORIS/iA3":
        if settings_of.on_input:
            pytest.skip("lycoris-lora's own reader takes no file that was trained on the input")
        given = given[:1]
    read = theirs.make_module_from_state_dict("x", layer, *given)
    torch.testing.assert_close(read(x), module(x), rtol=1e-4, atol=1e-4)


def test_every_trained_tensor_has_a_gradient_and_no_frozen_one(case, settings_of):
    layer, x = case
    module = randomised(layer, settings_of)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in layer.parameters())


def test_gradients_are_float32_while_the_layer_computes_in_bfloat16(case, settings_of):
    layer, x = case
    module = randomised(layer.to(torch.bfloat16), settings_of)
    answer = module(x.bfloat16())
    assert answer.dtype == torch.bfloat16
    answer.float().square().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_a_small_update_is_not_rounded_away_by_large_frozen_weights(settings_of):
    """Frozen weights of 1 and inputs that sum to 0: the frozen answer is 0, and what is left is the update's."""
    if settings_of.type in ("LyCORIS/iA3", "LyCORIS/Diag-OFT", "LyCORIS/BOFT"):
        pytest.skip("these change nothing about equal weights and inputs that sum to 0")
    layer = torch.nn.Linear(24, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.fill_(1)
    if settings_of.dora:
        pytest.skip("DoRA's lengths do not let the update be told from the frozen weights")
    torch.manual_seed(0)
    module = randomised(layer, settings_of)
    with torch.no_grad():
        module.limit_norm(0.001)
    x = torch.tensor([1.0, -1.0] * 12, dtype=torch.bfloat16)[None]
    delta = change(dict(module.saved()), layer.weight.float(), settings_of)
    expected = x.float() @ delta.T
    assert not layer(x).any()
    assert 0 < float(delta.abs().max()) < 2**-9  # under half a step of bfloat16 at 1
    torch.testing.assert_close(module(x).float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.proves("module_dropout")
def test_module_dropout_leaves_out_the_whole_layer_in_its_share_of_the_steps(algorithm):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40).requires_grad_(False), torch.randn(3, 24)
    module = randomised(layer, Settings(type=algorithm, module_dropout=0.3))
    left_out = [torch.equal(module(x), layer(x)) for _ in range(300)]
    assert sum(left_out) / 300 == pytest.approx(0.3, abs=0.08)
    module.eval()
    assert not any(torch.equal(module(x), layer(x)) for _ in range(20))


def test_strength_zero_is_the_base_bit_for_bit(case, settings_of):
    layer, x = case
    base = layer(x)
    network = networks.Network({"a": randomised(layer, settings_of)}, {"a": "unet"}, {"a": layer})
    network.attach()
    with network.strength(0):
        assert torch.equal(layer(x), base)
    assert not torch.equal(layer(x), base)
    network.detach()
    assert torch.equal(layer(x), base)


def test_a_norm_above_the_limit_is_shrunk_to_it(case, settings_of):
    if "scale_weight_norms" not in USES[settings_of.type]:
        pytest.skip("the type has no such control")
    layer, _ = case
    module = randomised(layer, settings_of)

    def norm():
        return float(change(dict(module.saved()), layer.weight, settings_of).norm())

    assert norm() > 0.1
    with torch.no_grad():
        module.limit_norm(0.1)
    assert norm() == pytest.approx(0.1, rel=1e-4)
    before = norm()
    with torch.no_grad():
        module.limit_norm(1.0)
    assert norm() == before


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


@pytest.mark.proves("LoRA_type", "network_weights")
def test_a_training_writes_a_file_that_it_can_go_on_from(settings, train, tmp_path, algorithm):
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
    first = load_file(path)
    blocks = {block_of(name) for name in first}
    assert {None, 1, 3, 12, 17} <= blocks
    assert any(name.startswith("lora_unet_conv_in.") for name in first)
    path.rename(tmp_path / "given.safetensors")
    given = {"network_weights": str(tmp_path / "given.safetensors"), "unet_lr": 1e-9, "text_encoder_lr": 1e-9}
    for extra in ({}, {"dim_from_weights": True, "network_dim": 7}):
        code, _, _ = train(settings | given | extra)
        assert code == 0
        second = load_file(path)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[k], second[k], rtol=0, atol=1e-6) for k in first)
        path.unlink()


def test_a_lokr_with_the_immense_rank_of_presets_in_the_wild_trains_whole_matrices(settings, train, tmp_path):
    settings |= {"LoRA_type": "LyCORIS/LoKr", "network_dim": 100000, "conv_dim": 100000, "max_train_steps": 1}
    assert train(settings)[0] == 0
    names = load_file(tmp_path / "out" / "photo.safetensors")
    assert not any("lokr_w1_a" in name or "lokr_w2_a" in name for name in names)
    assert any("lokr_w2" in name for name in names)
