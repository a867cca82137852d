"""What linear attention and the deep autoencoder save, counted."""

import pathlib

import numpy as np

from docs.figures import style
from sana_jax import config as config_lib
from sana_jax import flops

SIDES = np.array([512, 1024, 2048, 4096])


def softmax_instead(config: config_lib.SanaConfig, tokens: int) -> int:
  """Operations that softmax attention has more than linear attention.

  Linear attention multiplies keys with values and queries with the sums, the
  normaliser being one more column; softmax attention multiplies queries with
  keys and weights with values.
  """
  linear = 2 * (config.attention_head_dim + 1)
  softmax = 2 * tokens
  return 2 * config.num_layers * tokens * config.width * (softmax - linear)


def evaluation(config: config_lib.SanaConfig, pixels: int) -> list[float]:
  """Returns TFLOP with softmax attention, by side, for pixels per token."""
  return [
    (
      flops.forward(config, side, side, compression=pixels)
      + softmax_instead(config, (side // pixels) ** 2)
    )
    / 1e12
    for side in map(int, SIDES)
  ]


def draw(directory: pathlib.Path) -> None:
  """Draws operations of one evaluation, and tokens by compression."""
  made, (left, right) = style.figure(8, 3, columns=2)
  config = config_lib.sana_1600m()
  linear = [flops.forward(config, side, side) / 1e12 for side in SIDES]
  for cost, label in (
    (linear, "linear, 32 pixels a token (SANA)"),
    (evaluation(config, 32), "softmax, 32 pixels a token"),
    (evaluation(config, 16), "softmax, 16 pixels a token"),
  ):
    left.plot(SIDES, cost, marker="o", label=label)
  left.set(xlabel="pixels a side", ylabel="TFLOP")
  left.set_title("one evaluation of 1.6B, by attention")
  # By pixels a token: the autoencoder's compression times the patch.
  for pixels, name in (
    (32, "32x, patch 1 (SANA)"),
    (16, "8x, patch 2"),
    (8, "8x, patch 1"),
  ):
    right.plot(SIDES, (SIDES // pixels) ** 2, marker="o", label=name)
  right.set(xlabel="pixels a side", ylabel="tokens")
  right.set_title("tokens, by compression and patch")
  for panel in (left, right):
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(SIDES, [str(side) for side in SIDES])
    panel.legend(fontsize=8)
  style.write_svg(made, directory / "cost.svg")
