"""Plans: every record in its turn, whatever the host, step or mixture."""

import collections
import fractions
import itertools

import numpy as np
import pytest

from sana_jax.data import sampler as sampler_lib
from tests import populations as populations_lib


def first_step_of(plans, epoch):
  """The number of batches before an epoch (some epochs may have none)."""
  return next(step for step in itertools.count() if plans.epoch(step) >= epoch)


@pytest.mark.parametrize("seed", range(8))
def test_every_record_of_a_bucket_comes_once_a_pass(seed):
  rng = np.random.default_rng(seed)
  (population,) = populations_lib.random_populations(rng, 1, 3)
  batch_size = int(rng.integers(1, 12))
  plans = sampler_lib.BatchSampler([population], batch_size, seed)
  epochs = 6
  batches = collections.Counter()
  counts = collections.defaultdict(collections.Counter)
  for step in range(first_step_of(plans, epochs)):
    plan = plans.batch(step)
    batches[plan.bucket, plans.epoch(step)] += 1
    counts[plan.bucket].update(plan.index.tolist())
  for bucket, members in enumerate(population.members):
    n = len(members)
    for epoch in range(epochs):
      expected = (epoch + 1) * n // batch_size - epoch * n // batch_size
      assert batches[bucket, epoch] == expected
    # Whole batches of whole passes: all records equally often, but for those
    # of the last pass that are carried over.
    read = epochs * n // batch_size * batch_size
    times = [counts[bucket][int(member)] for member in members]
    assert sum(times) == read
    if n:
      assert set(times) <= {read // n, read // n + 1}


def test_orders_change_between_epochs_and_mix_buckets():
  population = sampler_lib.Population("a", 1.0, (np.arange(40), np.arange(80)))
  plans = sampler_lib.BatchSampler([population], 4, 3)
  first = [plans.batch(step) for step in range(30)]
  second = [plans.batch(step) for step in range(30, 60)]
  kinds = [[plan.bucket for plan in epoch] for epoch in (first, second)]
  assert kinds[0].count(0) == kinds[1].count(0) == 10
  assert kinds[0] != sorted(kinds[0])
  assert kinds[0] != kinds[1]
  for bucket in range(2):
    orders = [
      [i for plan in epoch if plan.bucket == bucket for i in plan.index]
      for epoch in (first, second)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert sorted(orders[0]) == list(population.members[bucket])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_asking_gives_the_same_plans(seed):
  rng = np.random.default_rng(seed)
  populations = populations_lib.random_populations(
    rng, int(rng.integers(1, 4)), int(rng.integers(1, 6))
  )
  batch_size = int(rng.integers(1, 50))
  forwards = sampler_lib.BatchSampler(populations, batch_size, seed)
  plans = [forwards.batch(step) for step in range(40)]
  backwards = sampler_lib.BatchSampler(populations, batch_size, seed)
  for step in rng.permutation(40):
    again = backwards.batch(int(step))
    assert again.bucket == plans[step].bucket
    for a, b in zip(again[1:], plans[step][1:], strict=True):
      np.testing.assert_array_equal(a, b)
  for plan in plans:
    for source, index in zip(plan.source, plan.index, strict=True):
      assert index in populations[source].members[plan.bucket]


def test_another_seed_gives_another_order():
  population = sampler_lib.Population("a", 1.0, (np.arange(100),))
  a, b = (sampler_lib.BatchSampler([population], 50, s) for s in (0, 1))
  assert not np.array_equal(a.batch(0).index, b.batch(0).index)
  assert not np.array_equal(a.batch(0).draw, b.batch(0).draw)


@pytest.mark.parametrize("seed", range(2))
def test_shares_are_those_of_the_weights(seed):
  rng = np.random.default_rng(seed)
  populations = populations_lib.random_populations(rng, 3, 4)
  plans = sampler_lib.BatchSampler(populations, 8, seed)
  total = sum(p.weight for p in populations)
  epochs = 7
  counts = collections.Counter()
  for step in range(first_step_of(plans, epochs)):
    plan = plans.batch(step)
    for source in plan.source.tolist():
      counts[source, plan.bucket] += 1
  size = sum(len(p) for p in populations)
  for number, population in enumerate(populations):
    for bucket, members in enumerate(population.members):
      expected = epochs * size * population.weight / total
      expected *= len(members) / len(population)
      # Less than a sample is rounded off, less than a batch carried over.
      assert -8 - 1 <= counts[number, bucket] - expected < 1


def test_all_draws_are_different():
  population = sampler_lib.Population("a", 1.0, (np.arange(5),))
  plans = sampler_lib.BatchSampler([population], 16, 0)
  draws = np.concatenate([plans.batch(step).draw for step in range(50)])
  assert len(set(draws.tolist())) == 16 * 50


def test_expected_batches_per_epoch_are_exact():
  members = (np.arange(30), np.arange(10))
  plans = sampler_lib.BatchSampler(
    [
      sampler_lib.Population("a", 0.1, members),
      sampler_lib.Population("b", 0.3, members[::-1]),
    ],
    *(8, 0),
  )
  # 80 samples an epoch: 20 of a (15, 5), 60 of b (15, 45).
  fraction = fractions.Fraction
  assert plans.batches_per_epoch() == (fraction(30, 8), fraction(50, 8))


def test_a_distant_step_of_many_records_is_found_at_once():
  members = (np.arange(2_000_000), np.arange(1_000_000), np.arange(3))
  population = sampler_lib.Population("a", 1.0, members)
  plans = sampler_lib.BatchSampler([population], 256, 0)
  plan = plans.batch(10**9)
  assert plans.epoch(10**9) == 10**9 * 256 // 3_000_003
  assert len(set(plan.index.tolist())) == 256


def test_rows_are_a_part_of_the_batch():
  population = sampler_lib.Population("a", 1.0, (np.arange(50),))
  plans = sampler_lib.BatchSampler([population], 12, 0)
  plan, part = plans.batch(5), plans.batch(5, (4, 7))
  assert part.bucket == plan.bucket
  np.testing.assert_array_equal(part.index, plan.index[4:7])
  np.testing.assert_array_equal(part.draw, plan.draw[4:7])


def test_what_cannot_be_planned_is_said_at_once():
  empty = sampler_lib.Population("void", -1.0, (np.zeros(0, np.int64),))
  full = sampler_lib.Population("full", 1.0, (np.arange(3), np.arange(3)))
  expected = "(?s)batch_size.*got 0.*weight of void.*-1.*void has no usable.*"
  with pytest.raises(
    ValueError, match=expected + r"same buckets, got \[1, 2\]"
  ):
    sampler_lib.BatchSampler([empty, full], 0, 0)
  with pytest.raises(ValueError, match="at least one source"):
    sampler_lib.BatchSampler([], 1, 0)
  plans = sampler_lib.BatchSampler([full], 1, 0)
  with pytest.raises(ValueError, match="step must not be negative, got -1"):
    plans.batch(-1)


def _more(*values):
  return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("seed", [*range(4), *_more(*range(4, 12))])
def test_no_record_comes_twice_in_a_batch(seed):
  """Of two sources in proportion, in buckets of a batch and more."""
  rng = np.random.default_rng(seed)
  batch_size = int(rng.integers(2, 24))
  # Of one to two batches, where passes are short, and of more.
  sizes = np.concatenate(
    [
      rng.integers(-(-batch_size // 2), batch_size + 1, (2, 2)),
      rng.integers(batch_size, 4 * batch_size, (2, 2)),
    ],
    axis=1,
  )
  populations = [
    sampler_lib.Population(
      str(number), float(row.sum()), tuple(np.arange(n) for n in row)
    )
    for number, row in enumerate(sizes)
  ]
  plans = sampler_lib.BatchSampler(populations, batch_size, seed)
  crossing = 0
  for step in range(200):
    plan = plans.batch(step)
    rows = set(zip(plan.source.tolist(), plan.index.tolist(), strict=True))
    assert len(rows) == batch_size
    middle = int(rng.integers(1, batch_size))
    parts = [plans.batch(step, r) for r in ((0, middle), (middle, batch_size))]
    np.testing.assert_array_equal(
      np.concatenate([part.index for part in parts]), plan.index
    )
    crossing += plans.epoch(step) != plans.epoch(step + 1)
  assert crossing > 3


@pytest.mark.parametrize("batch_size", [5, *_more(8, 12)])
def test_a_bucket_of_a_batch_and_more_never_repeats_within_one(batch_size):
  for size in range(batch_size, 3 * batch_size + 1):
    population = sampler_lib.Population("a", 1.0, (np.arange(size),))
    plans = sampler_lib.BatchSampler([population], batch_size, size)
    rows = [tuple(plans.batch(step).index.tolist()) for step in range(60)]
    assert {len(set(batch)) for batch in rows} == {batch_size}
    # Nor do orders stay as they were; few records have few of them.
    assert len(set(rows)) > 30


@pytest.mark.parametrize("seed", range(6))
def test_the_counts_of_epochs_are_what_is_planned(seed):
  rng = np.random.default_rng(seed)
  populations = populations_lib.random_populations(
    rng, int(rng.integers(1, 4)), 3
  )
  batch_size = int(rng.integers(1, 40))
  plans = sampler_lib.BatchSampler(populations, batch_size, seed)
  before = 0
  for epoch in range(5):
    counts = plans.counts(epoch)
    steps = range(counts.first_step, counts.end_step)
    assert all(plans.epoch(step) == epoch for step in steps)
    # What was left over, and what is drawn, is trained on or left over.
    assert before + sum(counts.drawn) == (
      len(steps) * batch_size + counts.carried
    )
    before = counts.carried
  assert plans.counts(5).first_step == counts.end_step
