"""Plans of a small run, compiled for the host's devices."""

import json

import jax
import pytest

from sana_jax import config as config_lib
from sana_jax import hardware, sharding
from sana_jax.plan import (
  compilation,
  report,
  roofline,
  suggest,
  topology,
  training,
)
from tests import tiny

SIZE = {"sample_size": 4, "num_layers": 2}


def make_config(**changes) -> config_lib.TextToImageConfig:
  values = {
    "model": tiny.transformer_config(**SIZE),
    "text_encoder": config_lib.Gemma2Config(hidden_size=12),
    "batch_size": 16,
    "mesh": {"data": 2, "fsdp": 4},
    "max_sequence_length": 6,
  }
  config = config_lib.TextToImageConfig(**values | changes)
  config.data.synthetic = True
  return config


def host_devices() -> topology.Topology:
  return topology.Topology("host:8", "v5e", tuple(jax.devices()[:8]), 1)


@pytest.fixture(scope="module")
def plan() -> report.Plan:
  return training.plan(
    make_config(), host_devices(), efficiency=0.4, num_images=2e6
  )


def test_memory_is_accounted_for(plan):
  memory = plan.memory
  assert memory["parameters"] == memory["average"]
  # Two moments, and a counter or two.
  assert 0 <= memory["optimiser"] - 2 * memory["parameters"] < 100
  # Per device: 2 images of 4x4x4 latents, 2 x 6 text states of 12, 2 masks of
  # 6, and the null caption.
  images, text = 2 * 4 * 4 * 4 * 2, 6 * 12 * 2 + 6
  assert memory["batch"] == images + 2 * text + text
  assert memory["temporaries"] > memory["parameters"]
  assert plan.total == sum(memory.values()) <= plan.hbm_bytes


@pytest.mark.slow
def test_a_run_without_an_average_plans_none(plan):
  config = make_config(ema_decay=0.0)
  mesh = sharding.make_mesh(config.mesh)
  step = compilation.make_step(config, mesh, (4, 4))
  memory = compilation.compile_step(step).memory
  assert memory["average"] == 0
  for part in ("parameters", "optimiser", "batch"):
    assert memory[part] == plan.memory[part]


def test_what_is_sent_is_found_along_the_mesh(plan):
  assert {axis for one in plan.found for axis in one.axes} == {"data", "fsdp"}
  kinds = {one.kind for one in plan.found if one.axes == ("fsdp",)}
  assert "all-gather" in kinds
  # The batch is small, and so are parameters: XLA sums what it would scatter.
  assert 1 <= report.ratio(plan) < 20


def test_times_and_prediction_follow_from_the_figures(plan):
  config = make_config()
  assert plan.step_flops == roofline.step_flops(config, (4, 4))
  chip_flops = 197e12 * 0.4
  assert plan.times.compute == pytest.approx(plan.step_flops / 8 / chip_flops)
  rate = 16 / plan.times.step
  assert plan.prediction.images_per_second == pytest.approx(rate)
  assert plan.prediction.chip_hours == pytest.approx(2e6 / rate / 3600 * 8)


def test_the_page_and_the_record_say_the_same(plan):
  page = report.text(plan)
  assert "training step for host:8 (8 chips)" in page
  assert "mesh data=2 fsdp=4" in page
  assert "fits" in page
  assert "2 million images" in page
  record = json.loads(json.dumps(report.record(plan)))
  assert record["fits"] is True
  assert record["total_bytes"] == plan.total
  assert record["sent_bytes"]["fsdp:all-gather"] > 0
  assert record["memory_bytes"]["parameters"] == plan.memory["parameters"]
  assert record["suggested"]["predicted"] is True


def test_the_compiled_step_calibrates_its_own_prediction(plan):
  config = make_config()
  devices = host_devices()
  step = compilation.make_step(config, _mesh(devices), (4, 4))
  study = suggest.Study(
    *(config, step.program, _chip(), (4, 4), 0.4, 2e6),
  )
  study = suggest.calibrated(study, _mesh(devices), plan.memory["temporaries"])
  (same,) = [
    one
    for one in suggest.candidates(study, [8])
    if one.mesh["fsdp"] == 4 and one.remat == config.remat
  ]
  state = ("parameters", "optimiser", "average")
  held = sum(plan.memory[name] for name in state)
  assert same.total == pytest.approx(
    held + plan.memory["temporaries"], rel=0.01
  )
  assert same.batch_size == 16


def _mesh(devices):
  return sharding.make_mesh({"data": 2, "fsdp": 4}, devices.devices)


def _chip():
  return hardware.CHIPS["v5e"]


def candidate(chips, hours, total):
  return suggest.Candidate(
    *(chips, {"data": chips}, "full", 8, total, 0.0),
    times=roofline.Times(1.0, 0.0, 0.0),
    prediction=roofline.Prediction(1.0, hours / chips, hours),
  )


def test_the_cheapest_fits_and_is_small():
  found = [
    candidate(8, 100.0, total=5),
    candidate(4, 100.5, total=9),
    candidate(4, 100.2, total=8),
    candidate(2, 120.0, total=9),
    candidate(1, 90.0, total=99),
  ]
  assert suggest.cheapest(found, hbm_bytes=10) == found[2]
  assert suggest.cheapest(found, hbm_bytes=8) == found[0]
  assert suggest.cheapest(found, hbm_bytes=5) is None


def test_a_batch_that_does_not_divide_is_refused():
  config = make_config(batch_size=12)
  with pytest.raises(ValueError, match="12 samples, which do not divide"):
    training.plan(config, host_devices())


def test_a_mesh_of_other_chips_is_refused():
  config = make_config(mesh={"data": 3, "fsdp": 4})
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    training.plan(config, host_devices())


def test_runs_on_tokens_are_refused():
  config = make_config(train_text_encoder=True)
  with pytest.raises(ValueError, match="train_text_encoder must be False"):
    training.plan(config, host_devices())


def test_other_recipes_are_refused():
  with pytest.raises(ValueError, match="got AutoencoderConfig"):
    training.check_config(config_lib.AutoencoderConfig())
  stages = config_lib.StagesConfig(stages={"small": make_config()})
  with pytest.raises(ValueError, match="of small: plan each by a config of"):
    training.check_config(stages)


def test_what_a_plan_can_do_without_is_filled_in():
  config = make_config(mesh=config_lib.TextToImageConfig().mesh)
  config.data.synthetic = False
  training.complete(config, host_devices(), {})
  assert config.data.synthetic
  assert config.hardware.preset == "v5e-8"
  assert config.mesh["data"] * config.mesh["fsdp"] == 8
  config = make_config()
  training.complete(config, host_devices(), {})
  assert config.hardware.preset is None
  assert config.mesh == {"data": 2, "fsdp": 4}


def test_a_preset_leaves_what_flags_gave():
  alone = config_lib.TextToImageConfig().mesh
  config = make_config(mesh=alone, remat="offload")
  given = {"remat": "offload", "optim.accumulation": 2}
  config.optim.accumulation = 2
  training.complete(config, host_devices(), given)
  assert config.hardware.preset == "v5e-8"
  assert (config.remat, config.optim.accumulation) == ("offload", 2)
  # A size that happens to be the default was given all the same.
  config = make_config(mesh=alone)
  training.complete(config, host_devices(), {"mesh.fsdp": 1})
  assert (config.hardware.preset, config.mesh) == (None, alone)


def test_a_preset_for_other_chips_is_refused():
  config = make_config(mesh={"data": 2, "fsdp": 8})
  config.hardware.preset = "v5e-16"
  with pytest.raises(ValueError, match="'v5e-16' is for 16 devices, got 8"):
    training.complete(config, host_devices(), {})


def test_pictures_must_be_whole_latents():
  config = make_config()
  assert training.latents_of(config, None, 1024) == (4, 32)
  with pytest.raises(ValueError, match=r"height \(1000\) must be a multiple"):
    training.latents_of(config, 1000, 1024)


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "Ran out of memory in memory space hbm. Used 25.93G of 15.75G hbm. "
      "Exceeded hbm capacity by 10.18G.",
      int(25.93 * 2**30),
    ),
    # As libtpu 0.0.42 says it.
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (40.25G) exceeds available HBM (15.75G).",
      7 + int(40.25 * 2**30),
    ),
    ("INTERNAL: something else", None),
  ],
)
def test_what_xla_says_of_lacking_memory_is_read(message, needed):
  assert compilation.needed_bytes(message, held=7) == needed


@pytest.mark.tpu_aot
def test_a_step_that_does_not_fit_is_told_not_raised():
  pytest.importorskip("libtpu")
  model = config_lib.sana_600m()
  model.num_layers = 1
  config = make_config(
    model=model,
    text_encoder=config_lib.Gemma2Config(),
    mesh={"data": 4},
    batch_size=4096,
    remat="none",
    max_sequence_length=300,
  )
  plan = training.plan(config, topology.describe("v5e:2x2"))
  assert plan.found is None
  assert plan.total > plan.hbm_bytes
  assert "DOES NOT FIT" in report.text(plan)


@pytest.mark.tpu_aot
def test_what_is_on_the_host_does_not_lie_beside_activations():
  pytest.importorskip("libtpu")

  def compiled(offload: tuple[str, ...]) -> report.Plan:
    model = config_lib.sana_600m()
    model.num_layers = 2
    config = make_config(
      model=model,
      text_encoder=config_lib.Gemma2Config(),
      mesh={"fsdp": 4},
      batch_size=32,
      max_sequence_length=300,
    )
    config.hardware.offload = offload
    return training.plan(config, topology.describe("v5e:2x2"))

  beside, away = compiled(()), compiled(("optimizer", "average"))
  state = beside.memory["optimiser"] + beside.memory["average"]
  assert state > 1e8
  assert away.total <= beside.total - 0.9 * state
