"""Noise is a function of (seed, step), whoever reads it, and is noise."""

import numpy as np

from sana_jax.data import loader, synthetic

SHAPES = ((4, 6, 3), (7, 5))


def batches(seed=1, *, host=None, first_step=0, batch_size=8):
  noise = synthetic.open_noise(*SHAPES, batch_size=batch_size, seed=seed)
  return iter(noise(host or loader.Host(), first_step))


def test_a_batch_is_like_one_of_a_cache():
  batch = next(batches())
  assert {name: (v.shape, v.dtype.name) for name, v in batch.items()} == {
    "latents": ((8, 4, 6, 3), "bfloat16"),
    "text": ((8, 7, 5), "bfloat16"),
    "text_mask": ((8, 7), "bool"),
  }
  latents = np.concatenate(
    [next(batches(seed))["latents"] for seed in range(40)]
  ).astype(np.float32)
  # 40 x 8 x 72 numbers: means to 1 / sqrt(23040) = 0.007, four times that.
  assert abs(latents.mean()) < 0.03
  assert abs(latents.std() - 1) < 0.03


def test_texts_have_all_lengths_from_one_token_on():
  stream = batches()
  lengths = np.concatenate(
    [next(stream)["text_mask"].sum(1) for _ in range(30)]
  )
  assert set(lengths) == set(range(1, 8))
  mask = next(stream)["text_mask"]
  assert (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_seed_and_step_tell_the_batch_whatever_the_hosts():
  stream = batches()
  expected = [next(stream) for _ in range(4)]
  late = next(batches(first_step=3))
  halves = [
    next(batches(host=loader.Host(process, 2), first_step=3))
    for process in range(2)
  ]
  for name, values in expected[3].items():
    np.testing.assert_array_equal(late[name], values)
    joined = np.concatenate([half[name] for half in halves])
    np.testing.assert_array_equal(joined, values)
  assert not np.array_equal(expected[2]["latents"], expected[3]["latents"])
  assert not np.array_equal(next(batches(2))["latents"], expected[0]["latents"])
