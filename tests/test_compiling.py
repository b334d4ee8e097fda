"""torch.compile of the U-Net's blocks: the same training, and never a reason for it to end.

The compiler's own work on a graph takes a minute and is PyTorch's; here stands a backend that runs graphs as they are.
"""

from __future__ import annotations

import pytest
import torch

from trainer import compiling, kohya, loop
from trainer.events import Sample, Step, Warned
from trainer.prepare import prepare
from trainer.run import Run
from trainer.schema import parse


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were handed to the compiler."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    yield seen
    torch.compiler.reset()


def prepared(settings, folder, tell=lambda event: None, **changed):
    events = []

    def emit(event):
        events.append(event)
        tell(event)

    return prepare(parse(settings | {"output_dir": str(folder)} | changed), Run(folder), emit), events


def losses(settings, folder, tell=lambda event: None, **changed):
    session, events = prepared(settings, folder, tell, **changed)
    loop.train(session, set)
    return [event.loss for event in events if isinstance(event, Step)], events


def warnings(events):
    return [event for event in events if isinstance(event, Warned)]


@pytest.mark.proves("dynamo_backend")
def test_compiled_blocks_train_the_same_one_graph_serves_those_of_a_kind_and_pictures_need_none(
    settings, tmp_path, graphs
):
    plain, _ = losses(settings, tmp_path / "plain", dynamo_backend="auto")
    assert not graphs, "on a processor auto does not compile"
    at_pictures = []

    def tell(event):
        if isinstance(event, Sample):
            at_pictures.append(len(graphs))

    drawing = {"sample_prompts": "a cat --w 64 --h 64 --s 2", "sample_every_n_epochs": 1}
    compiled, events = losses(settings, tmp_path / "compiled", tell, dynamo_backend="inductor", **drawing)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert not warnings(events)
    assert at_pictures[0] == 0, "pictures are drawn without"
    assert at_pictures[1] == len(graphs)
    session, _ = prepared(settings, tmp_path / "again")
    blocks = [module for module in session.model.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert 0 < len(graphs) < len(blocks)


def test_where_compiling_fails_a_warning_says_so_and_the_same_step_is_taken_without(settings, tmp_path, monkeypatch):
    plain, _ = losses(settings, tmp_path / "plain")

    def failing(graph, inputs):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(compiling, "BACKEND", failing)
    without, events = losses(settings, tmp_path / "failing", dynamo_backend="inductor")
    torch.compiler.reset()
    assert without == plain
    (warned,) = warnings(events)
    assert "no C++ compiler" in warned.message
    assert "dynamo_backend" in warned.hint


def test_an_error_that_is_not_the_compilers_still_ends_the_training(settings, tmp_path, monkeypatch, graphs):
    session, _ = prepared(settings, tmp_path, dynamo_backend="inductor")

    def broken(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(loop, "batch_loss", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        loop.train(session, set)


@pytest.mark.parametrize(
    ("steps", "device", "weights", "changed", "expected"),
    [
        (1000, "cuda", 10**8, {}, True),
        (999, "cuda", 10**8, {}, False),
        (1000, "cpu", 10**8, {}, False),
        (1000, "cuda", 10**8 - 1, {}, False),
        (1000, "cuda", 10**8, {"fp8_base": True}, False),
        (1000, "cuda", 10**8, {"base_weights": "nf4"}, False),
        (1000, "cuda", 10**8, {"module_dropout": 0.1}, False),
    ],
)
def test_auto_compiles_full_size_models_on_a_gpu_in_long_runs(monkeypatch, steps, device, weights, changed, expected):
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    unet = torch.nn.Linear(weights, 1, bias=False, device="meta")
    config = parse(changed)
    assert compiling.pays(unet, config, steps, torch.device(device)) is expected
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert not compiling.pays(unet, config, steps, torch.device(device)), "GPUs need triton"


def test_a_preset_of_kohya_ss_that_compiles_nothing_says_so_in_our_words():
    preset = kohya.read({"dynamo_backend": "eager", "dynamo_mode": "default", "dynamo_use_dynamic": False})
    assert preset.values == {"dynamo_backend": "no"}
    assert [note.key for note in preset.notes] == ["dynamo_backend"]
