"""Makes the embedded base model: pictures → autoencoder → text encoder and U-Net → one file.

    python -m trainer.demo.make_base --work /some/folder

Every stage can be interrupted and resumed: its state is written to the work folder about once a minute. The
log there says what was done. The result, `base.safetensors`, has the original Stable Diffusion layout.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import time
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from trainer.demo import pictures
from trainer.demo.muon import Muon
from trainer.models import Schedule
from trainer.models.clip_tokens import tokenizer
from trainer.models.facts import FAMILIES
from trainer.models.layout import to_original

log = logging.getLogger("make_base")

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": pictures.SIZE,
    "scaling_factor": 0.18215,
}

TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 64,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}

UNET = {
    "sample_size": pictures.SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
    "use_linear_projection": False,
}

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, pictures, states and the log")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("base.safetensors"))
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--denoiser-steps", type=int, default=5600)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.work / "log.txt")],
    )
    if args.threads:
        torch.set_num_threads(args.threads)

    collection = Collection.prepare(args.work)
    autoencoder = train_autoencoder(collection, args.work / "autoencoder.pt", args.autoencoder_steps, args.seed)
    train_decoder(collection, autoencoder, args.work / "decoder.pt", args.decoder_steps, args.seed)
    train_denoiser(collection, autoencoder, args.work / "denoiser.pt", args.denoiser_steps, args.seed, args.out)


# Pictures


class Collection:
    """All pictures of all concepts in all styles, in memory, with what is needed to caption them."""

    def __init__(self, images: torch.Tensor, keywords: dict[str, list[str]]):
        self.images = images
        """(pictures, 3, 128, 128) uint8; picture number = concept number · styles + style number."""
        self.known = images[: len(pictures.CONCEPTS) * len(pictures.STYLES)]
        """The pictures that the denoiser learns."""
        self.keywords = keywords

    @classmethod
    def prepare(cls, work: Path) -> Collection:
        pictures.fetch_packages(work / "packages")
        keywords = pictures.read_keywords(work / "packages")
        rendered = work / f"pictures_{len(pictures.CONCEPTS)}_{len(pictures.OTHERS)}.pt"
        if not rendered.exists():
            concepts = pictures.CONCEPTS + pictures.OTHERS
            log.info("rendering %d concepts in %d styles", len(concepts), len(pictures.STYLES))
            sets = [pictures.IconSet(work / "packages", name) for name in pictures.STYLES.values()]
            images = [as_bytes(icons.picture(concept.icon)) for concept in concepts for icons in sets]
            write_atomically(torch.stack(images), rendered)
        return cls(torch.load(rendered, weights_only=True), keywords)

    def caption(self, number: int, rng: random.Random) -> str:
        concept = pictures.CONCEPTS[number // len(pictures.STYLES)]
        style = list(pictures.STYLES)[number % len(pictures.STYLES)]
        return pictures.varied_caption(style, concept, self.keywords[concept.icon], vocabulary(), rng)


@cache
def vocabulary() -> list[str]:
    """CLIP's words of plain letters, alphabetically."""
    endings = [word.removesuffix("</w>") for word in tokenizer().get_vocab() if word.endswith("</w>")]
    return sorted(word for word in endings if word.isascii() and word.isalpha() and len(word) > 2)


def as_bytes(picture) -> torch.Tensor:
    """(3, height, width) uint8."""
    width, height = picture.size
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures → −1 … 1, channels last in memory."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def write_atomically(content, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


# Autoencoder


def train_autoencoder(collection: Collection, state_path: Path, steps: int, seed: int, batch: int = 3):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # Starting from little noise rather than a deviation of 1 spares the steps that would unlearn it, and from
        # resnets that do nothing yet, the steps that would find out what colour a patch has.
        model.quant_conv.weight[4:] = 0
        model.quant_conv.bias[4:] = -8.0
        for name, weight in model.named_parameters():
            if ".conv2." in name or ".to_out.0." in name:
                weight.zero_()
    optimizer = Muon(model.parameters(), lr=1.5e-3)
    training = Training(state_path, {"model": model}, optimizer, steps, decay_from=0.4, peak=1.5e-3)
    if training.restore() >= steps and training.normalised:
        return model.eval()

    colours = ColourReader()
    while training.step < steps:
        images = augment(as_floats(collection.images[torch.randint(len(collection.images), (batch,))]))
        training.set_rate()
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            drawn = model.decode(posterior.sample()).sample
        drawn = drawn.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        error = drawn - images
        unread = colours.unread(posterior.mean.float(), images)
        loss = drawing_loss(error) + 60 * unread + 1e-4 * kl
        training.update(loss, {"dB": decibels(error), "unread": unread.detach()})

    model.eval()
    normalise_latents(model, collection)
    training.normalised = True
    training.save()
    log.info("autoencoder: %.2f dB", reconstruction_psnr(model, collection.known))
    return model


def augment(images: torch.Tensor, grey_share: float = 0.05, ink_share: float = 0.0) -> torch.Tensor:
    """Mirrors half of a batch, and takes the colour from a few: other styles must pass the autoencoder too.

    `ink_share`: of those without colour, how many become black and white alone.
    """

    def chance(share: float) -> torch.Tensor:
        return torch.rand(len(images), 1, 1, 1) < share

    images = torch.where(chance(0.5), images.flip(3), images)
    grey = images.mean(1, keepdim=True).expand_as(images)
    grey = torch.where(chance(ink_share), (grey > 0).float() * 2 - 1, grey)
    images = torch.where(chance(grey_share), grey, images)
    return images.contiguous(memory_format=torch.channels_last)


class ColourReader:
    """How well a linear map reads the mean colour of each latent's cell, 8×8 pixels, from the latent.

    A young autoencoder spends its four channels on outlines and light, and green things come out orange; the
    decoder's gradient is slow to change that. The map is the least-squares one over the recent batches.
    """

    def __init__(self, channels: int = 4):
        self.covariance = torch.eye(channels + 1) * 1e-3
        self.product = torch.zeros(channels + 1, 3)

    def unread(self, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the colours that are read, for colours in −1 … 1."""
        known = functional.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
        colours = functional.avg_pool2d(images, images.shape[-1] // latents.shape[-1]).movedim(1, -1).flatten(0, 2)
        with torch.no_grad():
            self.covariance.lerp_(known.T @ known / len(known), 0.05)
            self.product.lerp_(known.T @ colours / len(known), 0.05)
            reading = torch.linalg.solve(self.covariance, self.product)
        return (known @ reading - colours).square().mean()


def drawing_loss(error: torch.Tensor) -> torch.Tensor:
    """Three errors in one: of each pixel, of the steps between neighbours, and of the mean colour of each latent's cell.

    The second makes outlines sharp, the third keeps colours right.
    """
    steps = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    cells = functional.avg_pool2d(error, 8)
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * steps + 8 * cells.square().mean()


def decibels(error: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of the peak signal-to-noise ratio, for values from −1 to 1."""
    return -10 * (error.detach() / 2).square().mean(dim=(1, 2, 3)).log10().mean()


@torch.no_grad()
def encode_means(model, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """(pictures, 4, 16, 16): the posterior's means, unscaled."""
    return torch.cat([model.encode(as_floats(part)).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def normalise_latents(model, collection: Collection) -> None:
    """Gives every latent channel mean 0 and standard deviation 1 / scaling_factor, changing no reconstruction.

    The factor that every Stable Diffusion program multiplies with, 0.18215, is then right for this model too,
    and white, which is most of every picture, lies near the noise's own mean.
    """
    latents = encode_means(model, collection.images)
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    unit = 1 / model.config.scaling_factor / deviation
    into, back = model.quant_conv, model.post_quant_conv
    into.weight[:4] *= unit.view(4, 1, 1, 1)
    into.bias[:4] = (into.bias[:4] - mean) * unit
    into.bias[4:] += 2 * unit.mean().log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight /= unit.view(1, 4, 1, 1)


@torch.no_grad()
def reconstruction_psnr(model, images: torch.Tensor, batch: int = 32) -> float:
    """Mean over pictures of 10 log10(1 / mean squared error), pixel values in 0 … 1."""
    values = []
    for part in images.split(batch):
        expected = as_floats(part)
        drawn = model.decode(model.encode(expected).latent_dist.mean).sample.clamp(-1, 1)
        values.append(decibels(drawn - expected) * len(part))
    return sum(values).item() / len(images)


def train_decoder(collection: Collection, autoencoder, state_path: Path, steps: int, seed: int, batch: int = 4) -> None:
    """Goes on with the decoder alone, on pictures of which half have no colour: a young one tints those.

    The latents stay, so what the denoiser learned of them stays right; half are a little off, as its answers are.
    """
    torch.manual_seed(seed)
    parts = {"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv}
    optimizer = Muon([weight for part in parts.values() for weight in part.parameters()], lr=1e-3)
    training = Training(state_path, parts, optimizer, steps, decay_from=0.2, peak=1e-3)
    training.restore()
    while training.step < steps:
        images = as_floats(collection.images[torch.randint(len(collection.images), (batch,))])
        images = augment(images, grey_share=0.5, ink_share=0.5)
        training.set_rate()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = autoencoder.encode(images).latent_dist.mean
                off = 0.1 * torch.randn_like(latents) / autoencoder.config.scaling_factor
                latents = latents + off * (torch.rand(batch, 1, 1, 1) < 0.5)
            drawn = autoencoder.decode(latents).sample
        error = drawn.float() - images
        tint = (error - error.mean(1, keepdim=True)).abs().mean()
        training.update(drawing_loss(error) + 6 * tint, {"dB": decibels(error), "tint": tint.detach()})
    training.save()
    log.info("decoder: %.2f dB", reconstruction_psnr(autoencoder, collection.known))


# Text encoder and U-Net


def train_denoiser(
    collection: Collection, autoencoder, state_path: Path, steps: int, seed: int, out: Path, batch: int = 16
) -> None:
    """Trains both together, and writes their averages with the autoencoder: every few minutes, and at the end."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    rng = random.Random(seed)  # noqa: S311  not for secrets
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # As in the original: every branch of the U-Net starts as nothing, and so does its answer.
        for name, weight in unet.named_parameters():
            if any(part in name for part in (".conv2.", ".proj_out.", "conv_out.")):
                weight.zero_()
    # Heads of 16 and 32 channels: plain matrix products run backwards far faster than fused attention on a CPU.
    unet.set_attn_processor(AttnProcessor())
    models = {"unet": unet, "text_encoder": text_encoder}
    averages = {f"{name}_average": copy.deepcopy(model).requires_grad_(False) for name, model in models.items()}
    groups = [{"params": unet.parameters(), "peak": 3e-3}, {"params": text_encoder.parameters(), "peak": 1.5e-3}]
    optimizer = Muon(groups, lr=3e-3)
    training = Training(state_path, models | averages, optimizer, steps, decay_from=0.6, peak=3e-3, warmup=200)
    training.restore()
    rng.seed(seed + training.step)

    latents = encode_means(autoencoder, collection.known) * autoencoder.config.scaling_factor
    log.info("latents: mean %.3f, deviation %.3f", latents.mean(), latents.std())
    schedule = Schedule.of(SCHEDULER)
    exported_at = time.monotonic()

    def write() -> None:
        averaged = {name.removesuffix("_average"): model for name, model in averages.items()}
        export(out, autoencoder=autoencoder, step=training.step, **averaged)

    while training.step < steps:
        numbers = torch.randint(len(latents), (batch,))
        # One caption in ten is empty: the unconditional half of classifier-free guidance.
        captions = ["" if rng.random() < 0.1 else collection.caption(number, rng) for number in numbers.tolist()]
        clean = latents[numbers]
        noise, timesteps = torch.randn_like(clean), torch.randint(schedule.steps, (batch,))
        noisy = schedule.add_noise(clean, noise, timesteps)
        training.set_rate()
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(tokens(captions)).last_hidden_state
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, states).sample
        squared = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        # Min-SNR weights with γ = 5 (Hang et al. 2023, equation 8, for a model that predicts noise).
        weights = (5 / schedule.snr(timesteps)).clamp(max=1)
        saved = training.update((squared * weights).mean(), {"error": squared.detach().mean()})
        follow(averages, models, min(0.9985, (1 + training.step) / (10 + training.step)))
        if saved and time.monotonic() - exported_at > 240:
            write()
            exported_at = time.monotonic()

    training.save()
    write()


@torch.no_grad()
def follow(averages: dict, models: dict, decay: float) -> None:
    """Moves each average a little towards its model."""
    for name, model in models.items():
        average = list(averages[f"{name}_average"].parameters())
        torch._foreach_lerp_(average, list(model.parameters()), 1 - decay)


def tokens(captions: list[str]) -> torch.Tensor:
    """(captions, 77) token numbers, filled up with the end mark."""
    length = TEXT_ENCODER["max_position_embeddings"]
    encoded = tokenizer()(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


# The file


def export(out: Path, *, unet, autoencoder, text_encoder, step: int) -> None:
    """Writes one fp16 file in the original layout, complete with its configuration."""
    from safetensors.torch import save_file

    configs = {"unet": UNET, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER, "scheduler": SCHEDULER}
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    states = {name: part.state_dict() for name, part in parts.items()}
    weights = to_original(states, configs, FAMILIES["sd1"])
    weights = {name: weight.half().contiguous() for name, weight in weights.items()}
    partial = out.with_suffix(".partial")
    save_file(weights, partial, metadata={"format": "pt", "config": json.dumps(configs), "step": str(step)} | ABOUT)
    partial.chmod(0o644)
    os.replace(partial, out)
    log.info("%s: step %d, %.1f MB", out.name, step, out.stat().st_size / 1e6)


ABOUT = {
    "title": "Lorawright's embedded base model",
    "sources": "; ".join(f"{name} {version}" for name, version in pictures.PACKAGES.items() if "contrast" not in name),
    "licences": "pictures: Noto Emoji (Google), Apache-2.0; Fluent UI Emoji (Microsoft), MIT; emojilib, MIT",
    "made_by": "trainer/demo/make_base.py",
}


class Training:
    """Steps, rate, log line and state file of one stage."""

    def __init__(
        self, path: Path, models: dict, optimizer, steps: int, decay_from: float, peak: float, warmup: int = 50
    ):
        self.path, self.models, self.optimizer, self.steps = path, models, optimizer, steps
        self.decay_from, self.peak, self.warmup = decay_from, peak, warmup
        self.step = 0
        self.normalised = False
        self.saved_at = self.logged_at = time.monotonic()
        self.logged_step = 0
        self.sums: dict[str, float] = {}

    def restore(self) -> int:
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for name, model in self.models.items():
                model.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.normalised = state["step"], state["normalised"]
            torch.set_rng_state(state["random"])
            self.logged_step = self.step
            log.info("%s: resumed at step %d", self.path.stem, self.step)
        return self.step

    def save(self) -> None:
        state = {name: model.state_dict() for name, model in self.models.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "normalised": self.normalised}
        write_atomically(state | {"random": torch.get_rng_state()}, self.path)
        self.saved_at = time.monotonic()

    def set_rate(self) -> None:
        """Linear rise, constant, then linear fall to a hundredth over the last part."""
        fall_start = self.decay_from * self.steps
        fall = (self.step - fall_start) / max(1, self.steps - fall_start)
        factor = min(1, (self.step + 1) / self.warmup, max(0.01, 1 - fall))
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group.get("peak", self.peak)

    def update(self, loss: torch.Tensor, measured: dict) -> bool:
        """One optimizer step; True when the state was just saved."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        for name, value in ({"loss": loss.detach()} | measured).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        if self.step % 50 == 0:
            count, now = self.step - self.logged_step, time.monotonic()
            means = "  ".join(f"{name} {total / count:.4f}" for name, total in self.sums.items())
            log.info(
                "%s %d/%d  %s  %.3f s/step",
                self.path.stem,
                self.step,
                self.steps,
                means,
                (now - self.logged_at) / count,
            )
            self.sums, self.logged_at, self.logged_step = {}, now, self.step
        if time.monotonic() - self.saved_at > 60:
            self.save()
            return True
        return False


if __name__ == "__main__":
    main()
