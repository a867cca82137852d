"""Does a sampled emoji look most like the emoji its caption names?

python -m sana_jax.evaluation.emoji_retrieval --checkpoint=DIR

A sample is right when its nearest neighbour among all pictures of the data set
(Euclidean distance of 32x32 pixels) has the caption's name or base name: the
same emoji, possibly in another skin tone. Two rates are printed: for captions
drawn from the training split, and for the compositions that were held out.
"""

import json
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Float, Int
from PIL import Image

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.data import emoji

_SIDE = 32


def shrink(
  images: Float[np.ndarray, "n h w 3"],
) -> Float[np.ndarray, "n d"]:
  """Averages pictures in [0, 1] down to 32x32, one flat row each."""
  small = [
    np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    for picture in images_lib.to_pil(images)
  ]
  return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


def nearest(
  queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "m d"]
) -> Int[np.ndarray, " n"]:
  """Returns the index of the closest gallery row of every query."""
  squares = np.square(gallery).sum(axis=1)
  # |q|^2 is the same for all candidates of a query.
  return (squares[None] - 2 * queries @ gallery.T).argmin(axis=1)


def retrieval_rate(
  samples: Float[np.ndarray, "n h w 3"],
  wanted: Sequence[emoji.Record],
  records: Sequence[emoji.Record],
  gallery: Float[np.ndarray, "m d"],
) -> float:
  """Returns the share of samples whose nearest picture has the base name."""
  found = [records[i]["base_name"] for i in nearest(shrink(samples), gallery)]
  names = [record["base_name"] for record in wanted]
  return float(np.mean([a == b for a, b in zip(found, names, strict=True)]))


def choose(
  records: Sequence[emoji.Record], count: int, seed: int
) -> list[emoji.Record]:
  """Draws `count` different records; all of them when there are fewer."""
  order = np.random.default_rng(seed).permutation(len(records))
  return [records[i] for i in order[:count]]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("checkpoint", None, "Directory; None: the bundled model.")
  flags.DEFINE_integer("num_captions", 64, "Training captions to sample.")
  flags.DEFINE_integer("num_inference_steps", None, "None: the checkpoint's.")
  flags.DEFINE_float("guidance_scale", None, "None: the checkpoint's.")
  flags.DEFINE_integer("seed", 0, "Of the choice of captions and of the noise.")
  flags.DEFINE_string("output_dir", None, "Where to write grids and a JSON.")


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    pipe = pipeline_lib.SanaPipeline.from_pretrained(
      values.checkpoint or pipeline_lib.bundled_checkpoint()
    )
    train, heldout = (
      [source[i] for i in range(len(source))]
      for source in (emoji.load("train"), emoji.load("heldout"))
    )
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"emoji_retrieval: {error}")
  records = train + heldout
  pictures = np.stack([record["image"] for record in records])
  gallery = shrink(pictures.astype(np.float32) / 255)
  changes = {
    name: getattr(values, name)
    for name in ("num_inference_steps", "guidance_scale")
    if getattr(values, name) is not None
  }
  rates = {}
  for split, wanted in (
    ("train", choose(train, values.num_captions, values.seed)),
    ("heldout", heldout),
  ):
    names = [record["name"] for record in wanted]
    output = pipe(names, seed=values.seed, **changes)
    rates[split] = retrieval_rate(output.images, wanted, records, gallery)
    print(f"{split}: {rates[split]:.1%} of {len(wanted)} captions")  # noqa: T201
    if values.output_dir:
      _write(epath.Path(values.output_dir), split, output, names, rates)


def _write(directory, split, output, names, rates) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  images_lib.write_png(
    directory / f"{split}.png", images_lib.grid(output.images)
  )
  (directory / f"{split}_captions.json").write_text(json.dumps(names, indent=1))
  (directory / "retrieval.json").write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
  define_flags()
  app.run(main)
