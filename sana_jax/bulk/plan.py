"""What is made together: a pure function of the requests.

Images with the same settings share batches, so that each kind is compiled once;
batches make up units, the smallest thing that is done or not done. Whoever
makes unit u, in whatever order, makes the same images.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sana_jax.bulk.requests import Request


class Image(NamedTuple):
  """One image of a run.

  Attributes:
    index: its number in the run.
    seed: with `image_index`, what its noise is drawn from.
  """

  index: int
  prompt: str
  negative_prompt: str
  seed: int
  image_index: int
  settings: Mapping[str, Any]
  pictures: Mapping[str, str]


class Batch(NamedTuple):
  """Images of the same settings, and with the same kinds of pictures.

  Attributes:
    size: what to fill the batch up to, that of its kind's other batches.
  """

  images: tuple[Image, ...]
  size: int


class Unit(NamedTuple):
  """Batches that are written together."""

  number: int
  batches: tuple[Batch, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """All images of a run, in batches and units; see `make_plan`.

  Attributes:
    images_per_unit: a unit has as many batches as fit in, and at least one.
  """

  requests: Sequence[Request]
  seed: int
  batch_size: int
  images_per_unit: int

  @functools.cached_property
  def num_images(self) -> int:
    return int(self._first_images[-1])

  @property
  def num_units(self) -> int:
    return len(self._unit_starts) - 1

  def unit(self, number: int) -> Unit:
    first, last = self._unit_starts[number : number + 2]
    return Unit(
      number, tuple(self._batch(batch) for batch in range(first, last))
    )

  def indices(self, number: int) -> list[int]:
    """Lists the images of a unit, in the order they are made."""
    first, last = self._unit_starts[number : number + 2]
    start, stop = self._batch_starts[first], self._batch_starts[last]
    return self._order[start:stop].tolist()

  def images(self) -> Iterator[Image]:
    """Yields all images in the order of their numbers."""
    return map(self._image, range(self.num_images))

  def fingerprint(self) -> str:
    """Returns a hash of the requests, but not of where they are from."""
    digest = hashlib.sha256()
    for request in self.requests:
      values = (
        request.prompt,
        request.negative_prompt,
        request.seed,
        request.image_index,
        request.count,
        request.settings,
        request.pictures,
      )
      digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()

  @functools.cached_property
  def _first_images(self) -> np.ndarray:
    """The number of each request's first image, and that of all images."""
    counts = [request.count for request in self.requests]
    return np.cumsum([0, *counts], dtype=np.int64)

  @functools.cached_property
  def _kinds(self) -> np.ndarray:
    """Numbers what images have in common, in the order it first appears."""
    numbers: dict[Any, int] = {}
    kinds = [
      numbers.setdefault(_kind(request), len(numbers))
      for request in self.requests
    ]
    return np.repeat(np.asarray(kinds, np.int64), np.diff(self._first_images))

  @functools.cached_property
  def _order(self) -> np.ndarray:
    return np.argsort(self._kinds, kind="stable")

  @functools.cached_property
  def _batch_starts(self) -> list[int]:
    """Where in the order each batch starts, and the last one ends."""
    starts, first = [], 0
    for size in np.bincount(self._kinds).tolist():
      starts += range(first, first + size, self.batch_size)
      first += size
    return [*starts, first]

  @functools.cached_property
  def _unit_starts(self) -> list[int]:
    """The first batch of each unit, and the number of batches."""
    batch_starts = self._batch_starts
    num_batches = len(batch_starts) - 1
    starts, first_image = [], 0
    for batch in range(num_batches):
      images = batch_starts[batch + 1] - first_image
      if not starts or images > self.images_per_unit:
        starts.append(batch)
        first_image = batch_starts[batch]
    return [*starts, num_batches]

  def _batch(self, number: int) -> Batch:
    start, stop = self._batch_starts[number : number + 2]
    images = tuple(self._image(i) for i in self._order[start:stop].tolist())
    kind = self._kinds[self._order[start]]
    size = min(self.batch_size, int(self._kind_sizes[kind]))
    return Batch(images, size)

  @functools.cached_property
  def _kind_sizes(self) -> np.ndarray:
    return np.bincount(self._kinds)

  def _image(self, index: int) -> Image:
    number = int(np.searchsorted(self._first_images, index, "right")) - 1
    request = self.requests[number]
    within = index - int(self._first_images[number])
    if request.image_index is not None:
      image_index = request.image_index + within
    elif request.seed is not None:
      image_index = within
    else:
      image_index = index
    return Image(
      index,
      request.prompt,
      request.negative_prompt,
      self.seed if request.seed is None else request.seed,
      image_index,
      dict(request.settings),
      dict(request.pictures),
    )


def _kind(request: Request) -> Any:
  if not request.pictures:
    return request.settings
  return request.settings, tuple(name for name, _ in request.pictures)


def make_plan(
  requests: Sequence[Request],
  *,
  seed: int = 0,
  batch_size: int = 8,
  images_per_unit: int = 1,
) -> Plan:
  """Plans a run.

  Args:
    seed: of requests without their own.
    images_per_unit: 1 makes each batch a unit.

  Raises:
    ValueError: no requests, or a number that cannot be.
  """
  if not requests:
    raise ValueError("There is no prompt; give --prompt or --prompt_file.")
  if batch_size < 1 or images_per_unit < 1:
    raise ValueError(
      f"batch_size ({batch_size}) and images_per_shard ({images_per_unit}) "
      "must be at least 1."
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
  return Plan(tuple(requests), seed, batch_size, images_per_unit)


def units_of_host(num_units: int, host_index: int, num_hosts: int) -> range:
  """Returns every `num_hosts`-th unit.

  Raises:
    ValueError: there is no such host.
  """
  if not 0 <= host_index < num_hosts:
    raise ValueError(
      f"host_index must be in [0, num_hosts), got {host_index} of {num_hosts}."
    )
  return range(host_index, num_units, num_hosts)
