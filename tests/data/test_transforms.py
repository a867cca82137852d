"""Pictures look as in a viewer, and fit their bucket as in the reference."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from sana_jax.data import transforms
from tests import pictures


def rotated(rng, form, orientation):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  image = pictures.picture(rng, 24, 32)
  options = {"lossless": True} if form == "WEBP" else {}
  return image, pictures.encode(image, form, exif=exif, **options)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(rng, form, orientation):
  image, content = rotated(rng, form, orientation)
  image.getexif()[0x0112] = orientation
  expected = PIL.ImageOps.exif_transpose(image)
  found = transforms.decode(content)
  np.testing.assert_array_equal(found, expected)
  assert transforms.header(content) == (expected.height, expected.width)
  if form != "TIFF" or orientation == 1:
    assert transforms.is_turned(content) == (orientation != 1)


def test_jpeg_headers_are_read_from_the_beginning(rng):
  _, content = rotated(rng, "JPEG", 6)
  assert transforms.header(content[:900]) == (32, 24)
  assert transforms.decode(content).size == (24, 32)


def test_broken_exif_data_are_ignored(rng):
  content = pictures.encode(
    pictures.picture(rng), "PNG", exif=b"Exif\0\0broken"
  )
  assert transforms.header(content) == (24, 32)
  assert transforms.decode(content).size == (32, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(rng, mode):
  rgba = np.array(pictures.picture(rng).convert("RGBA"))
  if mode == "RGB":  # One colour that stands for nothing.
    rgba[:, :16, :3] = (1, 2, 3)
    image = PIL.Image.fromarray(rgba).convert("RGB")
    content = pictures.encode(image, "PNG", transparency=(1, 2, 3))
  else:
    rgba[:, :16, 3] = 0
    image = PIL.Image.fromarray(rgba)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    content = pictures.encode(image, "PNG")
  found = np.array(transforms.decode(content))
  assert found.shape == (24, 32, 3)
  assert (found[:, :16] == 255).all()
  assert (found[:, 16:] != 255).any()


def test_half_transparent_is_half_white():
  rgba = np.full((8, 8, 4), (0, 100, 200, 128), np.uint8)
  found = transforms.decode(pictures.encode(PIL.Image.fromarray(rgba), "PNG"))
  expected = np.array([0, 100, 200]) * 128 / 255 + 255 * 127 / 255
  # Half a level: rounding to bytes.
  np.testing.assert_allclose(np.array(found)[0, 0], expected, atol=1)


def test_sixteen_bits_are_rounded_to_eight(rng):
  values = rng.integers(0, 2**16, (8, 9), dtype=np.uint16)
  values[0, :2] = 0, 65535
  found = transforms.decode(pictures.encode(PIL.Image.fromarray(values), "PNG"))
  expected = np.rint(values / 257).astype(np.uint8)
  np.testing.assert_array_equal(np.array(found)[..., 0], expected)


def test_cmyk_is_the_rgb_it_was_made_of():
  rgb = PIL.Image.new("RGB", (16, 16), (200, 30, 60))
  content = pictures.encode(rgb.convert("CMYK"), "JPEG", quality=100)
  found = np.array(transforms.decode(content), np.int32)
  assert np.abs(found - (200, 30, 60)).max() <= 3  # JPEG's quantisation.


def test_an_animation_is_its_first_frame(rng):
  frames = [pictures.picture(rng).quantize(32) for _ in range(3)]
  buffer = io.BytesIO()
  frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
  found = transforms.decode(buffer.getvalue())
  np.testing.assert_array_equal(found, frames[0].convert("RGB"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_what_is_cut_off_is_refused(rng, form):
  noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
  content = pictures.encode(PIL.Image.fromarray(noise), form)
  for part in (0.4, 0.7, 0.9):
    with pytest.raises(ValueError, match="cut off|no image"):
      transforms.decode(content[: int(part * len(content))])


def test_no_images_are_refused(rng):
  for read in (transforms.decode, transforms.header):
    with pytest.raises(ValueError, match="is empty"):
      read(b"")
    with pytest.raises(ValueError, match="its format is unknown"):
      read(rng.bytes(500))


def test_pictures_too_large_to_be_true_are_refused(monkeypatch, rng):
  content = pictures.encode(pictures.picture(rng), "PNG")
  monkeypatch.setattr(transforms, "MAX_PIXELS", 24 * 32 - 1)
  with pytest.raises(ValueError, match="says it is 32 x 24 pixels"):
    transforms.header(content)
  monkeypatch.setattr(transforms, "MAX_PIXELS", 24 * 32)
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(ValueError, match="too many pixels"):
    transforms.decode(content)


def test_pixels_of_32_bits_are_refused(rng):
  values = rng.random((8, 8), dtype=np.float32)
  content = pictures.encode(PIL.Image.fromarray(values), "TIFF")
  with pytest.raises(ValueError, match="32-bit pixels"):
    transforms.decode(content)


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (41, 41), (49, 147)])
@pytest.mark.parametrize("goal", [(32, 64), (64, 32), (48, 48), (7, 5)])
def test_a_picture_covers_its_bucket_with_the_least_cut_off(rng, size, goal):
  image = pictures.picture(rng, *size)
  scale = max(goal[0] / size[0], goal[1] / size[1])
  # The other side is truncated; 1e-9: a product may fall just short.
  scaled = [int(side * scale + 1e-9) for side in size]
  resized = image.resize(scaled[::-1], PIL.Image.Resampling.BICUBIC)
  top, left = (round((s - g) / 2) for s, g in zip(scaled, goal, strict=True))
  expected = np.array(resized)[top : top + goal[0], left : left + goal[1]]
  np.testing.assert_array_equal(transforms.fit(image, *goal), expected)


def test_crops_and_mirror_images_are_drawn(rng):
  image = pictures.picture(rng, 8, 20)
  whole = np.array(image)
  found = set()
  for seed in range(200):
    out = transforms.fit(
      image, 8, 8, crop="random", flip=True, rng=np.random.default_rng(seed)
    )
    places = [
      (left, flipped)
      for left in range(13)
      for flipped in (False, True)
      if np.array_equal(out, whole[:, left : left + 8][:, :: 1 - 2 * flipped])
    ]
    assert len(places) == 1
    found.update(places)
  assert len(found) == 26  # Every place, both ways.


def test_filters_differ_and_impossible_fits_are_refused(rng, unchecked):
  image = pictures.picture(rng)
  assert (
    transforms.fit(image, 9, 9)
    != transforms.fit(image, 9, 9, resample="lanczos")
  ).any()
  with pytest.raises(ValueError, match="crop must be .*; .*resample must be"):
    transforms.fit(image, 9, 9, crop="top", resample="nearest")
  with pytest.raises(ValueError, match="need rng"):
    transforms.fit(image, 9, 9, flip=True)
  with pytest.raises(ValueError, match="must be RGB.*must be positive"):
    transforms.fit(image.convert("L"), 0, 9)
