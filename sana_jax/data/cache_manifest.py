"""What a cache of latents was made from and with: its manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

MANIFEST = "manifest.json"
# Of the layout of records, of the manifest and of the directory.
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a cache is made with: equal settings, equal shards.

  Attributes:
    autoencoder_sha256: of the weight files, as `text_encoder_sha256`.
    compression: pixels per latent.
    text_encoder_sha256: None: latents only; so are the other fields of text.
    tokenizer_sha256: of the tokenizer's file.
    instruction_sha256: of the lines that are put before every caption, joined
      by line breaks; None: there are none.
    text_width: features of a text state.
    buckets: (height, width) in pixels that pictures are scaled and cropped to.
    crop: which part of a picture is kept.
    resample: filter that pictures are scaled with.
    tile: side in pixels of the tiles that pictures are encoded in; None:
      whole.
    dtype: of the weights and the computation.
    batch_size: it may change the last bit.
    source_fingerprint: of the keys and the sizes of its pictures.
  """

  image_size: int
  buckets: tuple[tuple[int, int], ...]
  crop: str
  resample: str
  autoencoder_sha256: str
  scaling_factor: float
  compression: int
  latent_channels: int
  tile: int | None
  text_encoder_sha256: str | None
  tokenizer_sha256: str | None
  instruction_sha256: str | None
  max_sequence_length: int | None
  lowercase: bool | None
  text_width: int | None
  dtype: str
  batch_size: int
  records_per_shard: int
  source_fingerprint: str

  def to_json(self) -> dict[str, Any]:
    """Returns values as JSON has them, without tuples."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  def sha256(self) -> str:
    """Returns a digest that differs where the settings do."""
    content = json.dumps(self.to_json(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Settings":
    """Reads what `to_json` returned.

    Raises:
      ValueError: fields are missing or unknown.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if names != values.keys():
      raise ValueError(
        f"settings lack {sorted(names - values.keys())} and have "
        f"{sorted(values.keys() - names)} too many: made by another version of "
        "sana_jax; make the cache again."
      )
    buckets = tuple((height, width) for height, width in values["buckets"])
    return cls(**{**values, "buckets": buckets})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """One file of the cache; the sizes are sums over its records.

  Attributes:
    skipped: by key, why a picture of the source is not in it.
    truncated_captions: had more tokens than are used; counted once per text.
  """

  file: str
  bytes: int
  sha256: str
  records: int
  skipped: Mapping[str, str]
  captions: int
  truncated_captions: int
  latent_bytes: int
  text_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a cache was made from and with, and what is in it.

  Attributes:
    checkpoint: name of that of the models, for people, as `source`.
    versions: of the software that completed it.
  """

  settings: Settings
  checkpoint: str
  source: str
  shards: tuple[Shard, ...]
  versions: Mapping[str, str]

  @property
  def records(self) -> int:
    return self.total("records")

  def total(self, name: str) -> int:
    """Sums a field of all shards, such as "captions" or "text_bytes"."""
    return sum(getattr(shard, name) for shard in self.shards)

  @property
  def skipped(self) -> dict[str, str]:
    """Says by key why pictures of the source are not in the cache."""
    return {k: why for shard in self.shards for k, why in shard.skipped.items()}

  @property
  def has_text(self) -> bool:
    return self.settings.text_encoder_sha256 is not None

  def identity(self) -> dict[str, Any]:
    """Returns values that differ where what may be read from it does."""
    shards = "".join(shard.sha256 for shard in self.shards)
    return {
      **self.settings.to_json(),
      "shards": hashlib.sha256(shards.encode()).hexdigest(),
    }

  def check(self, *others: str, **expected: Any) -> None:
    """Refuses a cache that was made otherwise than training needs it.

    Args:
      *others: differences that were found elsewhere.
      **expected: fields of `Settings`.

    Raises:
      TypeError: there is no such field.
      ValueError: some differ; names them all.
    """
    made = dataclasses.asdict(self.settings)
    if unknown := sorted(expected.keys() - made.keys()):
      raise TypeError(f"no settings of a cache: {unknown}.")
    differences = [
      f"{name} is {made[name]!r}, training needs {value!r}"
      for name, value in expected.items()
      if made[name] != value
    ]
    if differences := [*differences, *others]:
      raise ValueError(
        f"The cache does not fit: {'; '.join(differences)}. Make another one "
        "with python -m sana_jax.precompute, or change the training "
        "configuration."
      )

  def to_json(self) -> str:
    values = {
      "format": FORMAT,
      "records": self.records,
      "skipped": len(self.skipped),
      "source": self.source,
      "checkpoint": self.checkpoint,
      "settings": self.settings.to_json(),
      "versions": dict(self.versions),
      "shards": [dataclasses.asdict(shard) for shard in self.shards],
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

  @classmethod
  def read(cls, path: epath.PathLike) -> "Manifest":
    """Reads the manifest of a cache's directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is broken, or of another version.
    """
    file = epath.Path(path) / MANIFEST
    if not file.is_file():
      raise FileNotFoundError(
        f"{path} has no {MANIFEST}: expected a finished cache of python -m "
        "sana_jax.precompute; run that again to finish one."
      )
    try:
      values = json.loads(file.read_text(encoding="utf-8"))
      if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, expected {FORMAT}")
      return cls(
        settings=Settings.from_json(values["settings"]),
        checkpoint=values["checkpoint"],
        source=values["source"],
        shards=tuple(Shard(**shard) for shard in values["shards"]),
        versions=values["versions"],
      )
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{file} is no manifest of cached latents: {error}."
      ) from error
