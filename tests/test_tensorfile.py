"""Headers of .safetensors files, sound and not."""

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save

from trainer.errors import ModelError
from trainer.tensorfile import header

TENSORS = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros((2,), np.float16), "scalar": np.array(1.0)}
SOUND = save(TENSORS, {"title": "été"})


def written(folder, content):
    path = folder / "model ü.safetensors"
    path.write_bytes(content)
    return path


def made(entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_names_shapes_dtypes_and_metadata_are_those_of_the_safetensors_library(tmp_path):
    found = header(written(tmp_path, SOUND))
    assert found.metadata == {"title": "été"}
    assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == {
        "a.weight": ("F32", (3, 4)),
        "b": ("F16", (2,)),
        "scalar": ("F64", ()),
    }


def test_a_file_without_metadata_or_tensors_is_sound(tmp_path):
    assert header(written(tmp_path, save({}))).tensors == {}


@pytest.mark.parametrize("mark", [b"\x80\x02", b"\x80\x04", b"\x1f\x8b"])
def test_a_header_whose_length_looks_like_another_format_is_sound(tmp_path, mark):
    text = b"{}".ljust(int.from_bytes(mark, "little"))
    assert header(written(tmp_path, struct.pack("<Q", len(text)) + text)).tensors == {}


def test_a_missing_file_a_folder_and_an_empty_file_are_told_apart(tmp_path):
    with pytest.raises(ModelError, match="There is no file"):
        header(tmp_path / "nothing.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        header(tmp_path)
    with pytest.raises(ModelError, match="is empty"):
        header(written(tmp_path, b""))


def test_other_formats_are_named(tmp_path):
    def refused(content):
        with pytest.raises(ModelError) as caught:
            header(written(tmp_path, content))
        assert caught.value.hint
        return caught.value.message

    archive = tmp_path / "model.ckpt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    assert "PyTorch checkpoint" in refused(archive.read_bytes())
    assert "pickle" in refused(pickle.dumps({"state_dict": {}}))
    assert "git-lfs pointer" in refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "web page" in refused(b"\n<!DOCTYPE html><html>403</html>")
    assert "GGUF" in refused(b"GGUF" + bytes(100))
    assert "PNG" in refused(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "is not a .safetensors file" in refused(b"just some text that is not a model at all")
    assert "is not a .safetensors file" in refused(b"1234567")


@pytest.mark.parametrize("keep", [9, 60, 100, len(SOUND) // 2, len(SOUND) - 1])
def test_a_cut_off_file_is_recognised(tmp_path, keep):
    with pytest.raises(ModelError, match=r"is cut off|not a \.safetensors"):
        header(written(tmp_path, SOUND[:keep]))


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        made(b"[" * 100_000 + b"]" * 100_000),
        made([1, 2]),
        made(b'{"a": '),
        made(b"\xff\xfe"),
        made({"a": 1}),
        made({"a": {"dtype": "F32", "shape": [1]}}),
        made({"a": entry("F99")}, bytes(4)),
        made({"a": entry(shape=(2,))}, bytes(4)),
        made({"a": entry(shape=(-1,), offsets=(4, 0))}, bytes(4)),
        made({"a": entry(shape=(2**70,))}, bytes(4)),
        made({"a": entry(shape=(1.0,))}, bytes(4)),
        made({"a": entry(shape=(True,))}, bytes(4)),
        made({"a": entry(offsets=(0, 2**60))}, bytes(4)),
        made({"a": entry(), "b": entry()}, bytes(4)),
        made({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
        made({"a": entry()}, bytes(5)),
        made({"__metadata__": {"a": 1}}),
        made({"__metadata__": 3}),
        struct.pack("<Q", 2**63) + b"{}" + bytes(50),
        struct.pack("<Q", 150_000_000) + b"{}" + bytes(50),
    ],
)
def test_hostile_and_damaged_headers_are_refused(tmp_path, content):
    with pytest.raises(ModelError):
        header(written(tmp_path, content))


@given(st.binary(max_size=200), st.integers(0, len(SOUND)))
@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_bytes_the_answer_is_a_header_or_a_model_error(tmp_path, noise, place):
    path = written(tmp_path, SOUND[:place] + noise + SOUND[place + len(noise) :])
    try:
        header(path)
    except ModelError as error:
        assert error.message  # noqa: PT017  both outcomes are right; only others are wrong
