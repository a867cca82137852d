"""Shuffling by arithmetic: the i-th element of a permutation, without the rest.

Nothing is materialised, so a shuffle of a billion records costs no memory; and
no library's random stream is used, so an order outlives upgrades of NumPy.
"""

import numpy as np
from jaxtyping import UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Maps 64 bits to 64 bits, one to one; every bit depends on every bit.

  Source: the finaliser of SplitMix64; Steele, Lea and Flood, "Fast splittable
  pseudorandom number generators", OOPSLA 2014.
  """
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def fold(*values: int | np.ndarray) -> UInt64[np.ndarray, "n"]:
  """Hashes integers, in this order, to 64 bits; arrays give one hash each."""
  hashed = np.zeros(1, np.uint64)
  for value in values:
    if isinstance(value, int):
      value = np.uint64(value % 2**64)
    word = np.atleast_1d(np.asarray(value, np.uint64))
    hashed = mix(hashed ^ mix(word + _GOLDEN))
  return hashed


def permute(
  index: UInt64[np.ndarray, "n"], size: int, key: UInt64[np.ndarray, "_"]
) -> UInt64[np.ndarray, "n"]:
  """Returns where permutations of range(`size`) send `index`.

  A Feistel network permutes the next power of four; what it sends outside of
  the range goes through it again until it is inside.

  Args:
    index: each less than `size`.
    key: of the permutation: one for all, or one for each index.

  Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
  2002, cycle walking.
  """
  half = max(1, ((size - 1).bit_length() + 1) // 2)
  key = np.broadcast_to(key, index.shape)
  result = _feistel(index, half, key)
  while (outside := np.flatnonzero(result >= np.uint64(size))).size:
    result[outside] = _feistel(result[outside], half, key[outside])
  return result


def _feistel(
  index: UInt64[np.ndarray, "n"], half: int, key: UInt64[np.ndarray, "n"]
) -> UInt64[np.ndarray, "n"]:
  mask, shift = np.uint64(2**half - 1), np.uint64(half)
  left, right = index >> shift, index & mask
  for number in range(_ROUNDS):
    key = mix(key + _GOLDEN + np.uint64(number))
    left, right = right, left ^ (mix(right + key) & mask)
  return (left << shift) | right
