"""What is made together: a pure function of the requests.

Images with the same settings share batches, so that each kind is compiled once;
batches make up units, the smallest thing that is done or not done. Whoever
makes unit u, in whatever order, makes the same images.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sana_jax.bulk import requests as requests_lib

_NO_KIND = -1


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


class Kind(NamedTuple):
  """What shares batches of the same size, and therefore programs.

  Attributes:
    size: of the batches.
    items: numbers of the items, from 0.
  """

  settings: requests_lib.Settings
  size: int
  items: Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """All images of a run, in batches and units; see `make_plan`.

  Attributes:
    items: of all lines; bad ones keep the numbers of their images free.
    generations: of each item. Later ones are lines that were bad when the run
      began: their batches and units follow the others, which stay as they are.
    images_per_unit: a unit has as many batches as fit in, and at least one.
  """

  items: Sequence[requests_lib.Item]
  generations: Sequence[int]
  seed: int
  batch_size: int
  images_per_unit: int

  @property
  def requests(self) -> list[requests_lib.Request]:
    return [i for i in self.items if isinstance(i, requests_lib.Request)]

  @property
  def problems(self) -> list[requests_lib.Problem]:
    return [i for i in self.items if isinstance(i, requests_lib.Problem)]

  @functools.cached_property
  def num_images(self) -> int:
    """How many numbers there are, those of bad lines among them."""
    return int(self._first_images[-1])

  @property
  def num_units(self) -> int:
    return len(self._unit_starts) - 1

  def unit(self, number: int) -> Unit:
    first, last = self._unit_starts[number : number + 2]
    return Unit(
      number, tuple(self._batch(batch) for batch in range(first, last))
    )

  def unit_name(self, number: int) -> str:
    """Names a unit's file, without its ending."""
    generations = self._unit_generations
    generation = generations[number]
    first = bisect.bisect_left(generations, generation)
    count = bisect.bisect_right(generations, generation) - first
    name = f"repaired-{generation}" if generation else "images"
    return f"{name}-{number - first:05d}-of-{count:05d}"

  def indices(self, number: int) -> list[int]:
    """Lists the images of a unit, in the order they are made."""
    first, last = self._unit_starts[number : number + 2]
    start, stop = self._batch_starts[first], self._batch_starts[last]
    return self._order[start:stop].tolist()

  def images(self) -> Iterator[Image]:
    """Yields the images of good lines, in the order of their numbers."""
    return map(self._image, np.sort(self._order).tolist())

  def kinds(self) -> list[Kind]:
    """Lists the kinds, in the order they are made."""
    members = [[] for _ in self._kind_generations]
    for item, kind in enumerate(self._item_kinds.tolist()):
      if kind != _NO_KIND:
        members[kind].append(item)
    return [
      Kind(self.items[numbers[0]].settings, self._batch_size(kind), numbers)
      for kind, numbers in enumerate(members)
    ]

  def fingerprint(self, generation: int = 0) -> str:
    """Returns a hash of a generation's requests, but not where they are from.

    That of the first one knows how much room the others have.
    """
    digest = hashlib.sha256()
    for item, born in zip(self.items, self.generations, strict=True):
      values: Any = ["left out", item.count]
      if born == generation and isinstance(item, requests_lib.Request):
        values = (
          item.prompt,
          item.negative_prompt,
          item.seed,
          item.image_index,
          item.count,
          item.settings,
          item.pictures,
        )
      digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()

  @functools.cached_property
  def _first_images(self) -> np.ndarray:
    """The number of each item's first image, and that of all images."""
    counts = [item.count for item in self.items]
    return np.cumsum([0, *counts], dtype=np.int64)

  @functools.cached_property
  def _item_kinds(self) -> np.ndarray:
    """Numbers what images have in common, in the order it first appears."""
    numbers: dict[Any, int] = {}
    kinds = np.full(len(self.items), _NO_KIND, np.int64)
    for i in np.argsort(self.generations, kind="stable").tolist():
      item = self.items[i]
      if isinstance(item, requests_lib.Request):
        key = (self.generations[i], _kind(item))
        kinds[i] = numbers.setdefault(key, len(numbers))
    return kinds

  @functools.cached_property
  def _kinds(self) -> np.ndarray:
    """The kind of each image."""
    return np.repeat(self._item_kinds, np.diff(self._first_images))

  @functools.cached_property
  def _kind_generations(self) -> list[int]:
    kinds, first = np.unique(self._item_kinds, return_index=True)
    return [self.generations[i] for i in first[kinds != _NO_KIND].tolist()]

  @functools.cached_property
  def _order(self) -> np.ndarray:
    order = np.argsort(self._kinds, kind="stable")
    return order[np.count_nonzero(self._kinds == _NO_KIND) :]

  @functools.cached_property
  def _batch_starts(self) -> list[int]:
    """Where in the order each batch starts, and the last one ends."""
    starts, first = [], 0
    for size in self._kind_sizes.tolist():
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
      full = not starts or images > self.images_per_unit
      if full or self._generation(batch) != self._generation(batch - 1):
        starts.append(batch)
        first_image = batch_starts[batch]
    return [*starts, num_batches]

  @functools.cached_property
  def _unit_generations(self) -> list[int]:
    return [self._generation(batch) for batch in self._unit_starts[:-1]]

  def _generation(self, batch: int) -> int:
    kind = self._kinds[self._order[self._batch_starts[batch]]]
    return self._kind_generations[kind]

  def _batch_size(self, kind: int) -> int:
    return min(self.batch_size, int(self._kind_sizes[kind]))

  def _batch(self, number: int) -> Batch:
    start, stop = self._batch_starts[number : number + 2]
    images = tuple(self._image(i) for i in self._order[start:stop].tolist())
    kind = self._kinds[self._order[start]]
    return Batch(images, self._batch_size(kind))

  @functools.cached_property
  def _kind_sizes(self) -> np.ndarray:
    kinds = self._kinds[self._kinds != _NO_KIND]
    return np.bincount(kinds)

  def _image(self, index: int) -> Image:
    number = int(np.searchsorted(self._first_images, index, "right")) - 1
    request = self.items[number]
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


def _kind(request: requests_lib.Request) -> Any:
  if not request.pictures:
    return request.settings
  return request.settings, tuple(name for name, _ in request.pictures)


def make_plan(
  items: Sequence[requests_lib.Item],
  *,
  generations: Sequence[int] | None = None,
  seed: int = 0,
  batch_size: int = 8,
  images_per_unit: int = 1,
) -> Plan:
  """Plans a run.

  Args:
    generations: see `Plan`; None: there is one.
    seed: of requests without their own.
    images_per_unit: 1 makes each batch a unit.

  Raises:
    ValueError: no items, or a number that cannot be.
  """
  if not items:
    raise ValueError("There is no prompt; give --prompt or --prompt_file.")
  if batch_size < 1 or images_per_unit < 1:
    raise ValueError(
      f"batch_size ({batch_size}) and images_per_shard ({images_per_unit}) "
      "must be at least 1."
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
  if generations is None:
    generations = (0,) * len(items)
  return Plan(tuple(items), generations, seed, batch_size, images_per_unit)


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
