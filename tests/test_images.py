"""Pictures keep their values, their places in a grid, and their texts."""

import numpy as np
import PIL.Image
import pytest

from sana_jax import images


def test_values_are_rounded_to_the_nearest_level():
  values = np.array([-0.1, 0.0, 0.5, 127.6 / 255, 1.0, 1.7], np.float32)
  pixels = np.broadcast_to(values[:, None, None], (6, 1, 3))
  found = images.to_uint8(pixels)[:, 0, 0]
  # 127.5 is rounded to the even 128.
  np.testing.assert_array_equal(found, [0, 0, 128, 128, 255, 255])


def test_a_grid_is_filled_row_by_row(rng):
  pictures = rng.uniform(size=(5, 2, 3, 3)).astype(np.float32)
  grid = images.grid(pictures, columns=2)
  assert grid.shape == (6, 6, 3)
  np.testing.assert_array_equal(grid[2:4, 3:6], pictures[3])
  np.testing.assert_array_equal(grid[4:6, 3:6], 1.0)
  assert images.grid(pictures).shape == (4, 9, 3)


def test_a_grid_needs_images_of_one_size(rng):
  with pytest.raises(ValueError, match="got none"):
    images.grid([])
  with pytest.raises(ValueError, match=r"\(1, 2, 3\), \(2, 2, 3\)"):
    images.grid([np.ones((2, 2, 3)), np.ones((1, 2, 3))])


def test_a_png_keeps_pixels_and_texts(tmp_path, rng):
  image = rng.uniform(size=(4, 5, 3)).astype(np.float32)
  metadata = {"prompt": "gâteau 🍰\nzwei Zeilen", "seed": "3"}
  images.write_png(tmp_path / "x.png", image, metadata=metadata)
  with PIL.Image.open(tmp_path / "x.png") as read:
    read.load()
    np.testing.assert_array_equal(np.asarray(read), images.to_uint8(image))
    assert read.text == metadata


def test_images_become_pil_images(rng):
  pictures = rng.uniform(size=(2, 4, 5, 3)).astype(np.float32)
  converted = images.to_pil(pictures)
  assert [picture.size for picture in converted] == [(5, 4)] * 2
