"""Which files of a run are deleted, and when."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.test_training import of_type, warnings
from trainer import loop, saving
from trainer.retention import Due, Retention
from trainer.schema.model import Saving
from trainer.schema.rules import LONGEST_NAME


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def listing(monkeypatch, folder):
    """After which step there were which files, as a training goes along."""
    seen = {}
    step = loop.take_step

    def look(session, number, batches):
        if folder.exists():
            seen[number - 1] = names(folder)
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", look)
    return seen


def at(*steps, kind=".safetensors"):
    return [f"photo-step{step:08d}{kind}" for step in steps]


@pytest.mark.proves("save_last_n_steps")
def test_files_older_than_the_last_n_steps_are_deleted(settings, train, tmp_path, monkeypatch):
    """The contract's example, a hundredth as long: of 6 steps each is saved, the last 3 are kept."""
    seen = listing(monkeypatch, tmp_path / "out")
    train(settings | {"save_every_n_steps": 1, "save_last_n_steps": 3, "save_every_n_epochs": 0})
    assert seen == {1: at(1), 2: at(1, 2), 3: at(1, 2, 3), 4: at(1, 2, 3, 4), 5: at(2, 3, 4, 5)}
    assert names(tmp_path / "out") == [*at(3, 4, 5), "photo.safetensors"]


@pytest.mark.proves("save_last_n_steps_state")
def test_states_have_their_own_number_of_last_steps(settings, train, tmp_path, monkeypatch):
    seen = listing(monkeypatch, tmp_path / "out")
    train(
        settings
        | {"save_every_n_steps": 1, "save_last_n_steps": 3, "save_last_n_steps_state": 1, "save_state": True}
        | {"save_every_n_epochs": 0, "max_train_steps": 6}
    )
    assert seen[3] == sorted(at(1, 2, 3) + at(2, 3, kind="-state"))
    assert seen[5] == sorted(at(2, 3, 4, 5) + at(4, 5, kind="-state"))


@pytest.mark.proves("save_last_n_epochs", "save_last_n_epochs_state")
@pytest.mark.parametrize(
    ("own", "kept"),
    [({}, ["photo-000003-state", "photo-000004-state"]), ({"save_last_n_epochs_state": 1}, ["photo-000004-state"])],
)
def test_the_newest_n_of_the_epochs_are_kept_and_states_follow_the_files(settings, train, tmp_path, own, kept):
    settings |= {"train_batch_size": 8, "epoch": 5, "save_every_n_epochs": 1, "save_state": True}
    train(settings | {"save_last_n_epochs": 2} | own)
    expected = ["photo-000003.safetensors", "photo-000004.safetensors", "photo.safetensors", *kept, "photo-state"]
    assert names(tmp_path / "out") == sorted(expected)


def test_what_another_run_wrote_is_never_deleted(settings, train, tmp_path):
    settings |= {"save_every_n_steps": 1, "save_every_n_epochs": 0, "save_state": True}
    train(settings | {"max_train_steps": 2})
    shutil.copy(tmp_path / "out" / at(1)[0], tmp_path / "out" / "photo-step00000099.safetensors")
    resumed = {"resume": str(tmp_path / "out" / at(1, kind="-state")[0]), "save_last_n_steps": 1, "max_train_steps": 5}
    _, events, _ = train(settings | resumed)
    assert of_type(events, "started")[0]["first_step"] == 2
    found = [name for name in names(tmp_path / "out") if not name.endswith("-state") and "-of-" not in name]
    # 1 and 99 are of the run before; of 2, 3 and 4 the resumed one deleted what was too old.
    assert found == [*at(1, 4, 99), "photo.safetensors"]
    assert at(1, kind="-state")[0] in names(tmp_path / "out")


def test_a_file_that_was_asked_for_in_between_stays(settings, train, tmp_path, monkeypatch):
    step = loop.take_step

    def ask(session, number, batches):
        if number == 1:
            session.run.request("save")
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", ask)
    train(settings | {"save_every_n_steps": 2, "save_last_n_steps": 1})
    assert names(tmp_path / "out") == [*at(1), "photo.safetensors"]


def test_a_file_that_someone_replaced_meanwhile_stays(tmp_path):
    kept = Retention(Saving(every_n_steps=1, last_n_steps=1))
    for number in (1, 2, 3):
        path = tmp_path / f"{number}"
        path.write_text("ours")
        kept.wrote(Due(path.name, "step", number), path)
        if number == 1:
            path.unlink()
            (tmp_path / "other").write_text("theirs")
            (tmp_path / "other").rename(path)
    assert names(tmp_path) == ["1", "2", "3"]
    kept.tidy("step", 4)
    assert names(tmp_path) == ["1", "3"]


@hypothesis_settings(deadline=None, max_examples=50)
@given(every=st.integers(1, 7), last=st.integers(1, 30), total=st.integers(1, 60))
def test_the_files_of_the_steps_are_those_that_sd_scripts_keeps(tmp_path_factory, every, last, total):
    folder = tmp_path_factory.mktemp("files")
    ours, theirs = Retention(Saving(every_n_steps=every, last_n_steps=last)), set()
    for step in range(every, total + 1, every):
        path = folder / str(step)
        path.touch()
        ours.wrote(Due(path.name, "step", step), path)
        theirs.add(step)
        # At step S it deletes the one at the largest multiple up to S − N − 1.
        theirs.discard((step - last - 1) // every * every)
        assert {int(p.name) for p in folder.iterdir()} == theirs


@pytest.mark.proves("save_last_n_epochs")
@hypothesis_settings(deadline=None, max_examples=50)
@given(every=st.integers(1, 5), last=st.integers(1, 9), total=st.integers(1, 30))
def test_the_files_of_the_epochs_are_those_that_sd_scripts_keeps(tmp_path_factory, every, last, total):
    folder = tmp_path_factory.mktemp("files")
    ours, theirs = Retention(Saving(every_n_epochs=every, last_n_epochs=last)), set()
    for epoch in range(every, total + 1, every):
        path = folder / str(epoch)
        path.touch()
        ours.wrote(Due(path.name, "epoch", epoch), path)
        theirs.add(epoch)
        theirs.discard(epoch - every * last)
        assert {int(p.name) for p in folder.iterdir()} == theirs


class KilledError(BaseException):
    """Ends a training at once."""


@pytest.fixture
def killed_at(monkeypatch):
    """Have a training end behind the file of each of these steps, before its state is written; each once."""

    def plan(*steps):
        left, save_state = set(steps), saving.save_state

        def end_or_save(session, step, due, **how):
            if step in left:
                left.remove(step)
                raise KilledError
            save_state(session, step, due, **how)

        monkeypatch.setattr(saving, "save_state", end_or_save)

    return plan


REGULARLY = {"save_every_n_steps": 2, "save_every_n_epochs": 0, "save_state": True, "max_train_steps": 12, "seed": 5}


def test_a_training_that_was_killed_twice_leaves_the_files_of_one_in_one_go(settings, train, tmp_path, killed_at):
    settings |= REGULARLY | {"save_last_n_steps": 2, "resume": "auto"}
    train(settings | {"output_dir": str(tmp_path / "whole")})
    killed_at(4, 8)
    for _ in range(3):
        train(settings)
    assert names(tmp_path / "out") == names(tmp_path / "whole")


def test_the_same_command_again_after_the_end_trains_nothing(settings, train, tmp_path):
    settings |= REGULARLY | {"resume": "auto"}
    train(settings)
    before = names(tmp_path / "out")
    code, events, folder = train(settings)
    assert code == 0 and of_type(events, "ended")[0]["status"] == "done" and not of_type(events, "step")
    assert of_type(events, "ended")[0]["path"] == str(tmp_path / "out" / "photo.safetensors")
    assert names(tmp_path / "out") == before and "nothing is left to train" in (folder / "log.txt").read_text()


def test_what_a_training_with_other_settings_wrote_behind_the_state_is_set_aside(settings, train, tmp_path, killed_at):
    settings |= REGULARLY
    killed_at(4)
    train(settings)
    state = str(tmp_path / "out" / at(2, kind="-state")[0])
    train(settings | {"resume": state, "unet_lr": 3e-4})
    aside = [name for name in names(tmp_path / "out") if "-of-" in name]
    assert len(aside) == 1 and aside[0].startswith("photo-step00000004-of-")


def test_the_longest_name_that_is_allowed_can_be_saved_under_with_states(settings, train, tmp_path):
    name = "x" * LONGEST_NAME
    code, _, _ = train(settings | REGULARLY | {"output_name": name, "max_train_steps": 2})
    assert code == 0 and f"{name}-state" in names(tmp_path / "out")


def test_an_image_that_is_gone_after_it_was_encoded_is_missed_by_no_state(settings, train, tmp_path, monkeypatch):
    step = loop.take_step

    def take_away(session, number, batches):
        for picture in session.feed.pictures[:1]:
            picture.path.unlink(missing_ok=True)
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", take_away)
    folder = shutil.copytree(settings["train_data_dir"], tmp_path / "images of its own")
    code, events, _ = train(settings | {"train_data_dir": str(folder), "save_state": True, "cache_latents": True})
    assert code == 0 and not warnings(events)
    assert any(event["what"] == "state" for event in of_type(events, "saved"))
