"""Published checkpoints are found by any of their names, as what they are."""

import pytest

from sana_jax import config as config_lib
from sana_jax import resolution
from sana_jax.diffusion import schedules
from sana_jax.weights import zoo


@pytest.mark.parametrize(
  "name",
  [
    "Sana_600M_1024px",
    "sana_600m_1024PX_diffusers",
    "Efficient-Large-Model/Sana_600M_1024px",
    "efficient-large-model/Sana_600M_1024px_diffusers",
    "somebody/Sana_600M_1024px_diffusers",
    "/data/models/Sana_600M_1024px_diffusers/",
    "Sana_600M_1024px_MultiLing",
    "checkpoints/Sana_600M_1024px_MultiLing.pth",
    "Sana_600M_1024px_MultiLing.safetensors",
    "hub/models--Efficient-Large-Model--Sana_600M_1024px_diffusers/snapshots/ab1",
  ],
)
def test_a_checkpoint_is_found_by_any_of_its_names(name):
  assert zoo.find(name).name == "Sana_600M_1024px"


def test_names_with_dots_are_whole_names():
  assert zoo.find("SANA1.5_4.8B_1024px").make_config().num_layers == 60
  assert zoo.find("Sana_Sprint_0.6B_1024px_diffusers").is_sprint


def test_unknown_names_list_what_looks_like_them():
  with pytest.raises(ValueError, match="mean .*Sana_1600M_1024px_BF16"):
    zoo.find("Sana_1600M_1024_BF16")
  with pytest.raises(ValueError, match="there are Sana_600M_512px, "):
    zoo.find("flux")
  assert zoo.lookup("transformer") is None
  assert zoo.lookup("") is None


def test_no_two_checkpoints_share_a_name():
  names = [n.lower() for entry in zoo.ENTRIES for n in set(entry.names)]
  assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_the_columns_of_the_table_agree(entry):
  config = entry.make_config()
  config.validate()
  assert config.sample_size * resolution.COMPRESSION == entry.resolution
  assert config.guidance_embeds == entry.is_sprint
  assert (config.interpolation_scale is not None) == (entry.resolution > 1024)
  # Query and key norms came with the change to bfloat16.
  assert entry.precision == "bf16" or config.qk_norm is None
  if not entry.is_sprint:
    assert entry.pag_block == {1152: 14, 2240: 8}[config.width]
  assert (config.timestep_scale == 0.001) == entry.name.endswith("_teacher")
  assert entry.file.endswith(".pth")


def test_the_exceptions_are_as_published():
  small = zoo.find("Sana_600M_1024px")
  assert small.solver == schedules.FlowDPMSolver(flow_shift=3.0)
  assert small.original_solver == schedules.FlowDPMSolver(flow_shift=4.0)
  assert zoo.find("Sana_1600M_4Kpx_BF16").solver.flow_shift == 6.0
  sprint = zoo.find("Sana_Sprint_1.6B_1024px")
  assert (sprint.num_inference_steps, sprint.pag_block) == (2, None)
  assert sprint.make_config() == config_lib.sana_sprint_1600m()


def test_control_networks_name_the_model_they_steer():
  for net in zoo.CONTROLNETS:
    assert zoo.find(net.base).precision == net.precision
    assert zoo.lookup(net.repo) is None


def test_autoencoders_compress_as_the_transformers_expect():
  for entry in zoo.AUTOENCODERS:
    assert entry.make_config().spatial_compression == resolution.COMPRESSION
