"""Editing captions: what changes, what never does, and the way back."""

from pathlib import Path

import pytest
from PIL import Image

from gui.captions import Captions, RefusedError
from gui.files import Roots


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images" / "10_cat"
    images.mkdir(parents=True)
    for name, caption in {"a": "cat, grey fur", "b": "\ufeffcat, window\r\nsecond line\r\n", "c": None}.items():
        Image.new("RGB", (64, 64)).save(images / f"{name}.png")
        if caption is not None:
            (images / f"{name}.txt").write_bytes(caption.encode())
    return images


@pytest.fixture
def captions(tmp_path, folder):
    return Captions(Roots([tmp_path / "images"]), tmp_path / "runs" / "captions")


@pytest.fixture
def values(folder):
    return {"train_data_dir": str(folder.parent), "caption_extension": ".txt"}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts(folder):
    return {path.stem: path.read_bytes().decode() for path in sorted(folder.glob("*.txt"))}


def test_one_caption_is_written_and_the_lines_below_it_stay(captions, values, folder):
    order = {"how": "write", "path": str(folder / "b.png"), "text": " cat,\n door ", "sure": True}
    assert captions.edit(values, order)["count"] == 1
    assert texts(folder) == {"a": "cat, grey fur", "b": "cat, door\r\nsecond line\r\n"}
    captions.edit(values, {"how": "write", "path": str(folder / "c.png"), "text": "new", "sure": True})
    assert texts(folder)["c"] == "new"


@pytest.mark.parametrize(
    ("order", "after"),
    [
        ({"how": "replace", "find": "grey", "by": "blue"}, {"a": "cat, blue fur", "b": None, "c": None}),
        ({"how": "remove", "text": "cat"}, {"a": "grey fur", "b": "window\r\nsecond line\r\n", "c": None}),
        ({"how": "add", "text": "zwx"}, {"a": "zwx, cat, grey fur", "b": "zwx, cat, window\r\nsecond line\r\n", "c": "zwx, cat"}),
        ({"how": "add", "text": "window", "end": True}, {"a": "cat, grey fur, window", "b": None, "c": "cat, window"}),
    ],
)  # fmt: skip
def test_all_captions_change_at_once_and_come_back_byte_for_byte(captions, values, folder, order, after):
    before, seen = contents(folder), texts(folder)
    expected = {name: text if text is not None else seen.get(name) for name, text in after.items()}
    told = captions.edit(values, order)
    assert contents(folder) == before and captions.undoable() == ""  # only told, until it is sure
    assert captions.edit(values, {**order, "sure": True}) == told
    assert texts(folder) == {name: text for name, text in expected.items() if text is not None}
    assert captions.undoable().startswith(order["how"])
    assert captions.undo() == {"count": told["count"], "left": []}
    assert contents(folder) == before and captions.undoable() == ""


def test_edits_are_taken_back_one_by_one_and_by_another_server_too(captions, values, folder, tmp_path):
    before = contents(folder)
    for tag in ("one", "two"):
        captions.edit(values, {"how": "add", "text": tag, "sure": True})
    other = Captions(captions.roots, captions.backups)
    other.undo()
    assert texts(folder)["a"] == "one, cat, grey fur"
    other.undo()
    assert contents(folder) == before
    with pytest.raises(RefusedError):
        other.undo()


def test_what_others_changed_since_is_left_alone_by_undo(captions, values, folder):
    captions.edit(values, {"how": "add", "text": "zwx", "sure": True})
    (folder / "a.txt").write_text("by hand")
    assert captions.undo() == {"count": 2, "left": ["a.txt"]}
    assert (folder / "a.txt").read_text() == "by hand" and not (folder / "c.txt").exists()


def test_regularisation_images_keep_their_captions_when_all_change(captions, values, folder):
    others = folder.parent.parent / "images" / "reg" / "1_animal"
    others.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(others / "r.png")
    values = {**values, "train_data_dir": str(folder), "reg_data_dir": str(others.parent)}
    captions.edit({**values, "train_data_dir": str(folder.parent)}, {"how": "add", "text": "zwx", "sure": True})
    assert texts(folder)["a"].startswith("zwx") and texts(others) == {}


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"caption_extension": ".png"}, {"how": "add", "text": "zwx"}),
        ({"caption_extension": ".py"}, {"how": "add", "text": "zwx"}),
        ({"caption_extension": "/../../x.txt"}, {"how": "add", "text": "zwx"}),
        ({}, {"how": "write", "path": "/etc/passwd", "text": "x"}),
        ({}, {"how": "write", "path": "images/10_cat/../../x.png", "text": "x"}),
        ({}, {"how": "format", "text": "x"}),
        ({}, {"how": "replace", "find": ""}),
        ({}, {"how": "add", "text": "x" * 10_001}),
    ],
)
def test_forged_orders_change_nothing(captions, values, tmp_path, changes, order):
    before = contents(tmp_path)
    with pytest.raises(RefusedError):
        captions.edit(values | changes, {**order, "sure": True})
    assert contents(tmp_path) == before


def test_folders_outside_the_roots_and_links_are_not_written(captions, values, folder, tmp_path):
    outside = tmp_path / "outside" / "1_dog"
    outside.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(outside / "d.png")
    (outside / "d.txt").write_text("dog")
    before = contents(tmp_path)
    with pytest.raises(RefusedError, match="outside"):
        captions.edit(values | {"train_data_dir": str(outside.parent)}, {"how": "add", "text": "x", "sure": True})
    (folder / "c.txt").symlink_to(outside / "d.txt")
    with pytest.raises(RefusedError, match="link"):
        captions.edit(values, {"how": "add", "text": "x", "sure": True})
    (folder / "c.txt").unlink()
    assert contents(tmp_path) == before


def test_a_file_that_is_no_text_stops_the_edit_before_anything_is_written(captions, values, folder):
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    before = contents(folder)
    with pytest.raises(RefusedError, match="UTF-8"):
        captions.edit(values, {"how": "add", "text": "x", "sure": True})
    assert contents(folder) == before


def test_the_pictures_that_come_along_keep_their_captions(captions, tmp_path):
    everywhere = Captions(Roots([Path("/")]), tmp_path / "backups")
    with pytest.raises(RefusedError, match="part of this program"):
        everywhere.edit({"train_data_dir": "embedded:images"}, {"how": "add", "text": "x"})
