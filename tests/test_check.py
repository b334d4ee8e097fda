"""The check before the start: it finds everything, all at once, and never stumbles."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from skimage import data

from trainer import kohya
from trainer.__main__ import main
from trainer.check import not_writable, problems, report
from trainer.kohya import Preset
from trainer.run import EXIT_CONFIG, EXIT_DONE
from trainer.schema import PARAMETERS, older


@pytest.fixture
def settings(settings):
    """With steps that leave every photograph its pixels."""
    return settings | {"bucket_reso_steps": 16}


def check(values):
    return problems(kohya.read(values))


def told(values, severity="error"):
    return [str(problem) for problem in check(values).problems if problem.severity == severity]


def one(values, severity="error"):
    (problem,) = told(values, severity)
    return problem


def photograph(folder, name, size=None):
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(data.coffee())
    picture = picture.resize(size) if size else picture
    picture.save(folder / name)
    (folder / name).with_suffix(".txt").write_text("a cup")
    return folder / name


# Ready


def test_a_good_preset_is_ready_and_its_length_is_known(settings):
    checked = check(settings)
    assert checked.problems == ()
    assert checked.config is not None
    summary = checked.summary
    assert (summary.images, summary.regularisation, summary.repeats, summary.model) == (
        3,
        0,
        6,
        "Stable Diffusion 1.x, epsilon prediction",
    )
    assert (summary.batches_per_epoch, summary.epochs, summary.total_steps) == (6, 1, 6)
    assert sum(count for *_, count in summary.buckets) == 6
    assert summary.buckets == ((64, 48, 4), (64, 64, 2))


@pytest.mark.parametrize(
    ("change", "steps", "epochs"),
    [
        ({"epoch": 3}, 18, 3),
        ({"epoch": 3, "train_batch_size": 4}, 6, 3),
        ({"epoch": 3, "gradient_accumulation_steps": 4}, 5, 3),
        ({"epoch": 3, "max_train_epochs": 2}, 12, 2),
        ({"max_train_steps": "10"}, 10, 2),
    ],
)
def test_the_steps_that_it_tells_are_those_of_the_contract(settings, change, steps, epochs):
    summary = check(settings | change).summary
    assert (summary.total_steps, summary.epochs) == (steps, epochs)


def test_exit_codes_and_text(settings, tmp_path, capsys):
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings))
    assert main(["check", str(preset)]) == EXIT_DONE
    assert "Ready: 3 images, 6 seen in an epoch" in capsys.readouterr().out
    assert main(["check", str(preset), "--output_name", "a/b"]) == EXIT_CONFIG
    text = capsys.readouterr().out
    assert "error: Model output name (output_name): " in text
    assert "Not ready: 1 error(s)." in text


def test_what_the_lora_type_does_not_use_is_told(settings, train, tmp_path, capsys):
    unused = {"LoRA_type": "LyCORIS/LoCon", "network_dropout": "0.5", "up_lr_weight": "sine", "unit": 1}
    checked = problems(Preset(settings | unused))
    assert [(note.key, note.what) for note in checked.notes] == [
        ("network_dropout", "without effect"),
        ("up_lr_weight", "without effect"),
    ]
    told = "network_dropout: 0.5 has no effect: LoRA type (LoRA_type) LyCORIS/LoCon does not use it."
    assert str(checked.notes[0]) == told
    _, _, folder = train(settings | unused | {"max_train_steps": 1})
    assert told in (folder / "log.txt").read_text()


@pytest.mark.proves("clip_skip")
def test_more_layers_than_the_text_encoder_has_cannot_be_skipped(settings):
    """The tiny model has 3, and so has the embedded one."""
    for values in (settings, settings | {"pretrained_model_name_or_path": ""}):
        assert not problems(Preset(values | {"clip_skip": 3}), decode=False).errors
        (error,) = problems(Preset(values | {"clip_skip": 4}), decode=False).errors
        assert error.key == "clip_skip"
        assert "has 3 layers" in error.message


@pytest.mark.proves("optimizer_args", "lr_scheduler_args")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer_args": "weight_decay=-1"}, "Invalid weight_decay value: -1"),
        ({"optimizer_args": "betas=0.9,1.5"}, "Invalid beta parameter at index 1: 1.5"),
        ({"optimizer_args": "eps=abc"}, 'eps "abc"'),
        ({"optimizer_args": "amsgrad=1"}, 'amsgrad "1"'),
        ({"optimizer_args": "maximize=no"}, 'maximize "no"'),
        ({"optimizer": "AdamW8bit", "optimizer_args": "betas=0.9"}, 'betas "0.9"'),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": "min_lr_rate=abc"}, 'min_lr_rate "abc"'),
    ],
)
def test_values_that_the_optimizer_cannot_use_are_found_before_the_start(settings, values, message):
    (error,) = problems(Preset(settings | values), decode=False).errors
    assert message in str(error)
    assert not problems(Preset(settings | values), decode=False, ask=False).errors, (
        "the page's own process has no torch"
    )


def test_the_optimizer_is_tried_in_the_way_that_trains(settings, monkeypatch):
    from trainer import optim

    make, tried = optim.make_optimizer, []
    monkeypatch.setattr(optim, "make_optimizer", lambda *given, **how: tried.append(make(*given, **how)) or tried[-1])
    assert not problems(Preset(settings | {"optimizer_args": "weight_decay=0.1"}), decode=False).errors
    assert [optimizer.param_groups[0]["fused"] for optimizer in tried] == [True]


@pytest.mark.proves("lr_warmup", "lr_warmup_steps", "lr_scheduler_args")
@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"lr_warmup": 100}, "lr_warmup", "takes 6 steps, and training 6"),
        ({"lr_warmup_steps": 10}, "lr_warmup_steps", "takes 10 steps, and training 6"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 10}, "", ""),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": "min_lr=1"}, "lr_scheduler_args", "min_lr 1 is above"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": "min_lr_rate=2"}, "lr_scheduler_args", "2 is above"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": "min_lr=1e-3"}, "", ""),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": "num_decay_steps=9"}, "lr_scheduler_args", "within its decay"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": "num_decay_steps=0.5"}, "", ""),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_meant_is_warned_about(settings, values, key, message):
    found = [p for p in check(settings | values).problems if p.severity == "warning"]
    assert [problem.key for problem in found] == [key] * bool(key)
    assert all(message in problem.message for problem in found)


def test_what_a_problem_tells_is_not_told_again_as_without_effect(settings):
    checked = check(settings | {"adaptive_noise_scale": 0.5, "noise_offset_type": "Multires"})
    assert [problem.key for problem in checked.problems] == ["adaptive_noise_scale"]
    assert checked.notes == ()


def test_warnings_alone_are_ready(settings, tmp_path, capsys):
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings | {"network_alpha": 64, "something_else": 3}))
    assert main(["check", str(preset), "--json"]) == EXIT_DONE
    answer = json.loads(capsys.readouterr().out)
    assert [(p["key"], p["severity"]) for p in answer["problems"]] == [("network_alpha", "warning")]
    assert [(n["key"], n["what"]) for n in answer["notes"]] == [("something_else", "unknown")]
    assert answer["summary"]["total_steps"] == 6
    assert answer["summary"]["buckets"] == [[64, 48, 4], [64, 64, 2]]


def test_every_problem_is_told_at_once(settings, tmp_path):
    (tmp_path / "taken").write_text("a file")
    broken = photograph(tmp_path / "images" / "1_x", "broken.jpg")
    broken.write_bytes(broken.read_bytes()[:-9000])
    checked = check(
        settings
        | {
            "learning_rate": "fast",
            "network_dim": 0,
            "dim_from_weights": True,
            "pretrained_model_name_or_path": str(tmp_path / "taken"),
            "vae": str(tmp_path / "nowhere"),
            "train_data_dir": str(tmp_path / "images"),
            "reg_data_dir": str(tmp_path / "nothing"),
            "output_dir": str(tmp_path / "taken" / "out"),
            "logging_dir": str(tmp_path / "taken"),
            "sample_prompts": "a cat --w 5",
            "sample_every_n_steps": 10,
        }
    )
    assert checked.config is None
    assert sorted(problem.key for problem in checked.errors) == [
        "dim_from_weights",
        "learning_rate",
        "logging_dir",
        "network_dim",
        "output_dir",
        "pretrained_model_name_or_path",
        "reg_data_dir",
        "sample_prompts",
        "train_data_dir",
        "vae",
    ]


def test_a_value_that_is_not_allowed_causes_no_second_complaint(settings):
    assert one(settings | {"network_dim": "x", "network_alpha": 64}).startswith(
        "Network Rank (Dimension) (network_dim)"
    )


# Model


@pytest.mark.proves("v2", "v_parameterization", "sdxl")
@pytest.mark.parametrize("key", ["v2", "sdxl", "v_parameterization"])
def test_a_box_that_contradicts_the_model_names_both(settings, key):
    problem = one(settings | {key: True})
    assert f"({key}): is on" in problem
    assert "(pretrained_model_name_or_path) is a Stable Diffusion 1.x model" in problem


def test_a_missing_model_and_one_from_the_network(settings):
    assert "There is no file" in one(settings | {"pretrained_model_name_or_path": "/nowhere.safetensors"})
    assert "huggingface.co" in one(settings | {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"})


def test_a_model_of_another_family_is_named(settings, tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": np.zeros((8, 4), np.float16)}, path)
    assert "is a Flux model, which is not supported" in one(settings | {"pretrained_model_name_or_path": str(path)})


# LoRA to go on from


@pytest.fixture
def lora(tmp_path):
    def lora(rank=4, width=32, parts=("unet", "te")):
        names = {
            "unet": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            "te": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        }
        path = tmp_path / "lora.safetensors"
        shapes = {f"{names[p]}.lora_down.weight": (rank, width) for p in parts}
        shapes |= {f"{names[p]}.lora_up.weight": (8, rank) for p in parts}
        shapes |= {f"{names[p]}.alpha": () for p in parts}
        save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
        return str(path)

    return lora


def test_a_fitting_lora_is_accepted(settings, lora):
    assert told(settings | {"network_weights": lora()}) == []
    assert told(settings | {"network_weights": lora(rank=9), "dim_from_weights": True}) == []
    assert told(settings | {"network_weights": lora(parts=("unet",)), "text_encoder_lr": 0}) == []


def test_a_lora_that_does_not_fit_says_what_to_change(settings, lora):
    assert "has rank 9, Network Rank (network_dim) is 4" in one(settings | {"network_weights": lora(rank=9)})
    assert "whose text states are 768 wide" in one(settings | {"network_weights": lora(width=768)})
    assert "no text encoder part" in one(settings | {"network_weights": lora(parts=("unet",))})
    assert "holds a text encoder part" in one(settings | {"network_weights": lora(), "text_encoder_lr": 0})
    assert "There is no file" in one(settings | {"network_weights": "/nowhere.safetensors"})


def test_the_lora_to_go_on_from_is_never_the_one_written(settings, lora, tmp_path):
    change = {"network_weights": lora(), "output_dir": str(tmp_path), "output_name": "lora"}
    assert "is the file in LoRA network weights (network_weights)" in one(settings | change)


def test_a_file_that_is_in_the_way_is_told(settings, tmp_path):
    (tmp_path / "last.safetensors").touch()
    assert "will be kept" in one(settings | {"output_dir": str(tmp_path), "output_name": "last"}, "warning")


# Buckets


def test_images_narrower_than_a_bucket_step_are_named_with_the_ways_out(settings, tmp_path):
    narrow = settings | {"bucket_reso_steps": 32}
    for number in range(7):
        photograph(tmp_path / "images" / "1_x", f"{number}.png", (20, 200))
    photograph(tmp_path / "images" / "1_x", "fine.png")
    problem = one(narrow | {"train_data_dir": str(tmp_path / "images")})
    assert "(bucket_no_upscale): 7 image(s) are too small or narrow" in problem
    assert f'"{tmp_path / "images" / "1_x" / "0.png"}": 20×200' in problem
    assert "and 2 more" in problem
    assert (
        told(narrow | {"train_data_dir": str(tmp_path / "images"), "bucket_no_upscale": False, "min_bucket_reso": 64})
        == []
    )


@pytest.mark.parametrize(("steps", "finer"), [(64, 32), (32, None)])
def test_steps_that_leave_images_less_than_half_their_pixels_are_told_with_those_that_do_not(
    settings, tmp_path, steps, finer
):
    for number, size in enumerate([(600, 400), (600, 400), (128, 128)]):
        photograph(tmp_path / "images" / "1_x", f"{number}.png", size)
    found = told(
        settings
        | {"train_data_dir": str(tmp_path / "images"), "max_resolution": "128,128", "bucket_reso_steps": steps},
        "warning",
    )
    coarse = [problem for problem in found if "bucket_reso_steps" in problem]
    if finer is None:
        assert not coarse
    else:
        (problem,) = coarse
        assert "2 of 3 images" in problem and "600×400 as 64×64" in problem
        assert f"multiples of {steps}. Use {finer}." in problem


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"bucket_reso_steps": 20}, "bucket_reso_steps"),
        ({"enable_bucket": False, "max_resolution": "100,100"}, "max_resolution"),
        ({"bucket_no_upscale": False, "max_resolution": "128,128", "min_bucket_reso": 256}, "min_bucket_reso"),
        ({"bucket_no_upscale": False, "max_resolution": "2048,2048"}, "max_bucket_reso"),
    ],
)
def test_resolutions_that_cannot_work_name_their_control(settings, change, key):
    assert f"({key}): " in one(settings | change)


# Folders to write to


def test_a_folder_need_not_exist_and_is_not_made(settings, tmp_path):
    assert (
        told(settings | {"output_dir": str(tmp_path / "new" / "Ausgabe ü"), "logging_dir": str(tmp_path / "logs")})
        == []
    )
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_to_is_refused(settings):
    problem = one(settings | {"output_dir": "/proc/self/out"})
    assert '(output_dir): "/proc/self/out" cannot be written to' in problem
    assert "(logging_dir)" in one(settings | {"logging_dir": "/proc/self/out"})


@pytest.mark.skipif(sys.platform == "win32", reason="such paths are right on Windows")
@pytest.mark.parametrize("key", ["output_dir", "logging_dir"])
def test_a_folder_of_a_windows_machine_is_refused(settings, key):
    assert "is a path of a Windows machine. Choose another" in one(settings | {key: "C:/kohya/out"})
    assert "is a path of a Windows machine. Choose another" in one(settings | {key: "D:\\train\\out"})


def test_the_probe_leaves_nothing_behind(tmp_path):
    assert not_writable(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []


# Samples


@pytest.mark.proves("sample_prompts")
def test_samples_without_prompts_are_warned_about(settings):
    assert "no samples will be drawn" in one(
        settings | {"sample_every_n_steps": 5, "sample_prompts": "# none"}, "warning"
    )
    assert told(settings | {"sample_every_n_steps": 5, "sample_prompts": "a cat"}, "warning") == []


def test_sample_prompts_that_are_cut_are_named_with_what_is_lost(settings):
    fits = "cat, " * 112  # 2 tokens each
    long = f"{fits} red wall"
    assert told(settings | {"sample_prompts": f"{fits} --n {fits}"}, "warning") == []
    problem = one(settings | {"sample_prompts": f"a cat\n{long} --n {fits}"}, "warning")
    assert '(sample_prompts): line 2: its prompt has 226 tokens (cut: "wall"). Shorten it: 225 are the most.' in problem
    assert "line 1: its negative prompt has 226" in one(settings | {"sample_prompts": f"a cat --n {long}"}, "warning")
    assert told(settings | {"sample_prompts": f"a cat --n {long} --l 1"}, "warning") == []


# Whatever is entered

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "0",
            "1e-4",
            "embedded:..",
            "/",
            ".",
            "~",
            "\0",
            "\ud800",
            "/\udcff",
            "a/b",
            "C:\\x",
            "//x/y",
            "--w 3",
            "512,",
            "-1",
        ]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@example(change={"resume": "\0"})
@given(change=st.dictionaries(st.sampled_from(sorted(PARAMETERS)), junk, max_size=12))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_preset_makes_it_stumble(settings, change, capsysbinary):
    preset = Preset(settings | change)
    checked = problems(preset)
    assert report(preset, as_json=False) == (EXIT_CONFIG if checked.errors else EXIT_DONE)
    capsysbinary.readouterr()[0].decode()
    assert (checked.config is None) == bool(checked.errors)
    assert all(problem.message and problem.label for problem in checked.problems)


@given(values=st.dictionaries(st.sampled_from(sorted([*PARAMETERS, *older.KEYS, "other"])), junk, max_size=30))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_preset_file_makes_it_stumble(values):
    problems(kohya.read(values))


@pytest.mark.parametrize("command", ["check", "draws"])
def test_it_answers_quickly_and_without_torch(command, settings, tmp_path):
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings))
    code = f"import sys; from trainer.__main__ import main; main([{command!r}, {str(preset)!r}]); sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.monotonic() - start < 10
