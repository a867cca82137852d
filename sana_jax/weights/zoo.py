"""The published SANA checkpoints: what each is, and how it was trained."""

import dataclasses
import difflib
import re
from collections.abc import Callable

from sana_jax import config as config_lib
from sana_jax.diffusion import schedules

_OWNER = "Efficient-Large-Model"
# What the model cards say; "see model card" where none was seen.
_NVIDIA = "NVIDIA License (NSCL v2-custom)"
_UNCONFIRMED = "see model card"
# The text encoder inside every diffusers repository is not the SANA authors'.
TEXT_ENCODER_LICENCE = "Gemma Terms of Use"
# Which block perturbed-attention guidance perturbs, by number of blocks.
_PAG_BLOCKS = {28: 14, 20: 8, 60: 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One published checkpoint of a diffusion transformer.

  Args:
    name: of the original repository, without its owner.
    make_config: builds the architecture.
    file: the original weights in `repo`, under checkpoints/.
    diffusers_repo: with its owner; None: there is none.
    resolution: side in pixels of the square images it was trained on.
    precision: "fp16" or "bf16", of the training run.
    licence: of these weights, as their model card says.
    solver: what the diffusers repository samples with.
    original_solver: what the original configuration samples with.
    num_inference_steps: that upstream samples with, as `guidance_scale`.
    pag_block: which block perturbed-attention guidance perturbs; None: the
      checkpoint takes guidance as an input and needs no other.
  """

  name: str
  make_config: Callable[[], config_lib.SanaConfig]
  file: str
  diffusers_repo: str | None
  resolution: int
  precision: str
  licence: str
  solver: schedules.FlowDPMSolver | schedules.SCM
  original_solver: schedules.FlowDPMSolver | schedules.SCM
  num_inference_steps: int
  guidance_scale: float
  pag_block: int | None

  @property
  def repo(self) -> str:
    return f"{_OWNER}/{self.name}"

  @property
  def is_sprint(self) -> bool:
    return isinstance(self.solver, schedules.SCM)

  @property
  def names(self) -> tuple[str, ...]:
    """All it is known by: repositories, with and without owner, and file."""
    repos = (self.repo, *filter(None, [self.diffusers_repo]))
    stem = self.file.rpartition("/")[2].removesuffix(".pth")
    return (*repos, *(repo.partition("/")[2] for repo in repos), stem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNet:
  """A published ControlNet, in the original layout only.

  Args:
    repo: with its owner.
    file: the weights in `repo`; they contain those of the base model.
    base: name of the `Entry` that it steers.
    precision: "fp16" or "bf16", of the training run.
    licence: of these weights.
  """

  repo: str
  file: str
  base: str
  precision: str
  licence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
  """A published DC-AE.

  Args:
    repo: with its owner, original layout.
    diffusers_repo: with its owner.
    make_config: builds the architecture.
    licence: of these weights.
  """

  repo: str
  diffusers_repo: str
  make_config: Callable[[], config_lib.DCAEConfig]
  licence: str


def _at(
  preset: Callable[[], config_lib.SanaConfig], **changes
) -> Callable[[], config_lib.SanaConfig]:
  return lambda: dataclasses.replace(preset(), **changes)


def _flow(
  name: str,
  make_config: Callable[[], config_lib.SanaConfig],
  *,
  resolution: int = 1024,
  precision: str = "bf16",
  shift: float = 3.0,
  original_shift: float | None = None,
  licence: str = _UNCONFIRMED,
  file: str | None = None,
  published: bool = True,
) -> Entry:
  return Entry(
    name=name,
    make_config=make_config,
    file=f"checkpoints/{file or name}.pth",
    diffusers_repo=f"{_OWNER}/{name}_diffusers" if published else None,
    resolution=resolution,
    precision=precision,
    licence=licence,
    solver=schedules.FlowDPMSolver(flow_shift=shift),
    original_solver=schedules.FlowDPMSolver(flow_shift=original_shift or shift),
    num_inference_steps=20,
    guidance_scale=4.5,
    pag_block=_PAG_BLOCKS[make_config().num_layers],
  )


def _sprint(
  name: str, make_config: Callable[[], config_lib.SanaConfig]
) -> Entry:
  return Entry(
    name=name,
    make_config=make_config,
    file=f"checkpoints/{name}.pth",
    diffusers_repo=f"{_OWNER}/{name}_diffusers",
    resolution=1024,
    precision="bf16",
    licence=_NVIDIA,
    solver=schedules.SCM(),
    original_solver=schedules.SCM(),
    num_inference_steps=2,
    guidance_scale=4.5,
    pag_block=None,
  )


_600M, _1600M = config_lib.sana_600m, config_lib.sana_1600m
_512, _FP16 = {"resolution": 512}, {"precision": "fp16"}
_TEACHER = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}

# Source: the model zoo of github.com/NVlabs/Sana and its sampling configs.
ENTRIES: tuple[Entry, ...] = (
  _flow(
    "Sana_600M_512px",
    _at(_600M, sample_size=16),
    file="Sana_600M_512px_MultiLing",
    **_512,
    **_FP16,
  ),
  _flow(
    "Sana_600M_1024px",
    _600M,
    file="Sana_600M_1024px_MultiLing",
    # The original configuration and the diffusers repository differ.
    original_shift=4.0,
    **_FP16,
  ),
  _flow("Sana_1600M_512px", _at(_1600M, sample_size=16), **_512, **_FP16),
  _flow(
    "Sana_1600M_512px_MultiLing", _at(_1600M, sample_size=16), **_512, **_FP16
  ),
  _flow("Sana_1600M_1024px", _1600M, licence=_NVIDIA, **_FP16),
  _flow("Sana_1600M_1024px_MultiLing", _1600M, **_FP16),
  _flow("Sana_1600M_1024px_BF16", _1600M),
  _flow(
    "Sana_1600M_2Kpx_BF16",
    config_lib.sana_1600m_2k,
    resolution=2048,
    licence=_NVIDIA,
  ),
  _flow(
    "Sana_1600M_4Kpx_BF16",
    config_lib.sana_1600m_4k,
    resolution=4096,
    shift=6.0,
  ),
  _flow("SANA1.5_1.6B_1024px", config_lib.sana15_1600m),
  _flow("SANA1.5_4.8B_1024px", config_lib.sana15_4800m, licence=_NVIDIA),
  _sprint("Sana_Sprint_0.6B_1024px", config_lib.sana_sprint_600m),
  _sprint("Sana_Sprint_1.6B_1024px", config_lib.sana_sprint_1600m),
  _flow(
    "Sana_Sprint_0.6B_1024px_teacher", _at(_600M, **_TEACHER), published=False
  ),
  _flow(
    "Sana_Sprint_1.6B_1024px_teacher",
    _at(_1600M, **_TEACHER),
    licence=_NVIDIA,
    published=False,
  ),
)

CONTROLNETS: tuple[ControlNet, ...] = tuple(
  ControlNet(
    repo=f"{_OWNER}/{name}",
    file=f"checkpoints/{name}.pth",
    base=base,
    precision=precision,
    licence=_UNCONFIRMED,
  )
  for name, base, precision in (
    ("Sana_1600M_1024px_BF16_ControlNet_HED", "Sana_1600M_1024px_BF16", "bf16"),
    ("Sana_600M_1024px_ControlNet_HED", "Sana_600M_1024px", "fp16"),
  )
)

AUTOENCODERS: tuple[Autoencoder, ...] = tuple(
  Autoencoder(
    repo=f"mit-han-lab/{name}",
    diffusers_repo=f"mit-han-lab/{name}-diffusers",
    make_config=make_config,
    licence=licence,
  )
  for name, make_config, licence in (
    ("dc-ae-f32c32-sana-1.0", config_lib.DCAEConfig, _UNCONFIRMED),
    ("dc-ae-f32c32-sana-1.1", config_lib.DCAEConfig, "MIT"),
    ("dc-ae-lite-f32c32-sana-1.1", config_lib.dc_ae_lite, _UNCONFIRMED),
  )
)

_BY_NAME = {name.lower(): entry for entry in ENTRIES for name in entry.names}
# The hub's cache keeps a snapshot under its commit, in a folder so called.
_CACHE_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def find(name: str) -> Entry:
  """Finds a checkpoint by repository, short name, file or local directory.

  Args:
    name: such as "Sana_1600M_1024px_BF16", with or without owner, `_diffusers`
      or `.pth`, in any case; of a path, its last part counts.

  Raises:
    ValueError: there is none; names that look like it are listed.
  """
  entry = lookup(name)
  if entry is None:
    raise ValueError(
      f"No published checkpoint is called {name!r}; {suggestion(name)}"
    )
  return entry


def lookup(name: str) -> Entry | None:
  """Does what `find` does, and returns None where there is none."""
  parts = [part for part in re.split(r"[/\\]", name.strip()) if part]
  for part in reversed(parts):
    if match := _CACHE_FOLDER.fullmatch(part):
      return _BY_NAME.get(match["name"].lower())
  last = parts[-1] if parts else ""
  stem = re.sub(r"\.(pth|pt|bin|safetensors)$", "", last, flags=re.IGNORECASE)
  return _BY_NAME.get(stem.lower())


def lookup_controlnet(name: str) -> ControlNet | None:
  """Finds a published ControlNet by its repository, with or without owner."""
  last = re.split(r"[/\\]", name.strip())[-1].lower()
  found = [c for c in CONTROLNETS if c.repo.lower().endswith(f"/{last}")]
  return found[0] if last and found else None


def suggestion(name: str) -> str:
  """Returns a sentence that lists the names most like `name`."""
  last = re.split(r"[/\\]", name.strip())[-1].lower()
  shorts = {n.lower(): n for n in (entry.name for entry in ENTRIES)}
  close = difflib.get_close_matches(last, shorts, n=3, cutoff=0.5)
  if close:
    return f"did you mean {', '.join(shorts[n] for n in close)}?"
  return f"there are {', '.join(shorts.values())}."
