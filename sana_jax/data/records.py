"""What every source of pictures yields, whatever its files look like."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, SupportsIndex, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Caption:
  """One description of a picture.

  Attributes:
    name: of the kind of caption, such as the model that wrote it; "prompt" when
      the source does not say.
    score: how well it fits the picture (CLIP score times 100); None: unknown.
  """

  name: str
  text: str
  score: float | None = None


@dataclasses.dataclass(frozen=True)
class Record:
  """A picture as it is stored, and its captions.

  Attributes:
    key: names the record within its source, the same in every run.
    image: the contents of the image file.
    captions: may be empty.
  """

  key: str
  image: bytes
  captions: tuple[Caption, ...]


@runtime_checkable
class Source(Protocol):
  """Random access to records, in an order that never changes.

  Attributes:
    name: says in messages and reports which source it is.
  """

  name: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex) -> Record: ...

  def __getitems__(self, indices: Sequence[int]) -> list[Record]:
    """Reads several records, in one go where the format allows."""
    ...
