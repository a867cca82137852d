"""What can be trained: a config for every recipe."""

import dataclasses
import re

from sana_jax.config.base import Config, require
from sana_jax.config.models import DCAEConfig, Gemma2Config, SanaConfig
from sana_jax.config.training import TrainConfig


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
class TextToImageConfig(TrainConfig):
  """Trains a SanaTransformer on the latents of a fixed autoencoder.

  Args:
    init_from: what training begins with: the name of a published checkpoint, a
      directory in the layout of diffusers, an original .pth file, or a work
      directory, whose newest average is taken (WORKDIR/checkpoints/STEP: that
      of this step); None: random numbers.
    fp16_clamp: True limits self-attention outputs as float16 would, which
      weights that were trained in it rely on.
    components: a published checkpoint, or a directory in the layout of
      diffusers, with what of the following three is left out.
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
  init_from: str | None = None
  fp16_clamp: bool = False
  components: str | None = None
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
      not (self.train_text_encoder and self.data.synthetic),
      "data.synthetic holds text states, so train_text_encoder must be False.",
    )
    if not self.data.synthetic:
      self._check_components()

  def _check_components(self) -> None:
    require(
      self.train_text_encoder
      or self.text_encoder_path is not None
      or self.components is not None,
      "text_encoder_path is None: give the pretrained text encoder's "
      "directory, name a checkpoint that has one in components, or set "
      "train_text_encoder=True.",
    )
    for name in ("autoencoder", "tokenizer"):
      require(
        bool(getattr(self, name)) or self.components is not None,
        f"{name} is empty: set it, or components.",
      )
    require(bool(self.sample_prompts), "sample_prompts is empty: set it.")


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
      not (self.data.places or self.data.cache or self.data.synthetic),
      "an autoencoder is trained on emoji; leave out data.path, data.sources, "
      "data.cache and data.synthetic.",
    )


@dataclasses.dataclass(kw_only=True)
class StagesConfig(Config):
  """Runs one after the other, each from the average of the one before.

  Args:
    stages: by name, in their order; each has a directory of that name in the
      work directory. One that has an `init_from` begins with that instead.
  """

  stages: dict[str, TextToImageConfig] = dataclasses.field(default_factory=dict)

  def validate(self) -> None:
    require(bool(self.stages), "stages is empty: it needs a run.")
    for name, stage in self.stages.items():
      require(
        re.fullmatch(r"\w[\w.-]*", name) is not None,
        f"stages has {name!r}, which is no name of a directory.",
      )
      try:
        stage.freeze()
      except ValueError as error:
        raise ValueError(f"stage {name!r}: {error}") from error
