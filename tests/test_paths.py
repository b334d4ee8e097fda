"""What entered paths mean."""

from pathlib import Path

import pytest

from trainer.errors import LorawrightError
from trainer.paths import DEMO, absent, base_model, resolve, shown


def test_the_home_folder_blanks_and_quotes_around_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve("~/cats") == Path("/home/me/cats")
    assert resolve('  "/data/my cats" ') == Path("/data/my cats")
    assert resolve("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_embedded_paths_stay_inside_the_package():
    assert resolve("embedded:images") == DEMO / "images"
    assert resolve("embedded:images/../base.safetensors") == DEMO / "base.safetensors"
    assert resolve("embedded:/etc/passwd") == DEMO / "etc" / "passwd"
    for text in ("embedded:..", "embedded:../secret", "embedded:images/../../../x"):
        with pytest.raises(LorawrightError, match="leaves the folder"):
            resolve(text)


def test_without_a_base_model_the_embedded_one_is_meant():
    assert base_model("") == base_model("  ") == DEMO / "base.safetensors"
    assert base_model("/m/x.safetensors") == Path("/m/x.safetensors")


def test_a_missing_path_is_told_by_what_exists_of_it(tmp_path):
    message = absent(str(tmp_path / "a" / "b"), "folder")
    assert (
        message == f'there is no folder "{tmp_path / "a" / "b"}"; of its path, "{tmp_path}" exists. Correct the path.'
    )


def test_any_path_can_be_shown():
    assert shown("/a/\udce9") == "/a/\\udce9"
    assert shown("/a/\ud800") == "/a/\\ud800"
    assert shown("a\0b") == "a\\0b"
    assert shown("/été") == "/été"
    assert shown("a\nb\t\x1b[31m") == r"a\nb\t\x1b[31m", "orders to a terminal do nothing"
