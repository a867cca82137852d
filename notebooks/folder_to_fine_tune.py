# %% [markdown]
# # From a folder of pictures to a fine-tune
#
# A folder with `.txt` files beside the pictures is all it takes. Here the
# folder is made first: 96 emoji with red and blue exchanged, so that what the
# model learns can be seen. Put your own folder in its place.

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
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from absl import logging

import sana_jax
from sana_jax import compilation_cache
from sana_jax import config as config_lib
from sana_jax import images as images_lib
from sana_jax.data import emoji, sources
from sana_jax.precompute import job, task
from sana_jax.tools import diagnosis, doctor
from sana_jax.training import loop, text_to_image

plt.rcParams["figure.dpi"] = 72
os.chdir(tempfile.mkdtemp())  # everything is written there
compilation_cache.enable(None, os.environ)
logging.set_verbosity(logging.ERROR)
jax.devices()

# %% [markdown]
# ## The folder

# %%
folder = pathlib.Path("pictures")
folder.mkdir()
chosen = [
  record
  for record in emoji.load("train")
  if record["group"] == "Smileys & Emotion"
][:96]
for number, record in enumerate(chosen):
  picture = PIL.Image.fromarray(record["image"][..., ::-1])
  picture.save(folder / f"{number:03d}.png")
  (folder / f"{number:03d}.txt").write_text(record["name"])

print((folder / "000.txt").read_text(), "|", (folder / "001.txt").read_text())
plt.figure(figsize=(8, 2.6))
plt.imshow(
  images_lib.grid(
    [np.asarray(PIL.Image.open(p)) / 255 for p in sorted(folder.glob("*.png"))],
    columns=24,
  )
)
plt.axis("off")
plt.show()

# %% [markdown]
# ## The doctor
#
# What is wrong with the data is better known before training. Every picture is
# decoded, every caption counted. At a command line:
# `python -m sana_jax.tools.doctor pictures/`.

# %%
bundled = sana_jax.bundled_checkpoint()
source = sources.open_source("pictures")
settings = diagnosis.Settings.load(
  image_size=64,
  kind="square",
  multiple=16,
  max_buckets=1,
  batch_size=16,
  tokenizer=str(bundled / "tokenizer"),
  max_tokens=24,
)
examined = diagnosis.examine_all(source, settings, num_threads=2)
found = diagnosis.sort(source.name, examined, settings)
report = diagnosis.summarize(source, examined, found, settings)
report |= {"config": "see below", "tokenizer": "the bundled one"}
print("\n".join(doctor.lines(report)).replace(f"{os.getcwd()}/", ""))

# %% [markdown]
# The last line counts warnings, too: anything to look at is a problem found.
# Here it is one warning, and it does not matter: six emoji are so much like
# others that they may be copies. With photographs, look at those it names.
#
# ## The cache
#
# Latents and text states are made once, not at every step. At a command line:
# `python -m sana_jax.precompute --source=pictures/ --output=cache/ ...`.

# %%
prepared = job.prepare(
  task.Task(
    source="pictures", checkpoint=str(bundled), image_size=64, buckets="square"
  )
)
outcome = job.run(prepared, pathlib.Path("cache"), started=time.monotonic())
print("pictures left out:", outcome.skipped)
sorted(path.name for path in pathlib.Path("cache").iterdir())

# %% [markdown]
# ## Before
#
# Two prompts are captions of the folder. The other six are not: there are only
# faces in it.

# %%
inside = ["grinning face", "crying face"]
outside = [
  "red heart",
  "woman firefighter: dark skin tone",
  "man astronaut: light skin tone",
  "thumbs up: medium skin tone",
  "princess",
  "blue square",
]
pipe = sana_jax.SanaPipeline.from_pretrained(bundled)
before = pipe([*inside, *outside], seed=1).images

# %% [markdown]
# ## Train
#
# The config describes the model that training begins with, `init_from` names
# it. The autoencoder and the text encoder stay as they are.


# %%
def read(cls, path):
  return config_lib.from_dict(cls, json.loads((bundled / path).read_text()))


config = config_lib.TextToImageConfig(
  init_from=str(bundled),
  components=str(bundled),
  model=read(config_lib.SanaConfig, "transformer/config.json"),
  text_encoder=read(config_lib.Gemma2Config, "text_encoder/config.json"),
  max_sequence_length=24,
  flow=config_lib.FlowConfig(shift=5.0, null_mask="own"),
  data=config_lib.DataConfig(cache="cache"),
  batch_size=16,
  num_steps=80,
  optim=config_lib.OptimConfig(
    peak_lr=5e-4, warmup_steps=20, b2=0.99, clip_norm=1.0
  ),
  ema_decay=0.95,
  dtype="float32",
  remat="none",
  log_every=5,
  checkpoint=config_lib.CheckpointConfig(every=20, keep=4),
  sample_every=80,
  sample_prompts=tuple(inside),
)
loop.train(config, "run", text_to_image.make_recipe(config, "run"))
lines = pathlib.Path("run/metrics.jsonl").read_text().splitlines()
points = [point for point in map(json.loads, lines) if "loss" in point]
plt.figure(figsize=(6, 2.2))
plt.plot([p["step"] for p in points], [p["loss"] for p in points])
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## After
#
# A work directory is read like a checkpoint, at any step that is kept; so is
# `run/export`, which diffusers reads, too.

# %%
rows = {"before": before}
for step in (20, 40, 80):
  tuned = sana_jax.SanaPipeline.from_pretrained("run", step=step)
  rows[f"step {step}"] = tuned([*inside, *outside], seed=1).images
plt.figure(figsize=(9, 4.4))
plt.imshow(images_lib.grid(np.concatenate(list(rows.values())), columns=8))
plt.yticks(32 + 64 * np.arange(len(rows)), list(rows))
plt.xticks(
  32 + 64 * np.arange(8),
  [name.replace(": ", "\n") for name in (*inside, *outside)],
  rotation=60,
  fontsize=8,
)
plt.axvline(2 * 64, color="black")
plt.show()

# %% [markdown]
# After 20 steps the faces are blue, but blurred; after 80 they have eyes and
# mouths again. What was not in the folder follows later: the red heart turns to
# pink, the blue square to brown. It is an exchange of colours that was learned,
# not blue faces alone. People change unevenly, and the thumb is spoiled.
#
# A folder of one kind of picture pulls all of the model with it: stop early, or
# mix in other pictures (`data.sources` takes several folders, with weights).
