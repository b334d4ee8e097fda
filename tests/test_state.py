"""Training states: what they hold, when they are written, and that training goes on from them exactly."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_optim import CLOSED_FORMS
from tests.test_training import of_type, prepared, warnings
from trainer import loop, optim, schema, state
from trainer.errors import StateError
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run
from trainer.schema.algorithms import USES
from trainer.schema.optimizers import OPTIMIZERS


@pytest.fixture
def stop_at(monkeypatch):
    """Have the next trainings stop after a step (0: not at all)."""
    step = loop.take_step
    asked = {"step": 0}

    def take_step(session, number, batches):
        if number == asked["step"]:
            session.run.request("stop")
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", take_step)
    return lambda number: asked.update(step=number)


def averages(events):
    return [event["average_loss"] for event in of_type(events, "step")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


CASES = {
    "AdamW, flip, shuffle and dropout": {
        "optimizer": "AdamW",
        "flip_aug": True,
        "shuffle_caption": True,
        "caption_dropout_rate": 0.3,
        "noise_offset": 0.05,
        "network_dropout": 0.2,
        "stop_text_encoder_training": 60,
    },
    "AdamW8bit, cosine with warmup": {
        "optimizer": "AdamW8bit",
        "optimizer_args": "min_8bit_size=16",
        "lr_scheduler": "cosine",
        "lr_warmup": 30,
    },
    "Prodigy, accumulation": {
        "optimizer": "Prodigy",
        "learning_rate": 1,
        "unet_lr": 1,
        "text_encoder_lr": 1,
        "gradient_accumulation_steps": 2,
    },
    "workers": {
        "cache_latents": False,
        "max_data_loader_n_workers": 2,
        "color_aug": True,
        "random_crop": True,
        "flip_aug": True,
    },
    "schedule-free, every dropout, accumulation across epochs, persistent workers": {
        "optimizer": "AdamWScheduleFree",
        "gradient_accumulation_steps": 4,
        "rank_dropout": 0.2,
        "module_dropout": 0.2,
        "caption_dropout_every_n_epochs": 2,
        "shuffle_caption": True,
        "noise_offset_type": "Multires",
        "multires_noise_iterations": 3,
        "multires_noise_discount": 0.2,
        "cache_latents": False,
        "max_data_loader_n_workers": 2,
        "persistent_data_loader_workers": True,
    },
    "weights of blocks as numbers and curves": {
        "down_lr_weight": "1,0.5",
        "mid_lr_weight": 0.5,
        "up_lr_weight": "sine+.25",
        "block_dims": ",".join("4" * 25),
    },
    "cached text states, gradient checkpointing, LoRA+, norms limited, batches of two": {
        "text_encoder_lr": 0,
        "sdxl_cache_text_encoder_outputs": True,
        "gradient_checkpointing": True,
        "loraplus_lr_ratio": 4,
        "scale_weight_norms": 0.1,
        "train_batch_size": 2,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2,
        "min_snr_gamma": 5,
        "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True,
    },
}


@pytest.mark.proves("resume")
@pytest.mark.parametrize("case", CASES)
def test_a_training_resumed_twice_is_the_one_that_never_stopped_bit_for_bit(settings, train, tmp_path, stop_at, case):
    out = tmp_path / "out"
    settings |= {"max_train_steps": 8, "save_every_n_epochs": 0, "save_state": True} | CASES[case]
    code, events, _ = train(settings)
    assert code == EXIT_DONE
    whole = averages(events)
    shutil.move(out, tmp_path / "in one go")

    stop_at(3)
    assert train(settings)[0] == EXIT_STOPPED
    stop_at(6)  # with 6 batches an epoch, also the end of one
    code, events, _ = train(settings | {"resume": str(out / "photo-step00000003-state")})
    assert code == EXIT_STOPPED
    assert of_type(events, "started")[0]["first_step"] == 4
    assert [e["step"] for e in of_type(events, "step")] == [4, 5, 6]
    assert averages(events) == pytest.approx(whole[3:6])
    assert not any("other settings" in e["message"] for e in of_type(events, "warning"))
    stop_at(0)
    assert train(settings | {"resume": str(out / "photo-step00000006-state")})[0] == EXIT_DONE

    for file in ("photo.safetensors", "photo-state/tensors.safetensors"):
        whole, pieces = load_file(tmp_path / "in one go" / file), load_file(out / file)
        assert whole.keys() == pieces.keys()
        assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []
    header, other = (json.loads((f / "photo-state" / "state.json").read_text()) for f in (tmp_path / "in one go", out))
    assert header["parts"] == other["parts"]


@pytest.mark.proves("save_state")
def test_a_state_stands_beside_every_saved_file_under_sd_scripts_names(settings, train, tmp_path):
    settings |= {"epoch": 2, "save_every_n_steps": 5, "save_state": True}
    _, events, _ = train(settings)
    expected = ["photo", "photo-000001", "photo-step00000005", "photo-step00000010"]
    found = names(tmp_path / "out")
    assert found == sorted([f"{name}.safetensors" for name in expected] + [f"{name}-state" for name in expected])
    states = [(e["step"], e["path"]) for e in of_type(events, "saved") if e["what"] == "state"]
    assert [step for step, _ in states] == [5, 6, 10, 12]
    assert all(state.read(tmp_path / "out" / path).step == step for step, path in states)


@pytest.mark.proves("save_state_on_train_end")
def test_a_state_at_the_end_alone_is_written_when_asked_for(settings, train, tmp_path, stop_at):
    settings |= {"save_state_on_train_end": True, "save_every_n_steps": 2}
    train(settings)
    assert [n for n in names(tmp_path / "out") if "state" in n] == ["photo-state"]
    stop_at(3)
    train(settings)
    assert "photo-step00000003-state" in names(tmp_path / "out")


@pytest.mark.proves("save_state")
def test_without_the_switch_a_stop_alone_leaves_a_state_until_training_has_gone_on_from_it(
    settings, train, tmp_path, stop_at
):
    out, settings = tmp_path / "out", settings | {"save_every_n_steps": 2}
    train(settings)
    assert not [name for name in names(out) if name.endswith("-state")]
    whole = load_file(out / "photo.safetensors")
    shutil.rmtree(out)
    stop_at(3)
    train(settings)
    assert names(out) == [f"photo-step0000000{end}" for end in ("2.safetensors", "3-state", "3.safetensors")]
    stop_at(4)
    train(settings | {"resume": str(out)})
    assert [name for name in names(out) if name.endswith("-state")] == ["photo-step00000004-state"]
    stop_at(0)
    train(settings | {"resume": str(out)})
    assert not [name for name in names(out) if name.endswith("-state")]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(out / "photo.safetensors").items())


@pytest.mark.proves("save_state_on_train_end")
def test_a_state_that_was_asked_for_stays_when_training_goes_on_from_it(settings, train, tmp_path, stop_at):
    out = tmp_path / "out"
    stop_at(3)
    train(settings | {"save_state_on_train_end": True})
    stop_at(0)
    train(settings | {"resume": str(out)})
    assert [name for name in names(out) if name.endswith("-state")] == ["photo-step00000003-state"]


def test_a_stop_with_no_room_for_the_state_is_still_a_stop(settings, train, tmp_path, stop_at, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    stop_at(3)
    code, events, _ = train(settings)
    assert code == EXIT_STOPPED
    assert any("this run cannot go on later" in e["message"] for e in of_type(events, "warning"))
    assert names(tmp_path / "out") == ["photo-step00000003.safetensors"]


@pytest.mark.proves("resume")
@pytest.mark.parametrize("own_folder", [True, False])
def test_auto_goes_on_from_the_newest_state_of_the_name_and_starts_anew_where_there_is_none(
    settings, train, tmp_path, stop_at, own_folder
):
    """Without an output folder the states lie in the runs' own, which are siblings."""
    settings |= {"resume": "auto", "output_dir": str(tmp_path / "out") if own_folder else ""}
    stop_at(2)
    train(settings | {"output_name": "photo-2"})
    stop_at(3)
    code, events, _ = train(settings)
    assert code == EXIT_STOPPED
    assert of_type(events, "started")[0]["first_step"] == 1, "the other one's state is none of this name"
    stop_at(0)
    code, events, _ = train(settings)
    assert code == EXIT_DONE
    assert of_type(events, "started")[0]["first_step"] == 4
    _, events, _ = train(settings)
    assert of_type(events, "started")[0]["first_step"] == 1, "the first one's state went when it had gone on"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, photographs):
    """A state after two of six steps, and its preset. Read only."""
    from accelerate.state import AcceleratorState

    from trainer.__main__ import main

    folder = tmp_path_factory.mktemp("saved")
    preset = {
        "pretrained_model_name_or_path": str(tiny_model),
        "train_data_dir": str(photographs),
        "output_dir": str(folder / "out"),
        "output_name": "photo",
        "caption_extension": ".txt",
        "max_resolution": "64,64",
        "bucket_reso_steps": 32,
        "mixed_precision": "no",
        "optimizer": "AdamW",
        "learning_rate": 1e-2,
        "unet_lr": "",
        "text_encoder_lr": "",
        "lr_scheduler": "constant",
        "lr_warmup": 0,
        "network_dim": 4,
        "network_alpha": 4,
        "seed": "",
        "num_cpu_threads_per_process": 1,
        "max_train_steps": 2,
        "save_state": True,
        "wandb_api_key": "never to be stored",
    }
    (folder / "preset.json").write_text(json.dumps(preset))
    assert main(["train", str(folder / "preset.json"), "--run", str(folder / "run")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "out" / "photo-state", preset | {"save_state": False, "max_train_steps": 3}


@pytest.fixture
def resume(saved, train, tmp_path):
    """Resume a copy of the saved state, changed by `damage`, with some settings changed."""

    def go(damage=lambda folder: None, **changes):
        shutil.copytree(saved[0], tmp_path / "a state", dirs_exist_ok=True)
        damage(tmp_path / "a state")
        preset = saved[1] | {"output_dir": str(tmp_path / "out"), "resume": str(tmp_path / "a state")}
        return train(preset | changes)

    return go


def test_a_random_seed_goes_on_with_the_state(saved, resume):
    _, events, _ = resume()
    assert of_type(events, "started")[0]["seed"] == state.read(saved[0]).seed


def test_a_resumed_run_tells_which_state_it_went_on_from(saved, resume, train, tmp_path):
    _, events, _ = resume()
    assert of_type(events, "started")[0]["resumed"] == str(tmp_path / "a state")
    _, events, _ = train(saved[1] | {"output_dir": str(tmp_path / "new")})
    assert of_type(events, "started")[0]["resumed"] == ""


def test_a_stop_right_after_resuming_says_where_it_went_on_from(resume, tmp_path, caplog):
    caplog.set_level("INFO")
    run = tmp_path / "run1"
    run.mkdir()

    def stop(record):
        if record.getMessage().startswith("resuming"):
            Run(run).request("stop")
        return True

    logging.getLogger("trainer.prepare").addFilter(stop)
    try:
        code, events, _ = resume(sample_every_n_steps=1, sample_prompts="a cat --s 2")
    finally:
        logging.getLogger("trainer.prepare").removeFilter(stop)
    assert code == EXIT_STOPPED and events[-1]["step"] == 2 and not events[-1]["path"]
    assert "stopped behind step 2, where it went on from; there is nothing new to save" in caplog.messages


def test_training_longer_than_planned_is_told_and_goes_on(resume):
    code, events, _ = resume(max_train_steps=4)
    assert code == EXIT_DONE
    assert [e["step"] for e in of_type(events, "step")] == [3, 4]
    (warning,) = warnings(events)
    assert "Resuming at step 3 with other settings: Max train steps (max_train_steps) was 2, now 4." in str(warning)


def test_another_learning_rate_applies_from_the_first_resumed_step_and_is_told(resume):
    _, events, _ = resume(learning_rate=1e-3, train_batch_size=2, seed=99)
    assert of_type(events, "step")[0]["unet_lr"] == pytest.approx(1e-3)
    (warning,) = warnings(events)
    for text in ("(learning_rate) was 0.01, now 0.001", "(train_batch_size)", "(seed) was", "6 batches, now 3"):
        assert text in warning["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "Lion"}, "Optimizer (optimizer) was AdamW, now Lion"),
        ({"optimizer_args": "weight_decay=0.5"}, "(optimizer_args)"),
        ({"max_train_steps": 2}, "is at step 2, and this training has 2 in all"),
    ],
)
def test_a_state_that_cannot_be_gone_on_from_is_refused_before_the_start(resume, capsys, changes, message):
    code, _, _ = resume(**changes)
    assert code == EXIT_CONFIG
    error = capsys.readouterr().err
    assert message in error
    assert "(resume)" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_dim": 8}, "it holds [4, 32], this one has [8, 32]"),
        ({"network_alpha": 2}, "is 4 there and 2 here"),
        ({"text_encoder_lr": 0}, "this one has nothing"),
    ],
)
def test_a_state_of_another_network_is_refused_naming_what_differs(resume, changes, message):
    code, events, _ = resume(**changes)
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "state"
    assert message in failed["message"]
    assert failed["hint"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda f: cut(f / "tensors.safetensors"), EXIT_CONFIG, "damaged"),
        (lambda f: cut(f / "state.json"), EXIT_CONFIG, "damaged"),
        (lambda f: (f / "tensors.safetensors").unlink(), EXIT_CONFIG, "damaged"),
        (lambda f: (f / "state.json").write_text("[]"), EXIT_CONFIG, "damaged"),
        (lambda f: (f / "state.json").write_text('{"format": "other", "version": 3}'), EXIT_CONFIG, "another program"),
        (lambda f: (f / "state.json").unlink(), EXIT_CONFIG, "holds no state.json"),
        (lambda f: (f / "state.json").rename(f / "optimizer.bin"), EXIT_CONFIG, "pickle"),
        (lambda f: shutil.rmtree(f), EXIT_CONFIG, "no such folder"),
        (lambda f: change_a_byte(f / "tensors.safetensors"), EXIT_FAILED, "not the one that was written"),
    ],
)
def test_a_torn_or_foreign_state_is_recognised(resume, capsys, damage, code, message):
    found, events, _ = resume(damage)
    assert found == code
    assert message in capsys.readouterr().err + str(of_type(events, "failed"))


def test_a_state_holds_no_pickle_and_no_secret(saved):
    folder, _ = saved
    assert names(folder) == ["state.json", "tensors.safetensors"]
    assert "never to be stored" not in (folder / "state.json").read_text()
    assert state.read(folder).settings["optimizer"] == "AdamW"


def test_a_state_of_the_same_name_is_replaced_and_any_other_folder_left_alone(settings, train, tmp_path):
    mine = tmp_path / "out" / "photo-state"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    settings |= {"save_state": True, "max_train_steps": 1}
    train(settings)
    train(settings | {"max_train_steps": 2})
    found = [name for name in names(tmp_path / "out") if "photo-of-" not in name]
    assert found == ["photo-state", "photo-state-2", "photo.safetensors"]
    assert names(mine) == ["notes.txt"]
    assert state.read(tmp_path / "out" / "photo-state-2").step == 2


def test_a_state_stays_when_its_successor_cannot_take_its_name(settings, train, tmp_path, monkeypatch):
    settings |= {"save_state": True, "max_train_steps": 1}
    train(settings)
    rename = Path.rename

    def refused(path, target):
        if path.name.endswith(".tmp"):
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    assert train(settings | {"max_train_steps": 2})[0] == EXIT_FAILED
    assert [name for name in names(tmp_path / "out") if "state" in name] == ["photo-state"]
    assert state.read(tmp_path / "out" / "photo-state").step == 1


@pytest.mark.proves("resume")
def test_images_and_captions_that_changed_since_the_state_are_named(settings, train, tmp_path, stop_at):
    own = shutil.copytree(settings["train_data_dir"], tmp_path / "own photographs")
    settings |= {"save_state": True, "max_train_steps": 4, "train_data_dir": str(own)}
    stop_at(2)
    train(settings)
    stop_at(0)
    again = settings | {"resume": str(tmp_path / "out" / "photo-step00000002-state")}

    def told():
        _, events, _ = train(again)
        return [e["message"] for e in of_type(events, "warning") if "images or captions" in e["message"]]

    assert told() == []
    folder = own / "2_photo"
    first, second, third = sorted(folder.glob("*.png"))
    first.with_suffix(".txt").write_text("something new")
    shutil.copy(second, folder / "new.png")
    third.unlink()
    (message,) = told()
    assert message == (  # by size in pixels and bytes, caption and repeats
        f"The images or captions are not those of step 2: 1 added ({folder.name}/new.png); "
        f"1 gone ({folder.name}/{third.name}); 1 with another caption ({folder.name}/{first.name})."
    )


def test_a_state_whose_writing_fails_leaves_nothing_behind(settings, train, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, events, _ = train(settings | {"save_state": True, "max_train_steps": 1})
    assert code == EXIT_FAILED
    assert of_type(events, "failed")[-1]["kind"] == "disk_full"
    assert names(tmp_path / "out") == ["photo.safetensors"], "it is written first"


def test_every_kind_of_value_survives_packing():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "mean": torch.arange(6).reshape(2, 3).T}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 1e-4, "name": "unet", "params": [0, 1], "none": None, "on": True}],
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "infinite": [float("inf"), float("-inf")],
    }
    tensors = {}
    packed = json.loads(json.dumps(state._packed(tree, tensors), allow_nan=False))
    found = state._unpacked(packed, tensors)
    assert found["groups"] == tree["groups"]
    assert isinstance(found["groups"][0]["betas"], tuple)
    assert found["infinite"] == tree["infinite"]
    assert list(found["state"]) == [0, 1]
    for a, b in ((found["state"][0][k], tree["state"][0][k]) for k in ("step", "mean")):
        assert torch.equal(a, b)
    assert torch.equal(found["bytes"], tree["bytes"]) and found["bytes"].dtype == torch.uint8


def test_reading_what_is_no_state_says_so(tmp_path):
    with pytest.raises(StateError, match="no such folder"):
        state.read(tmp_path / "nothing")
    for path in ("x" * 5000, "a\0b", "/root/\n", str(tmp_path / "file")):
        (tmp_path / "file").touch()
        with pytest.raises(StateError, match="is no training state"):
            state.read(Path(path))
    assert not state.is_state(tmp_path)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.package])
def test_every_optimizer_goes_on_from_its_state_exactly(name, tmp_path):
    config = schema.parse({"optimizer": name, "lr_scheduler": "cosine", "lr_warmup": 20})
    chosen = config.optim

    def fresh():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4, bias=False))
        groups = [{"name": str(i), "params": list(part.parameters()), "lr": 1e-2} for i, part in enumerate(network)]
        optimizer = optim.make_optimizer(groups, chosen)
        return network, optimizer, optim.make_scheduler(optimizer, chosen, 10)

    def train(parts, steps):
        network, optimizer, scheduler = parts
        for step in steps:
            torch.manual_seed(step)
            network(torch.randn(5, 8)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return [p.detach().clone() for p in network.parameters()]

    whole = fresh()
    train(whole, range(4))
    state.write(tmp_path / "state", 4, 0, 1, config, state.parts_of(*whole, None))
    resumed = fresh()
    train(resumed, range(1))  # what is restored must not depend on what was there
    state.read(tmp_path / "state").restore(*resumed, None)
    rates = [optim.rates(*parts[1:]) for parts in (whole, resumed)]
    assert rates[0] == rates[1]
    assert all(torch.equal(a, b) for a, b in zip(train(whole, range(4, 8)), train(resumed, range(4, 8)), strict=True))
    assert all(torch.isfinite(p).all() for p in whole[0].parameters())


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "adafactor"])
def test_every_scheduler_goes_on_from_its_state_exactly(name, tmp_path):
    if name == "adafactor":
        chosen, total = optim.Optim(optimizer="Adafactor", scheduler=name, learning_rate=1e-3), 20
    else:
        chosen, total = optim.Optim(**{"scheduler": name, "optimizer": "AdamW", **CLOSED_FORMS[name][0]}), 100

    def fresh():
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 4)
        optimizer = optim.make_optimizer([{"name": "unet", "params": list(layer.parameters()), "lr": 1.0}], chosen)
        return layer, optimizer, optim.make_scheduler(optimizer, chosen, total)

    def train(parts, steps):
        layer, optimizer, scheduler = parts
        used = []
        for step in range(steps):
            torch.manual_seed(step)
            layer(torch.randn(5, 8)).square().mean().backward()
            used.append(optim.rates(optimizer, scheduler)["unet"])
            optimizer.step()
            scheduler.step()
        return used

    whole, resumed = fresh(), fresh()
    train(whole, total // 2 - 3)
    state.write(tmp_path / "state", 1, 0, 1, schema.parse({}), state.parts_of(*whole, None))
    state.read(tmp_path / "state").restore(*resumed, None)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        other.grad = one.grad.clone()
    assert train(whole, 6) == train(resumed, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))


@pytest.mark.parametrize("algorithm", USES)
def test_every_network_comes_back_from_its_state_and_answers_the_same(settings, tmp_path, algorithm):
    changes = {"LoRA_type": algorithm, "cache_latents": False, "conv_dim": 2}
    first, second = (prepared(settings | changes | {"seed": seed}, tmp_path) for seed in (1, 2))
    with torch.no_grad():
        for tensor in first.network.parameters():
            tensor.normal_(std=0.02)
    parts = state.parts_of(first.network, first.optimizer, first.scheduler, None)
    state.write(tmp_path / "state", 1, 1, 6, first.config, parts)
    state.read(tmp_path / "state").restore(second.network, second.optimizer, second.scheduler, None)
    ours, theirs = first.network.tensors(), second.network.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    answers = []
    for session in (first, second):
        session.network.attach()
        with torch.no_grad(), session.network.without_dropout():
            answers.append(session.model.text_states(session.model.tokens(["a cat"])).states)
        session.network.detach()
    assert torch.equal(*answers)


@pytest.fixture
def states(saved, tmp_path):
    """An output folder with two states, that of step 1 written before that of step 2."""

    folder = tmp_path / "out of a run" / "output"
    for step in (1, 2):
        copy = shutil.copytree(saved[0], folder / f"photo-step{step:08d}-state")
        header = json.loads((copy / "state.json").read_text())
        (copy / "state.json").write_text(json.dumps(header | {"step": step}))
        for path in (*copy.iterdir(), copy):
            os.utime(path, (step, step))
    return folder


@pytest.mark.proves("resume")
def test_a_folder_of_states_means_the_newest(states, saved, train, tmp_path):
    assert state.find(states)[0].step == 2
    assert state.find(states.parent)[0].step == 2, "a run's folder"
    assert state.find(states / "photo-step00000001-state")[0].step == 1
    code, events, _ = train(saved[1] | {"output_dir": str(tmp_path / "out"), "resume": str(states)})
    assert code == EXIT_DONE
    assert of_type(events, "started")[0]["first_step"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: cut(f / "tensors.safetensors"),
        lambda f: change_a_byte(f / "tensors.safetensors"),
        lambda f: cut(f / "state.json"),
        lambda f: (f / "state.json").unlink(),
        lambda f: (f / "tensors.safetensors").unlink(),
    ],
)
def test_the_state_before_a_torn_one_is_used_and_that_is_said(states, damage):
    damage(states / "photo-step00000002-state")
    found, passed_over = state.find(states)
    assert found.step == 1
    assert "photo-step00000002-state" in " ".join(passed_over)


def test_the_start_says_which_state_is_used_for_a_torn_one(states, saved, train, tmp_path):
    cut(states / "photo-step00000002-state" / "tensors.safetensors")
    code, events, _ = train(saved[1] | {"output_dir": str(tmp_path / "out"), "resume": str(states)})
    assert code == EXIT_DONE
    assert of_type(events, "started")[0]["first_step"] == 2
    (warning,) = [e["message"] for e in of_type(events, "warning") if "damaged" in e["message"]]
    assert "photo-step00000002-state" in warning
    assert 'photo-step00000001-state" is used' in warning


def test_where_no_state_is_whole_each_is_named(states):
    for folder in states.iterdir():
        cut(folder / "tensors.safetensors")
    with pytest.raises(StateError, match="None of the 2 training states") as raised:
        state.find(states)
    assert "step00000001" in str(raised.value) and "step00000002" in str(raised.value)


def test_a_state_that_was_being_replaced_when_its_trainer_was_killed_is_found(saved, tmp_path):
    dead = 2**22 + 1  # beyond the highest process number
    shutil.copytree(saved[0], tmp_path / f".photo-state.{dead}.old")
    shutil.copytree(saved[0], tmp_path / f".photo-state.{dead}.tmp")
    assert state.find(tmp_path / "photo-state")[0].step == 2
    assert names(tmp_path) == ["photo-state"]


def test_weights_that_are_not_numbers_never_reach_a_state(settings, train, tmp_path, monkeypatch):
    step = loop.take_step

    def ruin(session, number, batches):
        taken = step(session, number, batches)
        if number == 2:
            with torch.no_grad():
                next(iter(session.network.parameters())).fill_(float("nan"))
        return taken

    monkeypatch.setattr(loop, "take_step", ruin)
    settings |= {"save_state": True, "save_every_n_steps": 1, "max_train_steps": 3}
    code, events, _ = train(settings)
    assert code == EXIT_FAILED
    assert of_type(events, "failed")[-1]["kind"] == "not_a_number"
    assert names(tmp_path / "out") == ["photo-step00000001-state", "photo-step00000001.safetensors"]


def test_a_runs_settings_are_those_of_its_last_start(settings, train, tmp_path):
    for rate in (1e-3, 5e-4):
        train(settings | {"unet_lr": rate, "max_train_steps": 1}, "--run", str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["unet_lr"] == 5e-4
