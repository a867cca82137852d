# %% [markdown]
# # Inside the linear attention
#
# Softmax attention computes a weight for each pair of patches. Linear attention
# does not: with $\phi(x) = \max(x, 0)$ it sums up keys and values once, in a
# state $S$, and every query reads from that:
#
# $$y_n = \frac{\phi(q_n)^\top S}{\phi(q_n)^\top z}, \qquad
# S = \sum_m \phi(k_m)\,v_m^\top, \qquad z = \sum_m \phi(k_m)$$
#
# The weights are still there, but implicit. This notebook writes them out,
#
# $$A_{nm} = \frac{\phi(q_n)^\top \phi(k_m)}{\sum_j \phi(q_n)^\top \phi(k_j)},
# \qquad y_n = \sum_m A_{nm} v_m,$$
#
# and looks at them, by layer and by noise level.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sana_jax
from sana_jax import images as images_lib
from sana_jax.models import sana_block

plt.rcParams["figure.dpi"] = 96
jax.config.update("jax_default_matmul_precision", "highest")
pipe = sana_jax.SanaPipeline.from_pretrained(sana_jax.bundled_checkpoint())
model = pipe.transformer
print(f"{model.num_layers} blocks of width {model.width}")
jax.devices()

# %% [markdown]
# ## What is looked at
#
# Four prompts are sampled, and what the sampler passes through is kept.

# %%
prompts = [
  "woman firefighter: dark skin tone",
  "grinning face",
  "green heart",
  "man astronaut: light skin tone",
]
condition = pipe.encode_prompt(prompts)
schedule = pipe.make_schedule()
noise = jax.random.normal(jax.random.key(0), (len(prompts), 4, 4, 32))
trajectory = pipe.denoise(
  noise,
  schedule,
  condition,
  pipe.encode_negative_prompt([""], condition),
  trajectory=True,
)
steps = [0, 8, 14, 19]
sigmas = [float(schedule.sigmas[i]) for i in steps]
pictures = np.asarray(pipe.decode(trajectory.samples[-1]))
thoughts = np.concatenate(
  [pictures, *(pipe.decode(trajectory.denoised[i]) for i in steps)]
)
plt.figure(figsize=(4, 4.6))
plt.imshow(images_lib.grid(thoughts, columns=len(prompts)))
plt.yticks(
  32 + 64 * np.arange(1 + len(steps)),
  ["result", *(f"at sigma {sigma:.2f}" for sigma in sigmas)],
)
plt.xticks([])
plt.show()

# %% [markdown]
# Below the result is what the model believes the picture to be at four noise
# levels. At sigma 1 it has seen nothing but noise: what it believes comes from
# the prompt, and is blurred. Eyes and edges come later.
#
# ## Writing the attention out
#
# A forward pass, block by block, with the parts of the model. The check at the
# end says that the implicit weights give what the linear form gives.


# %%
def tokens(x):
  return x.reshape(x.shape[0], -1, x.shape[-1])


def split(x, head_dim):
  return x.reshape(*x.shape[:2], -1, head_dim)


def look_at_block(block, x, modulation, caption, mask):
  """Returns implicit weights, state, and weights of the words, of a block."""
  shift, scale, gate, *_ = block.modulation(modulation)
  inputs = tokens(sana_block.modulate(block.norm1(x), shift, scale))
  attention = block.self_attention
  q, k, v = attention.qkv.split(inputs, 3, axis="heads")
  q, k = attention.norm_q(q), attention.norm_k(k)
  q, k, v = (split(part, attention.head_dim) for part in (q, k, v))
  q, k = jax.nn.relu(q), jax.nn.relu(k)
  scores = jnp.einsum("bnhd,bmhd->bhnm", q, k)
  weights = scores / (scores.sum(-1, keepdims=True) + 1e-15)
  mixed = jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(inputs.shape)
  attended = attention(inputs)

  cross = block.cross_attention
  x = x + gate * attended.reshape(x.shape)
  queries = split(cross.norm_q(cross.q(tokens(x))), cross.head_dim)
  keys, _ = cross.encode(caption)
  logits = jnp.einsum("bnhd,blhd->bhnl", queries, keys) / cross.head_dim**0.5
  return {
    "weights": weights,
    "state": jnp.einsum("bmhk,bmhv->bhkv", k, v),
    "error": jnp.abs(attention.project(mixed) - attended).max(),
    "words": jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30)),
  }


@jax.jit
def look(x, timestep, text, mask):
  _, modulation = model.embed_time(timestep)
  x, caption = model.patch_embed(x), model.caption_embed(text)
  seen = []
  for i in range(model.num_layers):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
    seen.append(look_at_block(block, x, modulation, caption, mask))
    x = block(x, modulation, caption, mask)
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


found = [
  look(
    trajectory.samples[i],
    jnp.full(len(prompts), schedule.timesteps[i]),
    *condition,
  )
  for i in steps
]
found = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
print("sigma, layer, picture, head, query, key:", found["weights"].shape)
print(f"largest difference to the linear form: {found['error'].max():.0e}")
np.testing.assert_allclose(found["error"], 0, atol=1e-3)

# %% [markdown]
# ## Where patches look, by layer
#
# The latents are a grid of 4 x 4 patches: each stands for 16 x 16 pixels. For
# three of them (framed), here are the weights, the mean of the heads, at the
# last step: a patch is as bright as it is looked at. With 1/8 and more it is as
# in the picture, with 0 it is black; were all patches looked at alike, every
# weight would be 1/16.


# %%
FULL = 1 / 8


def lit(picture, weights, full):
  """Returns a picture whose 16 patches are as bright as weights are large."""
  light = np.clip(weights.reshape(4, 4) / full, 0, 1)
  return picture * light.repeat(16, 0).repeat(16, 1)[..., None]


def draw_weights(axis, picture, weights, query):
  """Lights the picture by the weights, and frames who looks."""
  axis.imshow(lit(picture, weights, FULL))
  row, column = divmod(query, 4)
  axis.add_patch(
    plt.Rectangle((16 * column, 16 * row), 15, 15, fill=False, color="red")
  )
  axis.set_xticks([])
  axis.set_yticks([])


def draw_grid(picture, columns, titles):
  """Draws layers by columns; `columns` gives (weights by layer, query)."""
  figure, axes = plt.subplots(
    *(model.num_layers, len(columns)),
    figsize=(1.1 * len(columns) + 1, 4.8),
    layout="constrained",
    squeeze=False,
  )
  for number, (weights, query) in enumerate(columns):
    for layer, axis in enumerate(axes[:, number]):
      draw_weights(axis, picture, weights[layer], query)
      if number == 0:
        axis.set_ylabel(f"layer {layer}", fontsize=9)
    axes[0, number].set_title(titles[number], fontsize=9)
  scale = plt.cm.ScalarMappable(plt.Normalize(0, FULL), "gray")
  figure.colorbar(scale, ax=axes, shrink=0.6, label="weight")
  plt.show()


queries = {"corner": 0, "face": 5, "below": 13}
means = found["weights"].mean(3)  # over heads
for picture in (0, 1):
  draw_grid(
    pictures[picture],
    [(means[-1, :, picture, query], query) for query in queries.values()],
    list(queries),
  )

# %% [markdown]
# In the last layer, background looks at background: from the corner of the
# smiling face (second figure) the other three corners are seen, from the corner
# of the firefighter the left and right edges. The face looks at the face and at
# what is below it. In layer 1 one eye of the smiling face sees the other.
#
# From the corner of the smiling face, in layer 3, the other corners have more
# than 1/8; all other weights in these figures are below. But they are means of
# eight heads, which are more even than the heads themselves (further down).
#
# One thing is missing. Weights do not fall with the distance from the frame:
# nothing here is local. That is left to the 3 x 3 convolution of the Mix-FFN.
#
# ## By noise level
#
# The patch on the firefighter's face again, at four noise levels.

# %%
draw_grid(
  pictures[0],
  [(means[step, :, 0, 5], 5) for step in range(len(steps))],
  [f"sigma {sigma:.2f}" for sigma in sigmas],
)

# %% [markdown]
# From noise, the first two layers look at all patches alike: there is
# nothing to tell them apart by. Layers 2 and 3 prefer the lower middle already:
# by then the prompt has been read. With less noise, the background becomes
# darker: the patch on the face sees the figure, and most of all the face.
#
# There is no positional embedding. Where the middle is, the network can only
# know from the borders: the convolution pads them with zeros.
#
# ## Heads
#
# The mean hides what heads do. All 16 x 16 weights of the 8 heads of each
# layer, at the last step: a row is a query, a column is a patch that it looks
# at. A vertical line is a patch that all look at; a diagonal is a patch that
# looks at itself.

# %%
print(f"weights above 1/4: {np.mean(found['weights'] > 1 / 4):.1%}")
figure, axes = plt.subplots(
  *(model.num_layers, 8), figsize=(9, 4.8), layout="constrained"
)
for layer, row in enumerate(axes):
  for head, axis in enumerate(row):
    image = axis.imshow(found["weights"][-1, layer, 0, head], vmin=0, vmax=0.25)
    axis.set_xticks([])
    axis.set_yticks([])
  row[0].set_ylabel(f"layer {layer}", fontsize=9)
figure.colorbar(image, ax=axes, shrink=0.6, label="weight")
plt.show()

# %% [markdown]
# Most heads, above all in layer 2, have vertical lines: all queries look at
# the same patches, and get about the same average of a region. A few heads have
# blocks: a group of patches that look at each other, such as the middle of the
# picture in the last head of layer 3. There are no diagonals. One weight in a
# thousand exceeds 1/4 (yellow), in a few heads of layers 0, 2 and 3: sharp
# attention to one patch is rare in this model, but linear attention can do it.
#
# ## How much the state holds
#
# $S$ is a 32 x 32 matrix for each head, whatever the number of patches. With
# singular values $s_i$ and $p_i = s_i / \sum_j s_j$, its effective rank is
# $\exp(-\sum_i p_i \log p_i)$: how many directions are in use. With 16 patches
# it cannot exceed 16. Beside it, the same measure for the weights of a query:
# how many patches it looks at.


# %%
def perplexity(p):
  p = p / p.sum(-1, keepdims=True)
  return np.exp(-(p * np.log(p + 1e-12)).sum(-1))


singular = np.linalg.svd(found["state"], compute_uv=False)
measures = {
  "effective rank of the state": perplexity(singular).mean((2, 3)),
  "patches looked at": perplexity(found["weights"]).mean((2, 3, 4)),
}
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for axis, (name, values) in zip(axes, measures.items(), strict=True):
  for layer in range(model.num_layers):
    axis.plot(sigmas, values[:, layer], marker="o", label=f"layer {layer}")
  axis.set_title(name)
  axis.set_xlabel("sigma")
  axis.set_ylim(0, 16.5)
  axis.invert_xaxis()
axes[0].legend()
plt.show()

# %% [markdown]
# Three to six of 32 directions are in use. In the first two layers they
# become more as noise goes, and the weights become less even; the last two are
# the same at every noise level. A picture of 1024 pixels has 1024 patches in
# place of 16, and a state of the same size: what holds here for a small model
# need not hold there. For that, load a published checkpoint above.
#
# ## The words
#
# Cross-attention is a softmax, so its weights are explicit. Which words are
# looked at, by layer and noise level, mean of patches and heads:


# %%
def words_of(prompt):
  return [pipe.tokenizer.decode([i]) for i in pipe.tokenizer.tokenize(prompt)]


figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, picture in zip(axes, (0, 3), strict=True):
  names = words_of(prompts[picture])
  attended = found["words"].mean((3, 4))[:, :, picture, : len(names)]
  image = axis.imshow(
    attended.reshape(-1, len(names)), vmin=0, vmax=0.6, aspect="auto"
  )
  axis.set_xticks(range(len(names)), names, rotation=60, fontsize=9)
  labels = [
    f"sigma {sigma:.2f}, layer {layer}"
    for sigma in sigmas
    for layer in range(model.num_layers)
  ]
  axis.set_yticks(range(len(labels)), labels, fontsize=9)
figure.colorbar(image, ax=axes, label="weight")
plt.show()

# %% [markdown]
# The word for what is drawn gets most: `fighter`, `astr`. What a layer reads
# is the same at every noise level: the rows repeat after four. Of `dark skin
# tone` it is `tone` that is read. The text encoder is causal: a token knows
# those before it, so only the last one knows all three. `<bos>` comes first and
# knows nothing of the prompt. It is where to look when no word is needed.
#
# And where a word is looked at: for each patch the weight of the word, mean of
# the heads and layers, at the last step. The patch that reads it most is as
# bright as in the picture.

# %%
names = words_of(prompts[0])
maps = found["words"][-1].mean((0, 2))[0]  # [query, word]
figure, axes = plt.subplots(
  1, len(names), figsize=(1.1 * len(names), 1.5), layout="constrained"
)
for number, (axis, name) in enumerate(zip(axes, names, strict=True)):
  axis.imshow(lit(pictures[0], maps[:, number], maps[:, number].max()))
  axis.set_title(name, fontsize=9)
  axis.axis("off")
plt.show()

# %% [markdown]
# `dark`, `skin` and `tone` are read from the face, `fire` from the helmet,
# `fighter` from helmet and suit, `woman` from where the hair is, and `<bos>`
# from the corners, where there is nothing but background.
