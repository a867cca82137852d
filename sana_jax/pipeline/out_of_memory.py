"""Says what was predicted of a stage that filled the memory, and what helps."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sana_jax.pipeline import execution, memory

_GIB = 2**30
# Of the smallest windows and tiles that a policy chooses, in pixels.
_SIDE = 512


class _Knob(NamedTuple):
  """What to turn: in Python, and as a flag of sample.py."""

  effect: str
  option: str
  flag: str


_FEWER = _Knob(
  "fewer images at a time",
  "fewer prompts a call, or a smaller num_images_per_prompt",
  "--batch_size",
)
_OFFLOAD = _Knob(
  "the text encoder on the host after its work",
  "memory=memory.Policy(offload_text_encoder=True)",
  "--offload_text_encoder",
)
_HALF = _Knob("half the bytes", "dtype=jnp.bfloat16", "--dtype=bfloat16")
_SMALLER = _Knob("smaller images", "height and width", "--height and --width")
_ALONE = "nothing else on the device: no other program uses it"


class OutOfMemoryError(execution.StageMemoryError):
  """A stage does not fit a device, against the plan of its call.

  Attributes:
    plan: of the call.
    is_half: whether weights are bfloat16 already.
  """

  def __init__(
    self,
    error: execution.StageMemoryError,
    plan: memory.Plan,
    *,
    is_half: bool,
  ):
    super().__init__(error.stage, error.xla)
    self.plan, self.is_half = plan, is_half

  def __str__(self) -> str:
    return self.text()

  def text(self, *, flags: bool = False) -> str:
    """Returns the stage, what was predicted, and what would help.

    Args:
      flags: of sample.py are named; else what the pipeline is given.
    """
    knobs = [
      f"{knob.effect}: {knob.flag if flags else knob.option}"
      for knob in self._knobs()
    ]
    lines = [
      f"Out of device memory in the {self.stage}, against the prediction: "
      "something else uses the device, or the prediction is too small.",
      f"Planned was {self.plan.reason}",
      "Predicted for this stage (GiB per device):",
      *self._sizes(),
      "What would help, cheapest first:",
      *(f"  {n}. {knob}" for n, knob in enumerate([*knobs, _ALONE], 1)),
      f"XLA: {self.xla.strip().splitlines()[0][:300]}",
    ]
    return "\n".join(lines)

  def _sizes(self) -> list[str]:
    need = self.plan.needs[self.stage]
    sizes = {
      "weights": need.weights,
      "to work with": need.working,
      "in all": need.total,
    }
    if self.plan.available is not None:
      sizes["was available"] = self.plan.available
    return [f"  {size / _GIB:8.2f}  {name}" for name, size in sizes.items()]

  def _knobs(self) -> Iterator[_Knob]:
    yield _FEWER
    tiles, windows = self.plan.decoding.tiling, self.plan.decoding.windows
    if self.stage == "decoder" and tiles is None:
      side = _SIDE if windows is None else min(_SIDE, windows.window_side // 2)
      yield _Knob(
        "smaller windows",
        f"tiling=windows.Windows(window_side={side})",
        f"--vae_window={side}",
      )
    elif self.stage in ("decoder", "encoder"):
      side = _SIDE if tiles is None else min(_SIDE, tiles.tile_height // 2)
      yield _Knob(
        "smaller tiles", f"tiling=tiling.square({side})", f"--vae_tile={side}"
      )
    if not self.plan.offload_text_encoder:
      yield _OFFLOAD
    if not self.is_half:
      yield _HALF
    yield _SMALLER


@contextlib.contextmanager
def explained(plan: memory.Plan, model: nnx.Module) -> Iterator[None]:
  """Says what was planned where a stage runs out of memory inside.

  Args:
    model: of the pipeline, whose weights have the dtype of all.

  Raises:
    OutOfMemoryError: it did.
  """
  try:
    yield
  except execution.StageMemoryError as error:
    is_half = jax.tree.leaves(model)[0].dtype == jnp.bfloat16
    raise OutOfMemoryError(error, plan, is_half=is_half) from error
