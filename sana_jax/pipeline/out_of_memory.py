"""Says what was predicted of a stage that filled the memory, and what helps."""

import contextlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sana_jax.models import tiling, windows
from sana_jax.pipeline import execution, memory, sizes

if typing.TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline

_GIB = 2**30
# Of windows and tiles, in pixels; a policy chooses none that are smaller than
# the first.
_SIDES = (512, 256, 128, 64, 32)


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
    size: of its images.
    is_half: whether weights are bfloat16 already.
    on_cpu: whether the devices' memory is the host's.
  """

  def __init__(
    self,
    error: execution.StageMemoryError,
    plan: memory.Plan,
    size: sizes.ImageSize,
    *,
    is_half: bool,
    on_cpu: bool,
  ):
    super().__init__(error.stage, error.xla)
    self.plan, self.size = plan, size
    self.is_half, self.on_cpu = is_half, on_cpu

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
    if self.stage == "decoder" and self.plan.decoding.tiling is None:
      yield from self._smaller_windows()
    elif self.stage in ("decoder", "encoder"):
      yield from self._smaller_tiles()
    # While it encodes it is on the devices, and those of a CPU are the host.
    stays = self.plan.offload_text_encoder or self.on_cpu
    if self.stage != "text encoder" and not stays:
      yield _OFFLOAD
    if not self.is_half:
      yield _HALF
    yield _SMALLER

  def _smaller_windows(self) -> Iterator[_Knob]:
    present = self.plan.decoding.windows
    sides = [] if present is None else [present.window_side]
    side = self._smaller(lambda s: windows.Windows(window_side=s), sides)
    if side is not None:
      option = f"tiling=windows.Windows(window_side={side})"
      yield _Knob("smaller windows", option, f"--vae_window={side}")

  def _smaller_tiles(self) -> Iterator[_Knob]:
    present = self.plan.decoding.tiling
    side = self._smaller(tiling.square, () if present is None else present.tile)
    if side is not None:
      option = f"tiling=tiling.square({side})"
      yield _Knob("smaller tiles", option, f"--vae_tile={side}")

  def _smaller(
    self, make: Callable[[int], memory.Cut], present: Sequence[int]
  ) -> int | None:
    """Finds the largest side that a pipeline takes, below those at present."""
    for side in _SIDES:
      if all(side < other for other in present) and self._is_taken(make(side)):
        return side
    return None

  def _is_taken(self, cut: memory.Cut) -> bool:
    try:
      memory.check_tiling(cut, self.size.grid, self.size.compression)
    except ValueError:
      return False
    return True


@contextlib.contextmanager
def explained(
  pipeline: "SanaPipeline", plan: memory.Plan, size: sizes.ImageSize
) -> Iterator[None]:
  """Says what was planned where a stage runs out of memory inside.

  Args:
    size: of the images.

  Raises:
    OutOfMemoryError: it did.
  """
  try:
    yield
  except execution.StageMemoryError as error:
    # Its weights have the dtype of all.
    weights = jax.tree.leaves(pipeline.transformer)
    raise OutOfMemoryError(
      error,
      plan,
      size,
      is_half=weights[0].dtype == jnp.bfloat16,
      on_cpu=pipeline.used_devices[0].platform == "cpu",
    ) from error
