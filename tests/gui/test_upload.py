"""Zips from elsewhere: what is unpacked, and what a hostile one cannot do."""

import base64
import io
import os
import stat
import threading
import zipfile
import zlib

import pytest
from PIL import Image

from gui import upload
from gui.files import Roots
from gui.upload import Uploads
from trainer.errors import DataError


def picture():
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


PICTURE = picture()


def packed(files, change=lambda info: None):
    """A zip's bytes; `change` may alter what it says of each file before it is written."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.filename = info.orig_filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, content)
    return data.getvalue()


@pytest.fixture
def uploads(tmp_path):
    (tmp_path / "root").mkdir()
    return Uploads(Roots([tmp_path / "root"]), tmp_path / "runs" / "uploads")


def send(uploads, data, target, piece=1000):
    sent = uploads.begin(len(data), str(target))["id"]
    for start in range(0, len(data), piece):
        uploads.add(sent, start, base64.b64encode(data[start : start + piece]).decode())
    return uploads.unpack(sent, str(target))


def refused(uploads, data, target, words):
    with pytest.raises(DataError, match=words):
        send(uploads, data, target)
    top = target.parent.parent if target.parent.name == "datasets" else target.parent
    assert list(top.rglob("*")) in ([], [top / "datasets"]), "nothing is left behind"
    assert list(uploads.folder.iterdir()) == []


@pytest.fixture
def target(tmp_path):
    return tmp_path / "root" / "datasets" / "cats"


def test_images_and_captions_arrive_byte_for_byte_and_the_rest_is_named(uploads, target):
    files = [
        ("cats/10_cat/ä 1.png", PICTURE),
        ("cats/10_cat/ä 1.txt", b"Katze"),
        ("cats/10_cat/notes.pdf", b"x"),
        ("cats/10_cat/run.sh", b"x"),
        ("__MACOSX/cats/10_cat/._a.png", b"x"),
        ("cats/.DS_Store", b"x"),
    ]
    found = send(uploads, packed(files), target)
    inner = target / "cats"
    assert found == {
        "folder": str(inner), "images": 1, "captions": 1, "left_out": 2,
        "examples": ["cats/10_cat/notes.pdf", "cats/10_cat/run.sh"],
    }  # fmt: skip
    assert {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()} == dict(
        files[:2]
    )
    assert list(uploads.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["10_cat/a.png"], "."),
        (["a.png"], "."),
        (["x/y/10_cat/a.png", "x/y/1_dog/a.png"], "x/y"),
        (["cats/a.png"], "cats"),
    ],
)
def test_the_folder_to_train_on_is_the_one_around_the_image_folders(uploads, target, names, folder):
    found = send(uploads, packed([(name, PICTURE) for name in names]), target)
    assert found["folder"] == str(target / folder)


@pytest.fixture
def slowly(monkeypatch):
    """Unpacking waits for this before its second file, and whoever asks gets an answer at once."""
    monkeypatch.setattr(upload, "ANSWERED_WITHIN_S", 0.01)
    go_on, write = threading.Event(), upload._write

    def late(archive, info, path):
        write(archive, info, path)
        assert go_on.wait(10)

    monkeypatch.setattr(upload, "_write", late)
    yield go_on
    go_on.set()


def asked_until(uploads, sent, target, true):
    for _ in range(1000):
        if true(answer := uploads.unpack(sent, str(target))):
            return answer
    raise AssertionError(answer)


def test_a_large_zip_is_unpacked_beside_and_asked_after_until_it_is_done(uploads, target, slowly):
    data = packed([("a.png", PICTURE), ("b.png", PICTURE)])
    sent = uploads.begin(len(data), str(target))["id"]
    uploads.add(sent, 0, base64.b64encode(data).decode())
    asked_until(uploads, sent, target, lambda answer: answer == {"done": 0, "total": 2})
    slowly.set()
    assert asked_until(uploads, sent, target, lambda answer: "folder" in answer)["images"] == 2
    assert uploads.unpack(sent, str(target))["images"] == 2, "the answer may have been lost on its way"


def test_unpacking_that_is_given_up_leaves_nothing(uploads, target, slowly):
    data = packed([("a.png", PICTURE), ("b.png", PICTURE)])
    sent = uploads.begin(len(data), str(target))["id"]
    uploads.add(sent, 0, base64.b64encode(data).decode())
    asked_until(uploads, sent, target, lambda answer: answer["total"] == 2)
    uploads.drop(sent)
    slowly.set()
    with pytest.raises(DataError, match="given up"):
        asked_until(uploads, sent, target, lambda answer: "folder" in answer)
    assert not list(target.parent.iterdir()) and not list(uploads.folder.iterdir())


def test_a_piece_that_comes_twice_counts_once(uploads, target):
    data = packed([("a.png", PICTURE)])
    sent = uploads.begin(len(data), str(target))["id"]
    whole = base64.b64encode(data).decode()
    assert uploads.add(sent, 0, whole) == uploads.add(sent, 0, whole) == {"offset": len(data)}
    assert uploads.unpack(sent, str(target))["images"] == 1


def test_a_folder_that_exists_is_left_as_it_is_and_another_name_is_offered(uploads, target, tmp_path):
    assert uploads.place("cats.zip")["folder"] == str(target)
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    assert uploads.place("cats.zip")["folder"] == f"{target}-2"
    assert uploads.place("../../x y;$.zip")["folder"] == str(tmp_path / "root" / "datasets" / "x y")
    with pytest.raises(DataError, match="exists already"):
        send(uploads, packed([("a.png", PICTURE)]), target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_it_does_not_overwrite_a_folder_that_came_in_the_meantime(uploads, target):
    data = packed([("a.png", PICTURE)])
    sent = uploads.begin(len(data), str(target))["id"]
    uploads.add(sent, 0, base64.b64encode(data).decode())
    target.mkdir(parents=True)
    with pytest.raises(DataError, match="exists already"):
        uploads.unpack(sent, str(target))


@pytest.mark.parametrize("where", ["../outside", "/etc/cats", "", "~root/cats", "out/cats", "datasets/\0"])
def test_only_folders_in_the_roots_are_written_to(uploads, tmp_path, where):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"outside|Enter"):
        uploads.begin(10, where if where.startswith(("/", "~")) or not where else str(tmp_path / "root" / where))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "\\\\host\\a.png", "C:a.png"]
)
def test_names_that_lead_out_are_refused(uploads, target, name):
    refused(uploads, packed([("fine.png", PICTURE), (name, PICTURE)]), target, "leads out")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_are_refused(uploads, target, kind):
    def change(info):
        info.external_attr = (kind | 0o777) << 16

    refused(uploads, packed([("a.png", b"/etc/passwd")], change), target, "link or no regular file")


def test_bombs_are_refused_before_they_are_unpacked(uploads, target, monkeypatch):
    zeros = bytes(8 * 1024**2)
    refused(uploads, packed([("a.png", zeros)]), target, "200 times larger")
    monkeypatch.setattr(upload, "MOST_FILE", 1000)
    refused(uploads, packed([("a.png", os.urandom(2000))]), target, "unpacked")
    monkeypatch.setattr(upload, "MOST_UNPACKED", 1500)
    refused(uploads, packed([("a.png", os.urandom(900)), ("b.png", os.urandom(900))]), target, "Unpacked")
    monkeypatch.setattr(upload, "MOST_ENTRIES", 3)
    refused(uploads, packed([(f"{i}.png", PICTURE) for i in range(4)]), target, "4 entries")


def test_a_list_of_entries_without_end_is_not_even_read(uploads, target, monkeypatch):
    monkeypatch.setattr(upload, "MOST_INDEX", 70_000)
    refused(uploads, packed([(f"{i:0200}.png", b"") for i in range(400)]), target, "list of entries is too long")


def test_a_zip_that_lies_about_a_files_size_gets_no_more_room_than_it_announced(uploads, target):
    """The list says 100 bytes; the data behind it unpack to 4 megabytes."""
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = bomb.compress(bytes(4 * 1024**2)) + bomb.flush()
    data = packed([("a.png", content)], lambda info: setattr(info, "compress_type", zipfile.ZIP_STORED))
    ends = data.index(b"PK\x01\x02")
    local, central = bytearray(data[:ends]), bytearray(data[ends:])
    for part, at in ((local, 8), (central, 10)):
        part[at : at + 2] = (8).to_bytes(2, "little")
        part[at + 14 : at + 18] = (100).to_bytes(4, "little")
    refused(uploads, bytes(local + central), target, "cannot be read")


def test_encrypted_damaged_and_cut_off_zips_are_told_apart(uploads, target):
    data = packed([("a.png", os.urandom(5000))])
    refused(uploads, data[: len(data) // 2], target, "cannot be read: file is not a zip")
    damaged = bytearray(data)
    damaged[1000] ^= 255
    refused(uploads, bytes(damaged), target, "cannot be read")
    refused(uploads, data[:100] + data[1100:], target, "cannot be read")
    refused(uploads, b"", target, "cannot be read")
    encrypted = bytearray(data)
    encrypted[6] |= 1
    encrypted[data.index(b"PK\x01\x02") + 8] |= 1
    refused(uploads, bytes(encrypted), target, "encrypted")


def test_other_packings_are_refused(uploads, target):
    data = packed([("a.png", PICTURE)], lambda info: setattr(info, "compress_type", zipfile.ZIP_LZMA))
    refused(uploads, data, target, "Deflate")


@pytest.mark.parametrize("names", [("a.png", "a.png"), ("\u00e9.png", "e\u0301.png"), ("x\\a.png", "x/a.png")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(uploads, target, names):
    refused(uploads, packed([(name, PICTURE) for name in names]), target, "twice")


def test_two_names_that_differ_in_their_case_alone_are_both_told(uploads, target):
    files = packed([("x/A.png", PICTURE), ("x/a.PNG", PICTURE)])
    refused(uploads, files, target, '"x/A.png" and "x/a.PNG", which differ in nothing but capital letters')


def test_a_zip_that_holds_nothing_is_not_called_damaged(uploads, target):
    refused(uploads, packed([]), target, "The zip holds nothing")


def test_a_file_that_is_also_a_folder_is_refused(uploads, target):
    refused(uploads, packed([("a.png", PICTURE), ("a.png/b.png", PICTURE)]), target, "cannot be written")


def test_names_in_other_encodings_are_safe_and_utf8_is_understood_without_its_mark(uploads, target):
    data = packed([("10_x/\u732b.png", PICTURE), ("10_x/\u732b.txt", b"cat")])
    unmarked = bytearray(data)
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        at = unmarked.find(mark)
        while at >= 0:
            unmarked[at + (7 if mark[2] == 3 else 9)] &= ~8
            at = unmarked.find(mark, at + 4)
    assert send(uploads, bytes(unmarked), target)["images"] == 1
    assert (target / "10_x" / "\u732b.txt").read_bytes() == b"cat"
    japanese = bytes(unmarked).replace("\u732b".encode(), "\u732b".encode("shift_jis") + b"x")
    assert send(uploads, japanese, target.with_name("more"))["images"] == 1
    with pytest.raises(DataError, match="cannot be read"):  # says that it is UTF-8, and is not
        send(uploads, data.replace("\u732b".encode(), b"\xff\xfe\xfd"), target.with_name("bad"))


@pytest.mark.parametrize("name", ["a\x07.png", "a\n.png", "x\x1b[2J/a.png"])
def test_names_with_control_characters_are_refused(uploads, target, name):
    refused(uploads, packed([(name, PICTURE)]), target, "no name for a file")


def test_a_zip_without_images_is_refused(uploads, target):
    refused(uploads, packed([("10_cat/a.txt", b"cat")]), target, "no images")


def test_no_more_is_taken_than_allowed_nor_than_the_disk_has(uploads, target, monkeypatch):
    with pytest.raises(DataError, match="are the most"):
        uploads.begin(upload.MOST_BYTES + 1, str(target))
    monkeypatch.setattr(upload, "SPARE", 10**18)
    with pytest.raises(DataError, match="disk has"):
        uploads.begin(1, str(target))
    monkeypatch.setattr(upload, "SPARE", 0)
    monkeypatch.setattr(upload, "MOST_BYTES", 10)
    sent = uploads.begin(5, str(target))["id"]
    with pytest.raises(DataError, match="which are the most"):
        uploads.add(sent, 0, base64.b64encode(bytes(11)).decode())


@pytest.mark.parametrize("name", ["", "../x", "0" * 31, "/etc/passwd", "0" * 32])
def test_uploads_that_never_began_are_refused(uploads, target, name):
    for step in (lambda: uploads.add(name, 0, "AAAA"), lambda: uploads.unpack(name, str(target))):
        with pytest.raises(DataError, match="Send the zip again"):
            step()


def test_what_was_given_up_is_forgotten_after_some_hours(uploads, target):
    sent = uploads.begin(10, str(target))["id"]
    part = uploads.folder / f"{sent}.part"
    os.utime(part, (0, 0))
    uploads.begin(10, str(target))
    assert not part.exists()
