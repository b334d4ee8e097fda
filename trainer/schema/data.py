"""Images: resolution, buckets, caching, augmentation, loading."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from trainer.schema.declare import Group, Section, parameter


def parse_size(value: Any) -> Any:
    """ "512,768" or "512" as (width, height) in pixels. Raises ValueError with the form wanted."""
    try:
        parts = value if isinstance(value, list | tuple) else str(value).replace("x", ",").split(",")
        sides = [int(side) for side in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not 64 <= min(sides) <= max(sides) <= 8192:
        raise ValueError(f'"{value}" is not "width,height" in pixels, each from 64 to 8192')
    return sides[0], sides[1]


Size = Annotated[tuple[int, int], BeforeValidator(parse_size)]


class Data(Group):
    resolution: Size = parameter(
        "max_resolution",
        "512,512",
        "Max resolution",
        Section.RESOLUTION,
        """"width,height" in pixels: the area that images are brought to. The base model's own size
        is best: 512,512 for SD 1.5, 768,768 for SD 2.x with v-prediction, 1024,1024 for SDXL; smaller is
        quicker and coarser.""",
        kind="text",
    )
    buckets: bool = parameter(
        "enable_bucket",
        True,
        "Enable buckets",
        Section.RESOLUTION,
        """Images are sorted by shape and keep it, instead of being cut to Max resolution's shape.
        Off: each image is scaled to cover that size and its rest is cut off.""",
    )
    min_bucket_side: int = parameter(
        "min_bucket_reso",
        256,
        "Minimum bucket resolution",
        Section.RESOLUTION,
        """No bucket has a shorter side than this many pixels. Only used when small images may be
        enlarged.""",
        ge=64,
        when={"enable_bucket": True, "bucket_no_upscale": False},
    )
    max_bucket_side: int | None = parameter(
        "max_bucket_reso",
        None,
        "Maximum bucket resolution",
        Section.RESOLUTION,
        """No bucket has a longer side than this many pixels. Only used when small images may be
        enlarged.""",
        ge=64,
        blank="1024; 2048 for SDXL",
        when={"enable_bucket": True, "bucket_no_upscale": False},
    )
    no_upscale: bool = parameter(
        "bucket_no_upscale",
        True,
        "Don't upscale bucket resolution",
        Section.IMAGES,
        """Images are never enlarged: a small one gets a small bucket of its own size. Off: all are
        brought to about the same area.""",
        when={"enable_bucket": True},
    )
    bucket_step: int = parameter(
        "bucket_reso_steps",
        64,
        "Bucket resolution steps",
        Section.IMAGES,
        """Both sides of a bucket are multiples of this many pixels; what sticks out is cropped.
        Smaller cuts less off, but spreads the images over more buckets and batches stay
        unfilled.""",
        ge=8,
        le=1024,
        when={"enable_bucket": True},
    )
    cache_latents: bool = parameter(
        "cache_latents",
        True,
        "Cache latents",
        Section.MACHINE,
        """Every image goes through the VAE once, before training, and its result is kept in
        memory: quicker, and the VAE needs no room during training.""",
    )
    cache_to_disk: bool = parameter(
        "cache_latents_to_disk",
        False,
        "Cache latents to disk",
        Section.MACHINE,
        """Keep them in a folder beside the images as well, so that the next run starts at once.
        Only images that changed are encoded anew.""",
    )
    flip: bool = parameter(
        "flip_aug",
        False,
        "Flip augmentation",
        Section.IMAGES,
        """Every other read is mirrored, at random: more variety for free. Not for faces with a
        parting, text, or anything that has a left and a right.""",
    )
    color: bool = parameter(
        "color_aug",
        False,
        "Color augmentation",
        Section.IMAGES,
        """All hues of an image shift a little (up to 16° of the colour circle), anew at each read, so
        that exact colours are not learned. Needs Cache latents off, so every step pays for reading
        and encoding.""",
    )
    random_crop: bool = parameter(
        "random_crop",
        False,
        "Random crop instead of center crop",
        Section.IMAGES,
        """What sticks out of the bucket is cut off at another place at each read, instead of evenly
        on both sides. Needs Cache latents off. Not where heads or feet would be lost.""",
    )
    vae_batch_size: int = parameter(
        "vae_batch_size",
        0,
        "VAE batch size",
        Section.STEP,
        """Images that go through the VAE at once while caching. 0: as many as the train batch
        size.""",
        ge=0,
        le=4096,
        when={"cache_latents": True},
    )
    workers: int = parameter(
        "max_data_loader_n_workers",
        0,
        "Max num workers for DataLoader",
        Section.STEP,
        """Images that are read and resized at the same time when latents are not cached. 0: one
        batch ahead, in the main process. More than the machine has threads is never used.""",
        ge=0,
    )
    persistent_workers: bool = parameter(
        "persistent_data_loader_workers",
        False,
        "Persistent data loader",
        Section.STEP,
        """The loader's processes stay from one epoch to the next, which saves the pause in which they
        start anew. They keep their memory meanwhile. Without loader processes it does nothing.""",
    )


class Captions(Group):
    extension: str = parameter(
        "caption_extension",
        "",
        "Caption extension",
        Section.LENGTH,
        """Ending of the text files that hold the captions, beside the images: cat.png and cat.txt.
        Empty: .caption.""",
        placeholder=".caption",
    )
    shuffle: bool = parameter(
        "shuffle_caption",
        False,
        "Shuffle caption",
        Section.CAPTIONS,
        """The caption's comma-separated parts come in a new order at each read, so that none is
        preferred for standing first. For tags, not for sentences.""",
    )
    keep_tokens: int = parameter(
        "keep_tokens",
        0,
        "Keep n tokens",
        Section.CAPTIONS,
        """The first N comma-separated parts stay in front when shuffling: put the trigger word
        there.""",
        ge=0,
        when={"shuffle_caption": True},
    )
    dropout_rate: float = parameter(
        "caption_dropout_rate",
        0.0,
        "Rate of caption dropout",
        Section.CAPTIONS,
        """Share of reads, from 0 to 1, that train without any caption: what is learned then shows
        without the trigger word. 0.05–0.1 suits styles.""",
        ge=0,
        le=1,
    )
    dropout_every_n_epochs: int = parameter(
        "caption_dropout_every_n_epochs",
        0,
        "Dropout caption every n epochs",
        Section.CAPTIONS,
        """Every nth epoch trains without any captions. 0: never.""",
        ge=0,
    )
    clip_skip: int = parameter(
        "clip_skip",
        1,
        "Clip skip",
        Section.CAPTIONS,
        """Which layer of the text encoder counts, from the end. 1 for most models; 2 for anime
        models that descend from NovelAI's SD 1.5. SD 2.x counts from its last but one, which is its own; SDXL
        always takes that one and ignores this.""",
        ge=1,
        le=12,
    )
    max_tokens: Literal[75, 150, 225] = parameter(
        "max_token_length",
        75,
        "Max Token Length",
        Section.CAPTIONS,
        """How many tokens (pieces of words, commas too) of a caption are read. Longer captions are cut.""",
    )
    weighted: bool = parameter(
        "weighted_captions",
        False,
        "Weighted captions",
        Section.CAPTIONS,
        """Brackets in captions weigh words as in the web UIs: (cat) counts 1.1 times, (cat:1.3) 1.3
        times, [cat] less; \\( and \\) are plain brackets. Shuffling leaves what stands in one bracket
        together. Off: brackets are text like any other.""",
    )
    no_padding: bool = parameter(
        "no_token_padding",
        False,
        "No token padding",
        Section.CAPTIONS,
        """Captions are filled up only to the longest of their batch instead of to 75 tokens. The web
        UIs always fill up, so a LoRA trained without fits them less; leave it off unless you repeat
        an old training.""",
    )
    cache_states: bool = parameter(
        "sdxl_cache_text_encoder_outputs",
        False,
        "Cache text encoder outputs",
        Section.CAPTIONS,
        """Every caption goes through the text encoders once, before training; then they leave the memory: 1.6 GB
        less for SDXL, and quicker steps. Captions must be the same at each read, and Text Encoder learning rate
        0.""",
    )
    cache_states_to_disk: bool = parameter(
        "cache_text_encoder_outputs_to_disk",
        False,
        "Cache text encoder outputs to disk",
        Section.CAPTIONS,
        """Keep them in a folder beside the images as well (0.3 MB an image for SDXL), so that the next run starts
        at once. Only captions that changed are encoded anew.""",
        when={"sdxl_cache_text_encoder_outputs": True},
    )
