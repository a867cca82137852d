"""Bytes of one cached record: latents, captions and their text states.

A record is, all integers little-endian:

    4 bytes  "SJC1"
    4 bytes  length of the header, uint32
    header   MessagePack: {"key": str, "size": [height, width] in pixels,
             "latents": [h, w, c], "text_width": d,
             "captions": [[name, text, score or nil, length or nil], ...]}
    zeros    up to a multiple of 8 bytes
    latents  bfloat16 [h, w, c], multiplied by the scaling factor
    states   of each caption that has a length: bfloat16 [length, d]
"""

import struct
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from jaxtyping import BFloat16

_MAGIC = b"SJC1"
_PREFIX = struct.Struct("<4sI")
_ALIGNMENT = 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Caption(NamedTuple):
  """A caption, and what the text encoder makes of it.

  Attributes:
    name: see `records.Caption`, as `text` and `score`.
    states: without padding; None: the cache has latents only.
  """

  name: str
  text: str
  score: float | None
  states: BFloat16[np.ndarray, "length d"] | None

  @property
  def length(self) -> int | None:
    """Number of tokens."""
    return None if self.states is None else len(self.states)


class Record(NamedTuple):
  """What is trained on in place of a picture and its captions.

  Attributes:
    size: height and width of the bucket, in pixels.
    latents: in the transformer's scale.
    captions: may be empty.
  """

  key: str
  size: tuple[int, int]
  latents: BFloat16[np.ndarray, "h w c"]
  captions: tuple[Caption, ...]


def encode(record: Record) -> bytes:
  """Returns the bytes of a record."""
  states = [c.states for c in record.captions if c.states is not None]
  header = msgpack.packb(
    {
      "key": record.key,
      "size": list(record.size),
      "latents": list(record.latents.shape),
      "text_width": states[0].shape[1] if states else 0,
      "captions": [
        [c.name, c.text, c.score, c.length] for c in record.captions
      ],
    }
  )
  padding = bytes(-(_PREFIX.size + len(header)) % _ALIGNMENT)
  return b"".join(
    [
      _PREFIX.pack(_MAGIC, len(header)),
      header,
      padding,
      *(
        np.ascontiguousarray(array, BFLOAT16).tobytes()
        for array in (record.latents, *states)
      ),
    ]
  )


def decode(content: bytes) -> Record:
  """Reads a record; its arrays are views of the bytes.

  Raises:
    ValueError: it is something else, or cut short.
  """
  if len(content) < _PREFIX.size or content[:4] != _MAGIC:
    raise ValueError(
      f"not a record of cached latents: begins with {bytes(content[:4])!r}, "
      f"expected {_MAGIC!r}."
    )
  _, length = _PREFIX.unpack_from(content)
  start = _PREFIX.size + length
  header = msgpack.unpackb(content[_PREFIX.size : start])
  start += -start % _ALIGNMENT
  shapes = [tuple(header["latents"])] + [
    (tokens, header["text_width"])
    for *_, tokens in header["captions"]
    if tokens is not None
  ]
  sizes = [int(np.prod(shape)) for shape in shapes]
  expected = start + BFLOAT16.itemsize * sum(sizes)
  if len(content) != expected:
    raise ValueError(
      f"record {header['key']!r} has {len(content)} bytes, expected {expected}."
    )
  values = np.frombuffer(content, BFLOAT16, offset=start)
  ends = np.cumsum(sizes)
  latents, *states = (
    values[end - size : end].reshape(shape)
    for end, size, shape in zip(ends, sizes, shapes, strict=True)
  )
  rest = iter(states)
  return Record(
    key=header["key"],
    size=tuple(header["size"]),
    latents=latents,
    captions=tuple(
      Caption(name, text, score, None if tokens is None else next(rest))
      for name, text, score, tokens in header["captions"]
    ),
  )
