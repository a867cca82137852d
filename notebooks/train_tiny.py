# %% [markdown]
# # Train a tiny SANA, and watch the samples improve
#
# A small transformer is trained from random numbers on 80 emoji of people at
# work. As for the large models, autoencoder and text encoder are trained
# already and stay fixed. A CPU is enough.

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
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

import sana_jax
from sana_jax import checkpoint, compilation_cache
from sana_jax import config as config_lib
from sana_jax.data import emoji
from sana_jax.training import loop, text_to_image

plt.rcParams["figure.dpi"] = 72
os.chdir(tempfile.mkdtemp())  # the run is written there
compilation_cache.enable(None, os.environ)
checkpoint.quiet_orbax()
jax.devices()

# %% [markdown]
# ## The pictures
#
# Each has a caption such as `woman cook: light skin tone`: an occupation, a
# gender (or none) and a skin tone.

# %%
people = emoji.load("heldout")
print(people[22]["name"], "|", people[66]["name"], "|", people[57]["name"])
plt.figure(figsize=(8, 2))
plt.imshow(
  np.concatenate(
    [
      np.concatenate([people[20 * i + j]["image"] for j in range(20)], axis=1)
      for i in range(4)
    ]
  )
)
plt.axis("off")
plt.show()

# %% [markdown]
# ## What is learned
#
# With clean latents $x_0$, noise $\epsilon$ and a noise level $\sigma$ between
# 0 and 1, the network sees a point on the straight line between the two, and
# says in which direction the noise is:
#
# $$x_\sigma = (1 - \sigma)\,x_0 + \sigma\,\epsilon, \qquad
# \mathcal{L} = \lVert v_\theta(x_\sigma, \sigma, \text{text})
# - (\epsilon - x_0) \rVert^2$$
#
# ## The config
#
# `configs/emoji.py` made the model that comes with the package: 4 blocks of
# width 256, 8000 steps. This one has 2 blocks of width 128. A misspelled field
# is an error.

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
  checkpoint=config_lib.CheckpointConfig(every=80),
  sample_every=80,
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
# ## Train
#
# `train` is what `train.py` calls. It writes checkpoints, metrics and samples
# to a work directory. Most of the time of so short a run is compiling.

# %%
state = loop.train(config, "run", text_to_image.make_recipe(config, "run"))
print("steps:", int(state.step))
sorted(path.name for path in pathlib.Path("run").iterdir())


# %%
def plot_loss():
  lines = pathlib.Path("run/metrics.jsonl").read_text().splitlines()
  points = [json.loads(line) for line in lines]
  points = [point for point in points if "loss" in point]
  plt.figure(figsize=(6, 2.5))
  plt.plot([p["step"] for p in points], [p["loss"] for p in points])
  plt.yscale("log")
  plt.xlabel("step")
  plt.ylabel("loss")
  plt.show()


plot_loss()

# %% [markdown]
# ## Go on where it stopped
#
# A longer run in the same directory continues from its last checkpoint, with
# the batches and the noise of the steps that follow. It would do the same had
# it been killed.

# %%
config = config_lib.from_dict(
  config_lib.TextToImageConfig, config.to_dict() | {"num_steps": 320}
)
state = loop.train(config, "run", text_to_image.make_recipe(config, "run"))
print("steps:", int(state.step))
plot_loss()

# %% [markdown]
# The curve has no jump at step 160: nothing was forgotten. It is noisy because
# every batch has other noise levels, and the loss differs much between them.
#
# ## The samples
#
# Every 80 steps the same nine prompts were sampled, with the same noise and the
# averaged parameters. The last picture is what the data set has.

# %%
sampled = sorted(pathlib.Path("run/samples").glob("step_*[0-9].png"))
pictures = {path.stem: np.asarray(PIL.Image.open(path)) for path in sampled}
by_name = {record["name"]: record["image"] for record in people}
truth = [by_name[prompt] for prompt in config.sample_prompts]
pictures["data"] = np.concatenate(
  [np.concatenate(truth[3 * i : 3 * i + 3], axis=1) for i in range(3)]
)
figure, axes = plt.subplots(
  1, len(pictures), figsize=(2.2 * len(pictures), 2.5), layout="constrained"
)
for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
  axis.imshow(picture)
  axis.set_title(name.replace("_", " "), fontsize=9)
  axis.axis("off")
plt.show()

# %% [markdown]
# After 80 steps there are people, hardly to be told apart. Then come uniforms
# and the yellow helmet, then the judge's hammer, then goggles and the white
# helmet. At the end most are who they should be.
#
# With 80 pictures, this is learning by heart. What a model does with captions
# that it has not seen is another question: the bundled one was trained on 3575
# other pictures, and was asked for these 80
# (`python -m sana_jax.evaluation.emoji_retrieval`).
#
# `run/export` has the averaged model in the layout of diffusers;
# `SanaPipeline.from_pretrained("run")` reads the directory itself.
