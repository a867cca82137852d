"""Every layout turns into every other and back, exactly."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sana_jax import pipeline as pipeline_lib
from sana_jax.models import dc_ae, sana
from sana_jax.tools import convert
from sana_jax.weights import components, files, mapping, opening
from sana_jax.weights import sana as sana_weights
from tests import tiny

# A walk along every ordered pair.
CHAIN = (
  *("diffusers", "diffusers", "original", "original", "orbax", "orbax"),
  *("diffusers", "orbax", "original", "diffusers"),
)


def lite_config():
  config = tiny.autoencoder_config(2)
  config.decoder_block_types = "ResBlock"
  config.decoder_layers_per_block = (0, 2)
  config.decoder_qkv_multiscales = ((),) * 2
  config.upsample_block_type = "pixel_shuffle"
  return config


def save_transformer(directory, **options):
  config = tiny.transformer_config(**options)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  components.save_transformer(directory, model, config)
  return model, config


def save_autoencoder(directory, config):
  model = tiny.random_model(
    lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0)), 1
  )
  components.save_autoencoder(directory, model, config)


def tensors_of(directory):
  tensors = files.open_component(directory)
  return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def assert_same_tensors(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert found[name].dtype == value.dtype, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


SAVERS = {
  "sprint": lambda d: save_transformer(d, guidance_embeds=True),
  "every_option": lambda d: save_transformer(
    d,
    patch_size=2,
    attention_bias=True,
    norm_elementwise_affine=True,
    interpolation_scale=2.0,
  ),
  "dcae": lambda d: save_autoencoder(d, tiny.autoencoder_config(2)),
  "dcae_lite": lambda d: save_autoencoder(d, lite_config()),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_chains_through_all_pairs_of_layouts_are_exact(tmp_path, kind):
  SAVERS[kind](tmp_path / "diffusers0")
  last = tmp_path / "diffusers0"
  for i, to in enumerate(CHAIN[1:], 1):
    target = tmp_path / f"{to}{i}"
    assert convert.convert(last, target, to=to) == []
    assert (target / "params").exists() == (to == "orbax")
    assert (target / "model.safetensors").exists() == (to == "original")
    last = target
  start = tmp_path / "diffusers0"
  assert_same_tensors(tensors_of(last), tensors_of(start))
  assert files.read_json(last / "config.json") == (
    files.read_json(start / "config.json")
  )


def test_the_chain_has_every_pair():
  pairs = {(a, b) for a in convert.LAYOUTS for b in convert.LAYOUTS}
  assert set(zip(CHAIN[:-1], CHAIN[1:], strict=True)) == pairs


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("to", ["original", "orbax"])
def test_narrow_dtypes_stay_as_they_are(tmp_path, dtype, to):
  model, config = save_transformer(tmp_path / "wide")
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  narrow = {name: value.astype(dtype) for name, value in tensors.items()}
  files.write_component(tmp_path / "start", opening.config_json(config), narrow)
  convert.convert(tmp_path / "start", tmp_path / "other", to=to)
  found = opening.open_any(tmp_path / "other").tensors
  assert {tensor.dtype for tensor in found.values()} == {np.dtype(dtype)}
  convert.convert(tmp_path / "other", tmp_path / "end", to="diffusers")
  assert_same_tensors(tensors_of(tmp_path / "end"), narrow)


def test_a_dtype_may_be_chosen(tmp_path):
  save_transformer(tmp_path / "start")
  convert.convert(
    tmp_path / "start", tmp_path / "end", to="diffusers", dtype="bfloat16"
  )
  assert_same_tensors(
    tensors_of(tmp_path / "end"),
    {
      name: value.astype(ml_dtypes.bfloat16)
      for name, value in tensors_of(tmp_path / "start").items()
    },
  )


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
  model, config = save_transformer(tmp_path / "start")
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  tensors["proj_out.weight"][0, 0] = 1e5
  files.write_component(
    tmp_path / "large", opening.config_json(config), tensors
  )
  with pytest.raises(ValueError, match=r"float16 cannot hold.* 1e\+05"):
    convert.convert(
      tmp_path / "large", tmp_path / "end", to="orbax", dtype="float16"
    )
  assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "start"]


def test_original_files_lose_only_what_is_no_parameter(tmp_path, rng):
  model, config = save_transformer(tmp_path / "start", qk_norm=None)
  tensors = mapping.save(model, sana_weights.original_rules(config))
  extra = {
    "pos_embed": rng.normal(size=(1, 64, 16)).astype(np.float32),
    "y_embedder.y_embedding": rng.normal(size=(7, 12)).astype(np.float32),
  }
  file = tmp_path / "sana.safetensors"
  safetensors.numpy.save_file(
    {f"model.diffusion_model.{k}": v for k, v in (tensors | extra).items()},
    file,
  )
  left_out = convert.convert(
    file,
    tmp_path / "end",
    to="original",
    config_file=tmp_path / "start" / "config.json",
  )
  assert sorted(left_out) == sorted(extra)
  assert_same_tensors(tensors_of(tmp_path / "end"), tensors)


def test_tensors_of_one_parameter_must_agree_in_dtype(tmp_path):
  model, config = save_transformer(tmp_path / "start")
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  name = "transformer_blocks.1.attn1.to_k.weight"
  tensors[name] = tensors[name].astype(np.float16)
  files.write_component(
    tmp_path / "mixed", opening.config_json(config), tensors
  )
  with pytest.raises(ValueError, match="dtypes.*float16.*float32"):
    convert.convert(tmp_path / "mixed", tmp_path / "end", to="original")
  convert.convert(
    tmp_path / "mixed", tmp_path / "end", to="original", dtype="float32"
  )


def test_misfits_and_existing_targets_are_refused(tmp_path):
  model, config = save_transformer(tmp_path / "start")
  with pytest.raises(FileExistsError, match="start exists; give a new"):
    convert.convert(tmp_path / "start", tmp_path / "start", to="orbax")
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  del tensors["proj_out.bias"]
  tensors["proj_out.more"] = tensors["caption_norm.weight"]
  files.write_component(
    tmp_path / "wrong", opening.config_json(config), tensors
  )
  with pytest.raises(
    ValueError, match=r"(?s)wrong does not fit.*missing.*unexpected"
  ):
    convert.convert(tmp_path / "wrong", tmp_path / "end", to="orbax")
  assert not (tmp_path / "end").exists()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("pipeline") / "start"
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


@pytest.mark.parametrize("to", ["original", "orbax"])
def test_a_converted_pipeline_loads_and_returns(pipeline, tmp_path, to):
  convert.convert(pipeline, tmp_path / "other", to=to)
  layout = opening.open_any(tmp_path / "other" / "text_encoder").layout
  assert layout == ("orbax" if to == "orbax" else "diffusers")
  first = pipeline_lib.SanaPipeline.from_pretrained(pipeline)
  second = pipeline_lib.SanaPipeline.from_pretrained(tmp_path / "other")
  for name in ("transformer", "autoencoder", "text_encoder"):
    assert_same_leaves(getattr(second, name), getattr(first, name))
  assert second.generation_config == first.generation_config
  assert second.solver == first.solver
  convert.convert(tmp_path / "other", tmp_path / "end", to="diffusers")
  names = [p.relative_to(pipeline) for p in pipeline.rglob("*") if p.is_file()]
  for name in names:
    if name.suffix == ".safetensors":
      assert_same_tensors(
        tensors_of((tmp_path / "end" / name).parent),
        tensors_of((pipeline / name).parent),
      )
    else:
      found = (tmp_path / "end" / name).read_bytes()
      assert found == (pipeline / name).read_bytes()


def assert_same_leaves(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_pipeline_takes_no_config_and_must_have_the_variant(
  pipeline, tmp_path
):
  with pytest.raises(ValueError, match="have their own configs"):
    convert.convert(
      pipeline, tmp_path / "end", to="orbax", config_file="config.json"
    )
  with pytest.raises(FileNotFoundError, match="variant 'fp16'"):
    convert.convert(pipeline, tmp_path / "end", to="orbax", variant="fp16")


def test_orbax_parameters_have_no_variants(tmp_path):
  save_transformer(tmp_path / "start")
  convert.convert(tmp_path / "start", tmp_path / "end", to="orbax")
  with pytest.raises(ValueError, match="Orbax parameters, which have no var"):
    components.load_transformer(tmp_path / "end", variant="fp16")


def test_the_command_reports_what_it_did(tmp_path, capsys):
  save_transformer(tmp_path / "start")
  command = [str(tmp_path / "start"), str(tmp_path / "end"), "--to=original"]
  assert convert.main(command) == 0
  assert capsys.readouterr().out == f"{tmp_path / 'end'}\n"
  assert convert.main(command) == 1
  assert capsys.readouterr().err.startswith("convert: ")
