"""Full-size configs want the tensors that published files have."""

import gzip
import json
import os
import pathlib

import pytest

from sana_jax import config as config_lib
from sana_jax.weights import files, gemma2, mapping, opening

pytestmark = pytest.mark.parity

ROOT = pathlib.Path(os.environ.get("SANA_JAX_REFKIT", ""))
SMALL = {"sample_size": 16}
# The published name, the architecture here, and what differs in its config.
PUBLISHED = (
  ("Sana_600M_512px", config_lib.sana_600m, SMALL),
  ("Sana_600M_1024px", config_lib.sana_600m, {}),
  ("Sana_1600M_512px", config_lib.sana_1600m, SMALL),
  ("Sana_1600M_1024px", config_lib.sana_1600m, {}),
  ("Sana_1600M_2Kpx", config_lib.sana_1600m_2k, {}),
  ("Sana_1600M_4Kpx", config_lib.sana_1600m_4k, {}),
  ("SANA1.5_1.6B_1024px", config_lib.sana15_1600m, {}),
  ("SANA1.5_4.8B_1024px", config_lib.sana15_4800m, {}),
  ("Sana_Sprint_0.6B_1024px", config_lib.sana_sprint_600m, {}),
  ("Sana_Sprint_1.6B_1024px", config_lib.sana_sprint_1600m, {}),
  ("dc-ae-f32c32-sana-1.0", config_lib.DCAEConfig, {}),
  ("dc-ae-f32c32-sana-1.1", config_lib.DCAEConfig, {}),
  ("dc-ae-lite-f32c32-sana-1.1", config_lib.dc_ae_lite, {}),
  ("gemma-2-2b-it", config_lib.Gemma2Config, {}),
)


def manifest(name: str, layout: str) -> dict[str, files.Tensor]:
  found = sorted(ROOT.glob(f"**/manifests/{name}.{layout}.json.gz"))
  if not found:
    pytest.skip(f"SANA_JAX_REFKIT has no manifest {name}.{layout}")
  shapes = json.loads(gzip.decompress(found[0].read_bytes()))
  return {
    name: files.Tensor(tuple(shape), None, None)
    for name, shape in shapes.items()
  }


@pytest.mark.parametrize(("name", "preset", "changes"), PUBLISHED)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_names_and_shapes_are_the_published_ones(name, preset, changes, layout):
  config = preset()
  for field, value in changes.items():
    setattr(config, field, value)
  if isinstance(config, config_lib.Gemma2Config):
    layout = {"diffusers": "text_encoder", "original": "causal_lm"}[layout]
  tensors = manifest(name, layout)
  if layout == "causal_lm":
    tensors = gemma2.strip_prefix(tensors)
  component = opening.component(config, tensors)
  assert component.problems() == []
  wanted = mapping.expected_shapes(component.abstract(), component.rules)
  extra = {"pos_embed", "y_embedder.y_embedding"}
  extra |= {"logvar_linear.weight", "logvar_linear.bias"}
  assert set(tensors) - set(wanted) <= extra
