"""The Dataset tab from a zip on the visitor's machine to what the trainer sees of it."""

import io
import zipfile

from PIL import Image

from tests.browser.conftest import eventually, open_tab, set_text


def packed(*names):
    data, image = io.BytesIO(), io.BytesIO()
    Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(image, "PNG")
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, image.getvalue() if name.endswith(".png") else "zwx, " + "long " * 90)
    return {"name": "cats.zip", "mimeType": "application/zip", "buffer": data.getvalue()}


def test_a_zip_becomes_a_data_set_whose_captions_are_written_and_seen_as_the_trainer_does(server, page):
    root = server.runs.parent / "files"
    open_tab(page, "Dataset")
    page.set_input_files("#lw-upload-file", packed("../a.png"))
    page.get_by_role("button", name="Upload", exact=True).click()
    page.wait_for_selector("#lw-upload-told.lw-wrong >> text=leads out")

    page.set_input_files(
        "#lw-upload-file", packed("10_cat/blue_cat-01.png", "10_cat/b.png", "10_cat/b.caption", "10_cat/c.exe")
    )
    page.wait_for_function("() => document.getElementById('lw-upload-target').value.endsWith('cats')")
    page.get_by_role("button", name="Upload", exact=True).click()
    page.wait_for_selector("#lw-upload-told >> text=2 images and 1 caption file are in")
    assert "c.exe" in page.inner_text("#lw-upload-told")
    assert not (root / "datasets" / "cats" / "10_cat" / "c.exe").exists()
    page.get_by_role("button", name="Use it as the image folder").click()
    page.get_by_label("Caption of 10_cat/blue_cat-01.png").wait_for()
    assert "93 tokens, cut: long" in page.inner_text("#lw-images")

    page.get_by_label("What to do in all captions").select_option("name")
    page.get_by_role("button", name="Change…").click()
    page.locator("dialog").get_by_role("button", name="Change", exact=True).click()
    eventually(lambda: (root / "datasets" / "cats" / "10_cat" / "blue_cat-01.caption").exists())
    assert (root / "datasets" / "cats" / "10_cat" / "blue_cat-01.caption").read_text() == "blue cat"

    page.get_by_role("button", name="Draw for the first steps").click()
    page.wait_for_selector("#lw-draws img", timeout=60000)
    seen = page.inner_text("#lw-draws")
    assert "blue cat" in seen and "18 tokens cut" in seen and "step 1" in seen and "step 8" in seen
    page.get_by_role("button", name="Other draws").click()
    page.wait_for_selector("#lw-draws >> text=step 9 ", timeout=60000)
    page.get_by_label("Caption of 10_cat/blue_cat-01.png").fill("red cat")
    page.get_by_label("Caption of 10_cat/blue_cat-01.png").press("Enter")
    page.wait_for_selector("#lw-draws-told >> text=Captions have changed since these were drawn")
    page.get_by_role("button", name="Draw for the first steps").click()
    page.wait_for_selector("#lw-draws >> text=red cat", timeout=60000)
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", "embedded:images")
    open_tab(page, "Dataset")
    page.wait_for_selector("#lw-draws-told >> text=The form has changed since these were drawn")
    page.wait_for_selector("#lw-dataset-problems >> text=is part of this program")
    caption = page.locator(".lw-caption").first
    assert caption.get_attribute("readonly") is not None
    assert page.locator("#lw-captions").is_hidden()
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def show(page, folder):
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", str(folder))
    open_tab(page, "Dataset")


def test_images_that_cannot_be_read_are_left_out_of_the_sum_and_found_by_the_look_for_damage(page, tmp_path):
    folder = tmp_path / "10_thing"
    folder.mkdir()
    Image.new("RGB", (64, 64), "teal").save(folder / "a.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.jpg").write_text("words")
    show(page, tmp_path)
    page.wait_for_selector("#lw-dataset-sum >> text=1 × 10 (10_thing, 2 unreadable) = 10 images an epoch")
    page.get_by_role("button", name="Look for damage and duplicates").click()
    page.wait_for_selector("#lw-inspected >> text=Damaged (2)")


def test_every_image_of_a_large_data_set_can_be_found_and_its_caption_written(page, server):
    folder = server.runs.parent / "files" / "many" / "1_thing"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "teal").save(folder / "0.png")
    for number in range(1, 2010):
        (folder / f"{number}.png").hardlink_to(folder / "0.png")
    (folder / "2009.caption").write_text("the last")
    show(page, folder.parent)
    page.wait_for_selector("#lw-dataset-count >> text=2000 of 2010 images · 10 more are not listed")
    page.get_by_label("Find in captions and names").fill("2009.png")
    page.wait_for_selector("#lw-dataset-count >> text=/^1 of 2010 images · the frame/")
    page.get_by_label("Caption of 1_thing/2009.png").fill("thing, far")
    page.get_by_label("Find in captions and names").fill("")
    page.wait_for_selector("#lw-dataset-count >> text=2000 of 2010 images")
    assert (folder / "2009.caption").read_text() == "thing, far"
    page.get_by_role("button", name="far 1").click()
    page.wait_for_selector("#lw-dataset-count >> text=/^1 of 2010 images · the frame/")
    page.get_by_role("button", name="far 1").click()
    page.get_by_label("Find in captions and names").fill("no such name")
    page.wait_for_selector("#lw-dataset-count >> text=/^0 of 2010 images/")
    page.get_by_label("Find in captions and names").fill("")
    page.wait_for_selector("#lw-dataset-count >> text=2000 of 2010 images")
