"""Examples: position i is a pure function of the seed and i."""

import numpy as np
import pytest

from sana_jax import config as config_lib
from sana_jax.data import emoji, examples, loader

HELDOUT = 80


def data_config(**changes) -> config_lib.DataConfig:
  return config_lib.DataConfig(split="heldout", **changes)


@pytest.fixture(scope="module")
def dataset():
  """Examples whose latent is the number of the record."""
  latents = np.arange(HELDOUT, dtype=np.float32).reshape(-1, 1, 1, 1)
  config = data_config(keyword_probability=0.3, keywords_only_probability=0.2)
  return examples.caption_examples(
    config, 7, latents, lambda caption: {"caption": np.array(caption)}
  )


def numbers(dataset, start, stop) -> list[int]:
  return [int(dataset[i]["latents"].item()) for i in range(start, stop)]


def test_pixels_are_mapped_to_the_unit_range():
  image = np.array([0, 255], np.uint8).reshape(1, 2, 1).repeat(3, axis=2)
  mapped = examples.to_unit_range(image)
  np.testing.assert_array_equal(mapped[0, :, 0], [-1, 1])
  assert mapped.dtype == np.float32


def test_every_record_comes_once_an_epoch_in_a_new_order(dataset):
  first = numbers(dataset, 0, HELDOUT)
  second = numbers(dataset, HELDOUT, 2 * HELDOUT)
  assert sorted(first) == sorted(second) == list(range(HELDOUT))
  assert first != second
  assert first != sorted(first)


def test_a_position_does_not_depend_on_what_was_read_before(dataset):
  backwards = [dataset[i] for i in (170, 90, 3)]
  forwards = [dataset[i] for i in (3, 90, 170)]
  for one, other in zip(reversed(backwards), forwards, strict=True):
    assert one["caption"] == other["caption"]
    assert one["latents"] == other["latents"]


def test_captions_change_between_epochs_and_name_their_record(dataset):
  records = emoji.load("heldout")
  by_record: dict[int, set[str]] = {}
  for i in range(6 * HELDOUT):
    item = dataset[i]
    number = int(item["latents"].item())
    by_record.setdefault(number, set()).add(str(item["caption"]))
    words = (records[number]["name"], *records[number]["keywords"])
    assert set(str(item["caption"]).split(", ")) & set(words)
  assert sum(len(captions) > 1 for captions in by_record.values()) > 60


def test_another_seed_gives_another_order():
  orders = [
    [examples.image_examples(data_config(), s)[i]["images"] for i in range(3)]
    for s in (0, 0, 1)
  ]
  np.testing.assert_array_equal(orders[0], orders[1])
  assert not np.array_equal(orders[0], orders[2])


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_read_one_global_batch_between_them(dataset, count):
  """Stitched together, what the hosts read is what one would read."""
  taken = dataset.map(lambda item: {"n": item["latents"][0, 0, 0]})
  batches = loader.example_batches(taken, 8)

  def read(index, count):
    part = iter(batches(loader.Host(index, count, 0, 0), 3))
    return [next(part)["n"] for _ in range(3)]

  whole = read(0, 1)
  parts = [read(index, count) for index in range(count)]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
  assert whole[0].tolist() == numbers(dataset, 24, 32)


def test_another_size_is_an_error():
  with pytest.raises(ValueError, match="image_size is 32.*64x64"):
    examples.load_source(data_config(image_size=32))
