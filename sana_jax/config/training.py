"""What every training run is told, whatever it trains."""

import dataclasses

from sana_jax.config.anomalies import AnomalyConfig
from sana_jax.config.base import Config, require
from sana_jax.config.checkpointing import CheckpointConfig
from sana_jax.config.data import DataConfig
from sana_jax.config.hardware import HardwareConfig
from sana_jax.config.optim import OptimConfig

# Of `sharding.make_mesh`, from the outermost.
MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Of nn/stack.py.
REMAT_POLICIES = ("none", "full", "dots", "offload")


@dataclasses.dataclass(kw_only=True)
class TrainConfig(Config):
  """What every training run has, whatever it trains.

  Args:
    ema_decay: of the averaged parameters that are sampled and exported; 0:
      none are kept, and it is the parameters themselves.
    mesh: how many devices work side by side on "data" (samples, each with the
      whole model), "fsdp" (samples, each with a shard of it), "tensor" (parts
      of every matrix product) and "sequence" (rows of every latent). What is
      left out is 1; one -1 takes the devices that are left.
    dtype: compute dtype; parameters and optimiser state stay float32.
    remat: "none", "full", "dots" or "offload" (see nn/stack.py).
    scan_layers: False unrolls the blocks: faster on CPU, slower to compile.
  """

  seed: int = 0
  num_steps: int = 1000
  batch_size: int = 64
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  ema_decay: float = 0.9999
  log_every: int = 20
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  anomalies: AnomalyConfig = dataclasses.field(default_factory=AnomalyConfig)
  sample_every: int = 500
  mesh: dict[str, int] = dataclasses.field(
    default_factory=lambda: {"data": -1, **dict.fromkeys(MESH_AXES[1:], 1)}
  )
  hardware: HardwareConfig = dataclasses.field(default_factory=HardwareConfig)
  dtype: str = "bfloat16"
  remat: str = "full"
  scan_layers: bool = True

  def validate(self) -> None:
    for name in ("num_steps", "batch_size", "log_every", "sample_every"):
      value = getattr(self, name)
      require(value > 0, f"{name} must be positive, got {value}.")
    require(
      self.optim.accumulation < 1
      or self.batch_size % self.optim.accumulation == 0,
      f"batch_size ({self.batch_size}) must be a multiple of "
      f"optim.accumulation ({self.optim.accumulation}).",
    )
    require(
      set(self.mesh) <= set(MESH_AXES),
      f"mesh must have no axes but {MESH_AXES}, got {self.mesh}.",
    )
    sizes = list(self.mesh.values())
    require(
      sizes.count(-1) <= 1 and all(size > 0 or size == -1 for size in sizes),
      f"mesh sizes must be positive, and at most one -1, got {self.mesh}.",
    )
    require(
      self.remat in REMAT_POLICIES,
      f"remat must be one of {REMAT_POLICIES}, got {self.remat!r}.",
    )
    require(
      self.dtype in ("float32", "bfloat16"),
      f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.",
    )
    require(
      0 <= self.ema_decay < 1,
      f"ema_decay must be in [0, 1), got {self.ema_decay}.",
    )
