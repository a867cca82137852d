# %% [markdown]
# # Sample: from a prompt to a picture
#
# This notebook uses the emoji model that comes with the package. It is small,
# so a CPU is enough. Published SANA checkpoints are used in the same way.

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
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image

import sana_jax
from sana_jax import images as images_lib
from sana_jax.data import emoji

plt.rcParams["figure.dpi"] = 72
os.chdir(tempfile.mkdtemp())  # files are written there
jax.devices()


# %%
def show(rows, labels):
  """Draws rows of pictures, each row with a label."""
  pictures = [np.asarray(picture) for row in rows for picture in row]
  columns, height = len(rows[0]), pictures[0].shape[0]
  plt.figure(figsize=(1.6 + columns, len(rows)))
  plt.imshow(images_lib.grid(pictures, columns=columns))
  plt.yticks(height * (np.arange(len(rows)) + 0.5), labels)
  plt.xticks([])
  plt.gca().spines[:].set_visible(False)
  plt.show()


# %% [markdown]
# ## A prompt
#
# A pipeline holds the text encoder, the transformer and the autoencoder. The
# first call compiles; the next one of the same shape does not. For a published
# checkpoint, give its name: `from_pretrained("Sana_1600M_1024px_BF16",
# dtype=jnp.bfloat16)`.

# %%
pipe = sana_jax.SanaPipeline.from_pretrained(sana_jax.bundled_checkpoint())
output = pipe("red heart", seed=0)
print(output.images.shape, output.latents.shape)
show([output.images], ["red heart"])

# %% [markdown]
# The transformer works on the latents: 4 x 4 places of 32 numbers. The
# autoencoder makes 64 x 64 pixels of them.
#
# ## Prompts and seeds
#
# An image depends on its seed and its number, not on the batch it is made in.
# Here are six images of each prompt.

# %%
prompts = [
  "grinning face",
  "woman firefighter: dark skin tone",
  "thumbs up: medium skin tone",
  "green heart",
  "rocket",
]
output = pipe(prompts, num_images_per_prompt=6, seed=0)
show(output.images.reshape(len(prompts), 6, *output.images.shape[1:]), prompts)

# %% [markdown]
# Faces, people and hearts come out well, and much alike with every seed: this
# model knows one picture of each by heart. It has seen people in many
# combinations and draws them best. Of the rocket it has only a vague idea, and
# there the seeds differ most.
#
# ## Guidance
#
# Classifier-free guidance calls the network with the prompt and without, and
# goes beyond the difference:
#
# $$v = v_\text{null} + s\,(v_\text{prompt} - v_\text{null})$$
#
# A scale $s$ of 1 is no guidance. The default of this model is 4.5.

# %%
scales = [1.0, 2.0, 4.5, 7.0, 10.0]
guided = [
  pipe(prompts, guidance_scale=scale, num_images_per_prompt=2).images
  for scale in scales
]
show(guided, [f"guidance scale {scale}" for scale in scales])

# %% [markdown]
# With a larger scale colours become stronger and edges harder. At 10 it is too
# much: colours burn, white corners get dirt, and the firefighter falls apart.
#
# ## Steps
#
# A step is one call of the network (two with guidance, done as one batch). The
# solver is Flow-DPM-Solver++ of second order. Each number of steps is compiled
# once.

# %%
steps = [1, 2, 4, 8, 20]
sampled = [
  pipe(prompts, num_inference_steps=n, num_images_per_prompt=2).images
  for n in steps
]
show(sampled, [f"{n} step" if n == 1 else f"{n} steps" for n in steps])

# %% [markdown]
# One step gives an average: blurred, but of the right colour. Two to four are
# not enough, and eight are close to twenty.
#
# ## Negative prompt
#
# A negative prompt takes the place of the empty one in the formula above. The
# result stays away from it. A vague prompt leaves room for that.

# %%
negatives = ["", "red heart", "yellow", "black"]
away = [
  pipe(
    ["square", "woman"], negative_prompt=negative, num_images_per_prompt=3
  ).images
  for negative in negatives
]
show(away, [f"not: {negative}" for negative in negatives])

# %% [markdown]
# Away from red is cyan, away from yellow is blue, away from black is bright. A
# negative prompt is a direction, not a filter: it moves all of the picture.
#
# ## Image to image
#
# Take a picture, add noise to it, and sample from there with a prompt.
# `strength` is the share of the steps that is run. A picture of the data set:

# %%
pictures = {
  record["name"]: record["image"] / 255 for record in emoji.load("train")
}
source = pictures["woman firefighter: light skin tone"]
prompts = ["face", "heart", "square", "fruit"]
strengths = [0.1, 0.2, 0.4]
changed = [
  pipe(prompts, image=source, strength=strength, guidance_scale=2.0).images
  for strength in strengths
]
show(
  [[source, *row] for row in changed],
  [f"strength {strength}" for strength in strengths],
)
schedule = pipe.make_schedule(strength=0.4)
print(f"strength 0.4 begins at sigma = {schedule.sigmas[0]:.2f}")

# %% [markdown]
# With little strength the picture stays what it was. In between it is a mix:
# the heart at 0.2 still has a face, and the square is still red. At 0.4 nothing
# is left of the firefighter: this model moves its noise levels so far towards
# noise (flow shift 5) that 40 % of the steps begin with little else.
#
# ## Inpainting
#
# White in the mask is made anew, black stays. One latent stands for 16 x 16
# pixels here, so masks are best cut along these.

# %%
face = pictures["grinning face"]
mask = np.zeros((64, 64))
mask[32:] = 1
prompts = ["face with medical mask", "crying face", "angry face"]
output = pipe(prompts, image=face, mask_image=mask, num_images_per_prompt=2)
masked = face * (1 - mask[..., None])
show([[face, masked, *output.images]], ["the lower half anew"])

# %% [markdown]
# The upper half is given at every step, with the noise that belongs to it. The
# transformer sees it, and what is new fits the old outline. The medical mask is
# what was asked for. Crying and angry faces come out the same: what would tell
# them apart are eyes and brows, and these are given.
#
# ## Save, with everything it takes to make it again
#
# Settings go into the PNG as text. What one reads there gives the same picture.

# %%
settings = {
  "prompt": "woman astronaut: medium skin tone",
  "seed": 7,
  "num_inference_steps": 20,
  "guidance_scale": 4.5,
}
image = pipe(**settings).images[0]
images_lib.write_png(
  "astronaut.png", image, metadata={"settings": json.dumps(settings)}
)

with PIL.Image.open("astronaut.png") as saved:
  read = json.loads(saved.text["settings"])
  again = np.asarray(pipe(**read).pil()[0])
  np.testing.assert_array_equal(again, saved)
print(read)
show([[image, again / 255]], ["made, and made again"])

# %% [markdown]
# At a command line, `python sample.py --prompt="red heart"` writes such files,
# and `--reproduce=FILE` makes one again.
