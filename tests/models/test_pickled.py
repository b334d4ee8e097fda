"""PyTorch checkpoints read as data."""

import os
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from trainer import models
from trainer.errors import ModelError
from trainer.models import pickled, weights
from trainer.models.families import check_vae, detect
from trainer.models.pickled import Checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def read(path):
    with weights.opened(path) as file:
        return {name: file.get_tensor(name) for name in file.header.tensors}


def test_a_checkpoint_is_the_same_model_as_its_safetensors_file(tiny_sdxl, path):
    # The tiny model's configs are in its header, which a checkpoint has not: give the tensors and read by those.
    tensors = load_file(tiny_sdxl)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 1000}, path)
    found = read(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_every_dtype_view_and_parameter_is_read(path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "double": base.double(),
        "ids": torch.arange(3),
        "part": base[1:3, 2:5],
        "turned": base.T,
        "scalar": torch.tensor(0.5),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(torch.nn.ParameterDict({"x": base}).state_dict() | tensors, path)
    found = read(path)
    assert found.pop("x").dtype == torch.float32
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())


def test_objects_of_a_training_framework_are_passed_over(path, monkeypatch):
    module = types.ModuleType("lightning_like")
    module.Callback = type("Callback", (), {"__module__": "lightning_like"})
    callback = module.Callback()
    callback.best = [1, 2]
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    torch.save({"callbacks": {module.Callback: callback}, "state_dict": {"a": torch.ones(2)}}, path)
    monkeypatch.delitem(sys.modules, "lightning_like")
    assert read(path)["a"].tolist() == [1, 1]


class Harmful:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("state", [(), ({"x": 1},)], ids=["call", "call and set"])
def test_nothing_that_a_pickle_asks_for_is_called(path, tmp_path, state):
    trace = tmp_path / "harm"
    torch.save({"a": torch.ones(2), "b": Harmful(os.mkdir, (str(trace),), *state)}, path)
    assert list(read(path)) == ["a"]
    assert not trace.exists()


def test_a_pickle_can_name_nothing_but_tensors(path):
    """Names that lead to code, in every way that a pickle has to name things, become stand-ins."""
    for protocol in (0, 2, 4):
        content = pickle.dumps({"state_dict": {"f": os.system, "g": eval, "h": getattr}}, protocol)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content)
        assert read(path) == {}


def damaged(path, change):
    torch.save({"a": torch.arange(1000.0)}, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)


def cut_storage(records):
    name = next(name for name in records if name.endswith("data/0"))
    records[name] = records[name][:-4]


def lose_storage(records):
    del records[next(name for name in records if name.endswith("data/0"))]


def cut_pickle(records):
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = records[name][:-20]


def list_instead(records):
    records[next(name for name in records if name.endswith("data.pkl"))] = pickle.dumps([1, 2])


@pytest.mark.parametrize("change", [cut_storage, lose_storage, cut_pickle, list_instead])
def test_a_damaged_checkpoint_is_refused(path, change):
    damaged(path, change)
    with pytest.raises(ModelError, match="is damaged"):
        Checkpoint(path)


def crafted(path, content, compression=zipfile.ZIP_STORED):
    """A checkpoint with this pickle, and one storage of 16 bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", bytes(16))
    return path


# A dict with one float tensor `a` of the storage "0": offset, shape and stride follow as tuples.
TENSOR = (
    b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ%stRs."
)
NESTED = b"\x80\x02)" + b"".join(b"\x86" if i % 2 else b"2" for i in range(80))  # 2^40 leaves when told


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\x02]r\xff\xff\xff\xff.", "numbers what it remembers"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", ""),
        (b"\x80\x02" + b"(" * (1 << 24) + b".", "larger than 16 MB"),
        (NESTED + b"Q.", "of no known kind"),
        (TENSOR % b"K\x00(K\x05t(K\x01t", "impossible shape"),
        (TENSOR % b"K\x00(J\xff\xff\xff\x7ft(K\x00t", "impossible shape"),
        (TENSOR % b"K\x01(K\x04t(K\x01t", "cut off"),
        (TENSOR % b"K\x00(M\x01\x01K\x00t(K\x01t", "impossible shape"),
    ],
    ids=["memory", "bytes", "size", "message", "beyond", "stretched", "offset", "sides"],
)
def test_a_crafted_pickle_is_refused_before_it_fills_the_memory(path, content, why):
    tracemalloc.start()
    with pytest.raises(ModelError, match=f"is damaged.*{why}"):
        Checkpoint(crafted(path, content))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100_000_000


def test_a_tensor_within_its_storage_is_read(path):
    assert read(crafted(path, TENSOR % b"K\x01(K\x03t(K\x01t"))["a"].tolist() == [0, 0, 0]


def test_a_wrapper_that_holds_itself_has_no_tensors(path):
    content = {}
    content["state_dict"] = content
    assert read(crafted(path, pickle.dumps(content))) == {}


def test_packed_records_are_refused(path):
    with pytest.raises(ModelError, match="are compressed"):
        Checkpoint(crafted(path, TENSOR % b"K\x00(K\x04t(K\x01t", zipfile.ZIP_DEFLATED))


def test_what_a_pickle_sets_is_forgotten(path):
    """BUILD writes into functions and classes, too; the next file must not meet what one wrote."""
    for named in (b"_rebuild_parameter", b"_rebuild_tensor_v2"):
        crafted(path, b"\x80\x02ctorch._utils\n" + named + b"\n}U\x01xK\x01sb0}.")
        assert read(path) == {}
    assert "x" not in vars(pickled.Tensor.of.__func__)


def test_other_content_is_refused(path):
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match=r"before 1\.6"):
        Checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ModelError, match="no PyTorch checkpoint"):
        Checkpoint(path)
    with pytest.raises(ModelError, match="cannot be read"):
        Checkpoint(path.parent / "absent.ckpt")


@pytest.mark.proves("vae")
def test_a_vae_may_be_a_checkpoint(tiny_model, tmp_path):
    prefix = "first_stage_model."
    own = {n.removeprefix(prefix): t for n, t in load_file(tiny_model).items() if n.startswith(prefix)}
    path = tmp_path / "vae.pt"
    torch.save({"state_dict": {name: tensor + 1 for name, tensor in own.items()}}, path)
    check_vae(str(path), detect(tiny_model))
    model = models.load(str(tiny_model), str(path), torch.float32, torch.device("cpu"), 1, 75)
    torch.testing.assert_close(model.vae.encoder.conv_in.weight, own["encoder.conv_in.weight"] + 1)


def test_checkpoints_are_told_without_torch(path):
    torch.save({"state_dict": {"classifier": torch.ones(2)}}, path)
    code = (
        "import sys, pathlib; from trainer.models.families import detect\n"
        "try: detect(pathlib.Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert "those of no known base model (the first is classifier)" in done.stdout
