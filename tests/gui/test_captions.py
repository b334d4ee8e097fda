"""Editing captions: what changes, what never does, and the way back."""

from pathlib import Path

import pytest
from PIL import Image

from gui.captions import DONE, Captions, RefusedError, words_of
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
        ({"how": "add", "text": "zwx, cat, zwx"}, {"a": "zwx, cat, grey fur", "b": "zwx, cat, window\r\nsecond line\r\n", "c": "zwx, cat"}),
        ({"how": "remove", "text": "window, grey fur"}, {"a": "cat", "b": "cat\r\nsecond line\r\n", "c": None}),
        ({"how": "prefix", "text": "photo of"}, {"a": "photo of cat, grey fur", "b": "photo of cat, window\r\nsecond line\r\n", "c": "photo of cat"}),
        ({"how": "suffix", "text": ", window"}, {"a": "cat, grey fur, window", "b": None, "c": "cat, window"}),
        ({"how": "suffix", "text": "at night"}, {"a": "cat, grey fur at night", "b": "cat, window at night\r\nsecond line\r\n", "c": "cat at night"}),
        ({"how": "name"}, {"a": None, "b": None, "c": "c"}),
        ({"how": "name", "all": True}, {"a": "a", "b": "b\r\nsecond line\r\n", "c": "c"}),
        ({"how": "folder"}, {"a": None, "b": None, "c": "cat"}),
        ({"how": "folder", "all": True}, {"a": "cat", "b": "cat\r\nsecond line\r\n", "c": "cat"}),
    ],
)  # fmt: skip
def test_all_captions_change_at_once_and_come_back_byte_for_byte(captions, values, folder, order, after):
    before, seen = contents(folder), texts(folder)
    expected = {name: text if text is not None else seen.get(name) for name, text in after.items()}
    told = captions.edit(values, order)
    assert contents(folder) == before and captions.undoable() == ""  # only told, until it is sure
    assert captions.edit(values, {**order, "sure": True}) == told
    assert texts(folder) == {name: text for name, text in expected.items() if text is not None}
    assert captions.undoable().startswith(DONE[order["how"]] + " in ")
    assert captions.undo() == {"count": told["count"], "left": []}
    assert contents(folder) == before and captions.undoable() == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blue_cat-03", "blue cat"),
        ("001-blue-cat", "blue cat"),
        ("blue cat (2)", "blue cat"),
        ("cat, window_12_3", "cat, window"),
        ("00012", ""),
        ("2024_10", ""),
        ("sd15 cat4", "sd15 cat4"),
    ],
)
def test_a_files_name_is_words_without_the_numbers_around_them(name, words):
    assert words_of(name) == words


def test_a_flat_folders_own_name_is_the_caption_and_what_says_nothing_is_left_alone(captions, values, folder):
    flat = folder.parent / "zwx_bear"
    flat.mkdir()
    Image.new("RGB", (64, 64)).save(flat / "0001.png")
    values = values | {"train_data_dir": str(flat)}
    assert captions.edit(values, {"how": "name", "all": True, "sure": True})["count"] == 0
    assert captions.edit(values, {"how": "folder", "sure": True})["examples"] == [["0001.txt", "", "zwx bear"]]


def test_the_caption_file_is_the_trainers_whatever_the_case_of_its_name(captions, values, folder):
    (folder / "c.TXT").write_text("window")
    captions.edit(values, {"how": "prefix", "text": "zwx", "sure": True})
    assert (folder / "c.TXT").read_text() == "zwx window" and not (folder / "c.txt").exists()
    captions.edit(values, {"how": "prefix", "text": "zwx", "sure": True})  # a second time changes nothing
    assert (folder / "c.TXT").read_text() == "zwx window"


def test_tags_that_are_all_there_are_not_added_again(captions, values, folder):
    order = {"how": "add", "text": "zwx, roof", "sure": True}
    assert captions.edit(values, order)["count"] == 3
    assert texts(folder)["a"] == "zwx, roof, cat, grey fur"
    assert captions.edit(values, order)["count"] == 0


def test_an_image_without_captions_gets_its_own_file_and_not_that_of_another_in_other_case(captions, values, folder):
    Image.new("RGB", (64, 64)).save(folder / "A.PNG")
    if len(list(folder.glob("*.[pP][nN][gG]"))) < 4:
        pytest.skip("this file system knows no case")
    captions.edit(values, {"how": "write", "path": str(folder / "A.PNG"), "text": "new", "sure": True})
    assert texts(folder)["A"] == "new" and texts(folder)["a"] == "cat, grey fur"


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
        ({}, {"how": "add", "text": " , "}),
        ({}, {"how": "remove", "text": ","}),
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


def test_captions_of_a_folder_inside_the_roots_are_not_locked(captions, values):
    assert captions.locked(values) == ""


def test_a_file_that_is_no_text_stops_the_edit_before_anything_is_written(captions, values, folder):
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    before = contents(folder)
    with pytest.raises(RefusedError, match="UTF-8"):
        captions.edit(values, {"how": "add", "text": "x", "sure": True})
    assert contents(folder) == before


def test_the_pictures_that_come_along_keep_their_captions(captions, tmp_path):
    everywhere = Captions(Roots([Path("/")]), tmp_path / "backups")
    assert "part of this program" in everywhere.locked({"train_data_dir": "embedded:images"})
    assert captions.locked({"train_data_dir": str(tmp_path.parent)}).startswith(f'"{tmp_path.parent}" is outside')
    with pytest.raises(RefusedError, match="part of this program"):
        everywhere.edit({"train_data_dir": "embedded:images"}, {"how": "add", "text": "x"})
