"""What sampling does, step by step, with the model that ships."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import sana_jax
from docs.figures import style

PROMPT = "red apple"
STEPS = 12
PROMPTS = ("sunflower", "woman firefighter: dark skin tone", "snowman")
SCALES = (1.0, 2.0, 4.5, 9.0)


def draw(directory: pathlib.Path) -> None:
  """Draws a decoded trajectory, and pictures by guidance scale."""
  pipe = sana_jax.SanaPipeline.from_pretrained(
    sana_jax.bundled_checkpoint(), devices=jax.devices()[:1]
  )
  trajectory(pipe, directory)
  guidance(pipe, directory)


def trajectory(pipe: sana_jax.SanaPipeline, directory: pathlib.Path) -> None:
  """Draws the sample and the estimate of the data after every step."""
  settings = pipe.generation_config.replace({"num_inference_steps": STEPS})
  schedule = pipe.make_schedule(settings)
  condition = pipe.encode_prompt([PROMPT], settings)
  null_condition = pipe.encode_negative_prompt([""], condition, settings)
  config = pipe.transformer_config
  side = config.sample_size
  noise = jax.random.normal(
    jax.random.key(4), (1, side, side, config.in_channels)
  )
  passed = pipe.denoise(
    noise, schedule, condition, null_condition, settings, trajectory=True
  )
  rows = {
    "sample": pipe.decode(jnp.asarray(passed.samples)[1:, 0]),
    "estimate": pipe.decode(jnp.asarray(passed.denoised)[:, 0]),
  }
  labels = [f"{sigma:.2f}" for sigma in schedule.sigmas[1:]]
  _grid(rows, labels, directory / "trajectory.png", "sigma")


def guidance(pipe: sana_jax.SanaPipeline, directory: pathlib.Path) -> None:
  """Draws the same prompts and noise at several guidance scales."""
  made = [pipe(list(PROMPTS), guidance_scale=scale) for scale in SCALES]
  rows = {
    prompt.partition(":")[0]: [output.images[i] for output in made]
    for i, prompt in enumerate(PROMPTS)
  }
  labels = [f"{scale:g}" for scale in SCALES]
  _grid(rows, labels, directory / "guidance.png", "guidance_scale", size=1.4)


def _grid(rows, labels, path: pathlib.Path, name: str, size=0.8) -> None:
  made, _ = style.figure(size * len(labels) + 0.9, size * len(rows) + 0.4)
  made.clear()
  panels = made.subplots(len(rows), len(labels), squeeze=False)
  for panel_row, (row, pictures) in zip(panels, rows.items(), strict=True):
    panel_row[0].set_ylabel(row, fontsize=8)
    for panel, picture in zip(panel_row, pictures, strict=True):
      panel.imshow(np.asarray(picture))
      panel.set(xticks=[], yticks=[])
      for spine in panel.spines.values():
        spine.set_visible(False)
  for i, (panel, label) in enumerate(zip(panels[0], labels, strict=True)):
    panel.set_title(f"{name} {label}" if i == 0 else label, fontsize=8)
  style.write_png(made, path, dpi=110)
