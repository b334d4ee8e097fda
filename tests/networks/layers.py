"""Every LoRA type with each of its variants, on each kind of layer; and ΔW from a file's tensors, as the papers have it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from trainer import networks
from trainer.schema.network import Network as Settings

LAYERS = {
    "linear": (lambda: torch.nn.Linear(24, 40), (3, 7, 24)),
    "conv1": (lambda: torch.nn.Conv2d(24, 40, 1), (2, 24, 6, 5)),
    "conv3": (lambda: torch.nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 6, 5)),
}
RANK, ALPHA = 4, 1.0
VARIANTS = {
    "plain": {},
    "units": {"unit": 2},
    "tucker": {"tucker": True, "cp": True},
    "scalar": {"scalar": True},
    "dora": {"dora": True},
    "both": {"decompose_both": True, "factor": 4},
    "output": {"on_input": False},
    "rescaled": {"rescaled": True},
    "constrained": {"constraint": 0.01, "rescaled": True},
}
TYPES = {
    "Standard": "plain",
    "Kohya LoCon": "plain",
    "Kohya DyLoRA": "plain units",
    "LoRA-FA": "plain",
    "LyCORIS/LoCon": "plain tucker scalar dora",
    "LyCORIS/LoHa": "plain tucker scalar dora",
    "LyCORIS/LoKr": "plain tucker scalar dora both",
    "LyCORIS/iA3": "plain output",
    "LyCORIS/DyLoRA": "plain units",
    "LyCORIS/GLoRA": "plain scalar",
    "LyCORIS/Diag-OFT": "plain rescaled constrained",
    "LyCORIS/BOFT": "plain rescaled constrained",
    "LyCORIS/Native Fine-Tuning": "plain",
}
CASES = [(algorithm, variant) for algorithm, variants in TYPES.items() for variant in variants.split()]


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.Tensor]:
    """A frozen layer and an input of it."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


def settings_of(algorithm: str, variant: str) -> Settings:
    return Settings(type=algorithm, **VARIANTS[variant])


def module_for(layer: torch.nn.Module, settings: Settings, rank: int = RANK, alpha: float = ALPHA) -> torch.nn.Module:
    return networks.algorithm(settings.type).module_for(layer, rank, alpha, settings)


def randomised(layer: torch.nn.Module, settings: Settings) -> torch.nn.Module:
    """A module as after much training."""
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


def change(saved: Mapping[str, torch.Tensor], frozen: torch.Tensor, settings: Settings) -> torch.Tensor:
    """ΔW without DoRA."""
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
        rank = RANK
    else:
        one = s["lokr_w1"] if "lokr_w1" in s else s["lokr_w1_a"] @ s["lokr_w1_b"]
        two = s["lokr_w2"] if "lokr_w2" in s else product("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        if len(shape) == 4:
            two = two.reshape(shape[0] // one.shape[0], shape[1] // one.shape[1], *shape[2:])
            one = one[:, :, None, None]
        delta = torch.kron(one, two.contiguous())
        rank = RANK
    return delta.reshape(shape) * float(s["alpha"]) / rank


def butterfly(rows: int, distance: int) -> torch.Tensor:
    """The permutation that brings rows that are `distance` apart side by side, in each run of two distances."""
    order = torch.arange(rows).view(-1, 2, distance).mT.flatten()
    return torch.eye(rows)[order]
