"""How much memory a training of a full-size model takes, for each of the settings that save some.

    python benchmarks/memory.py [--family sdxl] [--side 256] [--steps 3] [--rank 16] [--gpu-side 1024] [--only NAME]

Measured on this machine's processor, in a process of its own for each row: the most that the process
ever held (loading included), the most while it trained, and the median step. Computed for a GPU: the
bytes of the weights that are on it during a step, of the trained weights with gradients and optimizer,
and of what is kept for the backward pass of the U-Net at --gpu-side, counted by running it on shapes
alone. The CUDA context (about 0.5 GB) and the kernels' own workspace are not in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from full_size import make_images, make_model, train

from trainer.models import facts, sd

GB = 2**30
SAVING = {"gradient_checkpointing": True, "optimizer": "AdamW8bit"}
WITHOUT_ENCODERS = {"text_encoder_lr": 0, "sdxl_cache_text_encoder_outputs": True}
ROWS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "AdamW8bit": {"optimizer": "AdamW8bit"},
    "full bf16": {"full_bf16": True},
    "cached text states": WITHOUT_ENCODERS,
    "fp8": {"fp8_base": True},
    "int8": {"base_weights": "int8"},
    "nf4": {"base_weights": "nf4"},
    "checkpointing, 8bit, cached": SAVING | WITHOUT_ENCODERS,
    "the same, fp8": SAVING | WITHOUT_ENCODERS | {"fp8_base": True},
    "the same, int8": SAVING | WITHOUT_ENCODERS | {"base_weights": "int8"},
    "the same, nf4": SAVING | WITHOUT_ENCODERS | {"base_weights": "nf4"},
}
BYTES_A_WEIGHT = {"fp8": 1 + 1 / 1000, "int8": 1 + 4 / 4096, "nf4": 0.5 + 4 / 64, "16": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--family", choices=tuple(facts.FAMILIES), default="sdxl")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--gpu-side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--no-run", action="store_true", help="compute for the GPU, measure nothing")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    row = facts.FAMILIES[chosen.family]
    kept = {on: kept_for_backward(row, chosen.gpu_side, chosen.rank, checkpointing=on) for on in (False, True)}
    print(f"{row.title}, rank {chosen.rank}, batch size 1, GB")
    print(
        f"{'':30}{'CPU at ' + str(chosen.side) + ', measured':>32}{'GPU at ' + str(chosen.gpu_side) + ', computed':>40}"
    )
    print(f"{'':30}{'peak':>10}{'training':>12}{'s/step':>10}{'weights':>12}{'trained':>10}{'kept':>8}{'sum':>10}")
    for name in chosen.only:
        settings = ROWS[name]
        measured = (float("nan"),) * 3 if chosen.no_run else run(settings, chosen)
        weights, trained = computed(row, settings, chosen.rank)
        activations = kept[bool(settings.get("gradient_checkpointing"))]
        print(
            f"{name:30}"
            + "".join(f"{value:{width}.2f}" for value, width in zip(measured, (10, 12, 10), strict=True))
            + f"{weights / GB:12.2f}{trained / GB:10.2f}{activations / GB:8.2f}"
            + f"{(weights + trained + activations) / GB:10.2f}",
            flush=True,
        )


def run(settings: dict[str, Any], chosen: argparse.Namespace) -> tuple[float, float, float]:
    """The process's peak and the most while training in GB, and seconds a step."""
    folder = chosen.work / f"run-{time.time_ns()}"
    row = facts.FAMILIES[chosen.family]
    preset = {
        "pretrained_model_name_or_path": make_model(chosen.work / f"{chosen.family}.safetensors", chosen.family),
        "train_data_dir": make_images(chosen.work / "images"),
        "caption_extension": ".txt",
        "max_resolution": f"{chosen.side},{chosen.side}",
        "mixed_precision": "bf16",
        "optimizer": "AdamW",
        "lr_scheduler": "constant",
        "max_train_steps": chosen.steps,
        "network_dim": chosen.rank,
        "seed": 42,
        "num_cpu_threads_per_process": os.cpu_count(),
        **({row.switch: True} if row.switch else {}),
        **settings,
    }
    peak, told = train(preset, folder)
    steps = [event for event in told if event["type"] == "step"]
    paces = [float(b["time"]) - float(a["time"]) for a, b in pairwise(steps)]
    return peak, max(int(step["memory_bytes"]) for step in steps) / GB, statistics.median(paces)


def computed(row: facts.Family, settings: dict[str, Any], rank: int) -> tuple[float, float]:
    """Bytes of the frozen weights on a GPU in a step, and of the trained ones with gradients and optimizer."""
    modules = sd.empty(row, row.configs)
    model = bare(row, modules)
    unet_bits = "fp8" if settings.get("fp8_base") else settings.get("base_weights", "16")
    text_bits = "fp8" if settings.get("fp8_base") else "16"
    bits = {"unet": unet_bits, "text_encoder": text_bits}
    targets = model.targets()
    packed = {
        p: sum(t.layer.weight.numel() for t in targets.values() if t.part == p and t.place != "edge") for p in bits
    }
    total = {"unet": parameters(modules["unet"]), "text_encoder": sum(map(parameters, model.text_encoders.values()))}
    parts = {"unet"} if settings.get("sdxl_cache_text_encoder_outputs") else {"unet", "text_encoder"}
    frozen = sum(packed[p] * BYTES_A_WEIGHT[bits[p]] + (total[p] - packed[p]) * 2 for p in parts)
    trained = sum(
        rank * (weight.shape[0] + weight[0].numel())
        for weight, t in ((t.layer.weight, t) for t in targets.values())
        if t.part in parts and t.place == "attention"
    )
    weight = 2 if settings.get("full_bf16") else 4
    moments = 2 if settings.get("optimizer") == "AdamW8bit" else 2 * weight
    return frozen, trained * (2 * weight + moments)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bare(row: facts.Family, modules: dict[str, Any]) -> sd.StableDiffusion:
    """The model without weights, to walk over its layers."""
    from trainer.models import Schedule

    encoders = {encoder.key: modules[encoder.part] for encoder in row.encoders}
    schedule = Schedule.of(row.configs["scheduler"])
    cpu = torch.device("cpu")
    return sd.StableDiffusion(row, modules["unet"], modules["vae"], encoders, schedule, torch.bfloat16, cpu, 1, 75)


def kept_for_backward(row: facts.Family, side: int, rank: int, *, checkpointing: bool) -> int:
    """The most bytes that are kept for the backward pass of a step at once, weights left out."""
    from torch.utils.checkpoint import checkpoint

    from trainer import networks
    from trainer.schema.network import Network

    modules = sd.empty(row, row.configs)
    unet = modules["unet"].to(torch.bfloat16).requires_grad_(False)
    if checkpointing:
        # This kind saves its inputs where the count sees them.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
        unet.train()
    network = networks.build(Network(rank=rank), bare(row, modules).targets(), {"unet"})
    network.to("meta")
    network.attach()
    weights = {p.untyped_storage()._cdata for p in [*unet.parameters(), *network.parameters()]}
    held = _Held(weights)
    config = row.configs["unet"]
    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attend),
    ):
        latents = torch.zeros(1, 4, side // 8, side // 8, dtype=torch.bfloat16, requires_grad=True)
        states = torch.zeros(1, 77, config["cross_attention_dim"], dtype=torch.bfloat16)
        added = None
        if row.size_conditioned:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.zeros(1, pooled, dtype=torch.bfloat16), "time_ids": torch.zeros(1, 6)}
        answer = unet(latents, torch.zeros(1), states, added_cond_kwargs=added, return_dict=False)[0]
        answer.float().square().mean().backward()
    return held.most


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its answer and a number a row; never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        answer = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return _FusedAttention.apply(query, key, value)


class _Held:
    """Counts the bytes of the tensors that wait for the backward pass, each storage once."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.uses = weights, dict[int, int]()
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> _Packed:
        return _Packed(self, tensor)

    def unpack(self, packed: _Packed) -> torch.Tensor:
        return packed.tensor

    def change(self, tensor: torch.Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.weights:
            return
        before = self.uses.get(storage._cdata, 0)
        self.uses[storage._cdata] = before + by
        if 0 in (before, before + by):
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)


class _Packed:
    def __init__(self, held: _Held, tensor: torch.Tensor) -> None:
        self.held, self.tensor = held, tensor
        held.change(tensor, 1)

    def __del__(self) -> None:
        self.held.change(self.tensor, -1)


if __name__ == "__main__":
    main()
