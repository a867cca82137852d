"""Diffusion mathematics: no networks, no files, only functions of arrays."""

from sana_jax.diffusion import (
  flow,
  guidance,
  samplers,
  scheduler_config,
  schedules,
  trigflow,
)

__all__ = [
  "flow",
  "guidance",
  "samplers",
  "scheduler_config",
  "schedules",
  "trigflow",
]
