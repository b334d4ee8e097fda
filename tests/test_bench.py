"""What `python -m trainer bench` tells."""

from __future__ import annotations

import json

import pytest
import torch

from trainer import arranged, bench
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
