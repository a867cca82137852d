"""ReLU linear attention: O(n) in the number of tokens."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax import sharding
from sana_jax.ops.linear_attention import (
  pallas_gpu,
  pallas_tpu,
  refusal,
  xla,
)

# For who does not have all tokens at a time: the sums over some, which add up,
# and what queries make of them.
State, state, apply = xla.State, xla.state, xla.apply
EPS = 1e-15
IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
_KERNELS: dict[str, tuple[str, ModuleType]] = {
  "pallas_tpu": ("tpu", pallas_tpu),
  "pallas_gpu": ("cuda", pallas_gpu),
}
# Of tokens on a device, from which on None is the kernel on a TPU. Of fewer,
# there are no estimates of the compiler.
MIN_TOKENS_OF_KERNEL = 256
_AXES = ("batch", "rows", "heads", None)


def relu_linear_attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  eps: float = EPS,
  implementation: str | None = None,
  interpret: Any = False,
) -> Float[Array, "b n heads head_dim"]:
  """Attends with the kernel relu(q) . relu(k), normalised per query.

  out_n = (sum_m v_m (k_m . q_n)) / (sum_m k_m . q_n + eps),  q, k after ReLU.

  The sums over tokens, the normaliser and the division are float32 whatever
  the input: in low precision they stall or overflow. The result is rounded
  once, to the dtype of `v`.

  Where a mesh in use shards the tokens, what devices exchange is the sum over
  their tokens: head_dim times head_dim + 1 numbers a head.

  Args:
    implementation: "xla", on any device; "pallas_tpu", a Mosaic kernel;
      "pallas_gpu", a Triton kernel. None: the Mosaic kernel on a TPU
      where a device has at least `MIN_TOKENS_OF_KERNEL` tokens, else "xla".
      All of them have the derivatives of "xla", forward and reverse, of any
      order, and its value where they are taken.
    interpret: runs the steps of a kernel on any device, slowly: what
      `pallas_call` takes.

  Raises:
    ValueError: an implementation that there is not.
    NotImplementedError: the implementation that was asked for cannot do these
      shapes, or, when lowering, not on that device.

  Source: Xie et al., SANA, arXiv:2410.10629, section 2.2; EfficientViT,
  arXiv:2205.14756, equation 3.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"relu_linear_attention: implementation must be None or one of "
      f"{IMPLEMENTATIONS}, got {implementation!r}."
    )
  dtype = jnp.result_type(q, k, v)
  if implementation is None and _may_gain(q.shape, dtype):
    choice = _Choice("pallas_tpu", named=False, interpret=interpret)
  elif implementation in (None, "xla"):
    return xla.attend(q, k, v, eps=eps)
  else:
    choice = _Choice(implementation, named=True, interpret=interpret)
  reason = choice.kernel.unsupported(q.shape, dtype)
  if reason is not None:
    raise NotImplementedError(
      f"relu_linear_attention: {implementation} cannot do this: {reason}; "
      'use implementation="xla".'
    )
  out = _attend(choice, eps, *(x.astype(dtype) for x in (q, k, v)))
  return out.astype(v.dtype)


def _may_gain(shape: tuple[int, int, int, int], dtype: DTypeLike) -> bool:
  """Says whether on a TPU the kernel is expected to beat XLA."""
  tokens = shape[1] // sharding.shards("rows")
  return (
    tokens >= MIN_TOKENS_OF_KERNEL
    and pallas_tpu.unsupported(shape, dtype) is None
  )


class _Choice(NamedTuple):
  """A kernel.

  Attributes:
    named: it was asked for, so nothing else will do.
    interpret: what `pallas_call` takes.
  """

  name: str
  named: bool
  interpret: Any

  @property
  def kernel(self) -> ModuleType:
    return _KERNELS[self.name][1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
  choice: _Choice,
  eps: float,
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
) -> Float[Array, "b n heads head_dim"]:
  """Runs a kernel where it is for the device that is compiled for."""
  run = functools.partial(_on_mesh, choice, eps)
  if choice.interpret:
    return run(q, k, v)
  platform, _ = _KERNELS[choice.name]
  default = functools.partial(xla.attend, eps=eps)
  if choice.named:
    default = refusal.because(
      f"relu_linear_attention: {choice.name} is a kernel for {platform} "
      'devices only; use implementation="xla".'
    )
  return jax.lax.platform_dependent(q, k, v, default=default, **{platform: run})


@_attend.defjvp
def _attend_jvp(choice, eps, primals, tangents):
  del choice
  # With derivatives comes their value: a kernel beside them would sum twice.
  return jax.jvp(functools.partial(xla.attend, eps=eps), primals, tangents)


def _on_mesh(choice, eps, q, k, v):
  """Runs a kernel on every device's share of what a mesh in use divides."""
  axes = sharding.compiler_axes()
  if not axes:
    return _local(choice, eps, (), q, k, v)
  spec = sharding.spec(_AXES, q.shape)
  rows = sharding.spec(_AXES[1:2], q.shape[1:2])
  return jax.shard_map(
    functools.partial(_local, choice, eps, rows[0] if rows else ()),
    in_specs=(spec, spec, spec),
    out_specs=spec,
    axis_names=axes,
    check_vma=False,
  )(q, k, v)


def _local(choice, eps, rows, q, k, v):
  """Runs a kernel; `rows` are the mesh axes that share a sample's tokens."""
  kernel, interpret = choice.kernel, choice.interpret
  if not rows:
    return kernel.attend(q, k, v, eps=eps, interpret=interpret)
  sums = jax.lax.psum(kernel.state(k, v, interpret=interpret), rows)
  return kernel.apply(q, sums, eps=eps, interpret=interpret)
