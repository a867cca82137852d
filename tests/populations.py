"""Populations of a sampler, drawn at random."""

import numpy as np

from sana_jax.data import sampler as sampler_lib


def random_populations(rng, sources, buckets):
  """Sources whose buckets are of very different sizes, some empty."""
  populations = []
  for number in range(sources):
    sizes = rng.integers(0, 60, buckets) * rng.integers(0, 2, buckets)
    sizes[rng.integers(buckets)] += 1 + rng.integers(100)
    order = rng.permutation(int(sizes.sum()))
    members = tuple(np.split(order, np.cumsum(sizes)[:-1]))
    weight = float(np.round(rng.uniform(0.1, 3), 3))
    populations.append(sampler_lib.Population(f"s{number}", weight, members))
  return populations
