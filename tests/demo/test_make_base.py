"""The stages that make the base model, on models of a few channels."""

import random

import pytest
import torch
from diffusers import AutoencoderKL

from trainer.demo import make_base, pictures


def tiny_autoencoder():
    torch.manual_seed(0)
    small = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 2}
    return AutoencoderKL(**make_base.AUTOENCODER | small).eval()


def some_pictures(count):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()


def collection(count):
    return make_base.Collection(some_pictures(count), {concept.icon: ["round"] for concept in pictures.CONCEPTS})


def test_normalised_latents_have_the_deviation_that_the_factor_promises():
    model, known = tiny_autoencoder(), collection(16)
    make_base.normalise_latents(model, known)
    latents = make_base.encode_means(model, known.images) * model.config.scaling_factor
    assert latents.mean(dim=(0, 2, 3)) == pytest.approx(torch.zeros(4).numpy(), abs=1e-4)
    assert latents.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4).numpy(), abs=1e-4)


def test_normalising_latents_changes_no_reconstruction():
    model, known = tiny_autoencoder(), collection(4)
    images = make_base.as_floats(known.images)
    with torch.no_grad():
        before = model(images).sample
        deviation_before = model.encode(images).latent_dist.std / model.encode(images).latent_dist.mean.std()
        make_base.normalise_latents(model, known)
        after = model(images).sample
        deviation_after = model.encode(images).latent_dist.std / model.encode(images).latent_dist.mean.std()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    # The noise of the posterior grows with the latents, though one factor stands for all channels.
    assert deviation_after.mean() == pytest.approx(deviation_before.mean().item(), rel=0.5)


def test_psnr_of_a_perfect_copy_off_by_one_step_is_48_db():
    class OffByOne:
        """An autoencoder whose output is one 255th too bright."""

        def encode(self, images):
            self.images = images
            return type("Encoded", (), {"latent_dist": type("Posterior", (), {"mean": images})})

        def decode(self, latents):
            return type("Decoded", (), {"sample": self.images + 2 / 255})

    dark = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert make_base.reconstruction_psnr(OffByOne(), dark) == pytest.approx(48.13, abs=0.01)


def test_the_rate_rises_holds_and_falls():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    training = make_base.Training(None, {}, optimizer, steps=1000, decay_from=0.8, peak=0.5, warmup=50)
    rates = []
    for training.step in (0, 24, 49, 400, 800, 900, 999):
        training.set_rate()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.25, 0.5, 0.5, 0.5, 0.25, 0.005])


def test_a_training_goes_on_where_its_state_was_saved(tmp_path):
    def stage():
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return make_base.Training(tmp_path / "stage.pt", {"model": model}, optimizer, 10, 1.0, 0.1)

    torch.manual_seed(0)
    first = stage()
    for _ in range(3):
        first.update(first.models["model"](torch.randn(4, 2)).square().mean(), {})
    first.save()
    first.update(first.models["model"](torch.randn(4, 2)).square().mean(), {})

    torch.manual_seed(99)
    second = stage()
    assert second.restore() == 3
    second.update(second.models["model"](torch.randn(4, 2)).square().mean(), {})
    assert torch.equal(first.models["model"].weight, second.models["model"].weight)


def test_averages_follow_their_models():
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(average.weight, 0.0)
    make_base.follow({"unet_average": average}, {"unet": model}, decay=0.9)
    assert average.weight.item() == pytest.approx(0.1)


def test_captions_name_style_and_concept_and_sometimes_less_or_more():
    known, rng = collection(4), random.Random(0)
    captions = [known.caption(1, rng) for _ in range(400)]
    first = pictures.CONCEPTS[0].name
    assert captions.count(f"retro, {first}") > 220
    assert 5 < captions.count(first) < 60
    assert 20 < captions.count(f"retro, {first}, round") < 100
    strange = [caption for caption in captions if "retro" not in caption and "," in caption]
    assert 30 < sum(caption.endswith(first) for caption in strange) < 110


def test_no_two_concepts_share_a_name_or_a_picture():
    every = pictures.CONCEPTS + pictures.OTHERS
    assert len({concept.name for concept in every}) == len({concept.icon for concept in every}) == len(every)


def test_the_colour_reader_reads_colours_that_are_in_the_latents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    mixing = torch.randn(3, 4, generator=generator)
    colours = torch.einsum("oc,bchw->bohw", mixing, latents)
    images = colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    reader, blind = make_base.ColourReader(), make_base.ColourReader()
    for _ in range(300):
        error, without = reader.unread(latents, images), blind.unread(torch.zeros_like(latents), images)
    assert error < 1e-3
    assert without == pytest.approx(colours.var(dim=(0, 2, 3), correction=0).mean().item(), rel=0.01)
