"""What SANA is made of: shapes of SANA 1.6B at 1024 pixels."""

import pathlib

from matplotlib import patches

from docs.figures import style
from sana_jax import config as config_lib

SIDE = 1024
TOKENS_OF_TEXT = 300
_LINE = "#546e7a"


def draw(directory: pathlib.Path) -> None:
  """Draws the way from a prompt to a picture, and the inside of a block."""
  config = config_lib.sana_1600m()
  text, autoencoder = config_lib.Gemma2Config(), config_lib.DCAEConfig()
  side = SIDE // autoencoder.spatial_compression
  latents = f"{side} x {side} x {config.in_channels}"
  hidden = int(config.mlp_ratio * config.width)
  made, (panel,) = style.figure(9, 3.9)
  panel.set(xlim=(0, 100), ylim=(5, 49))
  panel.axis("off")
  top = 41
  boxes = (
    (0, "prompt"),
    (21, f"Gemma 2\n{TOKENS_OF_TEXT} x {text.hidden_size}"),
    (42, f"{config.num_layers} blocks\n{side**2} x {config.width}"),
    (63, f"latents\n{latents}"),
    (84, f"DC-AE decoder\n{SIDE} x {SIDE} x 3"),
  )
  for x, label in boxes:
    _box(panel, x, top, 16, 7, label, "#b2dfdb")
  for (x, _), (following, _) in zip(boxes[:-1], boxes[1:], strict=True):
    _arrow(panel, (x + 16, top + 3.5), (following, top + 3.5))
  # A sampler's step: the latents go in again.
  panel.annotate(
    "",
    xy=(50, top),
    xytext=(71, top),
    arrowprops={
      "arrowstyle": "->",
      "color": _LINE,
      "connectionstyle": "arc3,rad=-0.25",
    },
  )
  panel.text(60.5, top - 5.2, "every step", ha="center", fontsize=8)
  parts = (
    ("norm, scale, shift", "#eceff1"),
    (f"linear attention\n{config.num_attention_heads} heads of "
     f"{config.attention_head_dim}", "#ffe0b2"),
    ("gate, add", "#eceff1"),
    (f"cross-attention to the text\n{config.num_cross_attention_heads} heads "
     f"of {config.cross_attention_head_dim}", "#c5cae9"),
    ("add", "#eceff1"),
    ("norm, scale, shift", "#eceff1"),
    (f"Mix-FFN, 3x3 depthwise\n{hidden} hidden channels", "#ffe0b2"),
    ("gate, add", "#eceff1"),
  )  # fmt: skip
  panel.text(0, 30.5, "a block", fontsize=9.5, weight="bold")
  width, x = 22, 0.0
  for i, (label, colour) in enumerate(parts):
    row, column = divmod(i, 4)
    x, y = 26 * column, 20 - 14 * row
    _box(panel, x, y, width, 8, label, colour)
    if column < 3:
      _arrow(panel, (x + width, y + 4), (x + 26, y + 4))
  # From the end of the first row to the beginning of the second.
  ends, middle = (78 + width / 2, width / 2), 17
  panel.plot(
    (ends[0], ends[0], ends[1]), (20, middle, middle), color=_LINE, linewidth=1
  )
  _arrow(panel, (ends[1], middle), (ends[1], 14))
  style.write_svg(made, directory / "diagram.svg")


def _box(panel, x, y, width, height, label, colour) -> None:
  panel.add_patch(
    patches.FancyBboxPatch(
      (x, y),
      width,
      height,
      boxstyle="round,pad=0,rounding_size=1",
      facecolor=colour,
      edgecolor="none",
    )
  )
  panel.text(
    x + width / 2,
    y + height / 2,
    label,
    ha="center",
    va="center",
    fontsize=8.5,
  )


def _arrow(panel, start, end) -> None:
  panel.annotate(
    "",
    xy=end,
    xytext=start,
    arrowprops={"arrowstyle": "->", "color": _LINE},
  )
