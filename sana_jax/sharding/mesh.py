"""Arranging devices so that neighbours in the mesh are neighbours in fact."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sana_jax.config import training

# From the least talk to the most: copies of the model (between slices, over
# the slow network), shards of parameters, shards of matrix products, rows of
# latents.
AXES = training.MESH_AXES


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges devices along all of `AXES`.

  Args:
    axes: sizes; what is missing is 1, and one may be -1: it takes what is left.
    devices: all there are when None.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the data
      axis does not spread evenly over several slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = _shape(axes, len(devices))
  return Mesh(
    arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices as an array of `shape`, close ones close together.

  Raises:
    ValueError: on several slices, the first size is no multiple of their
      number, or they differ in size.
  """
  platform = devices[0].platform
  # Chips described for a compiler have no slice where there is only one.
  slices = collections.Counter(
    device.slice_index
    for device in devices
    if platform == "tpu" and hasattr(device, "slice_index")
  )
  if len(slices) > 1:
    _check_slices(shape, slices)
    across = (len(slices),) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(
      (shape[0] // len(slices), *shape[1:]),
      across,
      devices,
      allow_split_physical_axes=True,
    )
  # Copies alone talk to all others alike: any order does, and any set of
  # devices, which mesh_utils wants to fill a box.
  if platform not in ("tpu", "gpu") or shape[0] == len(devices):
    return np.asarray(devices).reshape(shape)
  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def _check_slices(
  shape: tuple[int, ...], slices: collections.Counter[int]
) -> None:
  count, sizes = len(slices), sorted(set(slices.values()))
  if len(sizes) > 1:
    raise ValueError(
      f"the devices are {count} slices of {' and '.join(map(str, sizes))} "
      f"chips; a mesh needs slices of one size."
    )
  if shape[0] % count:
    raise ValueError(
      f"mesh axis data={shape[0]} is not a multiple of the {count} slices. "
      f"Only the data axis may cross the slow network between slices (once a "
      f"step, for the gradients): set data to {count} or a multiple of it, "
      f"and let the other axes multiply to {sizes[0]} or a divisor of it."
    )


def _shape(axes: Mapping[str, int], devices: int) -> tuple[int, ...]:
  unknown = sorted(set(axes) - set(AXES))
  if unknown:
    raise ValueError(f"unknown mesh axes {unknown}; there are {AXES}.")
  sizes = dict.fromkeys(AXES, 1) | dict(axes)
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or known < 1 or devices % known:
    raise ValueError(
      f"mesh {dict(axes)} does not fit {devices} devices: sizes must divide "
      f"it, with at most one -1."
    )
  if not free and known != devices:
    raise ValueError(
      f"mesh {dict(axes)} uses {known} of {devices} devices; set one axis to "
      f"-1 to use them all."
    )
  return tuple(
    devices // known if sizes[name] == -1 else sizes[name] for name in AXES
  )
