"""What a run is trained on."""

import dataclasses
import math
from collections.abc import Iterator

from sana_jax.config.base import Config, require

CAPTION_METHODS = (
  *("first", "random", "proportion"),
  *("clip_power", "clip_softmax"),
)
_OF_EMOJI = (
  *("data_dir", "split"),
  *("keyword_probability", "keywords_only_probability"),
)
_OF_FITTING = ("crop", "random_flip", "verify", "min_clip_score")
# Caption options that only some methods look at.
_OF_METHODS = {
  "caption_temperature": ("clip_power", "clip_softmax"),
  "caption_threshold": ("clip_power", "clip_softmax"),
  "caption_proportions": ("proportion",),
}
_OF_CAPTIONS = (
  *("caption_method", "caption_temperature", "caption_threshold"),
  "caption_proportions",
)
# Fields of DataConfig that do nothing, by where the data are from.
_NO_EFFECT = {
  "emoji": (
    *("buckets", "resample", "allow_changed"),
    *(*_OF_FITTING, *_OF_CAPTIONS),
  ),
  "path": _OF_EMOJI,
  "sources": _OF_EMOJI,
  "cache": (*_OF_EMOJI, *_OF_FITTING),
  # How pictures and captions would be read is left alone: any run can be
  # timed on noise, with nothing changed but this.
  "synthetic": _OF_EMOJI,
}
_NO_DATA = (
  "no data given: set data.cache (docs/data.md), or data.path, data.sources or "
  "data.synthetic; without, it is the bundled emoji, on which "
)
_ORIGINS = tuple(name for name in _NO_EFFECT if name != "emoji")


@dataclasses.dataclass(kw_only=True)
class SourceConfig(Config):
  """Captioned pictures in one place.

  Args:
    kind: of files; "auto" looks at them.
    split: of a data set that has splits.
    weight: share of the samples, relative to the other sources.
  """

  path: str = ""
  kind: str = "auto"
  split: str | None = None
  weight: float = 1.0


@dataclasses.dataclass(kw_only=True)
class DataConfig(Config):
  """Captioned images: the bundled emoji, one's own pictures, or a cache.

  With neither `path`, `sources`, `cache` nor `synthetic`, it is the emoji.

  Args:
    data_dir: of emoji, the TFDS version directory; None: the bundled one.
    split: of emoji, "train" or "heldout".
    image_size: side in pixels of a square picture; emoji of another size are
      an error.
    keyword_probability: of emoji, share of captions that get keywords appended.
    keywords_only_probability: of emoji, share of captions of keywords alone.
    path: where pictures are, when they are in one place; empty: it must be
      given, or one of the next two.
    sources: where they are, when they are in several.
    cache: directory of latents and text states that were computed before; no
      picture is read, no encoder is run.
    synthetic: noise in place of latents and text states, in the shape of
      `model.sample_size`; no file is read, and neither samples nor an export
      are made. It measures how fast a run is, and no more.
    buckets: "square", or "aspect": pictures keep about their aspect ratio, and
      about the area of the square. A cache must have been made so; None: the
      shapes that the cache has, of pictures "square".
    max_buckets: only so many shapes, the fullest, are kept: each is compiled.
    caption_method: which of a picture's captions is taken; see
      `sana_jax.data.captions`.
    caption_temperature: of the methods that draw by score.
    caption_threshold: captions of a lower score are not drawn.
    caption_proportions: weight of every caption name.
    min_clip_score: pictures whose prompt has a lower score are left out.
    crop: "center" or "random".
    resample: filter that pictures are scaled with, "bicubic", "lanczos", or
      "auto" for what the reference takes; a cache must have been made with it.
    random_flip: True mirrors every other picture.
    verify: decode every picture once before training, and leave out those that
      are broken; False reads their headers only, and a picture that turns out
      to be broken stops the run.
    allow_changed: True continues a run whose data are others than when it
      began; its steps are then not those of either.
    num_threads: that read and decode on a host; with workers, on each.
    num_workers: processes that read and decode; 0: none but this one.
  """

  data_dir: str | None = None
  split: str = "train"
  image_size: int = 64
  keyword_probability: float = 0.0
  keywords_only_probability: float = 0.0
  path: str | None = None
  sources: tuple[SourceConfig, ...] = ()
  cache: str | None = None
  synthetic: bool = False
  buckets: str | None = None
  max_buckets: int = 10
  caption_method: str = "first"
  caption_temperature: float = 1.0
  caption_threshold: float = 0.0
  caption_proportions: dict[str, float] = dataclasses.field(
    default_factory=dict
  )
  min_clip_score: float = 0.0
  crop: str = "center"
  random_flip: bool = False
  resample: str = "auto"
  verify: bool = False
  allow_changed: bool = False
  num_threads: int = 4
  num_workers: int = 0

  @property
  def places(self) -> tuple[SourceConfig, ...]:
    """The sources of pictures, however they were given."""
    return (SourceConfig(path=self.path),) if self.path else self.sources

  def validate(self) -> None:
    problems = [*self._misplaced(), *self._out_of_range()]
    require(not problems, f"{'; '.join(problems)}.")

  def _misplaced(self) -> Iterator[str]:
    given = [name for name in _ORIGINS if getattr(self, name)]
    if len(given) > 1:
      yield (
        "set one of data.path, data.sources, data.cache and data.synthetic, "
        f"got {given}"
      )
    if self.path == "" and not given:
      yield (
        "no data are given: set data.path=DIR to a folder of pictures (or "
        "another source), or data.cache=DIR to what sana_jax.precompute made "
        "of one"
      )
    # What would have no effect is a misunderstanding.
    of = given[0] if given else "emoji" if self.path is None else "path"
    defaults = DataConfig()
    idle = [
      f"data.{name}"
      for name in _NO_EFFECT[of]
      if getattr(self, name) != getattr(defaults, name)
    ]
    if idle:
      effect = f"{', '.join(idle)} {'have' if idle[1:] else 'has'} no effect"
      if of == "emoji":
        yield f"{_NO_DATA}{effect}"
      else:
        yield f"{effect} on data.{of}: leave out"
    yield from self._misplaced_of_captions(of)
    for number, source in enumerate(self.sources):
      name = f"data.sources[{number}]"
      if not source.path:
        yield f"{name}.path is empty"
      if not 0 < source.weight < math.inf:
        yield f"{name}.weight must be a positive number, got {source.weight}"

  def _misplaced_of_captions(self, of: str) -> Iterator[str]:
    defaults = DataConfig()
    for name, methods in _OF_METHODS.items():
      same = getattr(self, name) == getattr(defaults, name)
      if of != "emoji" and self.caption_method not in methods and not same:
        yield (
          f"data.{name} has no effect on data.caption_method="
          f"{self.caption_method!r}: leave it out, or set the method to one of "
          f"{methods}"
        )
    weights = self.caption_proportions.values()
    if self.caption_method == "proportion" and not any(w > 0 for w in weights):
      yield (
        "data.caption_proportions must give a caption name a positive weight, "
        f"got {self.caption_proportions}"
      )

  def _out_of_range(self) -> Iterator[str]:
    choices = {
      "buckets": (None, "square", "aspect"),
      "crop": ("center", "random"),
      "resample": ("auto", "bicubic", "lanczos"),
      "caption_method": CAPTION_METHODS,
    }
    for name, values in choices.items():
      if getattr(self, name) not in values:
        yield (
          f"data.{name} must be one of {values}, got {getattr(self, name)!r}"
        )
    for name, least in (
      *(("image_size", 1), ("max_buckets", 1)),
      *(("num_threads", 0), ("num_workers", 0)),
    ):
      if getattr(self, name) < least:
        yield f"data.{name} must be at least {least}, got {getattr(self, name)}"
    if not 0 <= self.min_clip_score < math.inf:
      yield f"data.min_clip_score must be at least 0, got {self.min_clip_score}"
    if not 0 < self.caption_temperature < math.inf:
      yield (
        "data.caption_temperature must be a positive number, got "
        f"{self.caption_temperature}"
      )
