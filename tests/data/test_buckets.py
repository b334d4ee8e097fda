"""Which bucket an image gets, against the rules and for any size."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import reference
from trainer import schema
from trainer.data.buckets import Buckets, Placement, ranged
from trainer.errors import DataError

sides = st.integers(1, 12_000)
sizes = st.tuples(sides, sides)
resolutions = st.tuples(st.integers(256, 1280), st.integers(256, 1280))
steps = st.sampled_from([8, 16, 32, 64, 128])


def buckets(resolution=(512, 512), **settings):
    config, _ = schema.read({"max_resolution": f"{resolution[0]},{resolution[1]}", **settings})
    return Buckets(config.data)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop"),
    [
        ((512, 512), (512, 512), (512, 512), (0, 0)),  # astronaut
        ((451, 300), (448, 256), (451, 300), (1, 22)),  # chelsea: smaller than the area, only cut
        ((600, 400), (576, 384), (600, 400), (12, 8)),  # coffee
        ((640, 427), (576, 384), (576, 384), (0, 0)),  # rocket: 273,280 pixels are too many, so it is shrunk
        ((1411, 1411), (512, 512), (512, 512), (0, 0)),  # retina
    ],
)
def test_photographs_keep_their_shape_and_are_never_enlarged(size, bucket, resized, crop):
    placement = buckets().place(size)
    assert (placement.bucket, placement.resized, placement.crop) == (bucket, resized, crop)


def test_with_upscaling_a_small_image_is_brought_to_the_area_of_the_resolution():
    placement = buckets(bucket_no_upscale=False).place((100, 100))
    assert placement.bucket == placement.resized == (512, 512)


@pytest.mark.proves("enable_bucket")
def test_buckets_off_cover_the_resolution_and_cut_the_rest():
    placement = buckets((512, 384), enable_bucket=False).place((1000, 400))
    assert placement.bucket == (512, 384)
    assert placement.resized == (960, 384)
    assert placement.crop == (224, 0)


@pytest.mark.proves("bucket_no_upscale", "bucket_reso_steps")
@settings(deadline=None)
@given(size=sizes, resolution=resolutions, step=steps)
def test_without_upscaling_nothing_grows_and_less_than_a_step_is_cut(size, resolution, step):
    try:
        placement = buckets(resolution, bucket_reso_steps=step).place(size)
    except DataError:
        assume(False)
    area, aspect = resolution[0] * resolution[1], size[0] / size[1]
    assert all(side > 0 and side % step == 0 for side in placement.bucket)
    assert all(r <= s for r, s in zip(placement.resized, size, strict=True))
    assert all(0 <= r - b < step for r, b in zip(placement.resized, placement.bucket, strict=True))
    # Within the area, but for the rounding of either side to the nearest pixel.
    assert math.prod(placement.bucket) <= (math.sqrt(area * aspect) + 1) * (math.sqrt(area / aspect) + 1)
    if math.prod(size) <= area:
        assert placement.resized == size


@settings(deadline=None)
@given(size=sizes, resolution=resolutions, step=steps)
def test_a_shrunk_image_gets_the_better_of_a_whole_width_and_a_whole_height(size, resolution, step):
    area, aspect = resolution[0] * resolution[1], size[0] / size[1]
    assume(math.prod(size) > area)
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    whole_width, whole_height = int(width + 0.5) // step * step, int(height + 0.5) // step * step
    assume(whole_width and whole_height)
    choices = [
        (whole_width, int(whole_width / aspect + 0.5) // step * step),
        (int(whole_height * aspect + 0.5) // step * step, whole_height),
    ]
    assume(all(all(choice) for choice in choices))
    bucket = buckets(resolution, bucket_reso_steps=step).place(size).bucket
    assert abs(bucket[0] / bucket[1] - aspect) == min(abs(w / h - aspect) for w, h in choices)


@settings(deadline=None)
@given(size=sizes, resolution=resolutions, step=steps, low=st.integers(64, 512), high=st.integers(512, 2048))
def test_with_upscaling_the_nearest_shape_within_the_bounds_is_covered(size, resolution, step, low, high):
    try:
        placed = buckets(
            resolution, bucket_no_upscale=False, bucket_reso_steps=step, min_bucket_reso=low, max_bucket_reso=high
        )
    except DataError:
        assume(False)
    placement = placed.place(size)
    width, height = placement.bucket
    aspect = size[0] / size[1]
    assert width % step == height % step == 0
    assert width * height <= math.prod(resolution)
    assert max(width, height) < high + step
    assert min(width, height) > low - step
    if size not in placed.choices:
        assert abs(width / height - aspect) == min(abs(w / h - aspect) for w, h in placed.choices)
    # It covers the bucket, and no more than it must: one side fits exactly.
    assert all(r >= b for r, b in zip(placement.resized, placement.bucket, strict=True))
    assert any(r == b for r, b in zip(placement.resized, placement.bucket, strict=True))


@settings(deadline=None)
@given(size=sizes, resolution=resolutions)
def test_the_crop_is_central(size, resolution):
    placement = buckets(resolution, enable_bucket=False).place(size)
    for resized, bucket, corner in zip(placement.resized, placement.bucket, placement.crop, strict=True):
        assert corner >= 0
        assert 0 <= (resized - bucket - corner) - corner <= 1


@pytest.mark.parametrize("size", [(40, 900), (900, 40), (10_000, 100)])
def test_an_image_narrower_than_a_step_is_refused_with_its_size_and_what_to_do(size):
    with pytest.raises(DataError, match=f"{size[0]}×{size[1]}") as caught:
        buckets().place(size)
    assert "bucket_reso_steps" in caught.value.hint
    assert "bucket_no_upscale" in caught.value.hint


def test_a_range_that_excludes_the_resolution_is_refused():
    with pytest.raises(DataError, match="256–512 does not hold Max resolution 768,768"):
        buckets((768, 768), bucket_no_upscale=False, max_bucket_reso=512)


def test_bounds_widen_to_whole_steps():
    assert ranged((512, 512), 300, 1000, 64) == ranged((512, 512), 256, 1024, 64)


def test_an_immense_range_takes_no_time():
    assert ranged((512, 512), 256, 10**12, 8) == ranged((512, 512), 256, 1024, 8)


REFERENCE = json.loads((Path(__file__).parent / "reference" / "buckets.json").read_text())


@pytest.mark.proves(
    "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "bucket_reso_steps", "max_resolution"
)
@pytest.mark.parametrize(
    "case", REFERENCE["settings"], ids=lambda case: "{max_resolution}-{steps}-{max_bucket}-{no_upscale}".format(**case)
)
def test_buckets_equal_those_of_sd_scripts_and_what_fails_there_is_refused_here(case):
    placed = buckets(
        case["max_resolution"],
        bucket_no_upscale=case["no_upscale"],
        bucket_reso_steps=case["steps"],
        min_bucket_reso=case["min_bucket"],
        max_bucket_reso=case["max_bucket"],
    )
    assert [list(choice) for choice in placed.choices] == case.get("buckets", [])
    for image, expected in zip(REFERENCE["image_sizes"], case["results"], strict=True):
        if isinstance(expected, str) or 0 in expected[:2]:
            with pytest.raises(DataError):
                placed.place(tuple(image))
        else:
            placement = placed.place(tuple(image))
            assert [*placement.bucket, *placement.resized, *placement.crop] == expected, image


@pytest.mark.parametrize("case", reference.read("crops"), ids=lambda case: f"{case['size']} in {case['bucket']}")
def test_sdxl_is_told_of_the_crop_that_sd_scripts_tells_it(case):
    placement = Placement(tuple(case["bucket"]), (0, 0), (0, 0))
    for key, flipped in (("crop", False), ("flipped", True)):
        assert list(placement.told_crop(tuple(case["size"]), flipped=flipped)) == case[key]
