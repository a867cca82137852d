"""TrigFlow: a flow network seen on the circle, as SANA-Sprint uses it.

A sample is u = cos(s) clean + sin(s) noise, both of unit variance, and the
prediction F = du/ds = cos(s) noise - sin(s) clean; clean = cos(s) u - sin(s) F.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.diffusion import flow
from sana_jax.typing import VelocityFn


def flow_time(trig_time: Float[Array, "b"]) -> Float[Array, "b"]:
  """Returns the flow time with the same ratio of noise to data.

  t = sin s / (sin s + cos s), from s in radians, [0, pi / 2], to [0, 1].

  Source: Chen et al. (SANA-Sprint), arXiv:2503.09641, section 3.1.
  """
  sin, cos = jnp.sin(trig_time), jnp.cos(trig_time)
  return sin / (sin + cos)


def trig_time(flow_time: Float[Array, "b"]) -> Float[Array, "b"]:
  """Inverts `flow_time`: s = atan2(t, 1 - t)."""
  return jnp.arctan2(flow_time, 1 - flow_time)


def interpolate(
  clean: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  trig_time: Float[Array, "b"],
) -> Float[Array, "b *shape"]:
  """Mixes data and noise of unit variance: u = cos(s) clean + sin(s) noise."""
  s = flow.expand(trig_time, clean)
  return jnp.cos(s) * clean + jnp.sin(s) * noise


def predict(
  velocity_fn: VelocityFn,
  sample: Float[Array, "b *shape"],
  trig_time: Float[Array, "b"],
) -> Float[Array, "b *shape"]:
  """Evaluates a flow network as a TrigFlow network F(u, s).

  With t the flow time of s and r = sqrt(t^2 + (1 - t)^2):
  F = ((1 - 2 t) r u + (1 - 2 t + 2 t^2) v(r u, t)) / r.

  Args:
    velocity_fn: called with t for both sigma and timestep: Sprint networks and
      their teachers take the flow time itself.
    sample: u, of unit variance (latents divided by sigma_data).
    trig_time: s, in radians.

  Source: Chen et al. (SANA-Sprint), arXiv:2503.09641, section 3.1.
  """
  # Float32: 1 - 2 t + 2 t^2 and r meet the network's output near t = 1.
  trig_time = trig_time.astype(jnp.promote_types(trig_time.dtype, jnp.float32))
  time = flow_time(trig_time)
  t = flow.expand(time, sample)
  norm = jnp.sqrt(jnp.square(t) + jnp.square(1 - t))
  x = sample * norm
  v = velocity_fn(x, time, time)
  return ((1 - 2 * t) * x + (1 - 2 * t + 2 * jnp.square(t)) * v) / norm


def prediction_fn(
  velocity_fn: VelocityFn, *, sigma_data: float = 0.5
) -> VelocityFn:
  """Wraps a flow network for `samplers` with a `schedules.SCM` schedule.

  Args:
    velocity_fn: the flow network.
    sigma_data: standard deviation of the latents given to the sampler.
  """

  def scaled(x, sigma, timestep):
    del sigma  # follows from the trigonometric time
    return sigma_data * predict(velocity_fn, x / sigma_data, timestep)

  return scaled
