"""What `python -m trainer bench` tells; and what a step costs that no machine's mood changes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_training import prepared
from trainer import arranged, bench, loop
from trainer.__main__ import main
from trainer.run import EXIT_CONFIG, EXIT_DONE


@pytest.fixture
def preset(settings, tmp_path):
    def preset(**changes):
        path = tmp_path / "preset.json"
        path.write_text(json.dumps(settings | changes))
        return str(path)

    return preset


def test_a_preset_is_measured_and_nothing_of_it_is_written(preset, tmp_path, capsys):
    path = preset(save_every_n_steps=1, sample_every_n_steps=1, sample_prompts="a cat", save_state=True)
    assert main(["bench", path, "--steps", "3", "--json"]) == EXIT_DONE
    told = json.loads(capsys.readouterr().out)
    assert (told["preset"], told["steps"]) == (path, 3)
    assert told["images_per_second"] == pytest.approx(1 / told["median_step"])
    assert told["slowest_step"] >= told["median_step"] > 0
    assert 0 < told["share"] == pytest.approx(told["operations_per_step"] / told["median_step"] / told["machine_rate"])
    assert {"reading the image folders", "loading the base model", "caching latents"} <= set(told["phases"])
    assert told["memory"] > 2**27
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preset.json"]


def test_the_table_names_the_step_and_the_start(preset, capsys):
    path = preset()
    assert main(["bench", path, "--steps", "2"]) == EXIT_DONE
    table = capsys.readouterr().out
    assert path in table
    assert "at which this machine multiplies matrices of 2048×2048" in table
    assert "one step, median of 2" in table
    assert "  loading the base model" in table


def test_what_stands_in_the_way_is_told(preset, capsys):
    assert main(["bench", preset(train_data_dir="/nowhere")]) == EXIT_CONFIG
    assert "/nowhere" in capsys.readouterr().err


def test_the_operations_of_a_product_and_of_attention_are_counted_whole():
    one, other = torch.ones(3, 5), torch.ones(5, 7)
    query = torch.ones(1, 2, 6, 8)
    with bench._operations() as counter:
        one @ other
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7 + 2 * (2 * 2 * 6 * 6 * 8)


@pytest.mark.skipif(not arranged._supported(torch.float32), reason="oneDNN is not there")
def test_arranged_convolutions_are_counted_like_plain_ones():
    counts = []
    for name in ("plain", "arranged"):
        layer = torch.nn.Conv2d(8, 12, 3, padding=1).requires_grad_(False)
        if name == "arranged":
            arranged.arrange(torch.nn.Sequential(layer))
        x = torch.randn(1, 8, 4, 6, requires_grad=True)
        with bench._operations() as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [2 * (2 * 12 * 4 * 6 * 8 * 9)] * 2


class Operators(TorchDispatchMode):
    """Counts what is computed; casts of the frozen weights beside."""

    def __init__(self, frozen: set[int]) -> None:
        super().__init__()
        self.frozen = frozen
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.counts[operator.overloadpacket.__name__] += 1
        first = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        if operator is torch.ops.aten._to_copy.default and first.untyped_storage()._cdata in self.frozen:
            self.counts["casts of frozen weights"] += 1
        return operator(*arguments, **(options or {}))


def counted(settings, tmp_path: Path) -> tuple[Counter[str], int]:
    """The operators of the second step's loss and its gradients, and the number of trained tensors."""
    session = prepared(settings | {"mixed_precision": "bf16"}, tmp_path)
    session.network.attach()
    session.optimizer.step = session.scheduler.step = lambda: None
    batches = session.feed.batches(range(2))
    loop.take_step(session, 1, batches)
    modules = (session.model.unet, *session.model.text_encoders.values())
    frozen = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    with Operators(frozen) as operators:
        loop.take_step(session, 2, batches)
    return operators.counts, len(list(session.network.parameters()))


def test_a_step_waits_for_no_number_and_casts_no_frozen_weight(settings, tmp_path):
    counts, trained = counted(settings, tmp_path)
    assert counts["_local_scalar_dense"] == 0, "each would make a GPU's step wait"
    assert counts["casts of frozen weights"] == 0
    # A trained weight is cast once on its way in, its gradient once on its way out.
    assert counts["_to_copy"] <= 2 * trained + 12


def test_less_is_computed_where_the_text_encoder_is_not_trained(settings, tmp_path):
    both, _ = counted(settings, tmp_path / "both")
    unet, _ = counted(settings | {"text_encoder_lr": 0, "unet_lr": 1e-4}, tmp_path / "unet")
    assert unet["native_layer_norm_backward"] < both["native_layer_norm_backward"]
