"""A preset spreads a batch without changing it, over memory that is there."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sana_jax import config as config_lib
from sana_jax import hardware, presets, sharding
from sana_jax.config import optim
from sana_jax.training import text_to_image
from tests import test_stage_configs

STAGES = sorted(test_stage_configs.PUBLISHED)


def get(name: str, *args) -> config_lib.TextToImageConfig:
  return importlib.import_module(f"configs.{name}").get_config(*args)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("v5e-256", ("v5e", 256, 1)),
    ("v5p-128x2", ("v5p", 128, 2)),
    ("h100-8", ("h100", 8, 1)),
  ],
)
def test_a_name_says_kind_and_number(name, expected):
  assert presets.parse(name) == expected


@pytest.mark.parametrize("name", ["v5e", "v5e-0", "tpu-8", "v5e-8x0", "v5e:8"])
def test_other_names_are_refused(name):
  with pytest.raises(
    ValueError, match="is not a kind of chip and their number"
  ):
    presets.parse(name)


@pytest.mark.parametrize(
  ("name", "first"),
  [
    ("v5-256", "v5e-256"),
    ("h10-8", "h100-8"),
    ("v5e-26", "v5e-256"),
    ("v5p-250x2", "v5p-256x2"),
  ],
)
def test_what_was_meant_is_asked_where_a_preset_does_not_do(name, first):
  with pytest.raises(ValueError, match=rf"Did you mean '{first}'( or|\?)"):
    get("sana_1600m_1024", name)


def test_what_is_offered_in_place_of_a_preset_fits():
  # Its state alone fills two chips, and so what is spelt likest.
  with pytest.raises(ValueError, match="Did you mean 'v5e-256'") as info:
    get("sana15_4800m_1024", "v5e-26")
  assert "'v5e-2'" not in str(info.value)


def test_boxes_of_gpus_are_no_slices():
  with pytest.raises(ValueError, match="give the number in all boxes, h100-16"):
    presets.parse("h100-8x2")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
  "name", ["v5e-16", "v5e-256", "v5p-64x2", "v6e-64", "h100-8", "h200-64"]
)
def test_what_is_laid_out_uses_all_chips_and_fits(stage, name):
  config = get(stage)
  batch = config.batch_size
  target = presets.parse(name)
  layout = presets.lay_out(config, target)
  assert math.prod(layout.mesh.values()) == target.chips * target.slices
  groups = layout.mesh["data"] * layout.mesh["fsdp"]
  assert batch % (groups * layout.accumulation) == 0
  assert layout.mesh["data"] % target.slices == 0
  needed = (
    presets.state_bytes(config) / layout.mesh["fsdp"]
    + presets.picture_bytes(config) * layout.rows
  )
  assert needed < 0.85 * hardware.CHIPS[target.chip].hbm_bytes
  assert presets.apply(config, name).batch_size == batch


def test_a_picture_that_is_too_large_is_shared():
  assert presets.lay_out(
    get("sana_1600m_4k"), presets.parse("v5e-256")
  ).mesh == {"data": 16, "fsdp": 8, "sequence": 2}


def test_what_does_not_fit_is_said():
  config = get("sana_1600m_1024")
  config.batch_size = 33
  with pytest.raises(ValueError, match="batch_size 33 does not spread over 64"):
    presets.lay_out(config, presets.parse("v5p-64"))
  with pytest.raises(ValueError, match=r"needs 11.5 GiB of the 1.5 that"):
    presets.lay_out(get("sana_1600m_4k"), presets.parse("v5e-2"))


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_counted_to_a_few_per_cent(stage):
  config = get(stage)
  params = jax.eval_shape(
    lambda key: text_to_image.init_params(config, key), jax.random.key(0)
  )
  counted = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert abs(presets.num_params(config.model) / counted - 1) < 0.03


def test_every_optimiser_has_its_moments():
  for name in optim.OPTIMIZERS:
    config = config_lib.TextToImageConfig()
    config.optim.name = name
    assert presets.state_bytes(config) > 12e9


def test_a_preset_is_a_beginning_that_flags_change():
  config = get("sana_1600m_1024", "h100-8")
  assert config.hardware.preset == "h100-8"
  assert config.hardware.compiler_options == {
    "xla_gpu_enable_latency_hiding_scheduler": True
  }
  config.optim.accumulation = 8
  config.data.synthetic = True
  config.freeze()
  line = presets.describe(config, sharding.make_mesh(config.mesh).shape)
  assert "mesh data=4 fsdp=2, batch 2048 in 8 part" in line


def test_a_preset_for_other_devices_is_named():
  config = get("sana_1600m_1024", "v5e-256")
  presets.check_devices(config, 256)
  with pytest.raises(
    ValueError, match=r"preset 'v5e-256' is for 256 devices, got 1: .*KIND-1\)"
  ):
    presets.check_devices(config, 1)
  config.mesh["data"] = -1
  presets.check_devices(config, 24)
  with pytest.raises(ValueError, match="is for 256 devices, got 12"):
    presets.check_devices(config, 12)
  # Without one, it is the mesh that is wrong.
  presets.check_devices(get("sana_1600m_1024"), 12)


def test_the_mesh_is_described_with_the_sizes_that_it_has():
  config = get("sana_1600m_1024")
  assert config.mesh["data"] == -1
  line = presets.describe(config, sharding.make_mesh(config.mesh).shape)
  assert f"mesh data={jax.device_count()}, batch" in line
  assert line.endswith("options: none")
  one = sharding.make_mesh(config.mesh, jax.devices()[:1])
  assert "mesh of one device, batch" in presets.describe(config, one.shape)


def test_options_are_named_as_the_compiler_names_them():
  config = config_lib.HardwareConfig(compiler_options={"--xla_x": "1"})
  with pytest.raises(ValueError, match="named without dashes"):
    config.freeze()


def test_xla_knows_the_options_of_gpus():
  """They are options of XLA itself, which it knows on CPUs too."""
  options = get("sana_1600m_1024", "h100-8").hardware.compiler_options
  lowered = jax.jit(lambda x: x @ x).lower(np.ones((4, 4), np.float32))
  lowered.compile(compiler_options=options)
  with pytest.raises(
    jax.errors.JaxRuntimeError, match="No such compile option"
  ):
    lowered.compile(compiler_options=options | {"xla_gpu_none": True})


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_knows_the_options_of_tpus(topology, monkeypatch):
  pytest.importorskip("libtpu")
  for name, value in {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }.items():
    monkeypatch.setenv(name, value)
  options = get("sana_1600m_1024", "v5e-16").hardware.compiler_options
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = jax.sharding.Mesh(np.asarray(devices).reshape(-1), ("fsdp",))
  x = jax.ShapeDtypeStruct(
    (256, 256),
    jnp.bfloat16,
    sharding=jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec("fsdp")
    ),
  )
  # A jitted function with the options, as the step is.
  jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()


def test_chips_that_do_not_hold_the_state_are_said_to_be_too_few():
  with pytest.raises(ValueError, match="1 v5e do not hold the state: .*GiB"):
    get("sana_1600m_1024", "v5e-1")


def test_a_run_without_an_average_needs_no_room_for_it():
  config = get("sana_1600m_1024")
  averaged = presets.state_bytes(config)
  config.ema_decay = 0.0
  difference = averaged - presets.state_bytes(config)
  assert difference == 4 * presets.num_params(config.model)
