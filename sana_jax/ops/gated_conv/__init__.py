"""Depthwise convolutions: one pass over memory where there is a kernel for it.

`reference` is the definition, by XLA, and what is differentiated; `pallas_tpu`
has the kernels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.ops.gated_conv import batching, pallas_tpu, reference, sharded


class _Forms(NamedTuple):
  """The implementations of an operation, functions of (inputs, *weights)."""

  xla: Callable[..., Array]
  pallas_tpu: Callable[..., Array]


def gated_conv(
  inputs: tuple[Float[Array, "b h w _"], ...],
  kernel: Float[Array, "kh kw 2 c"],
  bias: Float[Array, "2 c"],
  *,
  implementation: str | None = None,
) -> Float[Array, "b h w c"]:
  """Computes a * silu(g) with [a, g] = depthwise(silu(inputs)) + bias.

  Stride 1, zero padding to keep the size. Derivatives are those of "xla".

  Args:
    inputs: one array with the channels of values and gates side by side, or an
      array for each.
    implementation: "xla"; "pallas_tpu", which accumulates in float32; None: the
      latter on TPU.

  Raises:
    ValueError: inputs that do not fit the kernel, a kernel with an even side,
      or an unknown implementation.
    NotImplementedError: the named implementation does not take such inputs.

  Source: SANA, arXiv:2410.10629, section 2.2 (GLUMBConv).
  """
  channels = kernel.shape[-1]
  found = tuple(x.shape[-1] for x in inputs)
  if found not in ((2 * channels,), (channels, channels)):
    raise ValueError(
      f"gated_conv: inputs with {found} channels do not fit a kernel of shape "
      f"{kernel.shape}: they must have {(2 * channels,)} or {(channels,) * 2}."
    )
  forms = _Forms(reference.gated_conv, _gated_conv_tpu)
  return _run(forms, implementation, inputs, kernel, bias)


def depthwise_conv(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "kh kw c"],
  *,
  implementation: str | None = None,
) -> Float[Array, "b h w c"]:
  """Computes `ops.depthwise_conv`; for all else see `gated_conv`."""
  forms = _Forms(reference.conv, _conv_tpu)
  return _run(forms, implementation, (x,), kernel)


def _run(
  forms: _Forms, implementation: str | None, inputs, kernel, *weights
) -> Array:
  if implementation not in (None, *_Forms._fields):
    raise ValueError(
      f"implementation must be one of {_Forms._fields} or None, got "
      f"{implementation!r}."
    )
  sides = kernel.shape[:2]
  if not all(side % 2 for side in sides):
    raise ValueError(f"kernel sides must be odd, got {sides}.")
  reason = pallas_tpu.unsupported(inputs, sides)
  if reason and implementation == "pallas_tpu":
    raise NotImplementedError(f"implementation='pallas_tpu': {reason}.")
  if reason or implementation == "xla":
    return forms.xla(inputs, kernel, *weights)
  return _kernel_or_xla(forms, implementation, inputs, kernel, *weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel_or_xla(forms, implementation, inputs, *weights):
  if implementation == "pallas_tpu":
    return forms.pallas_tpu(inputs, *weights)
  # Where a program will run is known when it is lowered, not before.
  return jax.lax.platform_dependent(
    inputs, *weights, tpu=forms.pallas_tpu, default=forms.xla
  )


@_kernel_or_xla.defjvp
def _jvp(forms, implementation, primals, tangents):
  """Differentiates the definition, whose value is then a by-product.

  The kernel would not hand over the sums that derivatives are made of.
  """
  del implementation
  return jax.jvp(forms.xla, primals, tangents)


def _gated_conv_tpu(inputs, kernel, bias):
  def local(inputs, kernel, bias):
    start = kernel.shape[-1] if len(inputs) == 1 else 0
    return pallas_tpu.gated_conv(
      inputs[0], inputs[-1], jnp.moveaxis(kernel, 2, 0), bias, gate_start=start
    )

  return sharded.run(batching.folded(local), inputs, kernel, bias)


def _conv_tpu(inputs, kernel):
  def local(inputs, kernel):
    return pallas_tpu.conv(inputs[0], kernel)

  return sharded.run(batching.folded(local), inputs, kernel)
