"""Captions by a model: tiny random ones of each kind, saved as real ones are."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gui.captions import Captions
from gui.files import Roots
from trainer.__main__ import main
from trainer.errors import DataError, ModelError
from trainer.tools import caption, captioning
from trainer.tools.captioning import squared
from trainer.tools.commands import TOOLS

WORDS = ["a", "cat", "red", "sky", "on", "house"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.blip.processing_blip import BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    text = {
        "vocab_size": len(entries), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(entries)})
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def florence(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Florence2Config, Florence2ForConditionalGeneration, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.florence2.processing_florence2 import Florence2Processor

    folder = tmp_path_factory.mktemp("florence")
    entries = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    vision = {
        "depths": [1], "patch_size": [7], "patch_stride": [4], "patch_padding": [3], "patch_prenorm": [False], "embed_dim": [16],
        "num_heads": [2], "num_groups": [2], "window_size": 4, "projection_dim": 16, "max_temporal_embeddings": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": len(entries), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2, "forced_bos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(1)
    config = Florence2Config(
        vision_config=vision, text_config=text, image_token_id=4, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    shape = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=shape, crop_size=shape, do_center_crop=False)
    images.image_seq_length = 8 * 8 + 1
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "2_x"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (40 + 8 * i, 48), (50 * i, 80, 120)).save(folder / f"{i}.png")
    (folder / "0.txt").write_bytes(b"by hand, \r\nbelow\r\n")
    return folder


def options(model, images, **more):
    given = {
        "model": str(model),
        "folder": str(images.parent),
        "extension": ".txt",
        "backups": str(images.parent.parent / "backups"),
    }
    return TOOLS["caption"].read(given | more)


def texts(folder):
    return {path.stem: path.read_bytes().decode() for path in sorted(folder.glob("*.txt"))}


def quiet(*_):
    pass


@pytest.fixture
def talkative(monkeypatch):
    """A captioner that tells the width of each image."""
    monkeypatch.setattr(captioning, "load", lambda options: lambda images: [f"{image.width} wide" for image in images])


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_a_tiny_model_writes_a_caption_for_each_image_without_one(kind, images, request, capsys):
    model = request.getfixturevalue(kind)
    words = [
        "caption",
        str(model),
        str(images.parent),
        "--extension",
        ".txt",
        "--prefix",
        "zwx,",
        "--max_tokens",
        "200",
        "--batch_size",
        "2",
    ]
    assert main([*words, "--backups", str(images.parent.parent / "b")]) == 0
    found = texts(images)
    assert found.pop("0") == "by hand, \r\nbelow\r\n" and set(found) == {"1", "2", "3", "4"}
    for text in found.values():
        first, *rest = text.split()
        assert first == "zwx," and rest and set(rest) <= set(WORDS)
    assert "4 caption files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("existing", "first"),
    [
        ("skip", "by hand, \r\nbelow\r\n"),
        ("append", "by hand, zwx 40 wide\r\nbelow\r\n"),
        ("replace", "zwx 40 wide\r\nbelow\r\n"),
    ],
)
def test_captions_that_exist_are_skipped_added_to_or_replaced_and_come_back_by_undo(
    talkative, images, tmp_path, existing, first
):
    before = texts(images)
    report = caption.run(_options(images, existing), quiet)
    assert texts(images) == {"0": first, **{str(i): f"zwx {40 + 8 * i} wide" for i in range(1, 5)}}
    assert f"{4 if existing == 'skip' else 5} caption files" in report.lines[0]
    captions = Captions(Roots([tmp_path]), tmp_path / "backups")
    assert "captions by a model" in captions.undoable()
    assert captions.undo()["left"] == [] and texts(images) == before


def _options(images, existing, **more):
    return options(images.parent, images, existing=existing, prefix="zwx", **more)  # the model is a stand-in


def test_a_tool_that_is_stopped_leaves_whole_files_that_can_be_taken_back(images, tmp_path, monkeypatch):
    before, calls = texts(images), []

    def describe(pictures):
        calls.append(pictures)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ["done"] * len(pictures)

    monkeypatch.setattr(captioning, "load", lambda options: describe)
    with pytest.raises(KeyboardInterrupt):
        caption.run(_options(images, "skip", batch_size=2), quiet)
    assert texts(images) == {**before, "1": "zwx done", "2": "zwx done"}
    Captions(Roots([tmp_path]), tmp_path / "backups").undo()
    assert texts(images) == before


def test_the_message_of_a_stopped_captioning_does_not_say_that_nothing_was_written():
    assert "stay" in TOOLS["caption"].stopped


def test_links_and_the_pictures_that_come_along_are_not_written(talkative, images, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("x")
    (images / "1.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(DataError, match="link"):
        caption.run(_options(images, "replace"), quiet)
    (images / "1.txt").unlink()
    (tmp_path / "other").mkdir()
    (images / "1.png").rename(tmp_path / "other" / "1.png")
    (images.parent / "1_linked").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="link"):
        caption.run(_options(images, "skip"), quiet)
    assert (tmp_path / "elsewhere.txt").read_text() == "x" and len(list((tmp_path / "other").iterdir())) == 1
    shipped = TOOLS["caption"].read({"model": str(tmp_path), "folder": "embedded:images"})
    with pytest.raises(DataError, match="part of this program"):
        caption.run(shipped, quiet)


@pytest.fixture
def wd14(tmp_path, monkeypatch):
    """A tagger's folder, and a stand-in for onnxruntime that answers with fixed chances."""
    folder = tmp_path / "wd14"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    rows = [
        "tag_id,name,category,count",
        "1,general,9,1",
        "2,blue_sky,0,1",
        "3,^_^,0,1",
        "4,rare_thing,0,1",
        "5,miku_(x),4,1",
        "6,rin,4,1",
    ]
    (folder / "selected_tags.csv").write_text("\n".join(rows))
    seen = []

    class Session:
        def __init__(self, path, providers):
            assert path == str(folder / "model.onnx") and providers == ["CPUExecutionProvider"]

        def get_inputs(self):
            return [SimpleNamespace(name="input", shape=["batch", 32, 32, 3])]

        def run(self, outputs, inputs):
            seen.append(inputs["input"])
            return [np.array([[0.99, 0.5, 0.7, 0.2, 0.9, 0.5]] * len(inputs["input"]))]

    stand_in = SimpleNamespace(
        InferenceSession=Session, get_available_providers=lambda: ["CPUExecutionProvider"], __spec__=True
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    return folder, seen


def test_a_tagger_names_what_is_sure_enough_characters_first_and_no_rating(wd14, images):
    folder, seen = wd14
    caption.run(options(folder, images), quiet)
    assert texts(images)["1"] == "miku (x), ^_^, blue sky"
    assert seen[0].shape == (4, 32, 32, 3) and seen[0].dtype == np.float32
    caption.run(options(folder, images, existing="replace", threshold=0.1, character_threshold=0.95), quiet)
    assert texts(images)["1"] == "^_^, blue sky, rare thing"


def test_a_tagger_sees_the_whole_image_on_a_white_square_in_blue_green_red():
    found = squared(Image.new("RGB", (20, 10), (255, 0, 0)), 20)
    assert (
        found[0, 0].tolist() == [255, 255, 255] and found[10, 10].tolist() == [0, 0, 255] and found.shape == (20, 20, 3)
    )


def test_without_onnxruntime_a_tagger_says_what_to_install(wd14, monkeypatch):
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install onnxruntime"):
        captioning.tagger(wd14[0], 0.3, 0.8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llava"}, 'names the type "llava"'),
        ({"model_type": "florence2", "auto_map": {"AutoModel": "modeling.X"}}, "never run"),
        ("no json", "no config.json that can be read"),
        ([], "no config.json that can be read"),
        ({"model_type": "blip"}, "cannot be loaded"),
    ],
)
def test_folders_that_hold_no_known_model_are_told(images, tmp_path, config, words):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config if config == "no json" else json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match=words):
        captioning.load(options(folder, images))


def test_a_folder_without_images_and_one_that_is_done_are_told(talkative, images):
    caption.run(_options(images, "skip"), quiet)
    assert "already" in caption.run(_options(images, "skip"), quiet).lines[0]
    for path in images.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no images"):
        caption.run(_options(images, "skip"), quiet)
