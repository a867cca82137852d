"""Shuffling by arithmetic: the i-th element of a permutation, without the rest.

Nothing is materialised, so a shuffle of a billion records costs no memory; and
no library's random stream is used, so an order outlives upgrades of NumPy.
"""

import math

import numpy as np
from jaxtyping import UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Of the network; a small one mixes less in a round.
_ROUNDS, _ROUNDS_OF_SMALL, _SMALL = 8, 24, 2**16


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

  A Feistel network permutes the cells of a rectangle that has about as many;
  what lands outside of the range goes through it again until it is inside.

  Args:
    index: each less than `size`.
    key: of the permutation: one for all, or one for each index.

  All orders are equally likely, but for their parity: of an odd number of rows
  and columns the network has even ones only.

  Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
  2002, generalised Feistel and cycle walking.
  """
  rows = math.isqrt(size - 1) + 1
  columns = -(-size // rows)
  key = np.broadcast_to(key, index.shape)
  result = _feistel(index, rows, columns, key)
  while (outside := np.flatnonzero(result >= np.uint64(size))).size:
    result[outside] = _feistel(result[outside], rows, columns, key[outside])
  return result


def _feistel(
  index: UInt64[np.ndarray, "n"],
  rows: int,
  columns: int,
  key: UInt64[np.ndarray, "n"],
) -> UInt64[np.ndarray, "n"]:
  height, width = np.uint64(rows), np.uint64(columns)
  row, column = index // width, index % width
  # Keys of rounds are far apart: no two rounds hash the same number.
  rounds = _ROUNDS_OF_SMALL if rows * columns < _SMALL else _ROUNDS
  for _ in range(rounds // 2):
    key = key + _GOLDEN
    row = (row + mix(column + key) % height) % height
    key = key + _GOLDEN
    column = (column + mix(row + key) % width) % width
  return row * width + column
