"""What a run is told of the devices it is meant for."""

import dataclasses

from sana_jax.config.base import Config, require

OFFLOADABLE = ("optimizer", "average")


@dataclasses.dataclass(kw_only=True)
class HardwareConfig(Config):
  """What `sana_jax.presets` chose beside the mesh; no result depends on it.

  Args:
    preset: what was chosen for, such as "v5e-256"; None: nothing was.
    compiler_options: XLA's, for the training step. One that the compiler of the
      devices does not know is an error.
    offload: parts of the state that are in the host's memory between updates:
      "optimizer", "average". They cross to the device and back in every step.
  """

  preset: str | None = None
  compiler_options: dict[str, bool | int | str] = dataclasses.field(
    default_factory=dict
  )
  offload: tuple[str, ...] = ()

  def validate(self) -> None:
    wrong = [n for n in self.compiler_options if not n.startswith("xla_")]
    require(
      not wrong,
      "hardware.compiler_options are named without dashes in front, such as "
      f"'xla_tpu_scoped_vmem_limit_kib', got {wrong}.",
    )
    unknown = [name for name in self.offload if name not in OFFLOADABLE]
    require(
      not unknown,
      f"hardware.offload may name {OFFLOADABLE}, got {unknown}.",
    )
