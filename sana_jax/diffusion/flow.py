"""Rectified flow: the path from data to noise, its velocity, and its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Real

# Training draws one of this many noise levels, and the networks are told the
# level in these units.
NUM_TRAIN_TIMESTEPS = 1000


def expand(
  values: Float[Array, "b"], like: Float[Array, "b *shape"]
) -> Float[Array, "b *ones"]:
  """Adds trailing axes of one, so that `values` multiplies whole samples."""
  return values.reshape(values.shape + (1,) * (like.ndim - 1))


def interpolate(
  clean: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  sigma: Float[Array, "b"],
) -> Float[Array, "b *shape"]:
  """Mixes data and noise: x = (1 - sigma) clean + sigma noise.

  Float32 even for bfloat16 latents: near sigma = 1 their weight is only 3e-4.

  Source: Liu et al., arXiv:2209.03003, with time reversed.
  """
  sigma = expand(sigma.astype(jnp.float32), clean)
  return (1 - sigma) * clean + sigma * noise


def velocity(
  clean: Float[Array, "b *shape"], noise: Float[Array, "b *shape"]
) -> Float[Array, "b *shape"]:
  """Returns what the network regresses, dx/dsigma = noise - clean."""
  return noise.astype(jnp.float32) - clean.astype(jnp.float32)


def shift_time(
  time: Real[ArrayLike, "*shape"], shift: float | int
) -> Real[ArrayLike, "*shape"]:
  """Moves times towards noise: t' = s t / (1 + (s - 1) t).

  Args:
    time: 0 is data and 1 is noise.
    shift: s; 1 changes nothing, 3 is Sana's value at 1024 pixels.

  Source: Esser et al., arXiv:2403.03206, resolution-dependent shifting.
  """
  return shift * time / (1 + (shift - 1) * time)


def logit_normal(
  key: Key[Array, ""], batch_size: int, *, mean: float = 0.0, std: float = 1.0
) -> Float[Array, "b"]:
  """Draws times whose logit is normal: u = sigmoid(mean + std n).

  Source: Esser et al., arXiv:2403.03206, section 3.1.
  """
  return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch_size,)))


def uniform(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
  """Draws times in [0, 1), all equally likely."""
  return jax.random.uniform(key, (batch_size,))


def discrete_sigma(
  u: Float[Array, "b"], *, shift: float | int
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
  """Returns (sigma, timestep) of the table entry that u in [0, 1] falls into.

  With i = floor(1000 u): sigma = shift(i / 1000), timestep = floor(1000 sigma).
  Exactly the levels at which the published checkpoints were trained.

  Source: NVlabs/Sana, diffusion/model/gaussian_diffusion.py, "linear_flow".
  """
  sigmas, timesteps = _table(float(shift))
  # A float32 sigmoid can reach 1, which is past the end of the table.
  index = jnp.floor(NUM_TRAIN_TIMESTEPS * u).astype(jnp.int32)
  index = jnp.minimum(index, NUM_TRAIN_TIMESTEPS - 1)
  return jnp.asarray(sigmas)[index], jnp.asarray(timesteps)[index]


def continuous_sigma(
  u: Float[Array, "b"], *, shift: float | int
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
  """Returns (sigma, timestep) without rounding: shift(u) and 1000 shift(u)."""
  sigma = shift_time(u, shift)
  return sigma, NUM_TRAIN_TIMESTEPS * sigma


def sample_sigma(
  key: Key[Array, ""],
  batch_size: int,
  *,
  shift: float | int,
  mean: float = 0.0,
  std: float = 1.0,
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
  """Draws training noise levels as Sana does; returns (sigma, timestep).

  Other laws are compositions: `continuous_sigma(uniform(key, n), shift=3.0)`.

  Args:
    key: consumed here only.
    batch_size: number of samples.
    shift: as in `shift_time`.
    mean: of the logit; larger is noisier.
    std: of the logit.
  """
  u = logit_normal(key, batch_size, mean=mean, std=std)
  return discrete_sigma(u, shift=shift)


def squared_error(
  prediction: Float[Array, "b *shape"], target: Float[Array, "b *shape"]
) -> Float[Array, "b"]:
  """Returns each sample's mean squared error, in float32."""
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


def loss(
  prediction: Float[Array, "b *shape"], target: Float[Array, "b *shape"]
) -> Float[Array, ""]:
  """Returns the batch mean of `squared_error`: every noise level weighs 1."""
  return jnp.mean(squared_error(prediction, target))


@functools.cache
def _table(
  shift: float | int,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
  # As 1 - linspace and not arange / 1000: some entries end one rounding error
  # below an integer, and truncation makes a whole timestep of that.
  raw = 1 - np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, NUM_TRAIN_TIMESTEPS)
  sigmas = shift_time(raw, shift)
  timesteps = np.floor(NUM_TRAIN_TIMESTEPS * sigmas)
  return sigmas.astype(np.float32), timesteps.astype(np.float32)
