"""Noise schedules: what each sampling step does, as arrays of numbers.

A solver here is a small description with named options. Its `schedule` method
works out on the host, in float64, one row of coefficients for every step, and
`samplers` applies them without knowing which solver they came from.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from sana_jax.diffusion import flow

Levels: TypeAlias = Sequence[float] | Float[np.ndarray, "_"]


class Schedule(NamedTuple):
  """A sampler's n steps; step i takes x from sigmas[i] to sigmas[i + 1].

  With v_i the prediction of the network at (sigmas[i], timesteps[i]):

    d_i   = denoise[i, 0] x_i + denoise[i, 1] v_i
    x_i+1 = update[i, 0] x_i + sum_j update[i, 1 + j] d_i-j + noise[i] n_i

  d_i estimates the data, j runs over the estimates the solver remembers, and
  n_i is standard normal. Deterministic schedules have `noise` None.
  """

  sigmas: Float[np.ndarray, "n+1"]
  timesteps: Float[np.ndarray, "n"]
  denoise: Float[np.ndarray, "n 2"]
  update: Float[np.ndarray, "n k+1"]
  noise: Float[np.ndarray, "n"] | None

  @property
  def num_steps(self) -> int:
    return self.timesteps.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowDPMSolver:
  """Multistep DPM-Solver++ for flow models, the default of SANA and SANA-1.5.

  In lambda = log((1 - sigma) / sigma), with h the step and r the ratio of the
  two sigmas, order 1 is x' = r x + (1 - r) d, which is an Euler step; order 2
  replaces d by d + (h / h_previous) (d - d_previous) / 2. Step i has at most
  order i + 1.

  Args:
    flow_shift: of the noise levels, see `flow.shift_time`.
    solver_order: 1, 2 or 3.
    solver_type: "midpoint" or "heun", which differ at order 2 only.
    algorithm_type: "dpmsolver++" (ODE) or "sde-dpmsolver++" (fresh noise every
      step; orders 1 and 2).
    lower_order_final: end with orders 2 and 1 in runs of less than 15 steps.
    euler_at_final: end with order 1 whatever the number of steps.
    final_sigmas_type: "zero", or "sigma_min" to stop at the last nonzero sigma
      (the last step then stands still).
    num_train_timesteps: what sigma = 1 is called in timesteps.

  Source: Lu et al., arXiv:2211.01095, algorithm 2 (order 2, midpoint).
  """

  flow_shift: float | int = 3.0
  solver_order: int = 2
  solver_type: str = "midpoint"
  algorithm_type: str = "dpmsolver++"
  lower_order_final: bool = True
  euler_at_final: bool = False
  final_sigmas_type: str = "zero"
  num_train_timesteps: int = flow.NUM_TRAIN_TIMESTEPS

  def __post_init__(self):
    _check_positive("flow_shift", self.flow_shift)
    _check_positive("num_train_timesteps", self.num_train_timesteps)
    _check_choice("solver_order", self.solver_order, (1, 2, 3))
    _check_choice("solver_type", self.solver_type, ("midpoint", "heun"))
    _check_choice(
      "algorithm_type",
      self.algorithm_type,
      ("dpmsolver++", "sde-dpmsolver++"),
    )
    _check_choice(
      "final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min")
    )
    if self.stochastic and self.solver_order == 3:
      raise ValueError(
        "solver_order 3 is not defined for algorithm_type 'sde-dpmsolver++'; "
        "use solver_order 1 or 2, or 'dpmsolver++'."
      )

  @property
  def stochastic(self) -> bool:
    return self.algorithm_type == "sde-dpmsolver++"

  def schedule(
    self, num_inference_steps: int, *, begin_index: int = 0
  ) -> Schedule:
    """Spaces the steps evenly before the shift, from sigma just below 1.

    Args:
      num_inference_steps: calls of the network, were none skipped.
      begin_index: number of steps to skip, as image-to-image does.

    Raises:
      ValueError: a number of steps below 1, or none left after skipping.
    """
    n, total = num_inference_steps, self.num_train_timesteps
    _check_steps(n, begin_index)
    # The order of these operations is part of the convention: timesteps are
    # truncated, and some products lie within rounding of an integer.
    raw = 1 - np.linspace(1, 1 / total, n + 1)
    nonzero = np.flip(flow.shift_time(raw, self.flow_shift))[:-1]
    last = 0.0 if self.final_sigmas_type == "zero" else nonzero[-1]
    sigmas = np.append(nonzero, last)
    rows = [
      self._coefficients(sigmas, i, self._order(i, n, begin_index))
      for i in range(begin_index, n)
    ]
    update, noise = (np.array(column) for column in zip(*rows, strict=True))
    return _flow_schedule(
      sigmas=sigmas[begin_index:],
      timesteps=np.trunc(nonzero * total)[begin_index:],
      update=update,
      noise=noise if self.stochastic else None,
    )

  def _order(self, i: int, n: int, begin_index: int) -> int:
    few_steps = self.lower_order_final and n < 15
    if i == n - 1 and (
      few_steps or self.euler_at_final or self.final_sigmas_type == "zero"
    ):
      return 1
    available = i - begin_index + 1
    limit = 2 if few_steps and i == n - 2 else 3
    return min(self.solver_order, available, limit)

  def _coefficients(
    self, sigmas: Float[np.ndarray, "levels"], i: int, order: int
  ) -> tuple[Float[np.ndarray, "weights"], float]:
    """Returns the row of `Schedule.update`, and of `Schedule.noise`."""
    sigma, target = sigmas[i], sigmas[i + 1]
    alpha = 1 - target
    # exp(-h), rather than h: the last sigma is 0, where lambda is infinite.
    shrink = target / alpha * (1 - sigma) / sigma
    decay = shrink**2 if self.stochastic else shrink
    phi1 = 1 - decay
    estimates = np.eye(self.solver_order)  # their weights: d_i, d_i-1, d_i-2
    weights = phi1 * estimates[0]
    # A step of length zero has nothing to extrapolate (final "sigma_min").
    if order > 1 and shrink < 1:
      h = -np.log(shrink)
      h1 = _log_snr(sigma) - _log_snr(sigmas[i - 1])
      slope = (estimates[0] - estimates[1]) / h1
      extent = -np.log(decay)
      phi2 = 1 - phi1 / extent
      if order == 2:
        phi2 = phi1 / 2 if self.solver_type == "midpoint" else phi2
        weights = weights + phi2 * h * slope
      else:
        h2 = _log_snr(sigmas[i - 1]) - _log_snr(sigmas[i - 2])
        bend = (slope - (estimates[1] - estimates[2]) / h2) / (h1 + h2)
        phi3 = 0.5 - (extent - phi1) / extent**2
        weights = weights + phi2 * h * (slope + h1 * bend) + phi3 * h**2 * bend
    kept = target / sigma * (shrink if self.stochastic else 1.0)
    noise = target * np.sqrt(1 - shrink**2)
    return np.append(kept, alpha * weights), noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowEuler:
  """Euler's method: x' = x + (sigma' - sigma) v.

  Args:
    shift: of the noise levels, see `flow.shift_time`.
    num_train_timesteps: what sigma = 1 is called in timesteps; these are not
      rounded.
  """

  shift: float | int = 3.0
  num_train_timesteps: int = flow.NUM_TRAIN_TIMESTEPS

  def __post_init__(self):
    _check_positive("shift", self.shift)
    _check_positive("num_train_timesteps", self.num_train_timesteps)

  def schedule(
    self, num_inference_steps: int, *, begin_index: int = 0
  ) -> Schedule:
    """Spaces the steps evenly before the shift, from sigma 1.

    The smallest nonzero sigma is shifted twice: it is the shifted 1 / 1000
    before the shift is applied to all. So the reference behaves, and what it
    publishes for this sampler was made that way.

    Args:
      num_inference_steps: calls of the network, were none skipped.
      begin_index: number of steps to skip, as image-to-image does.

    Raises:
      ValueError: a number of steps below 1, or none left after skipping.
    """
    _check_steps(num_inference_steps, begin_index)
    smallest = flow.shift_time(1 / self.num_train_timesteps, self.shift)
    raw = np.linspace(1, smallest, num_inference_steps)
    return self._schedule(raw[begin_index:])

  def custom_schedule(
    self, sigmas: Levels, *, begin_index: int = 0
  ) -> Schedule:
    """Steps through given sigmas, which are shifted too, and then to 0.

    Args:
      sigmas: before the shift; decreasing, in (0, 1].
      begin_index: number of steps to skip.

    Raises:
      ValueError: sigmas out of order or range, or none left.
    """
    raw = np.asarray(sigmas, np.float64)
    _check_steps(len(raw), begin_index)
    if raw[0] > 1 or raw[-1] <= 0 or np.any(np.diff(raw) >= 0):
      raise ValueError(
        f"sigmas {list(sigmas)} must decrease and lie in (0, 1]; the final 0 "
        "is added."
      )
    return self._schedule(raw[begin_index:])

  def _schedule(self, raw: Float[np.ndarray, "n"]) -> Schedule:
    nonzero = flow.shift_time(raw, self.shift)
    sigmas = np.append(nonzero, 0.0)
    ratio = sigmas[1:] / sigmas[:-1]
    return _flow_schedule(
      sigmas=sigmas,
      timesteps=nonzero.astype(np.float32) * self.num_train_timesteps,
      update=np.stack([ratio, 1 - ratio], axis=1),
      noise=None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCM:
  """Consistency sampling on TrigFlow's circle, for SANA-Sprint.

  A step from angle s to t: d = cos(s) x - sin(s) F, where F is the prediction
  in the units of x, then x' = cos(t) d + sigma_data sin(t) n. The sampler's
  latents have standard deviation sigma_data: multiply the initial noise by it,
  and divide the result. Timesteps are angles in radians, `Schedule.sigmas` the
  flow times sin s / (sin s + cos s).

  Args:
    sigma_data: standard deviation of the data.

  Source: Lu and Song, arXiv:2410.11081; Chen et al., arXiv:2503.09641.
  """

  sigma_data: float | int = 0.5

  def __post_init__(self):
    _check_positive("sigma_data", self.sigma_data)

  def schedule(
    self,
    num_inference_steps: int,
    *,
    max_timesteps: float = 1.57080,
    intermediate_timesteps: float | None = 1.3,
    begin_index: int = 0,
  ) -> Schedule:
    """Spaces the angles evenly, or uses the intermediate one in two steps.

    Args:
      num_inference_steps: calls of the network, were none skipped.
      max_timesteps: first angle, radians.
      intermediate_timesteps: second angle of a two-step run; None otherwise.
      begin_index: number of steps to skip, as image-to-image does.

    Raises:
      ValueError: an intermediate angle with other than two steps, angles that
        do not decrease, or no steps left.
    """
    _check_steps(num_inference_steps, begin_index)
    if intermediate_timesteps is None:
      angles = np.linspace(max_timesteps, 0, num_inference_steps + 1)
    elif num_inference_steps == 2:
      angles = [max_timesteps, intermediate_timesteps, 0.0]
    else:
      raise ValueError(
        f"intermediate_timesteps ({intermediate_timesteps}) is for 2 steps, "
        f"but num_inference_steps is {num_inference_steps}; pass "
        "intermediate_timesteps=None."
      )
    return self.custom_schedule(angles, begin_index=begin_index)

  def custom_schedule(
    self, timesteps: Levels, *, begin_index: int = 0
  ) -> Schedule:
    """Steps through the given angles.

    Args:
      timesteps: n + 1 decreasing angles in radians, the last 0.
      begin_index: number of steps to skip.

    Raises:
      ValueError: angles out of order, or no steps left.
    """
    angles = np.asarray(timesteps, np.float32)
    _check_steps(len(angles) - 1, begin_index)
    if angles[-1] != 0 or np.any(np.diff(angles) >= 0):
      raise ValueError(
        f"timesteps {angles.tolist()} must decrease and end with 0."
      )
    angles = angles[begin_index:].astype(np.float64)
    sin, cos = np.sin(angles), np.cos(angles)
    no_weight = np.zeros_like(cos[1:])
    return Schedule(
      sigmas=(sin / (sin + cos)).astype(np.float32),
      timesteps=angles[:-1].astype(np.float32),
      denoise=np.stack([cos[:-1], -sin[:-1]], axis=1),
      update=np.stack([no_weight, cos[1:]], axis=1),
      noise=self.sigma_data * sin[1:],
    )


def begin_index(num_inference_steps: int, strength: float) -> int:
  """Returns how many steps image-to-image skips to run a share of them.

  Rounded as in the reference: at least one step is run, and of two steps a
  strength of 0.6 still skips none.

  Args:
    strength: in (0, 1]; 1 skips nothing.
  """
  n = num_inference_steps
  return int(max(n - min(n * strength, n), 0))


def _flow_schedule(*, sigmas, timesteps, update, noise) -> Schedule:
  denoise = np.stack([np.ones_like(timesteps), -sigmas[:-1]], axis=1)
  return Schedule(
    sigmas=sigmas.astype(np.float32),
    timesteps=timesteps.astype(np.float32),
    denoise=denoise,
    update=update,
    noise=noise,
  )


def _log_snr(sigma: float) -> float:
  return np.log((1 - sigma) / sigma)


def _check_steps(num_inference_steps: int, begin_index: int) -> None:
  if num_inference_steps < 1:
    raise ValueError(
      f"The number of steps is {num_inference_steps}; expected at least 1."
    )
  if not 0 <= begin_index < num_inference_steps:
    raise ValueError(
      f"begin_index ({begin_index}) must lie in [0, {num_inference_steps}), "
      "the number of steps."
    )


def _check_positive(name: str, value: float | int) -> None:
  if not value > 0:
    raise ValueError(f"{name} is {value}; expected a positive number.")


def _check_choice(name: str, value: object, choices: tuple) -> None:
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; expected one of {choices}.")
