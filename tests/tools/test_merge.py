import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tools import loras
from tests.tools.loras import CONV, LAYERS, PROJ_IN, TEXT, TO_Q, run
from trainer.models.pickled import Checkpoint


def merged(capsys, *words):
    code, said = run(capsys, "merge", *words)
    assert code == 0, said
    return said


def test_each_weight_grows_by_strength_times_its_update_and_nothing_else_changes(tiny_model, tmp_path, capsys):
    one, two = loras.write(tmp_path / "one.safetensors"), loras.write(tmp_path / "two.safetensors", rank=2, seed=1)
    out = tmp_path / "out.safetensors"
    merged(capsys, tiny_model, one, two, "--strengths", "0.8", "-0.5", "--output", out)
    before, after = load_file(tiny_model), load_file(out)
    assert list(before) == list(after)
    changed = {original: name for name, (original, _) in LAYERS.items()}
    for name in before:
        if name not in changed:
            assert torch.equal(before[name], after[name]), name
            continue
        delta = 0.8 * loras.delta(one, changed[name]) - 0.5 * loras.delta(two, changed[name])
        wanted = before[name].double().flatten(1).numpy() + delta
        np.testing.assert_allclose(after[name].flatten(1).numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_pytorch_is_merged_as_its_safetensors_file(tiny_model, tmp_path, capsys, monkeypatch):
    lora = loras.write(tmp_path / "lora.safetensors")
    torch.save({"state_dict": load_file(tiny_model)}, tmp_path / "base.ckpt")
    with safe_open(tiny_model, framework="pt") as file:
        metadata = {"config": file.metadata()["config"]}  # of the tiny model, which a checkpoint has no place for
    whole = Checkpoint.__init__

    def opened(self, path):
        whole(self, path)
        self.header = replace(self.header, metadata=metadata)

    monkeypatch.setattr(Checkpoint, "__init__", opened)
    merged(capsys, tiny_model, lora, "--output", tmp_path / "one.safetensors")
    merged(capsys, tmp_path / "base.ckpt", lora, "--output", tmp_path / "two.safetensors")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_result_is_what_the_trainers_network_answers(tiny_model, tmp_path, capsys):
    """Merged at 0.7, the model answers as the base model with the LoRA attached at 0.7."""
    from trainer.lora.reading import read
    from trainer.models import load
    from trainer.networks import build
    from trainer.networks.blocks import from_file
    from trainer.schema.network import Network

    path = loras.write(tmp_path / "lora.safetensors", alpha=0.5)
    out = tmp_path / "out.safetensors"
    merged(capsys, tiny_model, path, "--strengths", "0.7", "--output", out)
    tensors = read(path).tensors
    cpu = torch.device("cpu")
    base, whole = (load(str(source), "", torch.float32, cpu, 1, 75) for source in (tiny_model, out))
    network = build(Network(), base.targets(), {"unet", "text_encoder"}, from_file(tensors))
    network.read(tensors)
    network.attach()
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([400])
    with torch.no_grad(), network.strength(0.7):
        states = [model.text_states(model.tokens(["a cat"])) for model in (base, whole)]
        answers = [model.predict(latents, times, state) for model, state in zip((base, whole), states, strict=True)]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
def test_the_precision_asked_for_is_that_of_every_weight(tiny_model, tmp_path, capsys, precision):
    out = tmp_path / "out.safetensors"
    merged(capsys, tiny_model, loras.write(tmp_path / "l.safetensors"), "--output", out, "--precision", precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[precision]
    assert {tensor.dtype for tensor in load_file(out).values()} == {dtype}


def test_whole_numbers_stay_as_they_are(tiny_model, tmp_path, capsys):
    tensors = load_file(tiny_model)
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    tensors[positions] = torch.arange(77)[None]
    model = tmp_path / "model.safetensors"
    save_file(tensors, model, {"config": json.dumps(tiny.CONFIGS)})
    out = tmp_path / "out.safetensors"
    merged(capsys, model, loras.write(tmp_path / "l.safetensors"), "--output", out, "--precision", "fp16")
    assert torch.equal(load_file(out)[positions], tensors[positions])


def test_the_file_says_what_it_was_made_of_and_can_be_loaded(tiny_model, tmp_path, capsys):
    out = tmp_path / "styled.safetensors"
    path = loras.write(tmp_path / "l.safetensors", metadata={"modelspec.title": "Ink"})
    merged(capsys, tiny_model, path, "--output", out)
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert said["modelspec.merged_from"] == "tiny, Ink"
    assert said["modelspec.title"] == "styled"
    assert said["modelspec.architecture"] == "stable-diffusion-v1"
    assert "config" in said


def test_a_diffusers_folder_becomes_a_folder_with_the_same_weights_as_the_file(tiny_model, tmp_path, capsys):
    folder = tmp_path / "model"
    unet, vae, text_encoder = tiny.modules()
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        module.save_pretrained(folder / part)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("kept")
    path = loras.write(tmp_path / "l.safetensors")
    out, file = tmp_path / "out", tmp_path / "out.safetensors"
    merged(capsys, folder, path, "--output", out)
    merged(capsys, tiny_model, path, "--output", file)
    assert (out / "tokenizer" / "merges.txt").read_text() == "kept"
    whole = load_file(file)
    of_unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    of_text = {k.removeprefix("text_model."): v for k, v in load_file(out / "text_encoder/model.safetensors").items()}
    torch.testing.assert_close(of_unet["down_blocks.0.resnets.0.conv1.weight"], whole[LAYERS[CONV][0]])
    torch.testing.assert_close(of_unet["down_blocks.0.attentions.0.proj_in.weight"], whole[LAYERS[PROJ_IN][0]])
    torch.testing.assert_close(of_text["encoder.layers.1.mlp.fc1.weight"], whole[LAYERS[TEXT][0]])
    for place, told in (
        (tmp_path, "holds an input"),
        (folder / "merged", "lies in one"),
        (tmp_path / "out.safetensors", "would be a folder"),
        (folder.parent / "other", "is there already"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        code, said = run(capsys, "merge", folder, path, "--output", place)
        assert (code, told in said) == (2, True), said
        assert sorted(tmp_path.rglob("*")) == before


def test_strengths_that_begin_with_a_minus_are_values(tiny_model, tmp_path, capsys):
    lora, out = loras.write(tmp_path / "l.safetensors"), tmp_path / "out.safetensors"
    merged(capsys, tiny_model, lora, lora, "--strengths", "-1,0.5", "--output", out)
    name = LAYERS[TO_Q][0]
    wanted = load_file(tiny_model)[name].numpy() - 0.5 * loras.delta(lora, TO_Q)
    np.testing.assert_allclose(load_file(out)[name].numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_events_that_cannot_be_written_are_told(tmp_path, capsys):
    lora = loras.write(tmp_path / "l.safetensors")
    code, said = run(capsys, "inspect", lora, "--events", tmp_path / "l.safetensors" / "events.jsonl")
    assert code == 2 and "(--events) cannot be written" in said


def test_several_loras_have_one_sum_whatever_their_order(tiny_model, tmp_path, capsys):
    """DoRA's and iA3's updates follow from the weight: from the base model's, not from what was added to it."""
    dora, plain = tmp_path / "dora.safetensors", loras.write(tmp_path / "plain.safetensors")
    tensors = load_file(loras.write(dora, seed=1))
    save_file({**tensors, f"{TO_Q}.dora_scale": torch.rand(32, 1) + 1}, dora)
    results = []
    for order in ((dora, plain), (plain, dora)):
        merged(capsys, tiny_model, *order, "--output", tmp_path / "out.safetensors")
        results.append(load_file(tmp_path / "out.safetensors")[LAYERS[TO_Q][0]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_types_whose_update_depends_on_the_weight_and_changes_of_biases(tiny_model, tmp_path, capsys):
    """iA3 of the rows: W·(1 + s·w). DoRA: s of the way to lengths · (W + ΔW)/|W + ΔW|. Differences: W + s·D, b + s·d."""
    name = LAYERS[CONV][0]
    before = load_file(tiny_model)
    weight, text = (before[LAYERS[layer][0]].double().numpy() for layer in (TO_Q, TEXT))
    bias = before[name.replace("weight", "bias")].numpy()
    draw = np.random.default_rng(0).normal
    rows, diff, diff_b, lengths = draw(size=(32, 1)), draw(size=(32, 32, 3, 3)), draw(size=32), draw(size=(64, 1)) ** 2
    up, down = draw(size=(64, 2)), draw(size=(2, 32))
    tensors = {
        f"{TO_Q}.weight": rows,
        f"{TO_Q}.on_input": np.array(False),
        f"{CONV}.diff": diff,
        f"{CONV}.diff_b": diff_b,
        f"{TEXT}.lora_up.weight": up,
        f"{TEXT}.lora_down.weight": down,
        f"{TEXT}.alpha": np.array(2.0),
        f"{TEXT}.dora_scale": lengths,
    }
    path, out = tmp_path / "mixed.safetensors", tmp_path / "out.safetensors"
    save_file(
        {key: torch.tensor(value if value.dtype == bool else value.astype("f")) for key, value in tensors.items()}, path
    )
    merged(capsys, tiny_model, path, "--strengths", "0.5", "--output", out)
    after = {key: tensor.double().numpy() for key, tensor in load_file(out).items()}
    np.testing.assert_allclose(after[LAYERS[TO_Q][0]], weight * (1 + 0.5 * rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[name], before[name].numpy() + 0.5 * diff, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[name.replace("weight", "bias")], bias + 0.5 * diff_b, rtol=1e-4, atol=1e-5)
    turned = text + up @ down
    turned *= lengths / np.linalg.norm(turned, axis=1, keepdims=True)
    np.testing.assert_allclose(after[LAYERS[TEXT][0]], text + 0.5 * (turned - text), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_layer_that_openclip_holds_as_a_third_of_a_tensor_changes_that_third_alone(tiny_model, third):
    from pathlib import Path

    from trainer.tools.base import Place
    from trainer.tools.merge import change

    whole = torch.zeros(9, 4)
    place = Place(Path("x"), "in_proj_weight", "weight", third)
    roles = {"lora_up.weight": torch.ones(3, 1), "lora_down.weight": torch.ones(1, 4), "alpha": torch.tensor(1.0)}
    change(place.of(whole), "weight", roles, 2.0, "q", place.of(whole))
    rows = whole.view(3, 3, 4).sum((1, 2))
    assert rows.tolist() == [24.0 if i == third else 0.0 for i in range(3)]


def test_a_lora_for_another_family_is_refused(tiny_model, tmp_path, capsys):
    path = tmp_path / "xl.safetensors"
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    up, down = torch.ones(4, 2), torch.ones(2, 2048)
    save_file(
        {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": torch.ones(())}, path
    )
    code, said = run(capsys, "merge", tiny_model, path, "--output", tmp_path / "out.safetensors")
    assert code == 1 and "SDXL" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_weight_that_fp16_cannot_hold_stops_the_merge_and_leaves_nothing(tiny_model, tmp_path, capsys):
    path = loras.write(tmp_path / "l.safetensors")
    before = set(tmp_path.iterdir())
    code, said = run(
        capsys, "merge", tiny_model, path, "--strengths", "90000", "--output", tmp_path / "o", "--precision", "fp16"
    )
    assert code == 1 and "Choose bf16 or float" in said
    assert set(tmp_path.iterdir()) == before


def test_an_interrupted_merge_leaves_nothing_and_the_old_file_as_it_was(tiny_model, tmp_path, capsys, monkeypatch):
    from trainer.tools import merge

    path, out = loras.write(tmp_path / "l.safetensors"), tmp_path / "out.safetensors"
    out.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "change", interrupt)
    code, _ = run(capsys, "merge", tiny_model, path, "--output", out)
    assert code == 3
    assert out.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"l.safetensors", "out.safetensors"}


def test_a_file_in_the_way_is_kept_under_a_name_with_its_date(tiny_model, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    code, told = run(capsys, "merge", tiny_model, loras.write(tmp_path / "l.safetensors"), "--output", out)
    (kept,) = tmp_path.glob("out-of-*.safetensors")
    assert code == 0 and kept.read_text() == "old" and load_file(out)
    assert f"Written: {out} (what was there is kept as {kept.name})" in str(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--output", "{model}"), "one of the inputs"),
        (("--output", "{folder}/x.ckpt"), ".safetensors"),
        (("--output", "{folder}/x", "--strengths", "1", "2", "3"), "Strengths (strengths)"),
        (("--output", "{folder}/x", "--strengths", "much"), '"much" is not allowed'),
        (("--output", "{folder}/x", "--precision", "int4"), "one of same, fp16, bf16, float"),
    ],
)
def test_options_that_cannot_work_are_named(tiny_model, tmp_path, capsys, words, told):
    path = loras.write(tmp_path / "l.safetensors")
    words = [word.format(model=tiny_model, folder=tmp_path) for word in words]
    code, said = run(capsys, "merge", tiny_model, path, path, *words)
    assert code == 2 and told in said


def test_a_missing_input_is_named(tiny_model, tmp_path, capsys):
    code, said = run(capsys, "merge", tiny_model, tmp_path / "no.safetensors", "--output", tmp_path / "x")
    assert code == 2 and "no.safetensors" in said and "LoRAs (loras)" in said


def test_to_q_of_an_attention_is_found(tiny_model):
    from trainer.lora.names import layer
    from trainer.tools.base import open_base

    with open_base(str(tiny_model)) as base:
        assert base.places[layer(TO_Q), "weight"].tensor == LAYERS[TO_Q][0]
