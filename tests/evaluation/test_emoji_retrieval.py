"""The retrieval rate: 1 for the pictures themselves, near 0 for others."""

import numpy as np
import pytest

from sana_jax.data import emoji
from sana_jax.evaluation import emoji_retrieval


@pytest.fixture(scope="module")
def records():
  source = emoji.load("train")
  return [source[i] for i in range(0, len(source), 9)]


@pytest.fixture(scope="module")
def pictures(records):
  return np.stack([r["image"] for r in records]).astype(np.float32) / 255


def rate(samples, wanted, records, pictures) -> float:
  gallery = emoji_retrieval.shrink(pictures)
  return emoji_retrieval.retrieval_rate(samples, wanted, records, gallery)


def test_perfect_pictures_are_all_found(records, pictures):
  assert rate(pictures, records, records, pictures) == 1.0


def test_a_little_noise_does_not_matter(records, pictures, rng):
  noisy = pictures[:100] + rng.normal(0, 0.05, pictures[:100].shape)
  noisy = np.clip(noisy, 0, 1).astype(np.float32)
  assert rate(noisy, records[:100], records, pictures) > 0.95


def test_pictures_of_other_captions_are_wrong(records, pictures, rng):
  order = rng.permutation(len(records))
  assert rate(pictures[order], records, records, pictures) < 0.05


def test_another_skin_tone_counts_as_right():
  source = emoji.load("train")
  tones = [
    source[i] for i in range(len(source)) if "waving" in source[i]["name"]
  ]
  tones = [r for r in tones if r["base_name"] == "waving hand"]
  assert len(tones) == 6
  pictures = np.stack([r["image"] for r in tones]).astype(np.float32) / 255
  rolled = np.roll(pictures, 1, axis=0)
  assert rate(rolled, tones, tones, pictures) == 1.0
  other = dict(tones[0], base_name="ghost")
  assert rate(pictures[1:2], [other], tones, pictures) == 0.0


def test_the_nearest_neighbour_is_that_of_the_definition(rng):
  queries = rng.normal(size=(7, 12)).astype(np.float32)
  gallery = rng.normal(size=(9, 12)).astype(np.float32)
  squares = np.square(queries[:, None] - gallery[None]).sum(-1)
  np.testing.assert_array_equal(
    emoji_retrieval.nearest(queries, gallery), squares.argmin(axis=1)
  )


def test_pictures_are_averaged_down(rng):
  image = rng.random((1, 64, 64, 3)).astype(np.float32)
  means = image.reshape(1, 32, 2, 32, 2, 3).mean(axis=(2, 4)).reshape(1, -1)
  # Pixels are rounded to 8 bits before, between and after averaging rows and
  # columns.
  np.testing.assert_allclose(emoji_retrieval.shrink(image), means, atol=2 / 255)


def test_chosen_records_are_different_and_depend_on_the_seed(records):
  names = [r["name"] for r in emoji_retrieval.choose(records, 20, seed=1)]
  again = [r["name"] for r in emoji_retrieval.choose(records, 20, seed=1)]
  other = [r["name"] for r in emoji_retrieval.choose(records, 20, seed=2)]
  assert len(set(names)) == 20
  assert names == again
  assert names != other
  assert len(emoji_retrieval.choose(records, 9999, seed=0)) == len(records)
