"""What `draws` shows is what a training with the same settings gets."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import loop
from trainer.__main__ import main
from trainer.check import settings as config_of
from trainer.draws import draws
from trainer.models import clip_tokens

LIVELY = {
    "cache_latents": False,
    "flip_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "keep_tokens": 1,
    "caption_dropout_rate": 0.3,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def pixels(draw):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(draw.picture.partition(",")[2]))), np.float32)


@pytest.fixture
def lively(settings, tmp_path):
    """Four photographs, turned and cut in four ways, with captions of many tags; one is longer than 75 tokens."""
    folder = tmp_path / "images" / "3_photo"
    folder.mkdir(parents=True)
    for i, source in enumerate(sorted(Path(settings["train_data_dir"]).rglob("*.png"))):
        Image.open(source).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"zwx {i}, " + ", ".join(f"tag {chr(97 + j)}" for j in range(8 + 9 * i)))
    return {**settings, **LIVELY, "train_data_dir": str(folder.parent)}


def test_the_first_draws_are_those_of_the_first_steps(lively, train, monkeypatch):
    seen, ids, batches = [], [], []
    original, tokenize = loop.batch_loss, clip_tokens.tokenize

    def batch_loss(session, batch):
        batches.append(len(batch.names))
        seen.extend(zip(batch.names, batch.captions, batch.pixels, strict=True))
        return original(session, batch)

    def noted(texts, *lengths, **named):
        found = tokenize(texts, *lengths, **named)
        ids.extend(found.ids.tolist())
        return found

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    monkeypatch.setattr(clip_tokens, "tokenize", noted)
    code, _, _ = train({**lively, "max_train_steps": 3})
    assert code == 0
    found = draws(config_of(lively)[0])
    drawn = found.draws
    assert len(drawn) >= 8 and found.chosen and found.seed == 7
    assert [(d.name, d.caption) for d in drawn] == [(f"3_photo/{name}", text) for name, text, _ in seen[: len(drawn)]]
    for draw, (_, _, image), rows in zip(drawn, seen, ids, strict=False):
        trained = (image.permute(1, 2, 0).numpy() + 1) * 127.5
        assert (
            np.abs(pixels(draw) - trained).mean() < 8 < np.abs(pixels(draw)[:, ::-1] - trained).mean()
        )  # a JPEG of it
        assert draw.kept == sum(token < clip_tokens.BEGIN for row in rows for token in row)
    assert {d.flipped for d in drawn} == {True, False}
    assert any(d.caption == "" and d.before for d in drawn) and any(d.kept == 75 < len(d.tokens) for d in drawn)
    assert [d.step for d in drawn] == [i // 2 + 1 for i, size in enumerate(batches) for _ in range(size)][: len(drawn)]


def test_other_draws_follow_until_the_training_ends_and_then_begin_anew(lively):
    config, _ = config_of(lively)
    first = draws(config)
    then = draws(config, first.following)
    assert len(first.draws) == 8 and first.following == 5  # batches of 2, 1, 2, 2, 1 and 2
    assert then.following == 0 and [d.step for d in then.draws] == [3] * (9 - 8)
    assert (draws(config, 10**6).first, draws(config, -1).first) == (5, 0)


def test_of_a_large_batch_some_are_shown(lively):
    folder = Path(lively["train_data_dir"]) / "3_photo"
    folder.rename(folder.with_name("30_photo"))
    assert len(draws(config_of({**lively, "train_batch_size": 25})[0]).draws) == 12


def test_without_a_seed_it_is_told_that_a_training_draws_otherwise(lively, tmp_path, capsys):
    (tmp_path / "preset.json").write_text(json.dumps({**lively, "seed": ""}))
    assert main(["draws", str(tmp_path / "preset.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] is False


def test_what_masked_loss_leaves_out_is_transparent(lively):
    for path in Path(lively["train_data_dir"]).rglob("*.png"):
        with Image.open(path) as image:
            image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: 255 * (value > 127)))
            image.save(path)
    drawn = draws(config_of({**lively, "masked_loss": True})[0]).draws
    assert all(pixels(d).shape[2] == 4 and {0, 255} <= set(np.unique(pixels(d)[..., 3])) for d in drawn)


def test_folders_without_images_are_told(lively, tmp_path, capsys):
    (tmp_path / "preset.json").write_text(json.dumps({**lively, "train_data_dir": str(tmp_path / "none")}))
    assert main(["draws", str(tmp_path / "preset.json"), "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "none" in problem["message"]


def test_settings_that_training_refuses_are_not_drawn_with(lively, tmp_path, capsys):
    (tmp_path / "preset.json").write_text(json.dumps({**lively, "train_batch_size": 0, "cache_latents": True}))
    assert main(["draws", str(tmp_path / "preset.json"), "--json"]) == 2
    told = {problem["key"] for problem in json.loads(capsys.readouterr().out)["problems"]}
    assert told == {"train_batch_size", "random_crop"}
    assert main(["draws", str(tmp_path / "preset.json")]) == 2
    assert "Train batch size (train_batch_size)" in capsys.readouterr().err


def test_whoever_reads_the_first_lines_alone_sees_no_traceback(lively, tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps(lively))
    words = [sys.executable, "-m", "trainer", "draws", str(tmp_path / "preset.json")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
