"""Pictures from outside: read if harmless, refused in words if not."""

import io
import resource
import zlib

import numpy as np
import PIL.Image
import pytest

from sana_jax.app import uploads
from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.limits import Limits
from tests.app import hostile

LIMITS = Limits()


def encode(image, kind, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.fixture
def pixels(rng):
  return rng.integers(0, 255, (24, 40, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_three_formats_are_read(pixels, kind):
  options = {"lossless": True} if kind == "WEBP" else {}
  data = encode(PIL.Image.fromarray(pixels), kind, **options)
  picture = uploads.read_picture(data, LIMITS)
  assert (picture.mode, picture.size) == ("RGB", (40, 24))
  if kind != "JPEG":
    np.testing.assert_array_equal(picture, pixels)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(pixels, kind):
  data = encode(PIL.Image.fromarray(pixels), kind)
  with pytest.raises(InvalidRequestError, match="send PNG, JPEG, WEBP"):
    uploads.read_picture(data, LIMITS)


@pytest.mark.parametrize("data", [b"", b"PNG", b"<svg/>", b"/etc/passwd"])
def test_what_is_no_picture_is_refused_under_its_field(data):
  with pytest.raises(InvalidRequestError, match="mask_image is not") as caught:
    uploads.read_picture(data, LIMITS, field="mask_image")
  assert caught.value.field == "mask_image"


def test_a_decompression_bomb_is_refused_before_a_pixel_is_decoded():
  bomb = hostile.bomb()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(InvalidRequestError, match="pixels"):
    uploads.read_picture(bomb, LIMITS)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 50_000  # KB

  below_pillows_limit = hostile.png(9_000, 9_000, zlib.compress(bytes(1000)))
  with pytest.raises(InvalidRequestError, match="9000x9000"):
    uploads.read_picture(below_pillows_limit, LIMITS)


def test_a_text_chunk_that_inflates_is_refused(pixels):
  data = encode(PIL.Image.fromarray(pixels), "PNG")
  text = b"bomb\x00\x00" + zlib.compress(bytes(100_000_000))
  data = data[:33] + hostile.chunk(b"zTXt", text) + data[33:]
  with pytest.raises(InvalidRequestError):
    uploads.read_picture(data, LIMITS)


def test_bytes_are_counted_first():
  with pytest.raises(InvalidRequestError, match="at most 20000000"):
    uploads.read_picture(bytes(20_000_001), LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_an_error_not_a_grey_picture(pixels, kind):
  data = encode(PIL.Image.fromarray(pixels), kind)
  with pytest.raises(InvalidRequestError, match="image is"):
    uploads.read_picture(data[: len(data) // 2], LIMITS)


def test_an_animation_is_refused(pixels):
  frame = PIL.Image.fromarray(pixels)
  other = PIL.Image.fromarray(255 - pixels)
  for kind in ("PNG", "WEBP"):
    data = encode(frame, kind, save_all=True, append_images=[other])
    with pytest.raises(InvalidRequestError, match="animated"):
      uploads.read_picture(data, LIMITS)


def test_orientation_is_applied_and_nothing_else_of_the_file_stays(pixels):
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  exif[0x010E] = "a secret"
  data = encode(PIL.Image.fromarray(pixels), "PNG", exif=exif)
  picture = uploads.read_picture(data, LIMITS)
  np.testing.assert_array_equal(picture, np.rot90(pixels, -1))
  assert not picture.info
  assert not picture.getexif()


def test_what_is_transparent_becomes_white(pixels):
  alpha = np.zeros((*pixels.shape[:2], 1), np.uint8)
  layers = np.concatenate([pixels, alpha], axis=-1)
  data = encode(PIL.Image.fromarray(layers), "PNG")
  assert np.asarray(uploads.read_picture(data, LIMITS)).min() == 255


def test_sixteen_bits_are_scaled_not_cut(rng):
  levels = rng.integers(0, 65535, (8, 8)).astype(np.uint16)
  data = encode(PIL.Image.fromarray(levels), "PNG")
  picture = np.asarray(uploads.read_picture(data, LIMITS))[..., 0]
  np.testing.assert_allclose(picture, levels / 257, atol=1)
