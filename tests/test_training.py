"""What a training does, seen from outside: its files, events and exit code."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED


def of_type(events, name):
    return [event for event in events if event["type"] == name]


def warnings(events):
    """All but that one of the photographs is trained with a quarter of its pixels."""
    return [event for event in of_type(events, "warning") if "(bucket_reso_steps)" not in event["message"]]


@pytest.mark.proves(
    "pretrained_model_name_or_path",
    "train_data_dir",
    "output_dir",
    "output_name",
    "LoRA_type",
    "network_dim",
    "network_alpha",
)
def test_a_training_ends_with_a_lora_under_kohyas_names(settings, train, tmp_path):
    code, events, folder = train(settings)
    assert code == EXIT_DONE
    tensors = load_file(tmp_path / "out" / "photo.safetensors")
    assert len(tensors) == 3 * 66
    down = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert tensors[down].shape == (4, 32)
    assert tensors[down].dtype == torch.float32
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    assert float(tensors["lora_te_text_model_encoder_layers_2_mlp_fc1.alpha"]) == 4
    assert any(t.abs().sum() > 0 for k, t in tensors.items() if "lora_up" in k)
    assert [e["step"] for e in of_type(events, "step")] == [1, 2, 3, 4, 5, 6]
    assert events[-1]["type"] == "ended"
    assert events[-1]["status"] == "done"
    assert events[-1]["path"] == str(tmp_path / "out" / "photo.safetensors")
    assert "step 6/6" in (folder / "log.txt").read_text()


@pytest.mark.proves("seed")
def test_the_same_seed_gives_the_same_tensors_bit_for_bit(settings, train, tmp_path):
    settings |= {"flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.3, "noise_offset": 0.05}
    train(settings)
    first = load_file(tmp_path / "out" / "photo.safetensors")
    train(settings)
    second = load_file(tmp_path / "out" / "photo.safetensors")
    assert all(torch.equal(first[k], second[k]) for k in first)
    train(settings | {"seed": 8})
    third = load_file(tmp_path / "out" / "photo.safetensors")
    assert not all(torch.equal(first[k], third[k]) for k in first)


@pytest.mark.proves("seed")
def test_without_a_seed_a_random_one_is_used_logged_and_stored(settings, train, tmp_path):
    _, events, _ = train(settings | {"seed": "", "max_train_steps": 1})
    seed = of_type(events, "started")[0]["seed"]
    with safe_open(tmp_path / "out" / "photo.safetensors", "pt") as file:
        assert file.metadata()["ss_seed"] == str(seed)


@pytest.mark.proves("gradient_accumulation_steps", "train_batch_size")
def test_two_accumulated_batches_make_the_gradient_of_their_mean(settings, tmp_path):
    from trainer import loop

    sessions = {
        n: prepared(settings | {"gradient_accumulation_steps": n, "max_grad_norm": 0}, tmp_path) for n in (1, 2)
    }
    gradients = {}
    for count, session in sessions.items():
        collected = []
        session.network.attach()
        session.optimizer.step = lambda c=collected, s=session: c.append(
            [p.grad.clone() for p in s.network.parameters()]
        )
        session.scheduler.step = lambda: None
        batches = session.feed.batches(range(2))
        for step in range(1, 3 if count == 1 else 2):
            loop.take_step(session, step, batches)
        gradients[count] = collected
        session.network.detach()
    singles, (joint,) = gradients[1], gradients[2]
    for one, two, both in zip(*singles, joint, strict=True):
        torch.testing.assert_close((one + two) / 2, both, rtol=1e-4, atol=1e-7)


def prepared(settings, tmp_path):
    from trainer import schema
    from trainer.prepare import prepare
    from trainer.run import Run

    return prepare(schema.parse(settings), Run(tmp_path), lambda event: None)


@pytest.mark.proves("gradient_checkpointing")
def test_gradient_checkpointing_changes_nothing_but_memory(settings, tmp_path):
    from trainer import loop
    from trainer.randomness import set_torch_to

    def first_loss_and_gradient(checkpointing):
        session = prepared(settings | {"gradient_checkpointing": checkpointing}, tmp_path)
        session.network.attach()
        set_torch_to(1, "x")
        loss = loop.batch_loss(session, session.feed[0])
        loss.backward()
        return float(loss.detach()), [p.grad for p in session.network.parameters()]

    plain, checkpointed = first_loss_and_gradient(False), first_loss_and_gradient(True)
    assert plain[0] == pytest.approx(checkpointed[0], rel=1e-6)
    for a, b in zip(plain[1], checkpointed[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_accumulation_takes_fewer_steps_across_epochs(settings, train):
    _, events, _ = train(settings | {"gradient_accumulation_steps": 4, "epoch": 2})
    assert [e["step"] for e in of_type(events, "step")] == [1, 2, 3]


@pytest.mark.proves("epoch", "max_train_epochs", "max_train_steps")
def test_max_train_epochs_and_steps_limit_the_training(settings, train):
    _, events, _ = train(settings | {"epoch": 5, "max_train_epochs": "1"})
    assert of_type(events, "started")[0]["total_steps"] == 6
    _, events, _ = train(settings | {"epoch": 5, "max_train_epochs": "1", "max_train_steps": 2})
    assert of_type(events, "started")[0]["total_steps"] == 2


@pytest.mark.proves("save_every_n_epochs", "save_every_n_steps", "output_name")
def test_files_between_have_kohyas_names(settings, train, tmp_path):
    train(settings | {"epoch": 3, "save_every_n_epochs": 2, "save_every_n_steps": 7})
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "photo-000002.safetensors",
        "photo-step00000007.safetensors",
        "photo-step00000014.safetensors",
        "photo.safetensors",
    ]


@pytest.mark.proves("save_every_n_epochs", "sample_every_n_epochs")
def test_a_step_of_several_epochs_stands_for_the_last_one_that_is_due(settings, train, tmp_path):
    """Six batches an epoch and 18 a step: after the steps 3, 6, 9 and 12 epochs are complete."""
    settings |= {"gradient_accumulation_steps": 18, "epoch": 12, "sample_prompts": "a cat --s 1 --w 64 --h 64"}
    _, events, _ = train(settings | {"save_every_n_epochs": 2, "sample_every_n_epochs": 4})
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [*(f"photo-{epoch:06}.safetensors" for epoch in (2, 6, 8)), "photo.safetensors"]
    assert [e["step"] for e in of_type(events, "sample")] == [0, 2, 3, 4]


@pytest.mark.proves("unet_lr", "text_encoder_lr")
@pytest.mark.parametrize(
    ("zero", "kept", "gone"), [("text_encoder_lr", "lora_unet", "lora_te"), ("unet_lr", "lora_te", "lora_unet")]
)
def test_a_rate_of_zero_means_no_modules_for_that_part(settings, train, tmp_path, zero, kept, gone):
    train(settings | {zero: 0, "max_train_steps": 1})
    names = load_file(tmp_path / "out" / "photo.safetensors")
    assert any(n.startswith(kept) for n in names)
    assert not any(n.startswith(gone) for n in names)


@pytest.mark.proves("learning_rate", "unet_lr", "text_encoder_lr")
def test_an_empty_rate_is_the_general_one_and_each_part_has_its_own(settings, train):
    _, events, _ = train(
        settings
        | {
            "learning_rate": 3e-4,
            "unet_lr": "",
            "text_encoder_lr": "2e-5",
            "lr_scheduler": "constant",
            "max_train_steps": 1,
        }
    )
    step = of_type(events, "step")[0]
    assert step["unet_lr"] == pytest.approx(3e-4)
    assert step["text_encoder_lr"] == pytest.approx(2e-5)


@pytest.mark.proves("stop_text_encoder_training")
def test_the_text_encoder_stops_at_its_share_of_the_steps(settings, train, tmp_path):
    given = {"stop_text_encoder_training": 50, "save_every_n_steps": 1, "optimizer_args": "weight_decay=0.5"}
    _, events, _ = train(settings | given)
    rates = [bool(event["text_encoder_lr"]) for event in of_type(events, "step")]
    assert rates == [True, True, True, False, False, False]
    files = [load_file(tmp_path / "out" / f"photo-step{n:08d}.safetensors") for n in range(1, 6)]
    files.append(load_file(tmp_path / "out" / "photo.safetensors"))

    def same(a, b, part):
        return all(torch.equal(files[a][k], files[b][k]) for k in files[a] if k.startswith(part))

    assert not same(1, 2, "lora_te")
    assert same(2, 3, "lora_te")
    assert same(2, 5, "lora_te")
    assert not same(2, 3, "lora_unet")


@pytest.mark.proves("network_weights")
def test_training_goes_on_from_a_lora_file_which_stays_as_it_was(settings, train, tmp_path):
    train(settings)
    given = tmp_path / "given.safetensors"
    shutil.copy(tmp_path / "out" / "photo.safetensors", given)
    before = given.read_bytes()
    train(settings | {"network_weights": str(given), "learning_rate": 1e-9, "max_train_steps": 1})
    old, new = load_file(given), load_file(tmp_path / "out" / "photo.safetensors")
    assert given.read_bytes() == before
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)


@pytest.mark.proves("dim_from_weights")
def test_dim_from_weights_takes_rank_and_alpha_from_the_file(settings, train, tmp_path):
    train(settings | {"network_dim": 6, "network_alpha": 3, "max_train_steps": 1})
    shutil.move(tmp_path / "out" / "photo.safetensors", tmp_path / "six.safetensors")
    train(
        settings
        | {"network_weights": str(tmp_path / "six.safetensors"), "dim_from_weights": True, "max_train_steps": 1}
    )
    tensors = load_file(tmp_path / "out" / "photo.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_down" in k} == {6}
    assert {float(t) for k, t in tensors.items() if k.endswith("alpha")} == {3.0}


@pytest.mark.proves("save_precision")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_file_has_the_asked_precision(settings, train, tmp_path, precision, dtype):
    train(settings | {"save_precision": precision, "max_train_steps": 1})
    assert {t.dtype for t in load_file(tmp_path / "out" / "photo.safetensors").values()} == {dtype}


@pytest.mark.proves("mixed_precision")
def test_fp16_on_a_processor_becomes_bf16_with_a_warning(settings, train):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    _, events, _ = train(settings | {"mixed_precision": "fp16", "max_train_steps": 1})
    assert of_type(events, "started")[0]["precision"] == "bf16"
    assert any("bf16 is used instead" in e["message"] for e in of_type(events, "warning"))


@pytest.mark.proves("sample_every_n_steps", "sample_every_n_epochs", "sample_prompts")
def test_samples_are_drawn_before_training_and_when_they_are_due(settings, train):
    prompts = "a cat --s 2 --d 5\n# not this\na dog --n bad --w 96 --h 64 --s 2"
    _, events, folder = train(
        settings | {"sample_every_n_steps": 4, "sample_every_n_epochs": 1, "sample_prompts": prompts}
    )
    drawn = of_type(events, "sample")
    assert [(e["step"], e["index"]) for e in drawn] == [(0, 0), (0, 1), (4, 0), (4, 1), (6, 0), (6, 1)]
    assert drawn[0]["seed"] == 5
    assert drawn[1]["seed"] == drawn[3]["seed"]
    pictures = {(e["step"], e["index"]): (folder / e["path"]).read_bytes() for e in drawn}
    assert pictures[0, 0] != pictures[6, 0]


def test_stop_saves_what_is_trained_and_exits_as_stopped(settings, train, tmp_path, monkeypatch):
    from trainer import loop

    step = loop.take_step

    def stop_after_two(session, number, batches):
        if number == 2:
            session.run.request("stop")
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", stop_after_two)
    code, events, _ = train(settings)
    assert code == EXIT_STOPPED
    assert events[-1]["status"] == "stopped"
    assert events[-1]["step"] == 2
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["photo-step00000002-state", "photo-step00000002.safetensors"]


def test_save_and_sample_can_be_asked_for_in_the_middle(settings, train, tmp_path, monkeypatch):
    from trainer import loop

    step = loop.take_step

    def ask(session, number, batches):
        if number == 3:
            session.run.request("save")
            session.run.request("sample")
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", ask)
    code, events, _ = train(settings | {"sample_prompts": "a cat --s 2"})
    assert code == EXIT_DONE
    assert (tmp_path / "out" / "photo-step00000003.safetensors").exists()
    assert [e["step"] for e in of_type(events, "sample")] == [3]


def test_a_loss_that_is_not_a_number_ends_the_run_and_never_reaches_a_file(settings, train, tmp_path):
    code, events, _ = train(
        settings | {"learning_rate": 1e30, "max_grad_norm": 0, "optimizer": "AdamW", "lr_scheduler": "constant"}
    )
    assert code == EXIT_FAILED
    assert of_type(events, "failed")[-1]["kind"] == "not_a_number"
    assert "learning rate" in of_type(events, "failed")[-1]["hint"]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bad_settings_are_refused_with_all_reasons_before_anything_is_loaded(settings, train, capsys):
    code, _, _ = train(settings | {"train_data_dir": "/nowhere", "learning_rate": "fast"})
    assert code == EXIT_CONFIG
    message = capsys.readouterr().err
    assert "train_data_dir" in message
    assert "learning_rate" in message


@pytest.mark.proves("cache_latents_to_disk")
def test_latents_from_disk_train_as_those_in_memory(settings, train, tmp_path, photographs):
    own = tmp_path / "own photographs"
    shutil.copytree(photographs, own)
    settings |= {"train_data_dir": str(own), "flip_aug": True}
    train(settings)
    expected = load_file(tmp_path / "out" / "photo.safetensors")
    for _ in range(2):
        train(settings | {"cache_latents_to_disk": True})
        found = load_file(tmp_path / "out" / "photo.safetensors")
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert len(list((own / "2_photo" / ".latents").iterdir())) == 3


def test_weighted_captions_and_no_token_padding_change_the_states_that_the_unet_sees(settings, tmp_path):
    from trainer import loop

    def states(**changes):
        session = prepared(settings | changes, tmp_path)
        seen = []
        predict = session.model.predict
        session.model.predict = lambda x, t, s, *sizes: (seen.append(s.states), predict(x, t, s, *sizes))[1]
        batch = session.feed[0]
        batch.all_captions[:] = ["a (cat:1.5)"]
        loop.batch_loss(session, batch)
        return seen[0].detach()

    with_brackets_as_text, weighted = states(), states(weighted_captions=True)
    assert with_brackets_as_text.shape == weighted.shape == (1, 77, 32)
    torch.testing.assert_close(weighted[:, :2], with_brackets_as_text[:, :2])  # begin mark, a
    plain = prepared(settings, tmp_path).model
    expected = plain.text_states(plain.tokens(["a cat"])).states
    torch.testing.assert_close(weighted[:, 2], 1.5 * expected[:, 2])
    torch.testing.assert_close(weighted[:, 3:], expected[:, 3:])
    short = states(weighted_captions=True, no_token_padding=True)
    assert short.shape == (1, 4, 32)  # begin mark, a, cat, end mark
    torch.testing.assert_close(short, weighted[:, :4])


def test_captions_of_different_lengths_train_without_padding(settings, train):
    settings |= {"no_token_padding": True, "train_batch_size": 3, "enable_bucket": False}
    code, events, _ = train(settings | {"max_train_steps": 2})
    assert code == EXIT_DONE
    assert len(of_type(events, "step")) == 2


@pytest.mark.proves("no_token_padding")
def test_each_part_of_a_batch_is_as_long_as_the_longest_caption_of_all(settings, tmp_path):
    from trainer import loop
    from trainer.randomness import set_torch_to

    session = prepared(settings | {"no_token_padding": True, "train_batch_size": 3, "enable_bucket": False}, tmp_path)
    batch = session.feed[0]
    assert len({len(session.model.tokens([caption])[0].ids) for caption in batch.captions}) == 1
    set_torch_to(7, "noise")
    whole = loop.batch_loss(session, batch)
    session.parts = 3
    set_torch_to(7, "noise")
    assert float(sum(loop.losses_of_parts(session, batch))) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.proves("cache_latents", "max_data_loader_n_workers")
def test_uncached_images_train_and_worker_processes_change_nothing(settings, train, tmp_path):
    settings |= {"cache_latents": False, "flip_aug": True, "shuffle_caption": True}
    train(settings | {"max_data_loader_n_workers": 0})
    alone = load_file(tmp_path / "out" / "photo.safetensors")
    train(settings | {"max_data_loader_n_workers": 2})
    helped = load_file(tmp_path / "out" / "photo.safetensors")
    assert all(torch.equal(alone[k], helped[k]) for k in alone)


def test_source_images_and_captions_are_never_touched(settings, train, photographs):
    def state(folder: Path):
        return {
            p: (p.read_bytes(), p.stat().st_mtime_ns)
            for p in folder.rglob("*")
            if p.is_file() and ".latents" not in p.parts
        }

    before = state(photographs)
    train(settings | {"max_train_steps": 2})
    assert state(photographs) == before


@pytest.mark.proves("logging_dir")
def test_tensorboard_files_are_written_where_asked(settings, train, tmp_path):
    train(settings | {"logging_dir": str(tmp_path / "logs"), "max_train_steps": 2})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = list((tmp_path / "logs").rglob("events.out.tfevents*"))
    log = EventAccumulator(str(file))
    log.Reload()
    assert len(log.Scalars("loss/current")) == 2
    assert {"lr/unet", "lr/text_encoder"} <= set(log.Tags()["scalars"])


@pytest.mark.proves("xformers")
def test_the_log_tells_why_xformers_is_not_used(settings, train):
    _, _, folder = train(settings | {"xformers": "xformers", "max_train_steps": 1})
    assert "xformers is not used" in (folder / "log.txt").read_text()


def test_training_learns_the_photographs(settings, train):
    """The loss on fixed noise falls: the mean of the last quarter is under that of the first."""
    _, events, _ = train(settings | {"epoch": 25, "save_every_n_epochs": 0})
    losses = [e["loss"] for e in of_type(events, "step")]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.97 * sum(losses[:quarter])


def test_every_event_begins_with_its_type_and_time(settings, train):
    began = time.time()
    _, _, folder = train(settings | {"max_train_steps": 1})
    for line in (folder / "events.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert list(record)[:2] == ["type", "time"]
        assert began - 1 < record["time"] < time.time() + 1


@pytest.mark.parametrize(("limit", "norm"), [(1e-3, 1e-3), (0, None)])
@pytest.mark.proves("max_grad_norm")
def test_gradients_are_shortened_to_the_limit_and_zero_is_off(settings, tmp_path, limit, norm):
    from trainer import loop

    session = prepared(settings | {"max_grad_norm": limit}, tmp_path)
    found = []
    session.network.attach()
    session.scheduler.step = lambda: None
    session.optimizer.step = lambda: found.extend(p.grad.norm() for p in session.network.parameters())
    loop.take_step(session, 1, session.feed.batches(range(1)))
    total = float(torch.stack(found).norm())
    if norm is None:
        assert total > 0.01
    else:
        assert total == pytest.approx(norm, rel=1e-2)


@pytest.mark.proves("num_cpu_threads_per_process")
def test_the_trainer_computes_with_the_asked_number_of_threads(settings, tmp_path):
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            prepared(settings | {"num_cpu_threads_per_process": count}, tmp_path)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.proves("save_model_as")
def test_ckpt_in_a_preset_is_answered_with_safetensors_and_why(settings, train, tmp_path):
    _, events, _ = train(settings | {"save_model_as": "ckpt", "max_train_steps": 1})
    assert [p.suffix for p in (tmp_path / "out").iterdir()] == [".safetensors"]
    assert any("save_model_as" in e["message"] and "hide programs" in e["message"] for e in of_type(events, "warning"))


@pytest.mark.proves("gradient_checkpointing")
def test_gradient_checkpointing_keeps_less_for_the_backward_pass(settings, tmp_path):
    from trainer import loop

    def kept_bytes(checkpointing):
        session = prepared(settings | {"gradient_checkpointing": checkpointing}, tmp_path)
        session.network.attach()
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loop.batch_loss(session, session.feed[0])
        return kept

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_a_file_of_an_earlier_run_is_kept_under_a_name_with_its_date(settings, train, tmp_path):
    train(settings | {"max_train_steps": 1})
    first = (tmp_path / "out" / "photo.safetensors").read_bytes()
    _, events, _ = train(settings | {"max_train_steps": 2})
    kept = next((tmp_path / "out").glob("photo-of-*.safetensors"))
    assert kept.read_bytes() == first
    assert (tmp_path / "out" / "photo.safetensors").read_bytes() != first
    assert any(kept.name in event["message"] for event in of_type(events, "warning"))
