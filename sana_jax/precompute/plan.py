"""What is made together: a pure function of the source and the settings.

A shard holds a range of the source. Whoever makes it, in whatever order, makes
the same batches: pictures of a bucket, in the source's order.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sana_jax.data import buckets

# The number of a bucket is stored as uint16.
_MOST_BUCKETS = 2**16
_UNUSABLE = -1


class Batch(NamedTuple):
  """Pictures that are encoded together.

  Attributes:
    bucket: number of the shape.
    indices: of the records in the source.
  """

  bucket: int
  indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """The records of a source, in shards and batches; see `make_plan`.

  Attributes:
    shapes: (height, width) in pixels of each bucket.
    bucket_of: the bucket of each record; -1: it cannot be used.
    problems: why not, by record.
  """

  shapes: tuple[buckets.Shape, ...]
  bucket_of: Int64[np.ndarray, "n"]
  problems: Mapping[int, str]
  records_per_shard: int
  batch_size: int

  @property
  def num_records(self) -> int:
    """Of the source, those that cannot be used too."""
    return len(self.bucket_of)

  @property
  def num_shards(self) -> int:
    return -(-self.num_records // self.records_per_shard)

  def indices(self, shard: int) -> range:
    """Returns the records of the source that a shard is made from."""
    start = shard * self.records_per_shard
    return range(start, min(start + self.records_per_shard, self.num_records))

  def batches(self, shard: int) -> list[Batch]:
    """Returns what of a shard can be used, the first bucket's batches first."""
    of_bucket: dict[int, list[int]] = {}
    for index in self.indices(shard):
      bucket = int(self.bucket_of[index])
      if bucket != _UNUSABLE:
        of_bucket.setdefault(bucket, []).append(index)
    return [
      Batch(bucket, tuple(members[start : start + self.batch_size]))
      for bucket, members in sorted(of_bucket.items())
      for start in range(0, len(members), self.batch_size)
    ]


def make_plan(
  sizes: buckets.Sizes,
  *,
  kind: str,
  image_size: int,
  multiple: int,
  max_buckets: int,
  min_pictures: int,
  records_per_shard: int,
  batch_size: int,
) -> Plan:
  """Sorts a source into buckets, and cuts it into shards.

  Args:
    kind: see `buckets.table`, as `image_size` and `multiple`.
    max_buckets: see `buckets.sort`.
    min_pictures: of a shape, the `least` of `buckets.sort`.

  Raises:
    ValueError: a number that cannot be, or no record can be used.
  """
  if min(records_per_shard, min_pictures) < 1 or not (
    1 <= max_buckets <= _MOST_BUCKETS
  ):
    raise ValueError(
      f"records_per_shard ({records_per_shard}) and min_pictures "
      f"({min_pictures}) must be at least 1, and max_buckets ({max_buckets}) "
      f"in [1, {_MOST_BUCKETS}]."
    )
  sorted_ = buckets.sort(
    [sizes],
    [1.0],
    buckets.table(kind, image_size, multiple),
    max_buckets,
    least=min_pictures,
  )
  bucket_of = np.full(len(sizes.height), _UNUSABLE, np.int64)
  for bucket, members in enumerate(sorted_.populations[0].members):
    bucket_of[members] = bucket
  return Plan(
    shapes=sorted_.shapes,
    bucket_of=bucket_of,
    problems=sizes.problems,
    records_per_shard=records_per_shard,
    batch_size=batch_size,
  )


def shards_of_host(num_shards: int, host_index: int, num_hosts: int) -> range:
  """Returns every `num_hosts`-th shard.

  Raises:
    ValueError: there is no such host.
  """
  if not 0 <= host_index < num_hosts:
    raise ValueError(
      f"host_index must be in [0, num_hosts), got {host_index} of {num_hosts}."
    )
  return range(host_index, num_shards, num_hosts)
