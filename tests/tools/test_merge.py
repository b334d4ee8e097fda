import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tools import loras
from tests.tools.loras import CONV, LAYERS, PROJ_IN, TEXT, TO_Q, run


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


TYPES = ["LyCORIS/LoHa", "LyCORIS/LoKr", "LyCORIS/iA3", "LyCORIS/GLoRA", "LyCORIS/Diag-OFT", "LyCORIS/BOFT"]


@pytest.mark.parametrize("kind", [*TYPES, "LyCORIS/Native Fine-Tuning"])
def test_every_type_is_merged_as_it_was_trained(tiny_model, tmp_path, capsys, kind):
    """The merged weights answer as the trained modules do, for a Linear, a 1×1 and a 3×3 convolution."""
    from trainer.checkpoint import save_lora
    from trainer.models import load
    from trainer.networks import build
    from trainer.networks.blocks import from_settings
    from trainer.schema import parse

    config = parse({"LoRA_type": kind, "network_dim": 4, "conv_dim": 4, "LyCORIS_preset": "full"})
    cpu = torch.device("cpu")
    base = load(str(tiny_model), "", torch.float32, cpu, 1, 75)
    network = build(config.network, base.targets(), {"unet", "text_encoder"}, from_settings(config, None))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_lora(path, network, "float", {})
    merged(capsys, tiny_model, path, "--output", out)
    whole = load(str(out), "", torch.float32, cpu, 1, 75)
    network.attach()
    network.eval()
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([400])
    with torch.no_grad():
        states = [model.text_states(model.tokens(["a cat"])) for model in (base, whole)]
        answers = [model.predict(latents, times, state) for model, state in zip((base, whole), states, strict=True)]
        network.detach()
        alone = base.predict(latents, times, states[0])
    assert (answers[0] - alone).abs().max() > 1e-3, "the LoRA does something"
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-4)


def test_a_lora_for_another_family_is_refused(tiny_model, tmp_path, capsys):
    path = tmp_path / "xl.safetensors"
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    up, down = torch.ones(4, 2), torch.ones(2, 2048)
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": torch.ones(())}, path)
    code, said = run(capsys, "merge", tiny_model, path, "--output", tmp_path / "out.safetensors")
    assert code == 1 and "SDXL" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_weight_that_fp16_cannot_hold_stops_the_merge_and_leaves_nothing(tiny_model, tmp_path, capsys):
    path = loras.write(tmp_path / "l.safetensors")
    before = set(tmp_path.iterdir())
    code, said = run(
        capsys, "merge", tiny_model, path, "--strengths", "90000", "--output", tmp_path / "o", "--precision", "fp16"
    )
    assert code == 1 and "Lower the strength" in said
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
    merged(capsys, tiny_model, loras.write(tmp_path / "l.safetensors"), "--output", out)
    (kept,) = tmp_path.glob("out-of-*.safetensors")
    assert kept.read_text() == "old" and load_file(out)


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
