"""What a cache is to be made from and with, and the flags that say it."""

import dataclasses
import pathlib

from absl import flags

from sana_jax import resolution
from sana_jax.data import records
from sana_jax.data import sources as sources_lib
from sana_jax.precompute import encoders as encoders_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What a cache is to be made from and with, in values that may be pickled.

  Attributes:
    source: see `sources.open_source`, as `kind` and `split`.
    checkpoint: see `encoders.load`, as `variant`, `dtype` and `latents_only`.
    image_size: see `buckets.table`; the latter's `kind` is `buckets`.
    max_buckets: only the fullest are kept; each is compiled in training.
    min_pictures: those of shapes with fewer go to the nearest other shape;
      a training batch's worth, and no batch repeats any.
    resample: "bicubic", "lanczos", or "auto" for what the reference takes.
    vae_tile: side of tiles in pixels; None: as `encoders.default_tile` has it;
      0: whole pictures.
    min_clip_score: pictures whose prompt has a lower score are left out.
    num_threads: that read the sizes of pictures.
  """

  source: str
  checkpoint: str
  kind: str = "auto"
  split: str | None = None
  variant: str | None = None
  image_size: int = 1024
  buckets: str = "aspect"
  max_buckets: int = 10
  min_pictures: int = 64
  resample: str = "auto"
  vae_tile: int | None = None
  dtype: str = "float32"
  latents_only: bool = False
  batch_size: int = 8
  records_per_shard: int = 256
  min_clip_score: float = 0.0
  num_threads: int = 16

  @property
  def filter(self) -> str:
    """The resampling filter, once "auto" is decided."""
    if self.resample != "auto":
      return self.resample
    return resolution.reference_filter(self.image_size)

  def open_source(self) -> records.Source:
    return sources_lib.open_source(
      self.source, kind=self.kind, split=self.split
    )

  def load_encoders(self) -> encoders_lib.Encoders:
    tile = self.vae_tile
    return encoders_lib.load(
      self.checkpoint,
      dtype=self.dtype,
      variant=self.variant,
      latents_only=self.latents_only,
      tile=(
        encoders_lib.default_tile(self.image_size)
        if tile is None
        else tile or None
      ),
      batch_size=self.batch_size,
    )


def output_directory(value: str) -> pathlib.Path:
  """Returns where a cache is written.

  Raises:
    ValueError: it is not on a disk.
  """
  if "://" in value:
    raise ValueError(
      f"--output={value} is not on a disk; shards are written there only. "
      "Mount the bucket (gcsfuse), or copy the finished directory to it."
    )
  return pathlib.Path(value)


def define_flags() -> None:
  """Defines a flag for every field of `Task`, with its default."""
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  text("source", None, "What training reads.", required=True)
  text(
    "checkpoint",
    None,
    "Directory in the layout of diffusers, or a published name.",
    required=True,
  )
  text("kind", Task.kind, "Of source; auto: looks at what is there.")
  text("split", Task.split, "Of source, where it has any.")
  text("variant", Task.variant, "Of weights, e.g. fp16.")
  number("image_size", Task.image_size, "Side of a square picture, in pixels.")
  flags.DEFINE_enum(
    "buckets",
    Task.buckets,
    ["aspect", "square"],
    "Shapes: the published aspect ratios, or squares only.",
  )
  number("max_buckets", Task.max_buckets, "Shapes; the fullest are kept.")
  number(
    "min_pictures",
    Task.min_pictures,
    "Of a shape, such as training's batch; fewer go to the nearest other one.",
  )
  flags.DEFINE_enum(
    "resample",
    Task.resample,
    ["auto", "bicubic", "lanczos"],
    "Filter; auto: lanczos at 2048 and 2880 pixels, else bicubic.",
  )
  number(
    "vae_tile",
    Task.vae_tile,
    "Encode in tiles of so many pixels; 0: whole; None: 1024 above 1024.",
  )
  flags.DEFINE_enum(
    "dtype", Task.dtype, ["float32", "bfloat16"], "Of weights and computation."
  )
  flags.DEFINE_boolean(
    "latents_only", Task.latents_only, "Keep captions as texts, no states."
  )
  number("batch_size", Task.batch_size, "Pictures, or captions, at a time.")
  number("records_per_shard", Task.records_per_shard, "Of the source, a shard.")
  flags.DEFINE_float(
    "min_clip_score",
    Task.min_clip_score,
    "Leave out pictures whose prompt has a lower score.",
    lower_bound=0.0,
  )
  number("num_threads", Task.num_threads, "That read the sizes of pictures.")


def of_flags() -> Task:
  """Returns what the flags ask for."""
  return Task(
    **{
      field.name: flags.FLAGS[field.name].value
      for field in dataclasses.fields(Task)
    }
  )
