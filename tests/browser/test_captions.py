"""The Dataset tab's captions, edited by hand and all at once."""

import shutil

import pytest
from PIL import Image

from tests.browser.conftest import eventually, open_tab, set_text


@pytest.fixture
def cats(server):
    folder = server.runs.parent / "files" / "pictures" / "10_cat"
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(("cat, grey fur", "cat, window", "cat, grey wall")):
        Image.new("RGB", (96 + 32 * i, 96), (90, 120, 60 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.caption").write_text(caption)
    return folder


def texts(folder):
    return [path.read_text() for path in sorted(folder.glob("*.caption"))]


def test_captions_are_edited_one_by_one_and_all_at_once_and_taken_back(page, cats):
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(cats.parent))
    open_tab(page, "Dataset")
    box = page.get_by_label("Caption of 10_cat/0.png")
    assert box.input_value() == "cat, grey fur"
    box.fill("cat, red fur")
    box.press("Enter")
    eventually(lambda: texts(cats)[0] == "cat, red fur")
    page.wait_for_selector("#lw-tags >> text=red fur")

    page.get_by_label("What to do in all captions").select_option("replace")
    page.get_by_label("Text or tag").fill("cat")
    page.get_by_label("Replace it by").fill("zwx cat")
    page.get_by_role("button", name="Change…").click()
    assert "cat, red fur → zwx cat, red fur" in page.locator("dialog").inner_text()
    assert texts(cats)[0] == "cat, red fur"
    page.locator("dialog").get_by_role("button", name="Change", exact=True).click()
    eventually(lambda: texts(cats) == ["zwx cat, red fur", "zwx cat, window", "zwx cat, grey wall"])
    page.wait_for_function(
        "() => document.querySelector('[aria-label=\"Caption of 10_cat/1.png\"]').value === 'zwx cat, window'"
    )
    page.get_by_role("button", name="Undo: text replaced in 3 caption files").click()
    eventually(lambda: texts(cats) == ["cat, red fur", "cat, window", "cat, grey wall"])
    page.get_by_role("button", name="Undo: what was typed in 1 caption file").click()
    eventually(lambda: texts(cats)[0] == "cat, grey fur")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_before_many_captions_change_it_is_said_how_many_are_not_listed_and_where_the_backup_goes(server, page, cats):
    folder = cats.with_name("1_many")
    folder.mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (96, 96)).save(folder / f"{i}.png")
        (folder / f"{i}.caption").write_text("cat")
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(cats.parent))
    open_tab(page, "Dataset")
    page.get_by_label("Caption of 10_cat/0.png").wait_for()
    page.get_by_label("What to do in all captions").select_option("replace")
    page.get_by_label("Text or tag").fill("cat")
    page.get_by_label("Replace it by").fill("dog")
    page.get_by_role("button", name="Change…").click()
    told = page.locator("dialog").inner_text()
    assert "Change 7 captions?" in told and told.count("→") == 5 and "and 2 more" in told
    assert f"A backup is made first, in {server.runs / 'captions'}." in told
    page.get_by_role("button", name="Leave them").click()
    shutil.rmtree(folder)


def test_captions_outside_the_roots_cannot_be_typed_over_and_it_is_said_why(page, tmp_path):
    folder = tmp_path / "1_dog"
    folder.mkdir()
    Image.new("RGB", (96, 96)).save(folder / "d.png")
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(tmp_path))
    open_tab(page, "Dataset")
    page.wait_for_selector("#lw-dataset-problems >> text=outside the folders that this page may change")
    assert page.get_by_label("Caption of 1_dog/d.png").get_attribute("readonly") is not None


def test_a_caption_that_is_being_typed_when_the_page_is_left_is_kept(page, cats):
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(cats.parent))
    open_tab(page, "Dataset")
    page.get_by_label("Caption of 10_cat/0.png").fill("cat, half-typed")
    page.reload()
    eventually(lambda: texts(cats)[0] == "cat, half-typed")
    assert texts(cats)[1:] == ["cat, window", "cat, grey wall"]


def test_a_caption_that_was_not_kept_stands_until_it_can_be(page, cats, tmp_path):
    file = cats / "0.caption"
    text = file.read_text()
    file.rename(tmp_path / "elsewhere.caption")
    file.symlink_to(tmp_path / "elsewhere.caption")
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(cats.parent))
    open_tab(page, "Dataset")
    box = page.get_by_label("Caption of 10_cat/0.png")
    box.fill("wolf")
    box.press("Enter")
    page.wait_for_selector("#lw-banner >> text=is a link")
    assert box.input_value() == "wolf"
    assert (tmp_path / "elsewhere.caption").read_text() == text
    file.unlink()
    box.fill("grey wolf")
    box.press("Enter")
    page.wait_for_function("!document.querySelector('#lw-banner').textContent")
    assert file.read_text() == "grey wolf"


def test_a_look_at_the_pixels_finds_the_copy(page, tmp_path):
    folder = tmp_path / "1_dog"
    folder.mkdir()
    Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 20).save(folder / "a.png")
    Image.open(folder / "a.png").resize((80, 80)).save(folder / "b.png")
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(tmp_path))
    open_tab(page, "Dataset")
    page.get_by_label("Caption of 1_dog/b.png").wait_for()
    page.get_by_role("button", name="Look for damage and duplicates").click()
    page.wait_for_selector("#lw-inspected >> text=1_dog/a.png ~ 1_dog/b.png")
