"""One training step on meshes of every kind: the same losses, few bytes."""

import math
import os
import pathlib
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.training import checks, placement
from tests.training import batches_worker, parallel

AXES = sharding.AXES
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4))
STEPS = 20
# Sizes of axes that activations have on one device and parameters do not have:
# columns, and tokens where rows are whole and where they are cut in four.
TOKENS = {
  parallel.COLUMNS,
  parallel.COLUMNS * parallel.ROWS,
  parallel.COLUMNS * parallel.ROWS // 4,
}


class Observed(NamedTuple):
  losses: list[float]
  compiled: int
  collectives: list[parallel.Collective]


def observe(mesh, **changes) -> Observed:
  run = parallel.make_run(
    dict(zip(AXES, mesh, strict=True)),
    jax.devices()[: math.prod(mesh)],
    **changes,
  )
  losses = run.losses(STEPS)
  compiled = run.program.step._cache_size()
  return Observed(losses, compiled, parallel.collectives(run.hlo()))


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
  """What a program communicates does not depend on how well it is compiled."""
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


@pytest.fixture(scope="module")
def alone():
  return observe((1, 1, 1, 1)).losses


@pytest.fixture(
  scope="module",
  params=[
    # Copies alone are what most tests of the loop run on, too.
    pytest.param(MESHES[0], marks=pytest.mark.long),
    *MESHES[1:],
  ],
  ids=str,
)
def observed(request):
  return request.param, observe(request.param)


def test_losses_are_those_of_one_device_and_nothing_compiles_again(
  alone, observed
):
  _, found = observed
  assert alone[-1] < 0.7 * alone[0]
  # Sums over devices are taken in another order.
  np.testing.assert_allclose(found.losses, alone, rtol=1e-5)
  assert found.compiled == 1


def test_only_what_must_be_is_communicated(observed):
  mesh, found = observed
  CHECKS[mesh](found.collectives)


def moved(collectives, kind=None):
  """The shapes that are communicated, without axes of size one."""
  return [
    tuple(n for n in shape if n > 1)
    for collective in collectives
    if kind in (None, collective.kind)
    for shape in collective.shapes
  ]


def activations(shapes):
  return [shape for shape in shapes if TOKENS & set(shape)]


def check_data(collectives):
  assert {found.kind for found in collectives} == {"all-reduce"}
  assert not activations(moved(collectives))


def check_fsdp(collectives):
  """Kernels are gathered; gradients are summed; activations stay."""
  shapes = moved(collectives)
  assert not activations(shapes)
  gathered = moved(collectives, "all-gather")
  assert {(64, 192), (64, 320), (160, 64), (64, 384)} <= set(gathered)
  kinds = {found.kind for found in collectives}
  assert not kinds & {"collective-permute", "all-to-all"}


def check_tensor(collectives):
  """Activations are summed, three times a block and pass, and never moved."""
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert not activations(moved(collectives, kind))
  summed = activations(moved(collectives, "all-reduce"))
  # On a device: two samples of 8 x 7 patches and width 64.
  streams = [shape for shape in summed if math.prod(shape) == 2 * 56 * 64]
  # Forwards, forwards again (rematerialised), backwards.
  assert 6 <= len(streams) <= 9
  # Mean squares of queries and keys over a width that is cut, and of their
  # derivatives.
  assert {shape for shape in summed if shape not in streams} == {(2, 8, 7)}


def check_sequence(collectives):
  """Halos move, states are summed; neither depends on the picture's height."""
  halos = [
    shape
    for found in collectives
    if found.kind == "collective-permute"
    for shape in found.shapes
  ]
  # One row of values and gates, up and down, three times.
  assert set(halos) == {(4, 1, parallel.COLUMNS, 320)}
  assert len(halos) == 6
  others = [found for found in collectives if found.kind in OTHERS]
  assert not activations(moved(others))
  assert not moved(collectives, "all-to-all")
  # Of four samples and eight heads: key-value products, and sums of keys.
  assert {(4, 8, 8, 8), (4, 8, 8)} <= set(moved(collectives, "all-reduce"))


OTHERS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
CHECKS = dict(
  zip(
    MESHES,
    (check_data, check_fsdp, check_tensor, check_sequence),
    strict=True,
  )
)


@pytest.mark.long
@pytest.mark.parametrize(
  ("mesh", "changes"),
  [
    ((1, 2, 2, 2), {}),
    ((1, 2, 2, 2), {"qk_norm": None, "remat": "dots"}),
    ((2, 2, 1, 2), {"remat": "none", "scan_layers": False}),
  ],
)
def test_every_mixture_trains_alike(mesh, changes):
  alone = observe((1, 1, 1, 1), **changes).losses
  found = observe(mesh, **changes)
  np.testing.assert_allclose(found.losses, alone, rtol=1e-5)
  assert found.compiled == 1


@pytest.mark.parametrize("mesh", [(8, 1, 1, 1), (2, 1, 2, 2), (1, 2, 1, 4)])
def test_a_global_batch_is_the_same_on_every_mesh(mesh):
  sizes = dict(zip(AXES, mesh, strict=True))
  config = parallel.make_config(sizes)
  placed = sharding.make_mesh(sizes)
  found = placement.global_batches(
    parallel.read_batches, config, placed, first_step=3
  )
  whole = parallel.read_batches(parallel.loader.Host(), 3)
  for _ in range(2):
    batch, expected = next(found), next(whole)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    data, fsdp, _, sequence = mesh
    assert batch["latents"].addressable_shards[0].data.shape == (
      *(parallel.BATCH // (data * fsdp), parallel.ROWS // sequence),
      *(parallel.COLUMNS, 4),
    )
    assert batch["text"].addressable_shards[0].data.shape[1:] == (5, 12)


@pytest.mark.slow
def test_a_global_batch_is_the_same_in_two_processes(tmp_path):
  """Gathered, it is whole in the first alone, which exports a step once."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  pair = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", batches_worker.__name__),
        *(str(number), str(port), str(tmp_path)),
      ],
      env=os.environ | flags,
      cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]
  for number, process in enumerate(pair):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.count(" agrees\n") == len(batches_worker.MESHES)
    for step in (1, 2):
      written = output.count(f" writes step {step}\n")
      assert written == (0 if number else len(batches_worker.MESHES))


@pytest.mark.slow
def test_steps_with_scattered_gradients_are_those_of_the_compiler():
  """As on TPUs, of which CI compiles the program only."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.scattering_worker"],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "equal after 3 steps\n"


@pytest.mark.parametrize(
  ("blocks", "expected"),
  [
    ({(0, 16)}, ([0], 16)),
    ({(8, 12), (12, 16)}, ([8], 8)),
    # Chips of 2 x 2 in a 4 x 4: a process has blocks that are apart.
    ({(0, 2), (2, 4), (8, 10), (10, 12)}, ([0, 8], 4)),
    ({(4, 8), (8, 12)}, ([4, 8], 4)),
  ],
)
def test_a_process_reads_the_samples_of_its_devices(blocks, expected):
  assert placement.runs(blocks, 16) == expected


def test_what_does_not_divide_over_the_mesh_is_an_error():
  mesh = sharding.make_mesh({"data": 2, "sequence": 4})
  config = parallel.make_config({"data": 2, "sequence": 4}, batch_size=7)
  with pytest.raises(
    ValueError, match=r"batch_size \(7\) must be a multiple of data=2 x fsdp=1"
  ):
    checks.check_batch(config, mesh)

  def latents(*shape):
    return {"latents": jax.ShapeDtypeStruct(shape, np.float32)}

  with pytest.raises(
    ValueError, match="6 rows, .* sequence=4; use a smaller sequence axis"
  ):
    placement.batch_shardings(latents(4, 6, 8, 4), mesh)
  with pytest.raises(ValueError, match="3 samples, .* data=2 x fsdp=1; change"):
    placement.batch_shardings(latents(3, 8, 8, 4), mesh)


def test_a_mesh_that_leaves_the_parameters_whole_does_not_start():
  with pytest.raises(
    ValueError, match=r"fsdp=8 cuts .*embed of 60, .*set data=2, fsdp=4"
  ):
    parallel.make_run({"fsdp": 8}, **NARROW)


def test_heads_that_do_not_divide_are_an_error_when_traced():
  run = parallel.make_run({"data": 4, "tensor": 2}, **NARROW)
  with pytest.raises(ValueError, match=r"the heads axis of .* 5, .*tensor=2"):
    run.hlo()


# Five heads of a width of 60.
NARROW = {
  "num_attention_heads": 5,
  "attention_head_dim": 12,
  "num_cross_attention_heads": 5,
  "cross_attention_head_dim": 12,
  "cross_attention_dim": 60,
}
