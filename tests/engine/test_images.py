"""Decoding, cropping and the handling of unreadable images."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from engine.decode import center_crop, decode, random_crop
from engine.images import ImageSet, Listing, to_float, to_uint8


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(level: int, size: int = 8) -> bytes:
    return encoded(Image.new("RGB", (size, size), (level, level, level)))


def image_set(files: list[bytes], **options) -> ImageSet:
    labels = np.arange(len(files), dtype=np.int64)
    listing = Listing(labels=labels, read=files.__getitem__, name=lambda i: f"{i}.png", digest="d")
    return ImageSet(listing, **{"size": 8, "split": "train", "origin": {"source": "test"}, **options})


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_level_survives_the_round_trip_through_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert (to_float(levels).min(), to_float(levels).max()) == (-1.0, 1.0)


def test_floats_outside_the_range_are_clamped_and_halves_round_up():
    assert to_uint8(torch.tensor([-2.0, 2.0, 0.0])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "RGBA", "LA", "YCbCr", "HSV"])
def test_white_is_white_in_every_mode(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    decoded = decode(image)
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() >= 254


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_common_format_is_read(kind):
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    assert np.abs(np.asarray(decode(encoded(image, kind))).astype(int) - np.asarray(image)).max() <= 10


def test_cmyk_jpeg_keeps_its_colours():
    ink = Image.new("CMYK", (16, 16), (255, 0, 255, 0))  # cyan and yellow make green
    red, green, blue = np.asarray(decode(encoded(ink, "JPEG")))[8, 8]
    assert green > 200 and red < 50 and blue < 50


def test_16_bit_grey_is_scaled_and_not_clipped():
    samples = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(samples))))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_white_level_are_refused(dtype):
    image = Image.fromarray(np.full((4, 4), 1e9, dtype))
    with pytest.raises(ValueError, match=r"no defined white level"):
        decode(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert(mode)
    assert np.asarray(decode(encoded(image)))[0, 0].tolist() == [127, 127, 127]


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 1), 1)
    pixels = np.asarray(decode(encoded(image, transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [40, 50, 60]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; shown upright, the picture is taller than wide
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode(data).size == (10, 20)


def test_center_crop_of_an_image_at_size_changes_nothing():
    image = noisy(32, 32)
    assert np.array_equal(np.asarray(center_crop(image, 32)), np.asarray(image))


def test_center_crop_takes_the_middle_and_rounds_the_offset_down():
    image = noisy(35, 32)
    assert np.array_equal(np.asarray(center_crop(image, 32)), np.asarray(image)[:, 1:33])


def test_center_crop_halves_by_boxes_first():
    image = noisy(128, 128)
    boxes = np.asarray(image).astype(float).reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(image, 32)) - boxes).max() <= 2  # four roundings of half a level


@pytest.mark.parametrize("shape", [(7, 50), (50, 7), (500, 333), (1, 1)])
def test_crops_are_square_whatever_the_shape(shape):
    assert center_crop(noisy(*shape), 16).size == (16, 16)
    assert random_crop(noisy(*shape), 16, 0.999, 0.999, 0.999).size == (16, 16)


def test_random_crop_without_scale_in_the_middle_is_the_centre_crop():
    image = noisy(48, 32)
    assert np.array_equal(np.asarray(random_crop(image, 32, 0.0, 0.5, 0.5)), np.asarray(center_crop(image, 32)))


def test_random_crop_follows_its_place():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    left, right = (np.asarray(random_crop(ramp, 8, 0.99, 0.5, place)).mean() for place in (0.0, 0.99))
    assert left + 40 < right


def test_load_gives_uint8_planes_and_labels():
    batch = image_set([grey(level) for level in (10, 20, 30)]).load(np.array([2, 0]))
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (2, 3, 8, 8)
    assert batch["images"][:, 0, 0, 0].tolist() == [30, 10] and batch["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("crop", ["center", "random", "shift"])
def test_the_first_draw_mirrors_and_only_if_flip_is_set(crop):
    files = [encoded(noisy(8, 8))]
    half = np.array([[0.5, 0.0, 0.5, 0.5]])
    plain, mirrored = (
        image_set(files, flip=flip, crop=crop).load(np.array([0]), half)["images"] for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)


def test_shifting_moves_the_centre_crop_by_a_sixteenth_at_most_and_repeats_its_edges():
    files = [encoded(noisy(32, 32))]
    centre = image_set(files, size=32).load(np.array([0]))["images"]
    images = image_set(files, size=32, crop="shift")

    def at(top: float, left: float) -> torch.Tensor:
        return images.load(np.array([0]), np.array([[0.0, 0.0, top, left]]))["images"]

    assert torch.equal(at(0.5, 0.5), centre)
    down_right = at(0.0, 0.0)
    assert torch.equal(down_right[..., 2:, 2:], centre[..., :-2, :-2])
    assert torch.equal(down_right[..., 0, 2:], centre[..., 0, :-2])
    assert torch.equal(at(0.999, 0.5)[..., :-2, :], centre[..., 2:, :])


def test_without_draws_the_images_are_centred_and_not_mirrored():
    files = [encoded(noisy(20, 12))]
    drawn = image_set(files, flip=True, crop="random").load(np.array([0]))["images"]
    assert torch.equal(drawn, image_set(files).load(np.array([0]))["images"])


def test_an_unreadable_image_gives_way_to_the_next_and_wraps():
    images = image_set([grey(10), b"broken", grey(30), grey(40)[:48]])
    with pytest.warns(UserWarning, match=r"left out unreadable image .*\.png \(.*\); \d so far") as caught:
        batch = images.load(np.array([1, 3, 2]))
    assert batch["labels"].tolist() == [2, 0, 2] and batch["images"][:, 0, 0, 0].tolist() == [30, 10, 30]
    assert len(caught) == 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_half_a_file_is_unreadable(kind):
    data = encoded(noisy(32, 32), kind)
    images = image_set([data[: len(data) // 2], grey(7)])
    with pytest.warns(UserWarning, match=r"0\.png"):
        assert images.load(np.array([0]))["labels"].tolist() == [1]


def test_a_bad_image_is_reported_once(recwarn):
    images = image_set([b"broken", grey(1)])
    for _ in range(3):
        images.load(np.array([0, 0]))
    assert len(recwarn) == 1


def test_too_many_unreadable_images_stop_with_their_names():
    images = image_set([b"", b"broken", grey(1)], max_corrupt=1)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"0\.png .*1\.png .*data\.max_corrupt"),
    ):
        images.load(np.array([0, 1]))


def test_a_set_without_a_readable_image_is_an_error():
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"2 of 2 images cannot be read"):
        image_set([b"", b""]).load(np.array([0]))


def test_in_order_gives_every_readable_image_once():
    images = image_set([grey(level) for level in range(5)] + [b"broken"] + [grey(6)], workers=3)
    with pytest.warns(UserWarning, match=r"5.png"):
        batches = list(images.in_order(2))
    assert torch.cat([batch["indices"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 6]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 6]
    assert torch.cat([batch["images"] for batch in batches])[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6]


def test_batches_say_which_captions_are_theirs():
    pictures = [b"broken", grey(1), grey(2)]
    facts = {"labels": np.zeros(3, np.int64), "read": lambda index: pictures[index], "name": str, "digest": "x"}
    told = ImageSet(Listing(captions=["a", "b", "c"], **facts), size=8, split="train", origin={})
    with pytest.warns(UserWarning, match="unreadable"):
        rows = told.load(np.array([2, 0]))["rows"]
    assert rows.tolist() == [2, 1] and rows.dtype == torch.int64  # the image that took the place of the broken one
    silent = ImageSet(Listing(**facts), size=8, split="train", origin={})
    assert set(silent.load(np.array([1]))) == {"images", "labels"}


def test_in_order_keeps_to_its_range():
    images = image_set([grey(level) for level in range(7)])
    batches = list(images.in_order(2, start=1, stop=6))
    assert [batch["indices"].tolist() for batch in batches] == [[1, 2], [3, 4], [5]]
    assert list(images.in_order(2, start=7, stop=99)) == []


def test_a_decoded_image_is_kept():
    reads: list[int] = []
    data = [grey(1), grey(2)]
    listing = Listing(labels=np.arange(2), read=lambda i: reads.append(i) or data[i], name=str, digest="")
    images = ImageSet(listing, size=8, split="train", origin={})
    for _ in range(3):
        images.load(np.array([0, 1, 0]))
    assert reads == [0, 1]


def test_loading_from_many_threads_agrees_with_one():
    files = [grey(level) if level % 7 else b"broken" for level in range(60)]
    alone, shared = image_set(files), image_set(files)
    with pytest.warns(UserWarning, match="left out"):
        expected = alone.load(np.arange(60))["images"]
    with ThreadPoolExecutor(8) as pool, pytest.warns(UserWarning, match="left out"):
        results = list(pool.map(lambda _: shared.load(np.arange(60))["images"], range(16)))
    assert all(torch.equal(result, expected) for result in results)


def test_identity_changes_with_the_data_and_not_with_the_augmentation():
    files = [grey(1)]
    same = image_set(files).identity()
    assert image_set(files, crop="random", flip=True).identity() == same
    others = [
        image_set(files * 2),
        image_set(files, size=16),
        image_set(files, split="test"),
        image_set(files, origin={}),
    ]
    assert all(other.identity() != same for other in others)


def test_a_subset_renumbers_everything():
    listing = Listing(labels=np.arange(4), captions=list("abcd"), read=lambda i: grey(i), name=str, digest="x")
    part = listing.subset(np.array([3, 1]))
    assert part.labels.tolist() == [3, 1] and part.captions == ["d", "b"] and part.name(0) == "3"
    assert part.digest != listing.subset(np.array([1, 3])).digest
    assert ImageSet(part, size=8, split="train", origin={}).load(np.array([1]))["images"][0, 0, 0, 0] == 1
