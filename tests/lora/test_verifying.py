"""A file is read back and proved; each thing that can be wrong with it is found and named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests import reference
from tests.lora.conftest import KOHYA, TEXT, pair, plain
from tests.test_training import warnings
from trainer import saving
from trainer.checkpoint import hashes
from trainer.lora.programs import PROGRAMS, layers_of
from trainer.lora.verifying import Expected, verify
from trainer.run import EXIT_DONE

ALL = ("A1111", "Forge", "ComfyUI", "diffusers", "sd-scripts")


@pytest.fixture
def saved(tmp_path):
    """A file as a training writes it, with sd-scripts' own metadata: its path and what was trained."""

    def saved(tensors=None, metadata=None, hashed=True):
        trained = tensors or plain()
        halves = {name: tensor.half() for name, tensor in trained.items()}
        said = metadata if metadata is not None else reference.read("sd15_lora_keys")["metadata"]
        said = {**said, **(hashes(halves, said) if hashed else {})}
        save_file(halves, tmp_path / "lora.safetensors", said)
        return tmp_path / "lora.safetensors", Expected(trained, "fp16", "sd1", 3)

    return saved


def test_a_file_as_sd_scripts_writes_it_is_proved_in_every_respect(saved):
    verified = verify(*saved())
    assert (verified.problems, verified.warnings, verified.passed_over) == ((), (), {})
    assert verified.loads_in == ALL
    text = " ".join(verified.checks)
    for what in (
        "6 tensors of 2 layers",
        "finite",
        "2 of 2 layers change",
        "bit for bit in fp16",
        "metadata",
        "hashes",
    ):
        assert what in text


def problems(saved_file, expected=None) -> str:
    verified = verify(saved_file, expected)
    assert not verified.good and verified.loads_in == ()
    return " ".join(verified.problems)


def test_other_values_than_the_trained_are_found(saved):
    path, expected = saved()
    trained = dict(expected.tensors)
    trained[f"{KOHYA}.lora_up.weight"] = trained[f"{KOHYA}.lora_up.weight"] + 1e-3
    assert f"{KOHYA}.lora_up.weight is not what was trained" in problems(path, Expected(trained, "fp16", "sd1", 3))


def test_a_tensor_too_few_or_too_many_is_found(saved):
    path, expected = saved()
    assert "1 tensors were trained" in problems(
        path, Expected({**expected.tensors, "more": torch.ones(1)}, "fp16", "sd1", 3)
    )


def test_another_precision_or_family_than_asked_for_is_found(saved):
    path, expected = saved()
    assert "not torch.bfloat16 as was asked for" in problems(path, Expected(expected.tensors, "bf16", "sd1", 3))
    assert "would be taken for Stable Diffusion 1.x" in problems(path, Expected(expected.tensors, "fp16", "sdxl", 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_found(saved, value):
    tensors = plain()
    tensors[f"{KOHYA}.lora_up.weight"][3, 2] = value
    assert "1 of 6 tensors are not numbers" in problems(saved(tensors)[0])


@pytest.mark.parametrize(
    "zeroed",
    [
        ({KOHYA: "lora_up.weight", TEXT: "lora_up.weight"}),
        ({KOHYA: "lora_down.weight", TEXT: "lora_up.weight"}),
    ],
)
def test_a_lora_that_changes_nothing_is_a_warning_before_the_first_step_and_a_problem_behind(saved, zeroed):
    tensors = plain()
    for name, role in zeroed.items():
        tensors[f"{name}.{role}"].zero_()
    path, expected = saved(tensors)
    assert "changes nothing" in problems(path, expected)
    at_start = verify(path, Expected(expected.tensors, "fp16", "sd1", 0))
    assert at_start.good and "as it is before the first step" in " ".join(at_start.warnings)


def test_one_layer_that_rests_is_no_problem(saved):
    tensors = plain()
    tensors[f"{TEXT}.lora_up.weight"].zero_()
    verified = verify(saved(tensors)[0])
    assert verified.good and "1 of 2 layers change the model" in verified.checks


@pytest.mark.parametrize(
    "roles",
    [
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8), "alpha": ()},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2": (2, 2), "alpha": ()},
        {"a1.weight": (2, 8), "a2.weight": (8, 2), "b1.weight": (2, 8), "b2.weight": (8, 2), "alpha": ()},
        {"oft_blocks": (2, 4, 4), "alpha": ()},
        {"diff": (8, 8), "diff_b": (8,)},
        {"weight": (8, 1), "on_input": ()},
    ],
)
def test_every_type_is_told_when_it_changes_nothing(write, roles):
    tensors = {f"{KOHYA}.{role}": torch.ones(shape) for role, shape in roles.items()}
    assert "changes nothing" not in " ".join(verify(write(tensors)).problems)
    for role in roles:
        if role in (
            "hada_w1_a",
            "lokr_w2_b",
            "lokr_w1_a",
            "a1.weight",
            "b2.weight",
            "oft_blocks",
            "diff",
            "diff_b",
            "weight",
        ):
            tensors[f"{KOHYA}.{role}"] = torch.zeros(roles[role])
    assert "changes nothing" in " ".join(verify(write(tensors)).problems)


def test_a_layer_that_the_family_does_not_have_is_found(saved):
    stranger = "lora_unet_down_blocks_3_attentions_0_proj_in"
    assert f"1 of 3 layers are not in a model of Stable Diffusion 1.x (the first: {stranger})" in problems(
        saved(plain() | pair(stranger))[0]
    )


def test_a_layer_that_no_family_has_is_found_where_nothing_tells_the_family(write):
    stranger = "lora_unet_down_blocks_9_resnets_0_conv1"
    assert (
        f"are not in a model of Stable Diffusion 1.x, Stable Diffusion 2.x or SDXL (the first: {stranger})"
        in problems(write(pair(stranger)))
    )


def test_metadata_that_is_lost_is_a_problem_of_our_own_file_and_a_warning_of_others(saved):
    said = reference.read("sd15_lora_keys")["metadata"]
    path, expected = saved(metadata={k: v for k, v in said.items() if k != "ss_tag_frequency"})
    assert "lacks 1 of" in problems(path, expected) and "ss_tag_frequency" in problems(path, expected)
    others = verify(path)
    assert others.good and "ss_tag_frequency" in " ".join(others.warnings)
    path, _ = saved(metadata=said | {"ss_bucket_info": "{broken"})
    assert "ss_bucket_info is not JSON" in problems(path)


@pytest.mark.parametrize("key", ["sshs_model_hash", "sshs_legacy_hash"])
def test_a_hash_that_is_not_of_the_content_is_found(saved, key):
    said = reference.read("sd15_lora_keys")["metadata"]
    path, expected = saved()
    good = {name: tensor.half() for name, tensor in expected.tensors.items()}
    path, _ = saved(metadata=said | hashes(good, said) | {key: "0" * 8}, hashed=False)
    assert f"{key} are not those of the content" in problems(path)


def test_a_damaged_file_is_reported_not_raised(saved):
    path, _ = saved()
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in problems(path)


def test_an_edited_title_keeps_the_hashes_right(saved):
    path, expected = saved()
    said = reference.read("sd15_lora_keys")["metadata"]
    tensors = {name: tensor.half() for name, tensor in expected.tensors.items()}
    save_file(tensors, path, said | hashes(tensors, said) | {"modelspec.title": "another"})
    assert verify(path, expected).good


# Who loads what

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def loading(write, tensors) -> tuple[tuple[str, ...], dict[str, str]]:
    verified = verify(write({name: torch.ones(shape) for name, shape in tensors.items()}))
    assert verified.good, verified.problems
    return verified.loads_in, dict(verified.passed_over)


def up_and_down(name: str, *more: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_down.weight": (1, 8), f"{name}.lora_up.weight": (8, 1), f"{name}.alpha": ()} | {
        f"{name}.{role}": (8, 1) for role in more
    }


LOHA = {f"{QUERY}.{role}": (2, 2) for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")} | {
    f"{QUERY}.alpha": ()
}


@pytest.mark.parametrize(
    ("tensors", "without"),
    [
        (up_and_down("lora_unet_down_blocks_0_resnets_0_conv1"), ()),
        (up_and_down("lora_unet_conv_in"), ("diffusers",)),
        (up_and_down(QUERY, "dora_scale"), ()),
        (LOHA, ("diffusers",)),
        ({f"{QUERY}.weight": (8, 1), f"{QUERY}.on_input": ()}, ("Forge", "ComfyUI", "diffusers")),
        ({f"{QUERY}.oft_blocks": (2, 4, 4), f"{QUERY}.alpha": ()}, ("Forge", "diffusers")),
        ({f"{QUERY}.diff_b": (8,)}, ("A1111", "diffusers")),
        ({"lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": (8,), "lora_te_text_model_encoder_layers_0_layer_norm1.b_norm": (8,)}, ("Forge", "ComfyUI", "diffusers", "sd-scripts")),
        (up_and_down("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"), ("A1111",)),
    ],
)  # fmt: skip
def test_who_does_not_load_a_file_is_named_with_the_reason(write, tensors, without):
    loads_in, passed_over = loading(write, tensors)
    assert tuple(name for name in ALL if name not in loads_in) == without
    assert passed_over.keys() == set(without) and all(passed_over.values())


def test_other_namings_are_for_diffusers_alone(write):
    loads_in, passed_over = loading(
        write,
        {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": (1, 8),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": (8, 1),
        },
    )
    assert loads_in == ("diffusers",) and "convert" in passed_over["ComfyUI"]


def test_one_line_says_what_is_wrong_or_who_loads_the_file_or_that_nobody_does(write):
    assert verify(write(plain())).summary == f"loads in {', '.join(ALL)}"
    norm = f"{KOHYA.partition('_transformer')[0]}_norm"
    trained_norm = {f"{norm}.w_norm": torch.ones(8), f"{norm}.b_norm": torch.ones(8)}
    of_its_own_size = pair(KOHYA, wide=32) | trained_norm
    assert verify(write(of_its_own_size)).summary == "whole, but no other program is known to load it"
    assert "changes nothing" in verify(write({name: t * 0 for name, t in plain().items()})).summary


def test_a_model_of_its_own_size_is_told(write):
    loads_in, passed_over = loading(
        write, {f"{KOHYA}.lora_down.weight": (1, 32), f"{KOHYA}.lora_up.weight": (8, 1), f"{KOHYA}.alpha": ()}
    )
    assert loads_in == ("diffusers",) and "32 wide" in passed_over["A1111"]


def test_every_tensor_that_sd_scripts_trains_is_known_to_every_program():
    """Held against the names in files that sd-scripts wrote."""
    for file in ("sd15_lora_keys", "sd15_locon_keys"):
        names = {key.partition(".")[0] for key in reference.read(file)["tensors"]}
        assert names <= layers_of("sd1")
        for program in PROGRAMS:
            assert all(program._finds(name, "sd1") for name in names), program.name


def test_the_page_and_the_log_are_told_what_was_proved(settings, train, tmp_path):
    """A training's own file, in the stream of events."""
    _, events, _ = train(settings | {"max_train_steps": 2})
    (verified,) = [event for event in events if event["type"] == "verified"]
    saved = next(event for event in events if event["type"] == "saved")
    assert verified["path"] == saved["path"] and verified["problems"] == []
    assert any("bit for bit" in check for check in verified["checks"])
    assert json.loads(json.dumps(verified)) == verified


def test_memory_that_ends_while_a_file_is_read_back_is_told_and_the_training_is_done(settings, train, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(saving, "verify", full)
    code, events, _ = train(settings | {"max_train_steps": 1})
    assert code == EXIT_DONE and events[-1]["type"] == "ended"
    warned = [e["message"] for e in warnings(events)]
    assert warned == ['"photo.safetensors" was not read back, because the memory is full.']
