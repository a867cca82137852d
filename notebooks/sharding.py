# %% [markdown]
# # Sharding, made visible
#
# A mesh arranges devices along axes; a table of rules says which axis of an
# array is cut along which axis of the mesh. No model code changes. Here are
# eight devices: those of a TPU, if there is one with eight, or else eight
# virtual ones of the CPU.

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
import os

# Read when jax starts; it has no effect on devices other than CPUs.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import matplotlib.pyplot as plt
import numpy as np

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import sana
from sana_jax.plan import collectives, compilation
from sana_jax.training import budget

plt.rcParams["figure.dpi"] = 72
devices = jax.devices()
if len(devices) < 8:
  devices = jax.devices("cpu")
devices = devices[:8]
if devices[0].platform == "cpu":
  # What devices send each other does not depend on it, and compiling does.
  jax.config.update("jax_disable_most_optimizations", True)
print(devices[0].platform, [device.id for device in devices])

# %% [markdown]
# ## Meshes
#
# There are four axes. On `data`, every device has the whole model and its own
# samples. On `fsdp`, samples are cut and so is the model. On `tensor`, every
# matrix product is cut. On `sequence`, every picture is: its rows.

# %%
shapes = [
  {"data": 8},
  {"fsdp": 8},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"fsdp": 4, "sequence": 2},
]
meshes = [sharding.make_mesh(shape, devices) for shape in shapes]
names = [", ".join(f"{k}={v}" for k, v in shape.items()) for shape in shapes]

for name, axes in sharding.RULES.items():
  print(f"{name:12} -> {', '.join(axes) or 'whole'}")

# %% [markdown]
# The left side are the names of axes of arrays. `batch` and `rows` belong to
# what flows through the network, the others to parameters. Every model has a
# table of its parameters; that of the transformer begins so:

# %%
for pattern, axes in sana.PARAM_AXES[1:5]:
  print(f"{pattern:45} {axes}")

# %% [markdown]
# ## Who holds what
#
# The config of a small run on noise (no data are needed), and its training step
# for each mesh. Nothing is computed yet: these are shapes and places.

# %%
config = config_lib.TextToImageConfig(
  model=config_lib.SanaConfig(
    num_attention_heads=8,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=64,
    cross_attention_dim=256,
    caption_channels=64,
    sample_size=8,
  ),
  text_encoder=config_lib.Gemma2Config(hidden_size=64),
  max_sequence_length=16,
  data=config_lib.DataConfig(synthetic=True, image_size=256),
  batch_size=16,
  optim=config_lib.OptimConfig(peak_lr=1e-3, warmup_steps=1),
  dtype="float32",
  remat="none",
)
steps = [compilation.make_step(config, mesh, (8, 8)) for mesh in meshes]


# %%
def draw_places(axis, array):
  """Draws the last (of latents, first) two axes, and the devices on a piece."""
  shape, first = array.shape, 0 if len(array.shape) == 4 else 1
  rows, columns = shape[first : first + 2]
  pieces = {}
  for device, index in array.sharding.devices_indices_map(shape).items():
    (top, bottom, _), (left, right, _) = (
      part.indices(n)
      for part, n in zip(index[first : first + 2], (rows, columns), strict=True)
    )
    pieces.setdefault((top, bottom, left, right), []).append(device.id)
  for (top, bottom, left, right), ids in pieces.items():
    axis.add_patch(
      plt.Rectangle(
        *((left, top), right - left, bottom - top),
        facecolor=plt.cm.Set3(ids[0]),
        edgecolor="black",
      )
    )
    center = ((left + right) / 2, (top + bottom) / 2)
    axis.text(
      *center, " ".join(map(str, ids)), ha="center", va="center", fontsize=8
    )
  axis.set_xlim(0, columns)
  axis.set_ylim(rows, 0)
  axis.set_xticks([0, columns])
  axis.set_yticks([0, rows])


def arrays(step):
  blocks = step.program.state.params["transformer"].blocks
  return {
    "latents: samples, rows": step.batch["latents"],
    "q of cross-attention": blocks.cross_attention.q.kernel.get_value(),
    "out of cross-attention": blocks.cross_attention.out.kernel.get_value(),
    "qkv of self-attention": blocks.self_attention.qkv.kernel.get_value(),
  }


figure, axes = plt.subplots(4, 4, figsize=(10, 7), layout="constrained")
for row, step, name in zip(axes, steps, names, strict=True):
  for axis, (what, array) in zip(row, arrays(step).items(), strict=True):
    draw_places(axis, array)
    axis.set_title(what, fontsize=8)
  row[0].set_ylabel(name, fontsize=8)
plt.show()

# %% [markdown]
# A row is a mesh. Numbers are the devices that hold a piece; several numbers
# are copies.
#
# - `data=8`: each device has two samples and all parameters.
# - `fsdp=8`: the same samples, and an eighth of every matrix. Biases and scales
#   (`None` in the table above) and depthwise kernels are whole: they are small.
# - `tensor=2`: `q` is cut in columns and `out` in rows, so the heads of a
#   device stay on it from one to the other. `qkv` has three parts side by side;
#   it is cut along its input while it is stored, and moved when it is used.
# - `sequence=2`: two devices have the same parameters, and each has one half of
#   the rows of the same pictures.
#
# JAX draws such pictures, too, of an array that exists:

# %%
state = steps[0].program.init(jax.random.key(0))
kernel = jax.device_put(
  state.params["transformer"].blocks.cross_attention.q.kernel[0],
  jax.sharding.NamedSharding(
    meshes[2], jax.sharding.PartitionSpec("fsdp", "tensor")
  ),
)
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# ## Memory
#
# The state of a run is parameters, their average, and two moments of AdamW. For
# SANA 1.6B, from shapes alone:

# %%
large = config_lib.TextToImageConfig(
  model=config_lib.sana_1600m(),
  data=config_lib.DataConfig(synthetic=True, image_size=1024),
)
options = [{"data": 8}, {"data": 4, "fsdp": 2}, {"fsdp": 8}]
bars = {
  ", ".join(f"{k}={v}" for k, v in shape.items()): budget.state_budget(
    compilation.make_program(large, sharding.make_mesh(shape, devices)).state
  )
  for shape in options
}
plt.figure(figsize=(7, 2.2))
left = np.zeros(len(bars))
for part in ("parameters", "average", "optimiser"):
  sizes = np.array([bar[part] / 2**30 for bar in bars.values()])
  plt.barh(list(bars), sizes, left=left, label=part)
  left += sizes
plt.axvline(15.75, color="black", linestyle=":", label="a TPU v5e has")
plt.xlabel("GiB on each device")
plt.legend(fontsize=8)
plt.gca().invert_yaxis()
plt.show()
print({name: f"{sum(bar.values()) / 2**30:.1f}" for name, bar in bars.items()})

# %% [markdown]
# Copies (`data=8`) do not fit a TPU v5e, whose memory is the dotted line; cut
# in eight, the state takes a fifth of it. Activations come on top.
#
# ## What devices send each other
#
# Each step is compiled, and what it sends is read in the compiled program.

# %%
programs = [
  step.program.step.lower(
    step.program.state, step.frozen, step.key, step.batch
  ).compile()
  for step in steps
]
sent = [
  collectives.totals(collectives.collectives(program.as_text(), mesh.shape))
  for program, mesh in zip(programs, meshes, strict=True)
]

# %%
plt.figure(figsize=(8, 3))
kinds = sorted({(" x ".join(axes), kind) for one in sent for axes, kind in one})
left = np.zeros(len(sent))
for number, (axes, kind) in enumerate(kinds):
  sizes = np.array(
    [
      sum(n for (a, k), n in one.items() if (" x ".join(a), k) == (axes, kind))
      for one in sent
    ]
  )
  plt.barh(
    *(names, sizes / 1e6),
    left=left,
    label=f"{axes}: {kind}",
    color=plt.cm.tab20(number),
  )
  left += sizes / 1e6
plt.xlabel("MB that a device sends in a step")
plt.legend(fontsize=7, bbox_to_anchor=(1, 1))
plt.gca().invert_yaxis()
plt.show()

# %% [markdown]
# - `data`: gradients are summed, and that is all.
# - `fsdp`: matrices are gathered where they are used, and their gradients are
#   summed. On CPUs, as here, every device is sent the whole sum; on TPUs and
#   GPUs that of its own eighth, half as much.
# - `tensor`: activations travel besides, and `qkv` moves to its heads' devices.
# - `sequence`: gradients are summed, and so are the states of the linear
#   attention, which do not grow with the picture. What is permuted is the row
#   beside the cut, for the 3 x 3 convolutions.
#
# How these compare depends on the sizes: this model is tiny. Ask for yours.
#
# ## The same losses
#
# All that is a question of place, not of result. The same parameters, batch and
# key on every mesh:

# %%
generator = np.random.default_rng(0)
batch = {
  "latents": generator.normal(size=(16, 8, 8, 32)),
  "text": generator.normal(size=(16, 16, 64)),
  "text_mask": np.ones((16, 16)),
}
start = jax.device_get(state)


def place(values, abstract):
  return jax.tree.map(
    lambda value, leaf: jax.device_put(
      np.asarray(value, leaf.dtype), leaf.sharding
    ),
    values,
    abstract,
  )


curves = []
for name, step, program in zip(names, steps, programs, strict=True):
  state = place(start, step.program.state)
  frozen = place(
    {key: np.zeros(leaf.shape) for key, leaf in step.frozen.items()},
    step.frozen,
  )
  key = jax.device_put(jax.random.key(1), step.key.sharding)
  losses = []
  for _ in range(4):
    state, scalars = program(state, frozen, key, place(batch, step.batch))
    losses.append(float(scalars["loss"]))
  print(f"{name:28}", *(f"{loss:.6f}" for loss in losses))
  curves.append(losses)
np.testing.assert_allclose(curves, curves[:1] * len(curves), rtol=1e-3)

# %% [markdown]
# Four steps, and the losses agree in every digit that is shown. What may differ
# is float32 rounding: sums are taken in another order.
#
# For chips that are not there, `python -m sana_jax.plan --config=FILE
# --topology=v5e:16x16` compiles the step of a real run, and says all this.
