"""The adapters of a service: one at a time, and none left behind."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from sana_jax.bulk import weight_files
from sana_jax.models import sana
from sana_jax.weights import lora


class Adapters:
  """Transformers with an adapter added to their weights.

  Added, not computed beside: the program is the same with every adapter, so
  none needs compilation. The one used last is kept.

  Args:
    base: a transformer without any; it is never changed.
    paths: directories or files by the names that requests call them.

  Raises:
    FileNotFoundError: there is no such adapter.
    ValueError: one cannot be read, or does not fit.
  """

  def __init__(
    self, base: sana.SanaTransformer, paths: Mapping[str, epath.PathLike]
  ):
    self._base = base
    self._loras = {name: lora.load(path) for name, path in paths.items()}
    self._hashes = {
      name: weight_files.adapter_hash(path) for name, path in paths.items()
    }
    for adapter in self._loras.values():
      lora.attach(base, [(adapter, 1.0)])  # says what does not fit
    self._kept: tuple[tuple[str, float], sana.SanaTransformer] | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(sorted(self._loras))

  def transformer(
    self, name: str | None, scale: float | None
  ) -> sana.SanaTransformer:
    """Returns the base, or a copy with an adapter."""
    if name is None:
      return self._base
    key = (name, 1.0 if scale is None else scale)
    if self._kept is None or self._kept[0] != key:
      self._kept = None  # before its successor takes memory
      self._kept = key, lora.fuse(self._base, [(self._loras[name], key[1])])
    return self._kept[1]

  def describe(self, name: str | None, scale: float | None) -> dict[str, Any]:
    """Returns what an image says of its adapter; its name is no path."""
    if name is None:
      return {}
    return {
      "lora": [name],
      "lora_scale": [1.0 if scale is None else scale],
      "fuse_lora": True,
      "lora_sha256": [self._hashes[name]],
    }
