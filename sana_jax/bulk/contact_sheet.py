"""All images of a small run in one picture."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax import storage
from sana_jax.bulk import manifest, plan, sinks

_MOST = 1024


def check(
  pipe: pipeline_lib.SanaPipeline,
  images: plan.Plan,
  *,
  output_format: str,
  num_hosts: int,
) -> None:
  """Raises ValueError for a run whose images do not make a grid."""
  if output_format != "png" or num_hosts > 1 or images.num_images > _MOST:
    raise ValueError(
      f"--grid is for PNG files of one host, at most {_MOST}; this is "
      f"{images.num_images} images, {output_format}, {num_hosts} host(s)."
    )
  sizes = set()
  for settings in {request.settings for request in images.requests}:
    changed = pipe.generation_config.replace(dict(settings))
    sizes.add(pipe.image_size(changed)[:2])
  if len(sizes) > 1:
    raise ValueError(f"--grid needs images of one size, got {sorted(sizes)}.")


def write(
  directory: storage.Directory,
  images: plan.Plan,
  description: Mapping[str, Any],
) -> None:
  """Writes grid.png; images that failed are white.

  Args:
    description: of the run.
  """
  pictures = [
    _read(directory, image, images.num_images) for image in images.images()
  ]
  found = [picture for picture in pictures if picture is not None]
  if not found:
    return
  white = np.ones_like(found[0])
  metadata = {
    "prompts": [image.prompt for image in images.images()],
    **description,
  }
  grid = images_lib.grid(
    [white if picture is None else picture for picture in pictures],
    columns=_columns(images),
  )
  content = images_lib.encode_png(
    grid, {"sana_jax": json.dumps(metadata, ensure_ascii=False)}
  )
  directory.write(manifest.GRID, content)


def _read(
  directory: storage.Directory, image: plan.Image, num_images: int
) -> Float[np.ndarray, "h w 3"] | None:
  name = sinks.png_name(image.index, image.prompt, num_images)
  try:
    with PIL.Image.open(directory.path / name) as picture:
      return np.asarray(picture.convert("RGB"), np.float32) / 255
  except FileNotFoundError:
    return None


def _columns(images: plan.Plan) -> int | None:
  """A row for each prompt, where each has the same number of images."""
  counts = sorted({r.count for r in images.requests})
  return counts[0] if len(counts) == 1 and counts[0] > 1 else None
