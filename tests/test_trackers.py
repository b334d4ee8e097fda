"""Curves and pictures for TensorBoard and Weights & Biases, and the key that is written nowhere."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer import kohya, trackers
from trainer.events import Warned
from trainer.run import EXIT_DONE, Run

KEY = "local-" + "0123456789abcdef" * 3
PROMPT = "a cat zwx, evening"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that nothing of this machine's is found or changed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def in_wandb(folder: Path) -> list[Any]:
    """The records of the one W&B run under a folder. W&B's own process may be a little behind ours."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    for _ in range(100):
        records = [wandb_internal_pb2.Record.FromString(data) for data in chunks(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def chunks(data: bytes) -> Iterator[bytes]:
    """What LevelDB's log format holds: pieces of a record behind crc, length and type, in blocks of 32 KiB."""
    at, record = 7, b""  # behind W&B's own header
    while at + 7 <= len(data):
        left = -at % 32768 or 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.HasField("history")]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]


def in_tensorboard(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    found = EventAccumulator(str(file), size_guidance={"images": 0})
    found.Reload()
    return found


def everything(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def sampled(settings, tmp_path):
    return settings | {
        "logging_dir": str(tmp_path / "logs"),
        "sample_every_n_steps": 2,
        "sample_prompts": f"{PROMPT} --s 1",
        "max_train_steps": 2,
    }


@pytest.mark.proves("log_with", "logging_dir", "wandb_run_name", "log_tracker_name")
def test_both_trackers_hold_loss_rates_and_samples_without_a_key(sampled, train, tmp_path):
    code, events, _ = train(
        sampled | {"log_with": "all", "wandb_run_name": "evening run", "log_tracker_name": "cats"},
    )
    assert code == EXIT_DONE
    (warning,) = [e for e in events if e["type"] == "warning" and "Weights & Biases" in e["message"]]
    assert "is offline" in warning["message"]
    assert "wandb sync" in warning["hint"]
    steps = [e for e in events if e["type"] == "step"]

    records = in_wandb(tmp_path / "logs")
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("cats", "evening run")
    rows = history(records)
    losses = [row["loss/current"] for row in rows if "loss/current" in row]
    assert losses == pytest.approx([e["loss"] for e in steps])
    assert [row["lr/unet"] for row in rows if "lr/unet" in row] == pytest.approx([e["unet_lr"] for e in steps])
    assert [row["lr/text_encoder"] for row in rows if "lr/text_encoder" in row]
    captions = {row["_step"]: row["sample_1/caption"] for row in rows if "sample_1/caption" in row}
    assert captions == {0: PROMPT, 2: PROMPT}
    assert len(list((tmp_path / "logs").rglob("media/images/*.png"))) == 2

    board = in_tensorboard(tmp_path / "logs" / "cats")
    assert [e.value for e in board.Scalars("loss/current")] == pytest.approx(losses)
    assert len(board.Scalars("lr/unet")) == len(board.Scalars("lr/text_encoder")) == 2
    assert [e.step for e in board.Images(f"sample_1/{PROMPT}")] == [0, 2]


@pytest.mark.proves("log_with")
def test_tensorboard_alone_writes_into_the_runs_folder_where_no_other_is_named(settings, train):
    _, _, folder = train(settings | {"log_with": "tensorboard", "max_train_steps": 1})
    assert len(in_tensorboard(folder / "logs").Scalars("loss/current")) == 1
    assert not list(folder.rglob("*.wandb"))


def test_nothing_is_tracked_unless_asked_for(settings, train):
    _, _, folder = train(settings | {"max_train_steps": 1})
    assert not (folder / "logs").exists()


@pytest.mark.proves("log_config")
def test_settings_are_tracked_only_where_asked_for_and_without_the_key(settings, train, tmp_path):
    for on in (False, True):
        logs = tmp_path / f"logs{on}"
        wanted = {
            "log_with": "all",
            "logging_dir": str(logs),
            "log_config": on,
            "wandb_api_key": "",
            "max_train_steps": 1,
        }
        train(settings | wanted)
        run = next(record.run for record in in_wandb(logs) if record.HasField("run"))
        tracked = {item.key: item.value_json for item in run.config.update}
        assert ("network_dim" in tracked) is on
        assert ("settings/text_summary" in in_tensorboard(logs).Tags()["tensors"]) is on
        assert "wandb_api_key" not in tracked


@pytest.mark.proves("wandb_api_key")
@pytest.mark.parametrize("given", ["form", "environment"])
def test_the_key_is_found_nowhere_on_disk(settings, train, tmp_path, home, monkeypatch, given):
    """Not in the run, its log and events, the file's metadata, W&B's own files or the home folder."""
    from trainer import trackers

    monkeypatch.setattr(trackers, "WANDB_TIMEOUT_S", 1)
    if given == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    preset = settings | {"log_with": "wandb", "log_config": True, "max_train_steps": 1}
    words = ["--wandb_api_key", KEY] if given == "form" else []
    code, events, folder = train(preset, *words)
    assert code == EXIT_DONE
    assert "Training goes on without it." in [e.get("hint") for e in events]
    assert any("cannot be reached" in e.get("message", "") for e in events)
    assert history(in_wandb_offline(folder))
    assert KEY.encode() not in everything(folder, home, tmp_path / "out", tmp_path)
    assert "wandb_api_key" not in json.loads((folder / "config.json").read_text())


def in_wandb_offline(folder: Path) -> list[Any]:
    return in_wandb(next((folder / "logs" / "wandb").glob("offline-run-*")))


def test_a_key_is_left_out_of_presets_and_settings(tmp_path):
    kohya.save(tmp_path / "x.json", {"wandb_api_key": KEY, "log_with": "wandb"}, {})
    assert json.loads((tmp_path / "x.json").read_text()) == {"log_with": "wandb"}


class Broken:
    name = "Broken"

    def log(self, values, step):
        raise ConnectionError(f"refused for {KEY}\nand more")

    def show(self, pictures, step): ...

    def close(self): ...


class Counting:
    name = "Counting"

    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append(("log", step))

    def show(self, pictures, step):
        self.calls.append(("show", step))

    def close(self):
        self.calls.append(("close", 0))


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on():
    events, counting = [], Counting()
    both = trackers.Trackers(events.append, secret=KEY)
    assert both.start("Broken", Broken)
    assert both.start("Counting", lambda: counting)
    for step in (1, 2):
        both.log({"loss/current": 1.0}, step)
    both.show([trackers.Shown(0, "a cat", Image.fromarray(np.zeros((8, 8, 3), np.uint8)))], 2)
    both.close()
    assert counting.calls == [("log", 1), ("log", 2), ("show", 2), ("close", 0)]
    assert events == [Warned("Broken does not work: refused for …", "Training goes on without it.")]


class Hanging(Counting):
    def __init__(self):
        super().__init__()
        self.answer = threading.Event()

    def log(self, values, step):
        self.answer.wait(20)


def test_a_tracker_that_hangs_holds_up_nothing_and_is_reported_once(monkeypatch):
    monkeypatch.setattr(trackers, "HANGS_AFTER_S", 1.0)
    events, hanging, counting = [], Hanging(), Counting()
    both = trackers.Trackers(events.append)
    both.start("Hanging", lambda: hanging)
    both.start("Counting", lambda: counting)
    began = time.monotonic()
    for step in range(1, 4):
        both.log({"loss/current": 1.0}, step)
    assert time.monotonic() - began < 0.9
    time.sleep(1.1)
    both.log({"loss/current": 1.0}, 4)
    both.close()
    assert time.monotonic() - began < 10
    hanging.answer.set()
    assert counting.calls == [("log", 1), ("log", 2), ("log", 3), ("log", 4), ("close", 0)]
    assert events == [Warned("Hanging does not work: it did not answer for 1 s", "Training goes on without it.")]


def test_a_tracker_that_hangs_at_its_start_or_end_is_left_to_itself(monkeypatch):
    monkeypatch.setattr(trackers, "HANGS_AFTER_S", 1.0)
    events, answer = [], threading.Event()
    some = trackers.Trackers(events.append)
    assert not some.start("Starting", lambda: answer.wait(20))
    ending = Counting()
    ending.close = lambda: answer.wait(20)
    assert some.start("Ending", lambda: ending)
    some.close()
    answer.set()
    assert [e.message.split()[0] for e in events] == ["Starting", "Ending"]


def test_a_tracker_that_is_still_behind_at_the_end_is_reported_although_each_of_its_calls_is_quick(monkeypatch):
    monkeypatch.setattr(trackers, "HANGS_AFTER_S", 0.2)
    events, slow = [], Counting()
    slow.log = lambda values, step: time.sleep(0.06)
    some = trackers.Trackers(events.append)
    assert some.start("Slow", lambda: slow)
    for step in range(10):
        some.log({"loss/current": 1.0}, step)
    some.close()
    assert [e.message for e in events] == ["Slow does not work: it did not answer for 0.2 s"]


def test_a_tracker_that_cannot_start_is_reported():
    events = []

    def missing():
        raise ModuleNotFoundError("No module named 'wandb'")

    some = trackers.Trackers(events.append)
    assert not some.start("Weights & Biases", missing)
    some.log({"loss/current": 1.0}, 1)
    assert "No module named" in events[0].message


@pytest.mark.proves("log_with")
@pytest.mark.parametrize(
    ("key", "value", "now"), [("wandb", True, "wandb"), ("use_wandb", "True", "wandb"), ("wandb", False, "")]
)
def test_the_switch_of_older_presets_chooses_weights_and_biases(key, value, now):
    assert kohya.read({key: value}).values == {"log_with": now}


@pytest.mark.proves("log_tracker_name")
def test_runs_of_one_name_have_curves_of_their_own(settings, tmp_path):
    from trainer import schema

    config = schema.parse(settings | {"logging_dir": str(tmp_path / "logs")})
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        started = trackers.start(config, Run(tmp_path / name), lambda event: None)
        started.log({"loss/current": 1.0}, 1)
        started.close()
    assert {p.parent.name for p in (tmp_path / "logs").rglob("events.out*")} == {"first", "second"}
