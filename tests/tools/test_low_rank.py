"""Merging LoRAs, resizing and extracting, against numpy's SVD of the explicit ΔW."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tools import loras
from tests.tools.loras import CONV, LAYERS, PROJ_IN, TEXT, TO_Q, best, delta, run
from trainer.tools.low_rank import decompose, decompose_product, factors, kept_rank


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    said = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_training_comment": "first"}
    return (
        loras.write(folder / "one.safetensors", rank=4, alpha=2, metadata=said),
        loras.write(folder / "two.safetensors", rank=3, alpha=6, seed=1),
    )


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def make(capsys, *words):
    code, said = run(capsys, *words)
    assert code == 0, said
    return said


def test_joined_loras_are_exactly_the_weighted_sum_of_their_updates(pair, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    make(capsys, "merge-loras", *pair, "--strengths", "0.8", "-0.5", "--output", out)
    tensors = load_file(out)
    for name in LAYERS:
        np.testing.assert_allclose(
            delta(out, name), 0.8 * delta(pair[0], name) - 0.5 * delta(pair[1], name), rtol=1e-4, atol=1e-4
        )
        assert len(tensors[f"{name}.lora_down.weight"]) == 7 == float(tensors[f"{name}.alpha"])
    assert tensors[f"{CONV}.lora_down.weight"].shape == (7, 32, 3, 3)
    assert tensors[f"{PROJ_IN}.lora_up.weight"].shape == (32, 7, 1, 1)


def test_loras_merged_to_a_rank_are_the_nearest_of_that_rank(pair, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    make(capsys, "merge-loras", *pair, "--strengths", "1", "0.5", "--rank", 3, "--conv_rank", 2, "--output", out)
    for name, rank in ((TO_Q, 3), (PROJ_IN, 3), (TEXT, 3), (CONV, 2)):
        wanted = best(delta(pair[0], name) + 0.5 * delta(pair[1], name), rank)
        np.testing.assert_allclose(delta(out, name), wanted, rtol=1e-3, atol=1e-3)


def test_other_types_can_be_merged_to_a_rank_but_not_joined(pair, tmp_path, capsys):
    """LoHa: ΔW = alpha / rank · (a₁ b₁) ∘ (a₂ b₂)."""
    generator = np.random.default_rng(0)
    a1, a2 = generator.normal(size=(2, 32, 2)).astype("f")
    b1, b2 = generator.normal(size=(2, 2, 32 * 9)).astype("f")
    path, out = tmp_path / "loha.safetensors", tmp_path / "both.safetensors"
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": np.float32(1)}
    save_file({f"{CONV}.{role}": torch.tensor(value) for role, value in parts.items()}, path)
    make(capsys, "merge-loras", path, pair[0], "--rank", 6, "--output", out)
    wanted = best((a1 @ b1) * (a2 @ b2) / 2 + delta(pair[0], CONV), 6)
    np.testing.assert_allclose(delta(out, CONV), wanted, rtol=1e-3, atol=1e-3)
    assert load_file(out)[f"{CONV}.lora_down.weight"].shape == (6, 32, 3, 3)
    code, said = run(capsys, "merge-loras", path, pair[0], "--output", tmp_path / "x.safetensors")
    assert code == 1 and "Give a rank" in said


def test_a_type_whose_update_needs_the_base_model_is_refused(pair, tmp_path, capsys):
    path = tmp_path / "ia3.safetensors"
    save_file({f"{TO_Q}.weight": torch.ones(32, 1), f"{TO_Q}.on_input": torch.tensor(False)}, path)
    code, said = run(capsys, "merge-loras", path, pair[0], "--rank", 4, "--output", tmp_path / "x.safetensors")
    assert code == 1 and "extract a LoRA from the difference" in said


def test_a_merged_lora_says_what_it_is_and_its_hash_is_that_of_its_content(pair, tmp_path, capsys):
    from trainer.checkpoint import hashes

    out = tmp_path / "both.safetensors"
    make(capsys, "merge-loras", *pair, "--rank", 3, "--conv_rank", 2, "--output", out)
    said = metadata(out)
    assert said["ss_base_model_version"] == "sd_v1" and said["ss_v2"] == "False"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "3", "3")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert said["modelspec.merged_from"] == "one, two" and said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["sshs_model_hash"] == hashes(load_file(out), said)["sshs_model_hash"]


def test_resizing_keeps_the_nearest_update_and_the_layers_strength(pair, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    make(capsys, "resize", pair[0], "--rank", 2, "--conv_rank", 3, "--output", out)
    tensors = load_file(out)
    for name, rank in ((TO_Q, 2), (PROJ_IN, 2), (TEXT, 2), (CONV, 3)):
        np.testing.assert_allclose(delta(out, name), best(delta(pair[0], name), rank), rtol=1e-3, atol=1e-3)
        assert len(tensors[f"{name}.lora_down.weight"]) == rank
        assert float(tensors[f"{name}.alpha"]) == pytest.approx(rank * 2 / 4), "alpha / rank stays"
    said = metadata(out)
    assert said["ss_network_dim"] == "2" and said["ss_base_model_version"] == "sd_v1"
    assert said["ss_training_comment"] == "resized from rank 4 to 2; first"


def test_a_rank_above_the_files_changes_nothing_but_is_no_error(pair, tmp_path, capsys):
    out = tmp_path / "same.safetensors"
    make(capsys, "resize", pair[0], "--rank", 64, "--output", out)
    assert len(load_file(out)[f"{TO_Q}.lora_down.weight"]) == 4
    np.testing.assert_allclose(delta(out, TO_Q), delta(pair[0], TO_Q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_is_no_output_and_nothing_is_written_beside_it(pair, tmp_path, capsys, ending):
    folder = tmp_path / "my"
    if not ending:
        folder.mkdir()
    code, said = run(capsys, "resize", pair[0], "--rank", 2, "--output", f"{folder}{ending}")
    assert code != 0 and "is a folder; name a file in it" in said
    assert not folder.with_suffix(".safetensors").exists()


VALUES = torch.tensor([10.0, 8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "share", "most", "rank"),
    [
        ("fixed", 0, 3, 3),
        # Above 10 / 4 = 2.5 are three; one more is kept, as sd-scripts keeps it.
        ("sv_ratio", 4, 6, 4),
        ("sv_ratio", 4, 2, 2),
        # 10² + 8² = 164 of 185.25 is 0.941² of the norm: two reach 0.9.
        ("sv_fro", 0.9, 6, 3),
        # 18 of 25.5 is 0.706, 22 is 0.863: three reach 0.8.
        ("sv_cumulative", 0.8, 6, 4),
        ("sv_cumulative", 0.7, 6, 3),
    ],
)
def test_the_rank_that_a_method_keeps(method, share, most, rank):
    assert kept_rank(VALUES, most, method, share, shortest=320) == rank


def test_a_layer_of_zeros_keeps_rank_one():
    assert kept_rank(torch.zeros(4), 4, "sv_fro", 0.9, 320) == 1


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (9, 9)])
def test_decomposed_matrices_are_numpys_singular_values_and_give_the_matrix_again(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = decompose(matrix)
    torch.testing.assert_close((parts.left * parts.values) @ parts.right, matrix.double())
    np.testing.assert_allclose(parts.values, np.linalg.svd(matrix.double().numpy())[1], rtol=1e-9)
    up, down = matrix[:, :5], matrix[:5, :]
    product = decompose_product(up, down)
    np.testing.assert_allclose(product.values, np.linalg.svd((up @ down).double().numpy())[1][:5], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_the_factors_of_a_small_or_large_matrix_are_the_nearest_product_even_in_fp16(size):
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * size
    up, down = (factor.half().float() for factor in factors(decompose(matrix), 4))
    wanted = best(matrix.numpy(), 4)
    assert np.linalg.norm((up @ down).numpy() - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_the_difference_of_two_checkpoints_is_extracted(pair, tiny_model, tmp_path, capsys):
    """Of a model that a LoRA was merged into: that LoRA again, up to its rank; 3×3 convolutions where they are asked for."""
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    make(capsys, "merge", tiny_model, pair[0], "--output", tuned)
    make(capsys, "extract", tiny_model, tuned, "--rank", 4, "--conv_rank", 4, "--output", out)
    assert {key.split(".")[0] for key in load_file(out)} == set(LAYERS)
    for name in LAYERS:
        np.testing.assert_allclose(delta(out, name), delta(pair[0], name), rtol=1e-3, atol=1e-3)
    said = metadata(out)
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "4") and "sshs_model_hash" in said
    make(capsys, "extract", tiny_model, tuned, "--rank", 2, "--no-text_encoder", "--output", out)
    assert {key.split(".")[0] for key in load_file(out)} == {TO_Q, PROJ_IN}
    np.testing.assert_allclose(delta(out, TO_Q), best(delta(pair[0], TO_Q), 2), rtol=1e-3, atol=1e-3)


def test_a_text_encoder_that_hardly_differs_is_left_out_and_told(tiny_model, tmp_path, capsys):
    lora, tuned = tmp_path / "l.safetensors", tmp_path / "tuned.safetensors"
    loras.write(lora)
    make(capsys, "merge", tiny_model, lora, "--strengths", "1e-4", "--output", tuned)
    words = ("extract", tiny_model, tuned, "--output", tmp_path / "o.safetensors")
    assert "was left out" in make(capsys, *words)
    assert not any(key.startswith("lora_te") for key in load_file(tmp_path / "o.safetensors"))
    make(capsys, *words, "--min_diff", "1e-6")
    assert any(key.startswith("lora_te") for key in load_file(tmp_path / "o.safetensors"))


def test_checkpoints_that_do_not_differ_are_refused(tiny_model, tmp_path, capsys):
    code, said = run(capsys, "extract", tiny_model, tiny_model, "--output", tmp_path / "o.safetensors")
    assert code == 1 and "do not differ" in said


def test_biases_that_a_rank_cannot_hold_are_told_where_the_layer_has_a_matrix_too(tmp_path, capsys):
    path = tmp_path / "native.safetensors"
    save_file({f"{TO_Q}.diff": torch.randn(32, 32), f"{TO_Q}.diff_b": torch.ones(32)}, path)
    for words in (("resize", path), ("merge-loras", path, path)):
        said = make(capsys, *words, "--rank", 2, "--output", tmp_path / "o.safetensors")
        assert "biases and norms were left out" in said and TO_Q in said


@pytest.mark.parametrize("words", [("resize",), ("merge-loras",), ("merge-loras", "--rank", 2)])
def test_a_lora_with_what_is_no_number_is_refused_naming_file_and_layer(words, tmp_path, capsys):
    path = loras.write(tmp_path / "broken.safetensors")
    tensors = load_file(path)
    tensors[f"{CONV}.lora_up.weight"][0] = torch.nan
    save_file(tensors, path)
    code, said = run(capsys, words[0], path, *words[1:], "--output", tmp_path / "o.safetensors")
    assert code == 1 and "broken.safetensors" in said and CONV in said and "not numbers" in said
    assert not (tmp_path / "o.safetensors").exists()


def test_a_resized_dora_still_says_so_and_what_was_the_hash_of_other_tensors_goes(tmp_path, capsys):
    path, out = tmp_path / "dora.safetensors", tmp_path / "o.safetensors"
    loras.write(path)
    said = {"ss_network_args": json.dumps({"dora_wd": "True", "conv_dim": "4"}), "modelspec.hash_sha256": "0x1"}
    save_file({**load_file(path), f"{TO_Q}.dora_scale": torch.ones(32, 1)}, path, said)
    make(capsys, "resize", path, "--rank", 2, "--output", out)
    assert json.loads(metadata(out)["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1", "dora_wd": "True"}
    assert "modelspec.hash_sha256" not in metadata(out)


def test_a_share_that_the_method_cannot_keep_is_named(pair, tmp_path, capsys):
    code, said = run(
        capsys, "resize", pair[0], "--method", "sv_fro", "--share", 2, "--output", tmp_path / "o.safetensors"
    )
    assert code == 2 and "Share or ratio (share)" in said
