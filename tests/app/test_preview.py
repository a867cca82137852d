"""A preview is what a linear decoder would make."""

import numpy as np
import pytest

from sana_jax.app import preview


def linear_decoder(rng, channels=4, factor=4):
  patch = 0.1 * rng.normal(size=(channels, factor, factor, 3))

  def decode(latents):
    count, height, width, _ = latents.shape
    colours = np.tensordot(latents, patch, 1) + 0.5
    rows = colours.transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(count, factor * height, factor * width, 3)

  return decode


def test_a_linear_decoder_is_found(rng):
  decode = linear_decoder(rng)
  latents = rng.normal(size=(64, 8, 8, 4)).astype(np.float32)
  fitted = preview.fit(latents, decode(latents))
  assert fitted.explained > 0.8  # the ridge pulls towards the mean
  # Even colours, for which smoothing does nothing.
  flat = np.broadcast_to(
    rng.normal(size=(2, 1, 1, 4)).astype(np.float32), (2, 6, 5, 4)
  )
  shown = fitted(flat)
  assert shown.dtype == np.uint8
  assert shown.shape == (6 * 8, 2 * 5 * 8, 3)
  means = decode(flat).mean((1, 2))
  for half, mean in zip(np.split(shown, 2, axis=1), means, strict=True):
    np.testing.assert_allclose(half.mean((0, 1)) / 255, mean, atol=0.1)


def test_pictures_of_a_batch_stand_side_by_side(rng):
  decode = linear_decoder(rng)
  latents = rng.normal(size=(16, 4, 4, 4)).astype(np.float32)
  fitted = preview.fit(latents, decode(latents))
  both = fitted(latents[:2])
  alone = [fitted(latents[i : i + 1]) for i in range(2)]
  np.testing.assert_array_equal(both, np.concatenate(alone, axis=1))


def test_latents_that_are_no_numbers_do_not_break_it(rng):
  decode = linear_decoder(rng)
  latents = rng.normal(size=(16, 4, 4, 4)).astype(np.float32)
  fitted = preview.fit(latents, decode(latents))
  assert fitted(np.full((1, 4, 4, 4), 1e30, np.float32)).shape == (32, 32, 3)


def test_images_of_another_size_are_refused(rng):
  with pytest.raises(ValueError, match="whole multiple"):
    preview.fit(np.zeros((1, 4, 4, 4)), np.zeros((1, 17, 16, 3)))


def test_a_fit_waits_for_enough():
  assert not preview.enough(np.zeros((3, 32, 32, 32)))
  assert preview.enough(np.zeros((4, 32, 32, 32)))
  assert not preview.enough(np.zeros((4, 4, 4, 32)))
