"""SanaPipeline: one object for SANA, SANA-1.5 and SANA-Sprint."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import Array, ArrayLike, Float

from sana_jax import config as config_lib
from sana_jax import images as images_lib
from sana_jax import resolution, text
from sana_jax.diffusion import samplers, scheduler_config, schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.models import tiling as tiling_lib
from sana_jax.pipeline import (
  checks,
  decoding,
  execution,
  files,
  options,
  stages,
)
from sana_jax.pipeline import memory as memory_lib


@dataclasses.dataclass(frozen=True)
class SanaOutput:
  """What a call returns, on the host.

  Attributes:
    images: in [0, 1].
    latents: in the transformer's scale.
  """

  images: Float[np.ndarray, "n height width 3"]
  latents: Float[np.ndarray, "n h w c"]

  def pil(self) -> list[PIL.Image.Image]:
    return images_lib.to_pil(self.images)


class ImageSize(NamedTuple):
  """Pixels of the finished image, and the latent grid it is made from."""

  height: int
  width: int
  latent_height: int
  latent_width: int


@dataclasses.dataclass(kw_only=True)
class SanaPipeline:
  """Text to images: encode the prompt, denoise latents, decode them.

  A model may be replaced by another of the same config (by a fine-tuned
  `transformer`, say) between calls. A batch is spread over `devices`; the image
  that a seed and an index give does not depend on the batch it is made in.

  Args:
    tokenizer_directory: the tokenizer's files; needed by `save_pretrained`.
    solver: `schedules.SCM` for SANA-Sprint, another for all else.
    generation_config: what a call does not specify.
    tiling: decodes images in overlapping tiles; None: as `memory` has it,
      whole if that fits.
    memory: what may be done to fit into the memory of the devices.
    devices: None: all devices of this process.
  """

  tokenizer: text.Tokenizer
  text_encoder: gemma2.Gemma2
  text_encoder_config: config_lib.Gemma2Config
  transformer: sana.SanaTransformer
  transformer_config: config_lib.SanaConfig
  autoencoder: dc_ae.DCAE
  autoencoder_config: config_lib.DCAEConfig
  solver: scheduler_config.Solver
  generation_config: options.GenerationConfig
  tokenizer_directory: epath.PathLike | None = None
  tiling: tiling_lib.Tiling | None = None
  memory: memory_lib.Policy = memory_lib.Policy()
  devices: Sequence[jax.Device] | None = None

  def __post_init__(self):
    checks.check_components(
      self.text_encoder_config,
      self.transformer_config,
      self.autoencoder_config,
      is_sprint=self.is_sprint,
    )
    self._executor = execution.Executor(self.devices or jax.local_devices())
    self.text_encoder = self._executor.place(self.text_encoder)
    self.transformer = self._executor.place(self.transformer)
    self.autoencoder = self._executor.place(self.autoencoder)

  @classmethod
  def from_pretrained(
    cls,
    path: epath.PathLike,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    devices: Sequence[jax.Device] | None = None,
  ) -> "SanaPipeline":
    """Loads a directory in the layout of diffusers.

    Args:
      path: holds model_index.json and one directory per component.
      dtype: of parameters and computation, float32 or bfloat16; norms, softmax,
        linear attention and the sampler are float32 in any case.
      variant: such as "fp16", for the components that have it.
      devices: None: all devices of this process.

    Raises:
      FileNotFoundError: something is missing.
      ValueError: something is unreadable, unsupported, or does not fit.
    """
    parts = files.load(path, dtype=dtype, variant=variant)
    return cls(**parts, devices=devices)

  def save_pretrained(self, path: epath.PathLike) -> None:
    """Writes a directory that `from_pretrained` and diffusers read.

    Raises:
      ValueError: `tokenizer_directory` is None.
    """
    files.save(path, self)

  @property
  def used_devices(self) -> list[jax.Device]:
    return self._executor.devices

  @property
  def is_sprint(self) -> bool:
    return isinstance(self.solver, schedules.SCM)

  def __call__(
    self,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    seed: int = 0,
    num_images_per_prompt: int = 1,
    first_image_index: int = 0,
    latents: Float[ArrayLike, "n h w c"] | None = None,
    noise: Float[ArrayLike, "steps n h w c"] | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    progress: execution.ProgressFn | None = None,
    **changes: Unpack[options.Options],
  ) -> SanaOutput:
    """Makes images, those of the first prompt first.

    Args:
      prompt: one or several.
      negative_prompt: one for all or one for each prompt; not for Sprint.
      first_image_index: number of the first image among those of the seed.
      latents: standard normal, in place of what the seed gives.
      noise: standard normal, for stochastic samplers, likewise.
      sigmas: custom noise levels; for the flow-Euler solver.
      timesteps: custom angles ending with 0; for Sprint.
      progress: called at the beginning and end of every stage.
      **changes: to the `generation_config`, for this call; its fields are
        num_inference_steps, guidance_scale, height, width and so on.

    Raises:
      TypeError: an unknown option.
      ValueError: an argument that cannot be, or does not fit the checkpoint.
      FloatingPointError: the result of a stage is not finite.
    """
    settings = self.generation_config.replace(changes)
    options.check_applicable(changes, is_sprint=self.is_sprint)
    prompts = checks.prompt_list(prompt)
    checks.check_counts(seed, num_images_per_prompt, first_image_index)
    negatives = checks.negative_prompt_list(
      negative_prompt, len(prompts), is_sprint=self.is_sprint
    )
    checks.check_custom_times(self.solver, changes, sigmas, timesteps)
    schedule = self.make_schedule(settings, sigmas=sigmas, timesteps=timesteps)
    indices = np.arange(len(prompts) * num_images_per_prompt)
    keys = stages.image_keys(seed, first_image_index + indices)
    size = self.image_size(settings)
    latents, noise = self._random_inputs(keys, schedule, size, latents, noise)
    plan = self.plan_memory(len(prompts), len(indices), settings)

    condition = self.encode_prompt(prompts, settings, progress=progress)
    null_condition = None
    if settings.guidance_scale > 1 and not self.is_sprint:
      null_condition = self.encode_negative_prompt(
        negatives, condition, settings, progress=progress
      )
    if plan.offload_text_encoder:
      self._offload_text_encoder()
    condition, null_condition = jax.tree.map(
      lambda a: jnp.repeat(a, num_images_per_prompt, axis=0),
      (condition, null_condition),
    )
    latents = self.denoise(
      latents,
      schedule,
      condition,
      null_condition,
      settings,
      noise=noise,
      progress=progress,
    )
    images = self._decode(latents, plan.decoding, size, progress)
    return SanaOutput(np.asarray(images), np.asarray(latents))

  def encode_prompt(
    self,
    prompts: Sequence[str],
    settings: options.GenerationConfig | None = None,
    *,
    progress: execution.ProgressFn | None = None,
  ) -> stages.Condition:
    """Encodes prompts, the complex human instruction in front of each."""
    settings = settings or self.generation_config
    return self._encode(
      prompts, settings.complex_human_instruction, settings, progress
    )

  def encode_negative_prompt(
    self,
    prompts: Sequence[str],
    condition: stages.Condition,
    settings: options.GenerationConfig | None = None,
    *,
    progress: execution.ProgressFn | None = None,
  ) -> stages.Condition:
    """Encodes what to stay away from, for the prompts of `condition`.

    Args:
      prompts: one for all, or one for each.
    """
    settings = settings or self.generation_config
    null = self._encode(prompts, None, settings, progress)
    count = condition.mask.shape[0]
    states, mask = (jnp.broadcast_to(a, (count, *a.shape[1:])) for a in null)
    if settings.null_mask == "caption":
      mask = condition.mask
    return stages.Condition(states, mask)

  def make_schedule(
    self,
    settings: options.GenerationConfig | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
  ) -> schedules.Schedule:
    """Works out the sampler's steps; custom times are for some solvers only."""
    settings = settings or self.generation_config.replace({})
    if sigmas is not None:
      return self.solver.custom_schedule(sigmas)
    if timesteps is not None:
      return self.solver.custom_schedule(timesteps)
    if not self.is_sprint:
      return self.solver.schedule(settings.num_inference_steps)
    return self.solver.schedule(
      settings.num_inference_steps,
      max_timesteps=settings.max_timesteps,
      intermediate_timesteps=settings.intermediate_timesteps,
    )

  def image_size(
    self, settings: options.GenerationConfig | None = None
  ) -> ImageSize:
    """Resolves what was requested, and the latent grid to generate it from.

    Raises:
      ValueError: a size that cannot be, or bins that do not exist.
    """
    settings = settings or self.generation_config
    sample_size = self.transformer_config.sample_size
    compression = self.autoencoder_config.spatial_compression
    default = sample_size * compression
    height = default if settings.height is None else settings.height
    width = default if settings.width is None else settings.width
    binning = settings.use_resolution_binning
    if binning is None:
      bins_fit = compression == resolution.COMPRESSION
      binning = bins_fit and sample_size in resolution.SAMPLE_SIZES
    checks.check_size(
      height,
      width,
      1 if binning else compression * self.transformer_config.patch_size,
    )
    generated = (height, width)
    if binning:
      generated = resolution.closest_bin(height, width, sample_size)
    grid = (generated[0] // compression, generated[1] // compression)
    return ImageSize(height, width, *grid)

  def denoise(
    self,
    latents: Float[ArrayLike, "b h w c"],
    schedule: schedules.Schedule,
    condition: stages.Condition,
    null_condition: stages.Condition | None = None,
    settings: options.GenerationConfig | None = None,
    *,
    noise: Float[ArrayLike, "steps b h w c"] | None = None,
    trajectory: bool = False,
    progress: execution.ProgressFn | None = None,
  ) -> Float[Array, "b h w c"] | samplers.Trajectory:
    """Runs the sampler from standard normal noise to latents.

    Args:
      null_condition: None: no classifier-free guidance.
      noise: of every step, for stochastic samplers.
      trajectory: return all of the sampler's steps, in its own units.

    Raises:
      FloatingPointError: the latents are not finite.
    """
    settings = settings or self.generation_config
    shared = {
      "transformer": self.transformer,
      "schedule": schedule,
      "guidance_scale": jnp.float32(settings.guidance_scale),
    }
    batched = {"latents": latents, "condition": condition}
    if noise is not None:
      batched["noise"] = jnp.swapaxes(noise, 0, 1)
    if null_condition is not None:
      batched["null_condition"] = null_condition
    function, static = self._denoiser(settings)
    run = functools.partial(
      self._executor.run,
      "transformer",
      function,
      shared=shared,
      batched=batched,
      progress=progress,
    )

    def run_trajectory() -> samplers.Trajectory:
      steps = run(static=static | {"trajectory": True})
      steps = samplers.Trajectory(*(part.swapaxes(0, 1) for part in steps))
      checks.check_steps_finite(steps.samples, schedule)
      return steps

    if trajectory:
      return run_trajectory()
    result = run(static=static)
    if not bool(jnp.isfinite(result).all()):
      run_trajectory()  # to say which step broke
      checks.check_finite("transformer", result)
    return result

  def decode(
    self,
    latents: Float[ArrayLike, "b h w c"],
    *,
    size: ImageSize | None = None,
    progress: execution.ProgressFn | None = None,
  ) -> Float[Array, "b height width 3"]:
    """Decodes latents to images in [0, 1], in tiles if they have to be.

    Args:
      size: to scale and crop to; None: as decoded.

    Raises:
      ValueError: it does not fit into memory, or a `tiling` without effect.
      FloatingPointError: the images are not finite.
    """
    grid = (latents.shape[1], latents.shape[2])
    factor = self.autoencoder_config.spatial_compression
    size = size or ImageSize(grid[0] * factor, grid[1] * factor, *grid)
    plan = memory_lib.plan_decoding(self, latents.shape[0], size)
    if plan.offload_text_encoder:
      self._offload_text_encoder()
    return self._decode(latents, plan.decoding, size, progress)

  def plan_memory(
    self,
    num_prompts: int = 1,
    num_images: int | None = None,
    settings: options.GenerationConfig | None = None,
  ) -> memory_lib.Plan:
    """Says how a call would run, and what it needs, without running it.

    Args:
      num_images: of all prompts; None: one of each.

    Raises:
      ValueError: it does not fit into memory, or a `tiling` without effect.
    """
    settings = settings or self.generation_config
    num_images = num_images or num_prompts
    return memory_lib.plan_call(self, num_prompts, num_images, settings)

  def _offload_text_encoder(self) -> None:
    """Moves the text encoder to the host, from where `run` fetches it."""
    self.text_encoder = jax.device_get(self.text_encoder)

  def _decode(self, latents, how, size, progress):
    images = decoding.decode(
      self._executor,
      self.autoencoder,
      latents,
      how=how,
      scaling_factor=self.autoencoder_config.scaling_factor,
      height=size.height,
      width=size.width,
      progress=progress,
    )
    checks.check_finite("decoder", images)
    return images

  def _denoiser(self, settings) -> tuple[Callable, dict[str, Any]]:
    if self.is_sprint:
      return stages.denoise_sprint, {
        "sigma_data": self.solver.sigma_data,
        "guidance_embeds_scale": self.transformer_config.guidance_embeds_scale,
      }
    return stages.denoise, {
      "timestep_scale": self.transformer_config.timestep_scale,
      "guidance_interval": settings.guidance_interval,
    }

  def _encode(self, prompts, instruction, settings, progress):
    input_ids, attention_mask = text.tokenize_prompts(
      self.tokenizer,
      prompts,
      complex_human_instruction=instruction,
      max_sequence_length=settings.max_sequence_length,
      lowercase=settings.lowercase,
    )
    condition = self._executor.run(
      "text encoder",
      stages.encode_text,
      shared={"text_encoder": self.text_encoder},
      batched={"input_ids": input_ids, "attention_mask": attention_mask},
      static={"max_sequence_length": settings.max_sequence_length},
      progress=progress,
    )
    checks.check_finite("text encoder", condition.states)
    return condition

  def _random_inputs(self, keys, schedule, size, latents, noise):
    """Draws latents and noise unless they are given, whose shapes it checks."""
    shape = (*size[2:], self.transformer_config.in_channels)
    count = keys.shape[0]
    if latents is None:
      latents = stages.initial_latents(keys, shape)
    checks.check_shape("latents", latents, (count, *shape))
    if schedule.noise is None:
      if noise is not None:
        raise ValueError("noise given, but this solver is deterministic.")
      return latents, None
    if noise is None:
      noise = stages.step_noise(keys, schedule.num_steps, shape)
    checks.check_shape("noise", noise, (schedule.num_steps, count, *shape))
    return latents, noise
