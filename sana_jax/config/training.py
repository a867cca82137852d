"""What a training run is told."""

import dataclasses
import math
from collections.abc import Iterator

from sana_jax.config.base import Config, require
from sana_jax.config.models import DCAEConfig, Gemma2Config, SanaConfig

CAPTION_METHODS = (
  *("first", "random", "proportion"),
  *("clip_power", "clip_softmax"),
)


@dataclasses.dataclass(kw_only=True)
class FlowConfig(Config):
  """Rectified flow: how noise levels are drawn in training.

  Args:
    shift: moves noise levels towards noise; 3 at 1024 pixels.
    logit_mean: mean of the normal whose sigmoid is the raw time.
    logit_std: its standard deviation.
    caption_dropout: share of samples trained with the null caption.
    null_mask: which text mask goes with a dropped caption: "caption" keeps the
      caption's (how SANA was trained), "own" takes the null caption's (what
      diffusers and `SanaPipeline` sample with).
  """

  shift: float = 3.0
  logit_mean: float = 0.0
  logit_std: float = 1.0
  caption_dropout: float = 0.1
  null_mask: str = "caption"

  def validate(self) -> None:
    require(self.shift > 0, f"flow.shift must be > 0, got {self.shift}.")
    require(
      0 <= self.caption_dropout <= 1,
      f"flow.caption_dropout must be in [0, 1], got {self.caption_dropout}.",
    )
    require(
      self.null_mask in ("caption", "own"),
      f"flow.null_mask must be 'caption' or 'own', got {self.null_mask!r}.",
    )


@dataclasses.dataclass(kw_only=True)
class OptimConfig(Config):
  """AdamW with linear warm-up, a schedule, and global-norm clipping.

  Args:
    schedule: after warm-up: "constant", or "cosine" down to `final_lr_ratio`
      of the peak at the last step.
  """

  peak_lr: float = 1e-4
  warmup_steps: int = 2000
  schedule: str = "constant"
  final_lr_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 0.1

  def validate(self) -> None:
    require(
      self.schedule in ("constant", "cosine"),
      f"optim.schedule must be 'constant' or 'cosine', got {self.schedule!r}.",
    )
    for name in ("peak_lr", "clip_norm", "eps"):
      value = getattr(self, name)
      require(
        value > 0 and math.isfinite(value),
        f"optim.{name} must be a positive number, got {value}.",
      )
    for name in ("warmup_steps", "weight_decay"):
      value = getattr(self, name)
      require(value >= 0, f"optim.{name} must not be negative, got {value}.")
    for name in ("b1", "b2"):
      value = getattr(self, name)
      require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}.")
    require(
      0 <= self.final_lr_ratio <= 1,
      f"optim.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}.",
    )


_OF_EMOJI = (
  *("data_dir", "split"),
  *("keyword_probability", "keywords_only_probability"),
)
_OF_FITTING = ("buckets", "crop", "random_flip", "verify")
_OF_CAPTIONS = (
  *("caption_method", "caption_temperature", "caption_threshold"),
  "caption_proportions",
)
# Fields of DataConfig that do nothing, by where the data are from.
_NO_EFFECT = {
  "emoji": (*_OF_FITTING, *_OF_CAPTIONS),
  "path": _OF_EMOJI,
  "sources": _OF_EMOJI,
  "cache": (*_OF_EMOJI, *_OF_FITTING),
}


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

  With neither `path`, `sources` nor `cache`, it is the emoji.

  Args:
    data_dir: of emoji, the TFDS version directory; None: the bundled one.
    split: of emoji, "train" or "heldout".
    image_size: side in pixels of a square picture; emoji of another size are
      an error.
    keyword_probability: of emoji, share of captions that get keywords appended.
    keywords_only_probability: of emoji, share of captions of keywords alone.
    path: where pictures are, when they are in one place.
    sources: where they are, when they are in several.
    cache: directory of latents and text states that were computed before; no
      picture is read, no encoder is run.
    buckets: "square", or "aspect": pictures keep about their aspect ratio, and
      about the area of the square; a cache has its own.
    max_buckets: only so many shapes, the fullest, are kept: each is compiled.
    caption_method: which of a picture's captions is taken; see
      `sana_jax.data.captions`.
    caption_temperature: of the methods that draw by score.
    caption_threshold: captions of a lower score are not drawn.
    caption_proportions: weight of every caption name.
    crop: "center" or "random".
    random_flip: True mirrors every other picture.
    verify: decode every picture once before training, and leave out those that
      are broken; False reads their headers only, and a picture that turns out
      to be broken stops the run.
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
  buckets: str = "square"
  max_buckets: int = 10
  caption_method: str = "first"
  caption_temperature: float = 1.0
  caption_threshold: float = 0.0
  caption_proportions: dict[str, float] = dataclasses.field(
    default_factory=dict
  )
  crop: str = "center"
  random_flip: bool = False
  verify: bool = False
  num_threads: int = 4
  num_workers: int = 0

  @property
  def places(self) -> tuple[SourceConfig, ...]:
    """The sources of pictures, however they were given."""
    return (
      self.sources if self.path is None else (SourceConfig(path=self.path),)
    )

  def validate(self) -> None:
    problems = [*self._misplaced(), *self._out_of_range()]
    require(not problems, f"{'; '.join(problems)}.")

  def _misplaced(self) -> Iterator[str]:
    given = [n for n in ("path", "sources", "cache") if getattr(self, n)]
    if len(given) > 1:
      yield f"set one of data.path, data.sources and data.cache, got {given}"
    # What would have no effect is a misunderstanding.
    of = given[0] if given else "emoji"
    defaults = DataConfig()
    for name in _NO_EFFECT[of]:
      if getattr(self, name) != getattr(defaults, name):
        what = "the bundled emoji" if of == "emoji" else f"data.{of}"
        yield f"data.{name} has no effect on {what}: leave it out"
    for number, source in enumerate(self.sources):
      name = f"data.sources[{number}]"
      if not source.path:
        yield f"{name}.path is empty"
      if not 0 < source.weight < math.inf:
        yield f"{name}.weight must be a positive number, got {source.weight}"

  def _out_of_range(self) -> Iterator[str]:
    choices = {
      "buckets": ("square", "aspect"),
      "crop": ("center", "random"),
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
    if not 0 < self.caption_temperature < math.inf:
      yield (
        "data.caption_temperature must be a positive number, got "
        f"{self.caption_temperature}"
      )


@dataclasses.dataclass(kw_only=True)
class TrainConfig(Config):
  """What every training run has, whatever it trains.

  Args:
    ema_decay: of the averaged parameters that are sampled and exported.
    mesh: sizes of the axes "data" (copies) and "fsdp" (shards of parameters);
      one -1 takes the devices that are left.
    checkpoints_to_keep: older checkpoints are deleted.
    dtype: compute dtype; parameters and optimiser state stay float32.
    remat: "none", "full" or "dots" (see nn/stack.py).
    scan_layers: False unrolls the blocks: faster on CPU, slower to compile.
  """

  seed: int = 0
  num_steps: int = 1000
  batch_size: int = 64
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  ema_decay: float = 0.9999
  log_every: int = 20
  checkpoint_every: int = 500
  checkpoints_to_keep: int = 2
  sample_every: int = 500
  mesh: dict[str, int] = dataclasses.field(
    default_factory=lambda: {"data": -1, "fsdp": 1}
  )
  dtype: str = "bfloat16"
  remat: str = "full"
  scan_layers: bool = True

  def validate(self) -> None:
    for name in (
      *("num_steps", "batch_size", "log_every", "sample_every"),
      *("checkpoint_every", "checkpoints_to_keep"),
    ):
      value = getattr(self, name)
      require(value > 0, f"{name} must be positive, got {value}.")
    require(
      set(self.mesh) == {"data", "fsdp"},
      f"mesh must have the axes 'data' and 'fsdp', got {self.mesh}.",
    )
    require(
      self.remat in ("none", "full", "dots"),
      f"remat must be 'none', 'full' or 'dots', got {self.remat!r}.",
    )
    require(
      self.dtype in ("float32", "bfloat16"),
      f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.",
    )
    require(
      0 <= self.ema_decay < 1,
      f"ema_decay must be in [0, 1), got {self.ema_decay}.",
    )


@dataclasses.dataclass(kw_only=True)
class TextToImageConfig(TrainConfig):
  """Trains a SanaTransformer on the latents of a fixed autoencoder.

  Args:
    autoencoder: directory of the autoencoder, diffusers layout (`vae/`).
    tokenizer: directory of the tokenizer.
    text_encoder: architecture of the text encoder.
    text_encoder_path: pretrained weights; None: random initialisation.
    train_text_encoder: True trains it together with the transformer.
    max_sequence_length: caption tokens, beginning-of-sequence included.
    use_complex_human_instruction: True puts SANA's instruction before every
      caption.
    sample_prompts: prompts of the sample grids made while training.
  """

  model: SanaConfig = dataclasses.field(default_factory=SanaConfig)
  text_encoder: Gemma2Config = dataclasses.field(default_factory=Gemma2Config)
  text_encoder_path: str | None = None
  train_text_encoder: bool = False
  autoencoder: str = ""
  tokenizer: str = ""
  max_sequence_length: int = 300
  use_complex_human_instruction: bool = False
  flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
  sample_prompts: tuple[str, ...] = ()
  sample_steps: int = 20
  sample_guidance_scale: float = 4.5

  def validate(self) -> None:
    super().validate()
    require(
      self.model.caption_channels == self.text_encoder.hidden_size,
      f"model.caption_channels ({self.model.caption_channels}) must equal "
      f"text_encoder.hidden_size ({self.text_encoder.hidden_size}).",
    )
    require(
      self.train_text_encoder or self.text_encoder_path is not None,
      "text_encoder_path is None: give the pretrained text encoder's "
      "directory, or set train_text_encoder=True.",
    )
    require(
      not (self.train_text_encoder and self.data.cache),
      "data.cache holds text states, so train_text_encoder must be False.",
    )
    for name in ("autoencoder", "tokenizer", "sample_prompts"):
      require(bool(getattr(self, name)), f"{name} is empty: set it.")


@dataclasses.dataclass(kw_only=True)
class AutoencoderConfig(TrainConfig):
  """Trains a DCAE to reconstruct images.

  Loss: l1 + l2_weight * l2 + latent_penalty * mean(z^2), decoded from
  z + latent_noise * noise.

  Args:
    latent_noise: noise added to latents before decoding, so that the decoder
      forgives the small errors of a sampled latent.
    latent_penalty: keeps latents from growing to drown that noise.
  """

  model: DCAEConfig = dataclasses.field(default_factory=DCAEConfig)
  l2_weight: float = 1.0
  latent_noise: float = 0.0
  latent_penalty: float = 0.0

  def validate(self) -> None:
    super().validate()
    require(
      not self.data.places and not self.data.cache,
      "an autoencoder is trained on emoji; leave out data.path, data.sources "
      "and data.cache.",
    )
