"""Permutations that are computed element by element."""

import math

import numpy as np
import pytest

from sana_jax.data import permutation


def permuted(size, *key):
  index = np.arange(size, dtype=np.uint64)
  return permutation.permute(index, size, permutation.fold(*key))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_every_number_comes_exactly_once(size, rng):
  key = int(rng.integers(2**62))
  assert sorted(permuted(size, key)) == list(range(size))


def test_an_element_needs_no_other(rng):
  index = rng.integers(10**12, size=50).astype(np.uint64)
  key = permutation.fold(3, 4)
  whole = permutation.permute(index, 10**12, key)
  for i in range(50):
    one = permutation.permute(index[i : i + 1], 10**12, key)
    assert one == whole[i]
  assert len(set(whole.tolist())) == 50
  assert whole.max() < 10**12


def test_each_index_may_have_a_permutation_of_its_own():
  keys = permutation.fold(5, np.arange(3).repeat(7))
  index = np.tile(np.arange(7, dtype=np.uint64), 3)
  rows = permutation.permute(index, 7, keys).reshape(3, 7)
  for number, row in enumerate(rows):
    np.testing.assert_array_equal(row, permuted(7, 5, number))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_are_equally_likely(size):
  orders = math.factorial(size)
  keys = permutation.fold(11, np.arange(100 * orders).repeat(size))
  index = np.tile(np.arange(size, dtype=np.uint64), 100 * orders)
  found = permutation.permute(index, size, keys).reshape(-1, size)
  _, counts = np.unique(found, axis=0, return_counts=True)
  assert len(counts) == orders
  # Chi-square: its mean, and five standard deviations.
  freedom = orders - 1
  limit = freedom + 5 * math.sqrt(2 * freedom)
  assert (np.square(counts - 100) / 100).sum() < limit


def test_large_orders_look_random():
  order = permuted(5000, 1).astype(np.int64)
  n = len(order)
  # Standard deviations of a random permutation: 1 of the fixed points (mean
  # 1), 1 / sqrt(n) of the correlations; 5 of them are never exceeded.
  assert (order == np.arange(n)).sum() <= 6
  for other in (np.arange(n), np.roll(order, 1), np.roll(order, 7)):
    assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(n)
  assert np.array_equal(order, permuted(5000, 1))
  assert np.corrcoef(order, permuted(5000, 2))[0, 1] < 5 / np.sqrt(n)


def test_an_order_is_that_of_all_versions():
  """Resumed runs of older versions rely on these."""
  assert permuted(10, 0, 1).tolist() == GOLDEN
  assert permutation.fold(1, -1, np.arange(2)).tolist() == GOLDEN_HASHES


GOLDEN = [2, 8, 9, 7, 4, 5, 1, 6, 0, 3]
GOLDEN_HASHES = [730293301966983907, 11208527029736379409]
