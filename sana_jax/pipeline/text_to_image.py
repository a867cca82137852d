"""SanaPipeline: one object for SANA, SANA-1.5 and SANA-Sprint."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, ArrayLike, Float

from sana_jax import config as config_lib
from sana_jax import sharding, text
from sana_jax.diffusion import samplers, scheduler_config, schedules
from sana_jax.models import controlnet as controlnet_lib
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.pipeline import (
  checks,
  decoding,
  denoising,
  encodings,
  execution,
  files,
  jobs,
  options,
  out_of_memory,
  output,
  pictures,
  reports,
  sampling,
  sizes,
  times,
)
from sana_jax.pipeline import memory as memory_lib


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
    controlnet: steers the transformer by a `control_image`.
    controlnet_wiring: how it is connected, which its weights were trained for:
      "diffusers" or "original"; see `controlnet.control_residuals`.
    tiling: decodes images in `windows.Windows`, the same up to rounding, or in
      overlapping tiles; None: as `memory` has it, whole if that fits.
    memory: what may be done to fit into the memory of the devices.
    devices: None: all devices of this process.
    prompt_batch_size: encodes so many prompts at a time, filled up, so that
      what one gives does not depend on the others; None: all new ones at once.
    text_lengths: texts of a call that fit into so many tokens are padded to
      these, not to `max_sequence_length`, for less work; none: always to that.
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
  controlnet: controlnet_lib.SanaControlNet | None = None
  controlnet_config: config_lib.SanaControlNetConfig | None = None
  controlnet_wiring: str = "diffusers"
  tokenizer_directory: epath.PathLike | None = None
  tiling: memory_lib.Cut | None = None
  memory: memory_lib.Policy = memory_lib.Policy()
  devices: Sequence[jax.Device] | None = None
  prompt_batch_size: int | None = None
  text_lengths: Sequence[int] = (64, 128)

  def __post_init__(self):
    checks.check_components(
      self.text_encoder_config,
      self.transformer_config,
      self.autoencoder_config,
      self.controlnet_config,
      is_sprint=self.is_sprint,
    )
    controlnet_lib.first_block(self.controlnet_wiring)  # checks its name
    self._executor = execution.Executor(self.devices or jax.local_devices())
    self._encodings = encodings.EncodingCache()
    self.text_encoder = self._executor.place(self.text_encoder)
    self.transformer = self._executor.place(self.transformer)
    self.autoencoder = self._executor.place(self.autoencoder)
    self.controlnet = self._executor.place(self.controlnet)

  @classmethod
  def from_pretrained(
    cls,
    path: epath.PathLike,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    components: epath.PathLike | None = None,
    step: int | None = None,
    fp16_clamp: bool | None = None,
  ) -> "SanaPipeline":
    """Loads a checkpoint of any kind, downloading it if need be.

    Args:
      path: a directory in the layout of diffusers; an original `.pth` or
        `.safetensors` file or a `transformer/` directory, with `components`; a
        work directory of train.py; the name of a published checkpoint, or
        "owner/name" of a repository on the hub.
      dtype: of parameters and computation, float32 or bfloat16; norms, softmax,
        linear attention and the sampler are float32 in any case.
      variant: such as "fp16", for the components that have it.
      devices: None: all devices of this process.
      components: directory that the text encoder, tokenizer and autoencoder
        come from, when `path` has none.
      step: of a work directory; None: the newest. The parameters are the
        averaged ones.
      fp16_clamp: limits activations as float16 does, which checkpoints trained
        in float16 need; None decides, and logs why.

    Raises:
      FileNotFoundError: something is missing.
      ImportError: a download is needed, and the hub's library is not installed.
      PermissionError: a licence must be accepted before the download.
      ValueError: something is unreadable, unsupported, or does not fit.
    """
    devices = devices or jax.local_devices()
    parts = files.load(
      path,
      dtype=dtype,
      variant=variant,
      mesh=sharding.make_mesh({"data": len(devices)}, devices),
      components=components,
      step=step,
      fp16_clamp=fp16_clamp,
    )
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
    image: pictures.Picture | None = None,
    mask_image: pictures.Picture | None = None,
    control_image: pictures.Picture | None = None,
    seed: int | Sequence[int] = 0,
    image_index: int | Sequence[int] = 0,
    num_images_per_prompt: int = 1,
    latents: Float[ArrayLike, "n h w c"] | None = None,
    noise: Float[ArrayLike, "steps n h w c"] | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    progress: execution.ProgressFn | None = None,
    on_step: reports.StepFn | None = None,
    **changes: Unpack[options.Options],
  ) -> output.SanaOutput:
    """Makes images, those of the first prompt first.

    Args:
      prompt: one or several.
      negative_prompt: one for all or one for each prompt; not for Sprint.
      image: to begin with (image-to-image, inpainting): a PIL image, or an
        array in [0, 1] of the size that is generated; one, or one an image.
      mask_image: white where `image` is made anew, black where it stays.
      control_image: what the ControlNet follows, such as edges; given like
        `image`.
      seed: one for all, or one for each image.
      image_index: number of each image among those of its seed, or the number
        of the first: what an image looks like depends on seed and number.
      latents: standard normal, in place of what the seed gives.
      noise: standard normal, for stochastic samplers, likewise.
      sigmas: custom noise levels; for the flow-Euler solver.
      timesteps: custom angles ending with 0; for Sprint.
      progress: called at the beginning and end of every stage.
      on_step: called after every step, see `reports`; a program of its own.
      **changes: to the `generation_config`, for this call; its fields are
        num_inference_steps, guidance_scale, height, width and so on.

    Raises:
      TypeError: an unknown option.
      ValueError: an argument that cannot be, has no effect, or does not fit.
      FloatingPointError: the result of a stage is not finite.
      OutOfMemoryError: a stage does not fit, against the plan.
    """
    job = jobs.resolve(
      self,
      prompt,
      negative_prompt,
      changes,
      pictures=(image, mask_image, control_image),
      numbers=(seed, image_index, num_images_per_prompt),
      times=(sigmas, timesteps),
      random=(latents, noise),
    )
    counts = (len(job.prompts), len(job.latents))
    plan = self.plan_memory(
      *counts, job.settings, size=job.size, num_encoded=job.num_encoded
    )
    with out_of_memory.explained(self, plan, job.size):
      conditions = self._conditions(job, num_images_per_prompt, progress)
      self._offload_text_encoder(plan)
      latents, known, control = self._begin(job, plan.decoding, progress)
      latents = self.denoise(
        latents,
        job.schedule,
        *conditions,
        job.settings,
        noise=job.noise,
        known=known,
        control=control,
        progress=progress,
        on_step=on_step,
      )
      images = self._decode(latents, plan.decoding, job.size, progress)
    if job.settings.composite_pixels:
      images = job.start.composite(images)
    return output.fetch(images, latents, job.text_length)

  def encode_prompt(
    self,
    prompts: Sequence[str],
    settings: options.GenerationConfig | None = None,
    *,
    progress: execution.ProgressFn | None = None,
  ) -> denoising.Condition:
    """Encodes prompts, the complex human instruction in front of each."""
    settings = settings or self.generation_config
    return self._encode(
      prompts, settings.complex_human_instruction, settings, progress
    )

  def encode_negative_prompt(
    self,
    prompts: Sequence[str],
    condition: denoising.Condition,
    settings: options.GenerationConfig | None = None,
    *,
    progress: execution.ProgressFn | None = None,
  ) -> denoising.Condition:
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
    return denoising.Condition(states, mask)

  def encode_image(
    self,
    images: Float[ArrayLike, "b height width 3"],
    *,
    how: decoding.Decoding | None = None,
    progress: execution.ProgressFn | None = None,
  ) -> Float[Array, "b h w c"]:
    """Encodes images in [0, 1] to latents in the transformer's scale.

    Args:
      how: in tiles if decoding is; None: whole.

    Raises:
      FloatingPointError: the latents are not finite.
    """
    latents = self._executor.run(
      "encoder",
      decoding.encode,
      shared={"autoencoder": self.autoencoder},
      batched={"images": jnp.asarray(images, jnp.float32)},
      static={
        "scaling_factor": self.autoencoder_config.scaling_factor,
        "how": how or decoding.Decoding(),
      },
      progress=progress,
    )
    checks.check_finite("encoder", latents)
    return latents

  def make_schedule(
    self,
    settings: options.GenerationConfig | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    strength: float = 1.0,
  ) -> schedules.Schedule:
    """Works out the sampler's steps; see `times.make_schedule`."""
    return times.make_schedule(
      self.solver,
      settings or self.generation_config.replace({}),
      sigmas=sigmas,
      timesteps=timesteps,
      strength=strength,
    )

  def image_size(
    self,
    settings: options.GenerationConfig | None = None,
    *,
    ratio: float | None = None,
  ) -> sizes.ImageSize:
    """Resolves what was requested; see `sizes.resolve`."""
    return sizes.resolve(
      settings or self.generation_config,
      self.transformer_config,
      self.autoencoder_config,
      ratio=ratio,
    )

  def denoise(
    self,
    latents: Float[ArrayLike, "b h w c"],
    schedule: schedules.Schedule,
    condition: denoising.Condition,
    null_condition: denoising.Condition | None = None,
    settings: options.GenerationConfig | None = None,
    *,
    noise: Float[ArrayLike, "steps b h w c"] | None = None,
    known: denoising.Known | None = None,
    control: Float[ArrayLike, "b h w c"] | None = None,
    trajectory: bool = False,
    progress: execution.ProgressFn | None = None,
    on_step: reports.StepFn | None = None,
  ) -> Float[Array, "b h w c"] | samplers.Trajectory:
    """Runs the sampler down to clean latents.

    Args:
      latents: at the schedule's first noise level: standard normal, or what
        `denoising.add_noise` makes of an image's.
      null_condition: None: no classifier-free guidance.
      noise: of every step, for stochastic samplers.
      known: the part of the picture that stays.
      control: latents of the control image; with a ControlNet only.
      trajectory: return all of the sampler's steps, in its own units.
      on_step: called after every step; not together with `trajectory`.

    Raises:
      FloatingPointError: the latents are not finite.
    """
    checks.check_control(self.controlnet, control)
    return sampling.sample(
      self._executor,
      self,
      sampling.Inputs(
        latents, condition, null_condition, noise, known, control
      ),
      schedule,
      settings or self.generation_config,
      trajectory=trajectory,
      progress=progress,
      on_step=on_step,
    )

  def decode(
    self,
    latents: Float[ArrayLike, "b h w c"],
    *,
    size: sizes.ImageSize | None = None,
    progress: execution.ProgressFn | None = None,
  ) -> Float[Array, "b height width 3"]:
    """Decodes latents to images in [0, 1], cut if they have to be.

    Args:
      size: to scale and crop to; None: as decoded.

    Raises:
      ValueError: it does not fit into memory, or a `tiling` without effect.
      FloatingPointError: the images are not finite.
    """
    grid = (latents.shape[1], latents.shape[2])
    factor = self.autoencoder_config.spatial_compression
    if size is None:
      size = sizes.ImageSize(*(factor * n for n in grid), *grid, factor)
    plan = memory_lib.plan_decoding(self, latents.shape[0], size)
    self._offload_text_encoder(plan)
    with out_of_memory.explained(self, plan, size):
      return self._decode(latents, plan.decoding, size, progress)

  def plan_memory(
    self,
    num_prompts: int = 1,
    num_images: int | None = None,
    settings: options.GenerationConfig | None = None,
    *,
    size: sizes.ImageSize | None = None,
    num_encoded: int = 0,
  ) -> memory_lib.Plan:
    """Says how a call would run, and what it needs, without running it.

    Args:
      num_images: of all prompts; None: one of each.
      size: None: what the settings say.
      num_encoded: pictures given, to begin with or to control.

    Raises:
      ValueError: it does not fit into memory, or a `tiling` without effect.
    """
    settings = settings or self.generation_config
    return memory_lib.plan_call(
      self,
      num_prompts=num_prompts,
      num_images=num_images or num_prompts,
      settings=settings,
      size=size or self.image_size(settings),
      num_encoded=num_encoded,
    )

  def _offload_text_encoder(self, plan: memory_lib.Plan) -> None:
    """Moves it to the host, from where `run` fetches it, if that is planned."""
    if plan.offload_text_encoder:
      self.text_encoder = jax.device_get(self.text_encoder)
      self._encodings.encoder_moved(self.text_encoder)

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

  def _conditions(self, job: jobs.Job, num_images_per_prompt: int, progress):
    """Encodes the prompts, and what to stay away from; a row an image."""
    settings = dataclasses.replace(
      job.settings, max_sequence_length=job.text_length
    )
    condition = self.encode_prompt(job.prompts, settings, progress=progress)
    null_condition = None
    if options.is_guided(settings, is_sprint=self.is_sprint):
      null_condition = self.encode_negative_prompt(
        job.negatives, condition, settings, progress=progress
      )
    return jax.tree.map(
      lambda a: jnp.repeat(a, num_images_per_prompt, axis=0),
      (condition, null_condition),
    )

  def _begin(self, job: jobs.Job, how: decoding.Decoding, progress):
    encode = functools.partial(self.encode_image, how=how, progress=progress)
    return job.begin(encode, on_circle=self.is_sprint)

  def _encode(self, prompts, instruction, settings, progress):
    condition = self._encodings.look_up(
      prompts,
      functools.partial(encodings.encode, self._executor, progress=progress),
      tokenizer=self.tokenizer,
      encoder=self.text_encoder,
      complex_human_instruction=instruction,
      max_sequence_length=settings.max_sequence_length,
      lowercase=settings.lowercase,
      batch_size=self.prompt_batch_size,
    )
    checks.check_finite("text encoder", condition.states)
    return condition
