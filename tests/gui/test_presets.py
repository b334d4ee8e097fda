import json
import os

import pytest

from gui.presets import Presets
from trainer.errors import ConfigError


@pytest.fixture
def shelf(tmp_path):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "first steps.json").write_text('{"network_dim": 4, "description": "hello"}')
    (tmp_path / "secret.json").write_text("{}")
    return Presets(tmp_path / "shipped", tmp_path / "own")


def test_own_presets_come_first_and_a_missing_folder_is_empty(shelf):
    assert shelf.ids() == ["shipped/first steps"]
    shelf.save("mine", {}, {})
    assert shelf.ids() == ["own/mine", "shipped/first steps"]


def test_a_saved_preset_comes_back_with_zero_false_and_blank_intact(shelf):
    values = {"seed": 0, "v2": False, "vae": "", "learning_rate": "1e-4"}
    saved = shelf.save("Zwö (2)", values, {"unknown_key": [1, None]})
    again = shelf.load(saved)
    assert again.values == values and again.kept == {"unknown_key": [1, None]}


def test_secrets_are_not_written(shelf):
    saved = shelf.save("x", {}, {"wandb_api_key": "k", "huggingface_token": "t"})
    assert json.loads(shelf.path(saved).read_text()) == {}


def test_saving_by_a_shipped_name_leaves_the_shipped_one_alone(shelf):
    assert shelf.save("first steps", {"network_dim": 9}, {}) == "own/first steps"
    assert shelf.load("shipped/first steps").values == {"network_dim": 4}


@pytest.mark.parametrize("name", ["", "../secret", "a/b", ".hidden", "a\\b", "x" * 81, "nul\0"])
def test_a_name_cannot_leave_the_shelf(shelf, name):
    with pytest.raises(ConfigError):
        shelf.save(name, {}, {})
    with pytest.raises(ConfigError):
        shelf.load(f"own/{name}")
    with pytest.raises(ConfigError):
        shelf.load(f"elsewhere/{name}")


def test_files_whose_names_cannot_be_listed_are_told(shelf, tmp_path):
    assert shelf.misnamed() == []
    shelf.save("mine", {}, {})
    for name in (b"a&b.json", b"k\xf6.json"):
        (tmp_path / "own" / os.fsdecode(name)).write_text("{}")
    assert shelf.misnamed() == ["a&b.json", "k?.json"] and shelf.ids() == ["own/mine", "shipped/first steps"]


def test_only_ones_own_presets_are_deleted(shelf, tmp_path):
    shelf.delete(shelf.save("mine", {}, {}))
    assert shelf.ids() == ["shipped/first steps"]
    for name, message in (
        ("shipped/first steps", "comes with the program"),
        ("own/mine", "cannot be deleted"),
        ("own/../secret", "cannot be a name"),
    ):
        with pytest.raises(ConfigError, match=message):
            shelf.delete(name)
    assert shelf.ids() == ["shipped/first steps"] and (tmp_path / "secret.json").exists()


def test_a_file_that_is_no_preset_is_told(shelf, tmp_path):
    (tmp_path / "shipped" / "bad.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not an object"):
        shelf.load("shipped/bad")


def test_a_folder_that_cannot_be_written_is_told(shelf, tmp_path):
    (tmp_path / "own").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="cannot be written"):
        shelf.save("x", {}, {})
