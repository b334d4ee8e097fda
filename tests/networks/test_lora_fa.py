"""LoRA-FA: down stays as it is drawn, up is trained."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from trainer import schema
from trainer.networks import lora_fa
from trainer.prepare import prepare
from trainer.run import Run
from trainer.schema.network import Network as Settings


def test_down_starts_normal_with_two_over_the_sum_of_its_sizes_as_variance_and_up_at_zero():
    torch.manual_seed(0)
    for layer in (torch.nn.Linear(300, 20), torch.nn.Conv2d(300, 20, 3)):
        module = lora_fa.module_for(layer, 100, 1.0, Settings())
        assert float(module.lora_down.weight.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
        assert not module.lora_up.weight.any()


@pytest.mark.proves("LoRA_type")
def test_training_moves_up_alone_and_the_optimizer_holds_nothing_for_down(settings, train, tmp_path):
    settings |= {"LoRA_type": "LoRA-FA", "max_train_steps": 3, "scale_weight_norms": 0.01}
    s = prepare(schema.parse(settings), Run(tmp_path / "prepared"), lambda event: None)
    grouped = {id(p) for group in s.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in s.network.named_parameters() if id(p) in grouped}
    assert names == {name for name, _ in s.network.named_parameters() if name.endswith("lora_up.weight")}
    start = s.network.tensors()
    assert train(settings)[0] == 0
    end = load_file(tmp_path / "out" / "photo.safetensors")
    changed = {name.split(".", 1)[1] for name in end if not torch.equal(end[name], start[name])}
    assert changed == {"lora_up.weight"}
    assert end.keys() == start.keys()
