"""The grid to choose a checkpoint by, against the pictures that the training drew itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tools.loras import run
from trainer.errors import ConfigError
from trainer.tools import contact
from trainer.tools.commands import TOOLS

PROMPTS = "a cat --s 2 --w 64 --h 64\na dog --s 2 --l 1 --d 9"


def draw(output, loras, tell=lambda *_: None, **values):
    tool = TOOLS["grid"]
    lines = "\n".join(map(str, loras))
    return tool.run(tool.read({"loras": lines, "output": str(output), **{k: str(v) for k, v in values.items()}}), tell)


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def trained(settings, train):
    """A run of the tiny model that saved two files and drew both prompts before, between and at the end."""
    asked = {"sample_prompts": PROMPTS, "sample_every_n_steps": 2, "save_every_n_steps": 2, "max_train_steps": 4}
    asked |= {"LoRA_type": "Kohya LoCon", "conv_dim": 2, "learning_rate": 4e-2}  # every seed changes the pictures much
    asked |= {"seed": ""}  # a random one, which the file tells
    code, _, folder = train(settings | asked)
    assert code == 0
    out = folder.parent / "out"
    return folder, [out / "photo-step00000002.safetensors", out / "photo.safetensors"]


def test_the_pictures_are_those_of_the_training_and_without_strength_those_of_the_base_model(trained, tmp_path):
    run, loras = trained
    report = draw(tmp_path / "grid", loras, at="0 1", settings=run)
    index = contact.read(tmp_path / "grid")
    assert index["at"] == [0, 1] and index["rows"] == [str(path) for path in loras]
    for prompt in range(2):
        for row, step in enumerate((2, 4)):
            without, with_lora = (pixels(tmp_path / "grid" / cell[prompt]) for cell in index["pictures"][row])
            assert np.array_equal(without, pixels(run / "samples" / f"00000000_{prompt:02d}.png"))
            assert np.array_equal(with_lora, pixels(run / "samples" / f"{step:08d}_{prompt:02d}.png"))
            assert not np.array_equal(without, with_lora)
    assert "6 pictures were drawn; 2 of 8 were there" in report.lines[0]  # the base model's are drawn once
    assert Image.open(report.path).width > 2 * 64

    # Again with another strength: what is there is kept, what is no part of it goes.
    report = draw(tmp_path / "grid", loras[1:], at="1, 0.5", settings=run)
    assert "2 pictures were drawn; 2 of 4" in report.lines[0]
    left = {path.name for path in (tmp_path / "grid").glob("*.png")} - {"sheet.png"}
    assert left == contact.names(contact.read(tmp_path / "grid")) and len(left) == 4


def test_a_dora_is_drawn_as_it_would_be_merged(settings, train, tmp_path, capsys):
    from trainer.lora.inspecting import inspect
    from trainer.models import load
    from trainer.tools.grid import network_of

    asked = {"LoRA_type": "LyCORIS/LoCon", "dora_wd": True, "max_train_steps": 2, "unet_lr": 0.1, "text_encoder_lr": 0}
    assert train(settings | asked)[0] == 0
    lora, merged = tmp_path / "out" / "photo.safetensors", tmp_path / "merged.safetensors"
    model = settings["pretrained_model_name_or_path"]
    assert run(capsys, "merge", model, lora, "--strengths", "0.3", "--output", merged)[0] == 0
    cpu = torch.device("cpu")
    base, whole = (load(str(path), "", torch.float32, cpu, 1, 75) for path in (model, merged))
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = base.text_states(base.tokens(["a cat"]))
    network = network_of(inspect(lora), base)
    with torch.no_grad():
        before = base.predict(latents, timesteps, text)
        network.attach()
        with network.strength(0.3), network.without_dropout():
            drawn = base.predict(latents, timesteps, text)
        wanted = whole.predict(latents, timesteps, text)
    assert (wanted - before).norm() > 1e-3 * before.norm()
    assert (drawn - wanted).norm() < 1e-2 * (wanted - before).norm()


def test_what_is_no_grid_of_ours_is_kept_aside(trained, tmp_path):
    run_folder, files = trained
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "sheet.png").write_bytes(b"mine")
    (folder / "grid.json").write_text("not JSON")
    draw(folder, files[1:], at="0", settings=run_folder)
    assert [path.read_bytes() for path in folder.glob("sheet-of-*.png")] == [b"mine"]
    assert [path.read_text() for path in folder.glob("grid-of-*.json")] == ["not JSON"]


def test_a_file_alone_with_its_base_model_is_drawn_as_it_says_of_itself(trained, settings, tmp_path):
    run, loras = trained
    told = []
    model = settings["pretrained_model_name_or_path"]
    draw(tmp_path / "grid", loras[1:], lambda *phase: told.append(phase), model=model, prompts=PROMPTS, at="1")
    ((pictures,),) = contact.read(tmp_path / "grid")["pictures"]
    for prompt, name in enumerate(pictures):
        drawn, sample = (
            pixels(p).astype(int) for p in (tmp_path / "grid" / name, run / "samples" / f"00000004_{prompt:02d}.png")
        )
        assert np.abs(drawn - sample).max() <= 2  # the file does not say how many threads added up its sums
        assert np.abs(drawn - pixels(run / "samples" / f"00000000_{prompt:02d}.png")).max() > 10
    assert told[-1] == ("drawing", 2, 2)


def test_what_cannot_be_drawn_is_refused_naming_the_control(trained, tmp_path):
    run, loras = trained
    (tmp_path / "file").write_text("x")
    for key, values in {
        "model": {"prompts": "a cat"},
        "prompts": {"settings": run, "prompts": "a cat --s none"},
        "at": {"settings": run, "at": "1, high"},
        "settings": {"settings": tmp_path / "nowhere"},
        "output": {"settings": run, "output": tmp_path / "file"},
    }.items():
        with pytest.raises(ConfigError) as refusal:
            draw(values.pop("output", tmp_path / "grid"), loras, **values)
        assert [problem.key for problem in refusal.value.problems] == [key]
