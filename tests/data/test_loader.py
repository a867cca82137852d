"""Hosts read one global batch between them, from any step on."""

import grain
import numpy as np
import pytest
from absl import flags

from sana_jax.data import loader, sampler
from tests import populations as populations_lib


def read(plan: sampler.BatchPlan) -> loader.Batch:
  """Rows whose width depends on the bucket, as pictures' do."""
  values = np.stack([plan.source, plan.index], axis=1).astype(np.int64)
  return {
    "values": np.repeat(values, plan.bucket + 1, axis=1),
    "draw": plan.draw,
  }


class Numbers:
  """A source that remembers how it was read."""

  def __init__(self, name):
    self.name = name
    self.calls = []

  def __getitems__(self, indices):
    self.calls.append(list(indices))
    return [(self.name, index) for index in indices]


def first_batches(batches, host, step, count):
  found = iter(batches(host, step))
  return [next(found) for _ in range(count)]


def stitched(batches, processes, step, count, **options):
  parts = [
    first_batches(batches, loader.Host(p, processes, **options), step, count)
    for p in range(processes)
  ]
  return [
    {
      name: np.concatenate([rows[i][name] for rows in parts])
      for name in parts[0][i]
    }
    for i in range(count)
  ]


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("seed", range(10))
def test_hosts_read_the_global_batch_bit_for_bit(seed):
  """Random hosts, devices, sources, weights, buckets, steps and restarts."""
  rng = np.random.default_rng(seed)
  populations = populations_lib.random_populations(
    rng, int(rng.integers(1, 4)), int(rng.integers(1, 5))
  )
  devices = int(rng.choice([1, 2, 4])) * int(rng.choice([1, 2, 3, 4, 8]))
  batch_size = devices * int(rng.integers(1, 6))
  plans = sampler.BatchSampler(populations, batch_size, seed)
  batches = loader.planned_batches(plans, batch_size, read)
  step, count = int(rng.integers(1000)), 6
  options = {"num_threads": int(rng.integers(0, 4))}
  whole = stitched(batches, 1, step, count, **options)
  assert_equal(whole, [read(plans.batch(step + i)) for i in range(count)])
  for processes in (2, 4, 5, devices):
    if devices % processes == 0:
      assert_equal(stitched(batches, processes, step, count, **options), whole)
      # Restarted in the middle, with other plans of the same seed.
      again = sampler.BatchSampler(populations, batch_size, seed)
      later = loader.planned_batches(again, batch_size, read)
      assert_equal(
        stitched(later, processes, step + 2, count - 2, **options), whole[2:]
      )


def test_a_step_is_read_in_pieces_of_the_host():
  population = sampler.Population("a", 1.0, (np.arange(500),))
  plans = sampler.BatchSampler([population], 96, 0)
  sizes = []

  def noted(plan):
    sizes.append(len(plan.index))
    return read(plan)

  batches = loader.planned_batches(plans, 96, noted)
  (batch,) = first_batches(batches, loader.Host(1, 2, num_threads=0), 3, 1)
  assert batch["values"].shape == (48, 2)
  assert sizes == [16, 16, 16]


def test_each_source_is_read_in_one_go():
  sources = [Numbers("a"), Numbers("b"), Numbers("c")]
  plan = sampler.BatchPlan(
    0,
    np.array([2, 0, 2, 0, 2]),
    np.array([5, 3, 1, 3, 9]),
    np.arange(5, dtype=np.uint64),
  )
  found = loader.read_records(sources, plan)
  assert found == [("c", 5), ("a", 3), ("c", 1), ("a", 3), ("c", 9)]
  assert [source.calls for source in sources] == [[[3, 3]], [], [[5, 1, 9]]]


def test_records_that_a_disk_does_not_give_at_once_are_asked_for_again():
  class Busy(Numbers):
    def __getitems__(self, indices):
      found = super().__getitems__(indices)
      if len(self.calls) < 3:
        raise OSError("busy")
      return found

  plan = sampler.BatchPlan(
    0, np.zeros(2, np.int64), np.array([4, 7]), np.arange(2, dtype=np.uint64)
  )
  assert loader.read_records([Busy("a")], plan) == [("a", 4), ("a", 7)]


@pytest.mark.parametrize("processes", [1, 2])
def test_examples_are_batched_in_order(processes):
  dataset = grain.MapDataset.source(np.arange(100)).map(lambda x: {"x": x})
  batches = loader.example_batches(dataset.repeat(), 8)
  found = stitched(batches, processes, 11, 3)
  np.testing.assert_array_equal(
    np.concatenate([batch["x"] for batch in found]), np.arange(88, 112) % 100
  )


def test_an_error_of_reading_reaches_the_reader_of_batches():
  population = sampler.Population("a", 1.0, (np.arange(50),))
  plans = sampler.BatchSampler([population], 8, 0)

  def broken(plan):
    raise ValueError("picture 7 is cut off")

  batches = loader.planned_batches(plans, 8, broken)
  with pytest.raises(ValueError, match="picture 7 is cut off"):
    first_batches(batches, loader.Host(), 0, 1)


@pytest.mark.slow
def test_worker_processes_read_the_same_batches():
  # As absl's app.run has done in a script; Grain's workers read flags.
  flags.FLAGS.mark_as_parsed()
  rng = np.random.default_rng(0)
  populations = populations_lib.random_populations(rng, 2, 3)
  plans = sampler.BatchSampler(populations, 32, 0)
  batches = loader.planned_batches(plans, 32, read)
  found = stitched(batches, 1, 5, 5, num_threads=2, num_workers=2)
  assert_equal(found, [read(plans.batch(5 + i)) for i in range(5)])
