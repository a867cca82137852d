"""What a restart takes over: free memory, and which lines were bad.

A run keeps the decisions of its beginning, whatever the machine is like later.
Lines that were bad then may be mended: their images follow, in units of their
own, and no other image changes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import plan as plan_lib
from sana_jax.bulk import requests
from sana_jax.pipeline import memory


@dataclasses.dataclass(frozen=True)
class History:
  """What run.json says of the beginning, and of what was mended since.

  Attributes:
    available_bytes: on each device, of models and programs, when it began;
      None: nobody knew.
    left_out: the images that bad lines have room for, by the item's number.
    repairs: for each time that lines were mended, their numbers, under "items",
      and the hash of their requests.
  """

  available_bytes: int | None
  left_out: Mapping[int, int] = dataclasses.field(default_factory=dict)
  repairs: Sequence[Mapping[str, Any]] = ()

  @classmethod
  def read(cls, run: Mapping[str, Any]) -> "History":
    return cls(
      run.get("available_bytes"),
      {bad["item"]: bad["images"] for bad in run.get("left_out", [])},
      run.get("repairs", []),
    )


def fix_memory(
  pipe: pipeline_lib.SanaPipeline, available_bytes: int | None
) -> None:
  """Has a pipeline plan with so much memory, not with what is free."""
  if available_bytes is None:
    available_bytes = memory.UNKNOWN
  pipe.memory = dataclasses.replace(
    pipe.memory, available_bytes=available_bytes
  )


def free_bytes(pipe: pipeline_lib.SanaPipeline) -> int | None:
  """Measures what models and programs may occupy on each device."""
  models = (
    *(pipe.text_encoder, pipe.transformer),
    *(pipe.autoencoder, pipe.controlnet),
  )
  return memory.available_bytes(pipe.used_devices, models)


def make_plan(
  items: Sequence[requests.Item],
  check: Callable[[plan_lib.Kind], None],
  past: History | None,
  **numbers: int,
) -> plan_lib.Plan:
  """Plans a run, or the rest of one.

  Args:
    check: raises ValueError for a kind of images that cannot be made.
    past: None: a new run.
    **numbers: see `plan.make_plan`.

  Raises:
    ValueError: numbers that cannot be, or a mended line that makes more or
      fewer images than there is room for.
  """
  if past is not None:
    items = [
      _in_its_room(item, past.left_out[i]) if i in past.left_out else item
      for i, item in enumerate(items)
    ]
  generations = _generations(items, past)
  images = plan_lib.make_plan(items, generations=generations, **numbers)
  refused = list(items)
  for kind in images.kinds():
    try:
      check(kind)
    except ValueError as error:
      for i in kind.items:
        refused[i] = requests.refusal(refused[i], error)
  if refused == list(items):
    return images
  # Whole kinds are gone, so that the batches of the others stay.
  return plan_lib.make_plan(
    refused, generations=_generations(refused, past), **numbers
  )


def start(images: plan_lib.Plan, available_bytes: int | None) -> dict[str, Any]:
  """Returns what run.json says of the beginning, as JSON values."""
  return {
    "available_bytes": available_bytes,
    "left_out": [
      {
        "item": i,
        "images": item.count,
        "origin": item.origin,
        "line": item.line,
        "error": item.reason,
      }
      for i, item in enumerate(images.items)
      if isinstance(item, requests.Problem)
    ],
  }


def repairs(images: plan_lib.Plan) -> list[dict[str, Any]]:
  """Returns what run.json says of mended lines, as JSON values."""
  return [
    {
      "items": [
        i for i, born in enumerate(images.generations) if born == generation
      ],
      "requests_sha256": images.fingerprint(generation),
    }
    for generation in range(1, max(images.generations) + 1)
  ]


def _in_its_room(item: requests.Item, count: int) -> requests.Item:
  if isinstance(item, requests.Problem):
    return dataclasses.replace(item, count=count)
  if item.count != count:
    raise ValueError(
      f"{item.origin}:{item.line} was bad when the run began, and left room "
      f"for {count} image(s); mended, it asks for {item.count}. Set "
      f"num_images_per_prompt to {count}, or use another --output_dir."
    )
  return item


def _generations(
  items: Sequence[requests.Item], past: History | None
) -> list[int]:
  generations = [0] * len(items)
  if past is None:
    return generations
  for number, repair in enumerate(past.repairs, 1):
    for i in repair["items"]:
      if i < len(items):
        generations[i] = number
  for i in past.left_out:
    if (
      i < len(items)
      and not generations[i]
      and isinstance(items[i], requests.Request)
    ):
      generations[i] = len(past.repairs) + 1
  return generations
