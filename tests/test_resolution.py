"""Bins are those of the checkpoints, and images come back to the request."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import resolution


@pytest.mark.parametrize(
  ("sample_size", "count"), [(16, 33), (32, 33), (64, 40), (128, 40)]
)
def test_bins_are_multiples_of_32_with_about_the_area_of_the_square(
  sample_size, count
):
  table = resolution.bins(sample_size)
  assert len(table) == count
  area = (32 * sample_size) ** 2
  for ratio, (height, width) in table.items():
    assert height % 32 == width % 32 == 0
    assert 0.8 < height * width / area < 1.1
    # The published keys are rounded, some of them generously.
    assert abs(ratio - height / width) < 0.02 * ratio + 0.02


@pytest.mark.parametrize("sample_size", [16, 32])
def test_more_bins_are_trained_at_than_sampled_at(sample_size):
  trained = resolution.bins(sample_size, training=True)
  sampled = resolution.bins(sample_size)
  assert sampled.items() < trained.items()
  only = sorted(trained.keys() - sampled.keys())
  # Source: the tables of github.com/NVlabs/Sana with and without "_TEST".
  assert only == [0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88]
  assert resolution.bins(64, training=True) == resolution.bins(64)


def test_the_training_bins_of_1024_pixels_are_the_published_ones():
  table = resolution.bins(32, training=True)
  lines = [f"{ratio} {h}x{w}" for ratio, (h, w) in table.items()]
  digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
  # Typed from the reference's table independently of the asset.
  assert (
    digest == "548a3c094bbaaa82cb4f09903529eb69f61b794d79b46400d7d8d621461b9438"
  )


@pytest.mark.parametrize(
  ("request_", "sample_size", "expected"),
  [
    ((160, 256), 16, (384, 640)),
    ((230, 130), 16, (672, 384)),
    ((1024, 1024), 32, (1024, 1024)),
    ((2918, 2167), 64, (2304, 1664)),
    ((100, 10_000), 32, (512, 2048)),
    ((99, 100), 128, (4096, 4096)),
  ],
)
def test_the_closest_ratio_wins(request_, sample_size, expected):
  assert (
    resolution.closest_bin(request_[0] / request_[1], sample_size) == expected
  )


def test_sizes_without_bins_are_named():
  with pytest.raises(ValueError, match="sample_size 8, only for"):
    resolution.bins(8)


def bilinear(image, height, width):
  """Pixel by pixel, from the definition; edges are repeated."""
  rows = np.clip(
    (np.arange(height) + 0.5) * image.shape[0] / height - 0.5, 0, None
  )
  columns = np.clip(
    (np.arange(width) + 0.5) * image.shape[1] / width - 0.5, 0, None
  )
  out = np.empty((height, width, image.shape[2]))
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      top, left = int(row), int(column)
      bottom = min(top + 1, image.shape[0] - 1)
      right = min(left + 1, image.shape[1] - 1)
      a, b = row - top, column - left
      upper = (1 - b) * image[top, left] + b * image[top, right]
      lower = (1 - b) * image[bottom, left] + b * image[bottom, right]
      out[i, j] = (1 - a) * upper + a * lower
  return out


def test_images_cover_the_request_and_lose_their_edges(rng):
  images = rng.normal(size=(2, 12, 20, 3)).astype(np.float32)
  found = resolution.cover_and_crop(jnp.asarray(images), 9, 11)
  assert found.shape == (2, 9, 11, 3)
  # 9/12 is the larger ratio: 9 x 15, of which columns 2 to 12 remain.
  expected = np.stack([bilinear(image, 9, 15)[:, 2:13] for image in images])
  # float32 against float64 interpolation.
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_enlarging_repeats_the_edges(rng):
  images = rng.normal(size=(1, 3, 4, 1)).astype(np.float32)
  found = resolution.cover_and_crop(jnp.asarray(images), 7, 8)
  expected = bilinear(images[0], 7, 9)[:, :8]
  np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_the_right_size_is_left_alone(rng):
  images = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32)
  assert resolution.cover_and_crop(images, 4, 4) is images


@pytest.mark.parametrize("side", [49, 98, 103, 107])
def test_rounding_never_loses_a_pixel(side):
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  for size in range(1, 60):
    fit = jax.eval_shape(
      lambda x, n=size: resolution.cover_and_crop(x, n, n), images
    )
    assert fit.shape == (1, size, size, 3)
