"""What a plan says: a page to read, and a record to keep."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sana_jax.plan import collectives, roofline, suggest, theory

_GIB = 2**30
_KEPT_COLLECTIVES = 12


class Plan(NamedTuple):
  """Everything that was found out about a step.

  Attributes:
    title: what was compiled, for what.
    settings: of the run that matter, by name.
    memory: bytes of a device by what they are for; None: XLA only said how
      many it needs in all.
    total: bytes of a device.
    on_host: bytes of its host.
    hbm_bytes: that XLA can allocate on it.
    found: exchanges of the compiled step; None: it was not compiled.
    least: see `theory.least_bytes`.
    activations: see `theory.gathered_activations`.
    times: a roofline, of what was found or else the least.
    suggested: the cheapest arrangement that is predicted to fit.
    versions: of what compiled it.
  """

  title: str
  settings: Mapping[str, Any]
  memory: Mapping[str, int] | None
  total: int
  on_host: int
  hbm_bytes: int
  found: Sequence[collectives.Collective] | None
  least: theory.Bytes
  activations: Sequence[collectives.Collective]
  step_flops: int
  times: roofline.Times
  efficiency: float
  prediction: roofline.Prediction
  num_images: float
  chips: int
  seconds: float
  suggested: suggest.Candidate | None
  versions: Mapping[str, str]


def text(plan: Plan) -> str:
  """Writes a plan for reading."""
  parts = [
    plan.title,
    f"  {', '.join(f'{k} {v}' for k, v in plan.settings.items())}",
    *_memory(plan),
    *_flops(plan),
    *_network(plan),
    *_time(plan),
    *_suggestion(plan),
  ]
  return "\n".join(parts)


def record(plan: Plan) -> dict[str, Any]:
  """Returns a plan as JSON can hold it; of exchanges, the largest."""
  return {
    "title": plan.title,
    "settings": dict(plan.settings),
    "versions": dict(plan.versions),
    "compile_seconds": round(plan.seconds, 1),
    "memory_bytes": dict(plan.memory) if plan.memory else None,
    "total_bytes": plan.total,
    "host_bytes": plan.on_host,
    "hbm_bytes": plan.hbm_bytes,
    "fits": plan.total <= plan.hbm_bytes,
    "step_flops": plan.step_flops,
    "sent_bytes": None if plan.found is None else _named(_sums(plan)),
    "least_bytes": _named(plan.least),
    "ratio": ratio(plan),
    "gathered_activations": [_collective(one) for one in plan.activations],
    "largest_collectives": [
      _collective(one) for one in (plan.found or ())[:_KEPT_COLLECTIVES]
    ],
    "seconds": plan.times._asdict() | {"step": plan.times.step},
    "efficiency": plan.efficiency,
    "num_images": plan.num_images,
    "prediction": plan.prediction._asdict(),
    "suggested": _candidate(plan.suggested),
  }


def ratio(plan: Plan) -> float | None:
  """Returns sent bytes over the least; None: there is nothing to compare.

  Tensor and sequence parallelism send activations, which the least leaves out.
  """
  if plan.found is None or not plan.least:
    return None
  ours = {axis for axes, _ in plan.least for axis in axes}
  sent = sum(one.bytes for one in plan.found if set(one.axes) <= ours)
  return sent / sum(plan.least.values())


def _sums(plan: Plan) -> theory.Bytes:
  return collectives.totals(plan.found or ())


def _memory(plan: Plan) -> list[str]:
  lines = ["", "memory of a device, GiB"]
  for name, size in (plan.memory or {}).items():
    lines.append(f"  {name:16}{size / _GIB:9.2f}")
  fits = "fits" if plan.total <= plan.hbm_bytes else "DOES NOT FIT"
  lines.append(
    f"  {'total':16}{plan.total / _GIB:9.2f} of "
    f"{plan.hbm_bytes / _GIB:.2f}: {fits}"
  )
  if plan.on_host:
    lines.append(f"  {'on the host':16}{plan.on_host / _GIB:9.2f}")
  return lines


def _flops(plan: Plan) -> list[str]:
  return [
    "",
    f"operations: {plan.step_flops / 1e12:.1f} TFLOP a step, "
    f"{plan.step_flops / 1e12 / plan.chips:.2f} a chip, recomputation included",
  ]


def _network(plan: Plan) -> list[str]:
  lines = ["", "sent by a device in a step, MB         compiled    least"]
  sums = _sums(plan)
  for key in sorted({*sums, *plan.least}, key=lambda k: -sums.get(k, 0)):
    axes, kind = key
    compiled = (
      f"{sums.get(key, 0) / 1e6:9.1f}" if plan.found is not None else ""
    )
    least = f"{plan.least[key] / 1e6:9.1f}" if key in plan.least else ""
    name = f"{' x '.join(axes) or '-'} {kind}"
    lines.append(f"  {name:34} {compiled:>9} {least:>9}".rstrip())
  found = ratio(plan)
  if found is not None:
    lines.append(f"  in all {found:.2f} times the least")
  for one in plan.activations[:4]:
    lines.append(
      f"  WARNING: {one.kind} of activations {_arrays(one)}, "
      f"{one.bytes / 1e6:.0f} MB: {one.op_name}"
    )
  return lines


def _time(plan: Plan) -> list[str]:
  times, prediction = plan.times, plan.prediction
  return [
    "",
    f"roofline: computing {times.compute:.3f} s (at {plan.efficiency:.0%} of "
    f"the chip's peak), memory {times.memory:.3f} s, "
    f"network {times.network:.3f} s",
    f"  at best {prediction.images_per_second:.1f} images/s, bound by "
    f"{times.bound}; {_images(plan.num_images)} images in "
    f"{prediction.hours:.1f} h, {prediction.chip_hours:,.0f} chip-hours",
    *(
      ["  what goes to the host and back is not in it"] if plan.on_host else []
    ),
  ]


def _suggestion(plan: Plan) -> list[str]:
  one = plan.suggested
  if one is None:
    return [
      "",
      "suggestion: no mesh of data and fsdp axes is predicted to fit at this "
      "batch_size; lower it, or take more chips or another kind.",
    ]
  mesh = ", ".join(f"{k}={v}" for k, v in one.mesh.items() if v > 1) or "one"
  return [
    "",
    f"cheapest that is predicted to fit (not compiled): {one.chips} chips, "
    f"{mesh}, remat {one.remat}, batch_size {one.batch_size}:",
    f"  {one.total / _GIB:.1f} GiB a device, at best "
    f"{one.prediction.images_per_second:.1f} images/s, "
    f"{one.prediction.chip_hours:,.0f} chip-hours",
  ]


def _images(number: float) -> str:
  return f"{number / 1e6:g} million" if number >= 1e6 else f"{number:g}"


def _named(sums: theory.Bytes) -> dict[str, int]:
  return {
    f"{','.join(axes)}:{kind}": round(sent)
    for (axes, kind), sent in sorted(sums.items())
  }


def _collective(one: collectives.Collective) -> dict[str, Any]:
  return {
    "kind": one.kind,
    "axes": list(one.axes),
    "arrays": _arrays(one),
    "times": one.times,
    "bytes": round(one.bytes),
    "op_name": one.op_name,
  }


def _arrays(one: collectives.Collective) -> str:
  shown = [str(array) for array in one.arrays[:3]]
  more = len(one.arrays) - len(shown)
  return ", ".join(shown) + (f" and {more} more" if more else "")


def _candidate(one: suggest.Candidate | None) -> dict[str, Any] | None:
  if one is None:
    return None
  return {
    "predicted": True,
    "chips": one.chips,
    "mesh": dict(one.mesh),
    "remat": one.remat,
    "batch_size": one.batch_size,
    "total_bytes": one.total,
    "images_per_second": one.prediction.images_per_second,
    "chip_hours": one.prediction.chip_hours,
  }
