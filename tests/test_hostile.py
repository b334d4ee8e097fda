"""Files that others wrote: a LoRA's metadata, a run's events and requests, captions. Read, or refused in clear words."""

import json
import struct
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gui import history, live
from gui.runs import Runs, cause, state
from gui.view import View
from trainer import events, tensorfile
from trainer.data import folders
from trainer.errors import LorawrightError
from trainer.events import Event
from trainer.run import REQUESTS, Run
from trainer.schema import Config

quick = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

odd = st.sampled_from(
    ["None", "nan", "-1", "1e999", "9" * 400, "{}", "[]", "[[1]]", '{"a": {"b": "c"}}', '{"a": {"b": 1e400}}', "\0",
     '{"datasets": 1}', '[{"tag_frequency": {"x": {"y": [1]}}}]', '[{"tag_frequency": [1]}]', "(", "True", "x=y=z,("]
)  # fmt: skip
flat = st.none() | st.booleans() | st.integers(-(2**40), 2**70) | st.floats() | st.text(max_size=8) | odd
anything = st.recursive(
    flat,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

ENTRIES = ["ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_network_args", "ss_network_dim",
           "ss_network_alpha", "ss_optimizer", "ss_resolution", "ss_num_epochs", "ss_steps", "ss_max_train_steps",
           "ss_learning_rate", "ss_seed", "ss_min_bucket_reso", "ss_bucket_info", "ss_base_model_version", "ss_v2",
           "ss_network_module", "ss_training_started_at", "ss_training_finished_at", "modelspec.architecture",
           "modelspec.timestep_range", "modelspec.prediction_type", "sshs_model_hash", "ss_text_encoder_lr",
           "ss_lr_warmup_steps", "ss_num_train_images", "ss_caption_dropout_rate", "format", "lora_adapter_metadata"]  # fmt: skip


@pytest.fixture
def lora(tmp_path):
    """Writes one small LoRA with the metadata that is given."""
    import torch
    from safetensors.torch import save

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 768),
        f"{name}.lora_up.weight": torch.ones(320, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }

    def write(metadata):
        path = tmp_path / "lora.safetensors"
        path.write_bytes(save(tensors, metadata))
        return path

    return write


def test_whatever_a_loras_metadata_says_it_is_inspected_and_verified(lora):
    from trainer.lora.inspecting import inspect
    from trainer.lora.verifying import verify

    @settings(quick, max_examples=150)
    @example({"ss_tag_frequency": '{"a": {"b": "many"}}'})
    @example({"ss_tag_frequency": '{"a": {"b": 1e400}}'})
    @example({"ss_datasets": '[1, {"tag_frequency": {"a": {"b": null}}}]'})
    @given(
        st.dictionaries(
            st.sampled_from(ENTRIES), odd | st.builds(json.dumps, anything) | st.text(max_size=9), max_size=6
        )
    )
    def read(metadata):
        path = lora({key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()})
        found = inspect(path)
        json.dumps(found.preset)
        assert [str(fact) for fact in (found.facts, found.tags, found.unsaid)]
        verify(path)

    read()


@settings(quick, max_examples=150)
@given(
    st.dictionaries(
        st.text(max_size=6) | st.just("__metadata__"),
        anything
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F4", "F16", "X", ""]) | anything,
                "shape": st.lists(st.integers(-1, 2**64), max_size=4) | anything,
                "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | anything,
            }
        ),
        max_size=4,
    ),
    st.binary(max_size=16),
    st.integers(-(2**10), 2**10),
)
def test_a_header_with_crafted_counts_is_refused_or_holds(tmp_path_factory, entries, data, off):
    text = json.dumps(entries).encode("utf-8", "replace")
    path = tmp_path_factory.getbasetemp() / "crafted.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + (off if abs(off) < 9 else 0))) + text + data)
    try:
        found = tensorfile.header(path)
    except LorawrightError:
        return
    assert sum(tensor.size for tensor in found.tensors.values()) == path.stat().st_size - found.data_begin


KINDS = {
    kind.type: [field.name for field in fields(kind)]
    for kind in Event.__subclasses__()
    if kind.__module__ == events.__name__
}
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
words = st.sampled_from(["stopped", "done", "state", "final", "../../etc/passwd", "\0", "samples/x.png"])
record = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.fixed_dictionaries(
        {"type": st.just(kind), "time": numbers},
        optional={key: numbers | words | st.none() | anything for key in KINDS[kind]},
    )
)


@settings(quick, max_examples=120)
@example([{"type": "step"}], b"")
@example([{"type": "sample", "time": 1, "path": "\0", "prompt": "", "index": [], "seed": 1, "step": 1}], b"")
@given(st.lists(record | anything, max_size=5), st.binary(max_size=10))
def test_events_that_no_trainer_wrote_are_passed_over(tmp_path_factory, written, rest):
    top = tmp_path_factory.mktemp("runs", numbered=True)
    run = Run(top / "20260101-000000-x")
    run.folder.mkdir()
    run.config.write_text("{}")
    lines = [json.dumps(event).encode() for event in written]
    run.events.write_bytes(b"\n".join([*lines, rest]) + b"\n")
    runs = Runs(top, top, ())
    answer = live.poll(runs, {"run": "", "follow": "", "events": 0, "log": 0})
    for found in (answer, View(runs).poll("", ""), runs.summary(run.folder.name)):
        json.dumps(found)
    for found in (
        history.curve(run),
        history.samples(run),
        history.outcome(run),
        history.rest(run),
        history.newest_state(run),
    ):
        str(found)
    live.downloads(run, top)
    cause(run, next((event for event in events.last(run.events) if event["type"] == "failed"), None))
    assert state(run) in ("crashed", "done", "stopped")


@settings(quick, max_examples=100)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_only_words_that_are_requests_are_taken_from_the_control_file(tmp_path_factory, data, offset):
    run = Run(tmp_path_factory.getbasetemp())
    run.control.write_bytes(data)
    words, behind = run.requests(offset)
    assert set(words) <= set(REQUESTS)
    assert offset <= behind <= max(offset, len(data))


@settings(quick, max_examples=60)
@given(
    st.lists(
        st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")),
        min_size=1,
        max_size=3,
    )
)
def test_a_caption_file_of_any_bytes_is_a_caption_or_a_problem(tmp_path_factory, contents):
    from PIL import Image

    top = tmp_path_factory.getbasetemp() / "captions"
    inner = top / "1_x"
    inner.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        if not (inner / f"{number}.png").exists():
            Image.new("RGB", (64, 64)).save(inner / f"{number}.png")
        (inner / f"{number}.txt").write_bytes(content)
    config = Config.model_validate({"folders": {"train_data_dir": str(top)}})
    survey = folders.survey(config.folders, config.captions, decode=False)
    for picture in survey.dataset.pictures:
        assert picture.caption is None or "\n" not in picture.caption
    assert len(survey.dataset.pictures) == len([*inner.glob("*.png")])
    assert all(str(problem) for problem in survey.problems)
