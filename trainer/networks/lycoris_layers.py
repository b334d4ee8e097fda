"""What the layers of lycoris-lora need to be trained by our loop: one class is mixed into each of theirs.

Theirs are the factors, how they start, and how the file is made of them. The forward is ours: theirs
takes W + ΔW − W in the frozen weights' precision, in which a small ΔW is rounded away; so is ΔW's
formula, one for training and for files (`weight_update`). What differs from Standard: rank dropout
leaves out rows of ΔW, and a `scalar` (where it is used) is trained in front of ΔW and multiplied into
a factor when the file is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.schema.network import Network as Settings


def decomposed(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """DoRA (Liu et al. 2024, eq. 5): each row of W (or column, where `lengths` is [1, in, …]) with a length of its own."""
    others = [i for i in range(weight.ndim) if lengths.shape[i] == 1]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (lengths / (norm + torch.finfo(weight.dtype).eps))


class Trained:
    """Mixed in before a class of lycoris.modules; `weight_update` is the algorithm's."""

    settings: Settings
    wd = False

    @classmethod
    def of(cls, layer: torch.nn.Module, rank: int, alpha: float, settings: Settings, **arguments: Any) -> Trained:
        """The module of one layer; on its device, in float32."""
        with torch.device(layer.weight.device):
            module: Any = cls(
                "",
                layer,
                lora_dim=rank,
                alpha=alpha,
                use_scalar=settings.scalar,
                weight_decompose=settings.dora,
                bypass_mode=False,
                **arguments,
            )
        module.settings = settings
        return module.to(layer.weight.device)

    @staticmethod
    def is_up(name: str) -> bool:
        """Whether the parameter of this name learns at LoRA+'s ratio."""
        return False

    @property
    def leading(self) -> Any:
        """The scalar in front of ΔW, in the types that have one."""
        return getattr(self, "scalar", 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The frozen layer's output plus ΔW·x; ΔW is made in the factors' precision, then rounded to that of x."""
        output = self.org_forward(x)
        p = self.settings.module_dropout
        if self.multiplier == 0 or (p and self.training and torch.rand(1) < p):
            return output
        delta = self.dropped(self.update())
        if self.wd:
            frozen = self.org_weight.float()
            delta = decomposed(frozen + delta, self.dora_scale) - frozen
        delta = delta * self.multiplier
        return output + self.answer(x, delta.to(x.dtype), self.bias_change(x.dtype))

    def answer(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the layer answers with these in place of its own."""
        return self.op(x, weight, bias, **self.kw_dict)  # type: ignore[no-any-return]

    def bias_change(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the layer's bias, where a type trains that."""
        return None

    def update(self) -> torch.Tensor:
        """ΔW without DoRA, and in full."""
        tensors = {**self._parameters, **self._buffers}
        for name, layer in self._modules.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in layer._parameters.items()}
        return self.weight_update(tensors, self.org_weight) * self.leading

    def dropped(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW; while training, rows of it are left out at random."""
        p = self.settings.rank_dropout
        if not (p and self.training):
            return weight
        kept = (torch.rand(len(weight), device=weight.device) > p).to(weight.dtype)
        if self.settings.rank_dropout_scale:
            kept = kept / kept.mean().clamp(min=1 / len(kept))
        return weight * kept.view(-1, *[1] * (weight.ndim - 1))

    def factors(self) -> list[torch.nn.Parameter]:
        """The tensors that ΔW is a product of."""
        return [p for name, p in self.named_parameters() if name not in ("scalar", "dora_scale")]

    def degree(self) -> int:
        """ΔW is multiplied by aⁿ when all factors are by a; this n."""
        return len(self.factors())

    def limit_norm(self, largest: float) -> None:
        """Shrink all factors alike, so that |ΔW| is at most `largest` (Frobenius)."""
        norm = self.update().norm()
        factors = self.factors()
        share = (largest / norm).clamp(max=1) ** (1 / self.degree())
        for factor in factors:
            factor.mul_(share.to(factor.dtype))

    def saved(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a LoRA file, as every program that reads LyCORIS files expects them."""
        theirs = super().custom_state_dict()
        return self.state_dict() if theirs is None else theirs

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors of a LoRA file, in which the scalar is multiplied in already."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        if hasattr(self, "scalar"):
            self.scalar.fill_(1)
        self.taken()

    def taken(self) -> None:
        """What follows from a file's tensors beyond themselves."""

    def custom_state_dict(self) -> None:
        """A training's state has the tensors as they are trained, not as a file has them."""
        return None

    def load_weight_hook(self, module: Any, incompatible_keys: Any) -> None:
        """The scalar is in a training's state; nothing is to be made up for."""
