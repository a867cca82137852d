# %% [markdown]
# # Your own loss and your own sampler
#
# Both are ordinary functions. This notebook writes one of each in about 20
# lines, and compares them with those of the package.

# %%
# Installs the package where it is missing, with what jax needs for the device
# that it was installed for. Colab asks for a wheel: docs/guides/notebook.md.
import importlib.util
import pathlib
import re
import subprocess
import sys

SOURCE = ".."  # a clone, wheel or zip of the repository, or git+https://...
has = importlib.util.find_spec
if has("sana_jax") is None or has("sana_jax").origin is None:  # a mere folder
  path = pathlib.Path(SOURCE).resolve()
  is_there = path.is_file() or (path / "sana_jax/__init__.py").exists()
  source = path if is_there else SOURCE if "://" in SOURCE else None
  if not source and "google.colab" in sys.modules:
    from google.colab import files

    for name, data in files.upload().items():
      # Colab calls a second upload "... (1).whl", which pip refuses.
      source = re.sub(r" \(\d+\)(?=\.\w+$)", "", name)
      pathlib.Path(source).write_bytes(data)
  if not source:
    raise FileNotFoundError(f"Set {SOURCE=} to a clone or wheel of sana_jax.")
  extras = [name for name in ("cuda12", "cuda13") if has(f"jax_{name}_plugin")]
  extras += ["tpu"] if has("libtpu") else []
  pip = [sys.executable, "-m", "pip", "install", "--quiet", source]
  subprocess.run([*pip, f"jax[{','.join(extras)}]", "matplotlib"], check=True)

# %%
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

import sana_jax
from sana_jax import checkpoint, compilation_cache
from sana_jax import config as config_lib
from sana_jax import images as images_lib
from sana_jax.diffusion import flow, guidance, samplers, schedules
from sana_jax.training import inputs, loop, text_to_image

plt.rcParams["figure.dpi"] = 72
os.chdir(tempfile.mkdtemp())  # the runs are written there
compilation_cache.enable(None, os.environ)
checkpoint.quiet_orbax()
jax.devices()

# %% [markdown]
# ## A loss
#
# The run is the one of `train_tiny.ipynb`: 80 emoji of people at work.

# %%
bundled = sana_jax.bundled_checkpoint()
config = config_lib.TextToImageConfig(
  autoencoder=str(bundled / "vae"),
  tokenizer=str(bundled / "tokenizer"),
  text_encoder_path=str(bundled / "text_encoder"),
  text_encoder=config_lib.from_dict(
    config_lib.Gemma2Config,
    json.loads((bundled / "text_encoder/config.json").read_text()),
  ),
  model=config_lib.SanaConfig(
    num_attention_heads=4,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=32,
    cross_attention_dim=128,
    caption_channels=192,
    qk_norm="rms_norm_across_heads",
    sample_size=4,
  ),
  max_sequence_length=24,
  flow=config_lib.FlowConfig(shift=3.0, null_mask="own"),
  data=config_lib.DataConfig(split="heldout"),
  batch_size=16,
  num_steps=160,
  optim=config_lib.OptimConfig(
    peak_lr=3e-3, warmup_steps=20, b2=0.99, clip_norm=1.0
  ),
  ema_decay=0.97,
  dtype="float32",
  remat="none",
  scan_layers=False,
  log_every=5,
  checkpoint=config_lib.CheckpointConfig(every=160),
  sample_every=160,
  sample_guidance_scale=2.0,
  sample_prompts=(
    "woman cook: light skin tone",
    "man judge: medium skin tone",
    "woman firefighter: medium-dark skin tone",
    "man police officer: medium-light skin tone",
    "astronaut: medium-dark skin tone",
    "man construction worker: dark skin tone",
    "woman farmer: medium-dark skin tone",
    "woman singer: medium-light skin tone",
    "man scientist: medium-dark skin tone",
  ),
)

# %% [markdown]
# Which noise levels are trained is a choice. Ours are drawn from a logit-normal
# law, moved towards noise by the flow shift. Here is another one: all levels
# alike, $\sigma \sim U(0, 1)$. A loss gets the trained parameters, what is
# fixed, a key and a batch. It returns a number to minimise, and others to log.


# %%
def uniform_loss(params, frozen, key, batch):
  key_drop, key_sigma, key_noise = jax.random.split(key, 3)
  given = inputs.tokens_to_conditions(params, frozen, batch, config)
  text, mask = text_to_image.drop_captions(key_drop, given, config.flow)
  sigma = flow.uniform(key_sigma, len(text))
  noise = jax.random.normal(key_noise, given.latents.shape)
  noisy = flow.interpolate(given.latents, noise, sigma)
  prediction = params["transformer"](noisy, 1000 * sigma, text, mask)
  errors = flow.squared_error(prediction, flow.velocity(given.latents, noise))
  return errors.mean(), text_to_image.loss_by_sigma(errors, sigma)


# %% [markdown]
# A recipe says what is trained; its loss can be replaced. For a Huber loss, or
# a weight by noise level, change the last two lines.


# %%
def train(name, loss_fn=None):
  recipe = text_to_image.make_recipe(config, name)
  if loss_fn is not None:
    recipe = recipe._replace(loss_fn=loss_fn)
  loop.train(config, name, recipe)
  lines = pathlib.Path(name, "metrics.jsonl").read_text().splitlines()
  return [point for point in map(json.loads, lines) if "loss" in point]


curves = {"ours": train("ours"), "uniform": train("uniform", uniform_loss)}

# %%
levels = [f"{low / 5:.1f}_{low / 5 + 0.2:.1f}" for low in range(5)]
figure, axes = plt.subplots(
  1, 3, figsize=(11, 3), width_ratios=[2, 1.5, 1.5], layout="constrained"
)
for number, (name, points) in enumerate(curves.items()):
  late = points[len(points) // 2 :]
  errors = [
    np.mean([p[key] for p in late if key in p])
    for key in (f"loss/sigma_{level}" for level in levels)
  ]
  axes[0].bar(np.arange(5) + 0.4 * number, errors, width=0.4, label=name)
  axes[number + 1].imshow(PIL.Image.open(f"{name}/samples/step_0000160.png"))
  axes[number + 1].set_title(name)
  axes[number + 1].axis("off")
axes[0].set_xticks(
  np.arange(5) + 0.2, [level.replace("_", "-") for level in levels]
)
axes[0].set_xlabel("noise level")
axes[0].set_title("squared error in the second half of the run")
axes[0].legend()
plt.show()

# %% [markdown]
# The uniform law trains more on little noise: its error is smaller there, and
# larger beyond 0.6. The pictures say which matters: its clothes are paler, and
# the helmet is not yellow yet. What a picture shows is decided at high noise
# levels. A small error at one level can matter more than a large one at
# another.
#
# ## A sampler
#
# A sampler follows $dx/d\sigma = v(x, \sigma)$ from noise to data. Heun's
# method takes an Euler step, looks at the slope where it ends, and goes back to
# take the mean of both. It calls the network twice a step. (Only the last step
# is Euler's: at $\sigma = 0$ no noise is left to be seen.)


# %%
def heun(velocity_fn, x, sigmas):
  def velocity(x, sigma):
    sigma = jnp.full(len(x), sigma)
    return velocity_fn(x, sigma, 1000 * sigma)

  def step(x, ends):
    sigma, target = ends
    slope = velocity(x, sigma)
    there = x + (target - sigma) * slope
    better = (slope + velocity(there, target)) / 2
    slope = jnp.where(target > 0, better, slope)
    return x + (target - sigma) * slope, None

  return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


# %% [markdown]
# Now the model that comes with the package, in pieces: text states, a velocity
# function, and guidance, which makes another velocity function of it.

# %%
pipe = sana_jax.SanaPipeline.from_pretrained(bundled)
prompts = [
  "grinning face",
  "princess",
  "green heart",
  "man astronaut: light skin tone",
]
condition = pipe.encode_prompt(prompts)
null = pipe.encode_negative_prompt([""], condition)
noise = jax.random.normal(jax.random.key(0), (len(prompts), 4, 4, 32))


def velocity_under(condition):
  return lambda x, sigma, timestep: pipe.transformer(x, timestep, *condition)


guided = guidance.classifier_free(velocity_under, condition, null, scale=3.0)

# %% [markdown]
# All three methods begin with the same noise. What would be exact is unknown;
# Heun with 100 steps stands for it. A method is as good as its distance to that
# is small, for as many calls of the network.

# %%
euler, dpm = schedules.FlowEuler(shift=5), schedules.FlowDPMSolver(flow_shift=5)
own = jax.jit(lambda x, sigmas: heun(guided, x, sigmas))
ours = jax.jit(lambda x, schedule: samplers.sample(guided, x, schedule))

exact = own(noise, euler.schedule(100).sigmas)
calls = [4, 8, 16]
latents = {
  "Euler": [ours(noise, euler.schedule(n)) for n in calls],
  "Flow-DPM-Solver++": [ours(noise, dpm.schedule(n)) for n in calls],
  "Heun, ours here": [own(noise, euler.schedule(n // 2).sigmas) for n in calls],
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for name, results in latents.items():
  errors = [float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for x in results]
  axes[0].loglog(calls, errors, marker="o", label=name)
axes[0].set_xlabel("calls of the network")
axes[0].set_xticks(calls, calls)
axes[0].tick_params(axis="x", which="minor", labelbottom=False)
axes[0].set_ylabel("distance of latents")
axes[0].legend()
rows = [pipe.decode(x) for x in (*(r[1] for r in latents.values()), exact)]
axes[1].imshow(images_lib.grid(np.concatenate(rows), columns=len(prompts)))
axes[1].set_yticks(
  32 + 64 * np.arange(4), [*(f"{name}, 8 calls" for name in latents), "exact"]
)
axes[1].set_xticks([])
plt.show()

# %% [markdown]
# Heun's method is the worst of the three here, and counting says why: for as
# many calls it takes half as many steps, and with so few, its second order does
# not pay. Flow-DPM-Solver++ has a second order, too, but gets it from what
# earlier steps have seen, without another call. Euler's method keeps up: with
# so few steps the order says little. On straight paths each of the three would
# be exact; paths bend, because the network predicts an average, and all three
# err. At 8 calls only the astronaut tells the methods apart, and Heun's has
# green stains.
#
# A solver whose steps are weighted sums of what the network says is a
# `Schedule`, a table of numbers: hand yours to `pipe.denoise`.
