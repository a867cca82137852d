"""Code that there is no way to compile, and that says why."""

from collections.abc import Callable

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def because(reason: str) -> Callable[..., Array]:
  """Returns a function like its first argument's shape, that never compiles.

  The error comes when it is lowered, so a program may hold it on a branch of
  `jax.lax.platform_dependent` for devices it is not for.
  """
  return lambda like, *_: _refused.bind(like, reason=reason)


def _refuse(context, *operands, reason: str):
  del context, operands
  raise NotImplementedError(reason)


def _batch(args, dims, *, reason: str):
  return _refused.bind(*args, reason=reason), dims[0]


_refused = Primitive("refused")
_refused.def_abstract_eval(lambda like, *, reason: like)
batching.primitive_batchers[_refused] = _batch
mlir.register_lowering(_refused, _refuse)
