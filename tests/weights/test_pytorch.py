"""What we save, PyTorch loads, and computes the same with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import text
from sana_jax.diffusion import schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.tools import convert
from sana_jax.weights import components
from tests import tiny

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

# Relative; both sides compute in float32.
TOLERANCE = 1e-4
COMPLETE = {
  "missing_keys": [],
  "unexpected_keys": [],
  "mismatched_keys": [],
  "error_msgs": [],
}
PROMPTS = ["a red apple", "A green cat, 3 gâteaux"]


def assert_close(found, expected):
  found, expected = np.asarray(found), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  error = np.linalg.norm(found - expected)
  assert error <= TOLERANCE * np.linalg.norm(expected)


def channels_first(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def channels_last(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.parametrize(
  "options",
  [
    {"qk_norm": None},
    {},
    {"guidance_embeds": True},
    {"interpolation_scale": 2.0, "sample_size": 6, "qk_norm": None},
  ],
  ids=["plain", "qk_norm", "sprint", "positions"],
)
def test_a_saved_transformer(tmp_path, rng, options):
  config = tiny.transformer_config(**options)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  components.save_transformer(tmp_path, model, config)
  theirs, info = diffusers.SanaTransformer2DModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert {key: list(info[key]) for key in COMPLETE} == COMPLETE
  latents = rng.normal(size=(2, 6, 8, 4)).astype(np.float32)
  states = rng.normal(size=(2, 5, 12)).astype(np.float32)
  mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
  timestep = np.array([3.0, 0.7], np.float32)
  guidance = np.array([0.45, 0.2], np.float32)
  guided = config.guidance_embeds
  with torch.no_grad():
    expected = theirs(
      channels_first(latents),
      torch.tensor(states),
      torch.tensor(timestep),
      guidance=torch.tensor(guidance) if guided else None,
      encoder_attention_mask=torch.tensor(mask),
    ).sample
  found = jax.jit(sana.SanaTransformer.__call__)(
    model,
    latents,
    timestep,
    states,
    mask.astype(bool),
    guidance=guidance if guided else None,
  )
  assert_close(found, channels_last(expected))


def lite_config() -> config_lib.DCAEConfig:
  config = tiny.autoencoder_config()
  config.decoder_block_types = "ResBlock"
  config.decoder_layers_per_block = (0, 1, 2)
  config.decoder_qkv_multiscales = ((),) * 3
  config.upsample_block_type = "pixel_shuffle"
  config.decoder_conv_act_fn = "silu"
  return config


def mix_config() -> config_lib.DCAEConfig:
  config = tiny.autoencoder_config()
  config.encoder_layers_per_block = config.decoder_layers_per_block = (0, 1, 1)
  config.downsample_block_type = "pixel_unshuffle"
  config.upsample_block_type = "pixel_shuffle"
  config.decoder_norm_types = ("batch_norm", "batch_norm", "rms_norm")
  config.decoder_act_fns = ("relu", "relu", "silu")
  return config


@pytest.mark.parametrize(
  "make_config", [tiny.autoencoder_config, lite_config, mix_config]
)
def test_a_saved_autoencoder(tmp_path, rng, make_config):
  config = make_config()
  model = tiny.random_model(
    lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0)), 1
  )
  components.save_autoencoder(tmp_path, model, config)
  theirs, info = diffusers.AutoencoderDC.from_pretrained(
    tmp_path, output_loading_info=True
  )
  theirs = theirs.eval()
  # PyTorch counts the batches a batch norm has seen, for itself alone.
  missing = [k for k in info["missing_keys"] if "num_batches" not in k]
  found = {key: list(info[key]) for key in COMPLETE} | {"missing_keys": missing}
  assert found == COMPLETE
  images = rng.uniform(-1, 1, size=(2, 32, 24, 3)).astype(np.float32)
  with torch.no_grad():
    latents = theirs.encode(channels_first(images)).latent
    decoded = theirs.decode(latents).sample
  ours = jax.jit(dc_ae.DCAE.encode)(model, images)
  assert_close(ours, channels_last(latents))
  again = jax.jit(dc_ae.DCAE.decode)(model, channels_last(latents))
  assert_close(again, channels_last(decoded))


def test_a_saved_text_encoder(tmp_path, rng):
  config = tiny.text_encoder_config(64)
  model = tiny.random_model(
    lambda: gemma2.Gemma2.from_config(config, rngs=nnx.Rngs(0)), 2
  )
  components.save_text_encoder(tmp_path, model, config)
  theirs, info = transformers.AutoModel.from_pretrained(
    tmp_path, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"]
  assert not info["unexpected_keys"]
  ids = rng.integers(3, 64, size=(2, 9))
  mask = np.arange(9)[None] < np.array([[9], [6]])
  with torch.no_grad():
    expected = theirs(
      torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64))
    ).last_hidden_state
  found = jax.jit(gemma2.Gemma2.__call__)(
    model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32)
  )
  assert_close(np.asarray(found)[mask], expected.numpy()[mask])


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(directory)
  return directory


@pytest.fixture
def run_both(tokenizer_directory, tmp_path, rng):
  """Saves a pipeline; calls it and PyTorch's, which loads what was saved."""

  def run(theirs_class, solver, settings, shared, *, noises=0):
    ours = tiny.make_pipeline(tokenizer_directory, solver=solver)
    ours.save_pretrained(tmp_path / "saved")
    theirs = theirs_class.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    latents = rng.normal(size=(2, 16, 8, 4)).astype(np.float32)
    expected = theirs(
      PROMPTS,
      latents=channels_first(latents),
      height=64,
      width=32,
      max_sequence_length=tiny.LENGTH,
      use_resolution_binning=False,
      generator=torch.Generator().manual_seed(5),
      output_type="np",
      **shared,
      **settings,
    ).images
    draws = {}
    if noises:
      # The scheduler's only use of the generator: one draw a step.
      generator = torch.Generator().manual_seed(5)
      shape = (2, 4, 16, 8)
      draws["noise"] = np.stack(
        [
          channels_last(torch.randn(shape, generator=generator))
          for _ in range(noises)
        ]
      )
    found = ours(
      PROMPTS, latents=latents, height=64, width=32, **shared, **draws
    )
    assert np.ptp(expected) > 0.1
    assert_close(found.images, expected)
    return theirs

  return run


@pytest.mark.parametrize(
  "solver",
  [schedules.FlowDPMSolver(flow_shift=3.0), schedules.FlowEuler(shift=2.0)],
  ids=["dpm", "euler"],
)
def test_a_saved_pipeline(run_both, solver):
  theirs = run_both(
    diffusers.SanaPipeline,
    solver,
    # PyTorch keeps no instruction with a checkpoint: its own is the default.
    {"complex_human_instruction": list(tiny.INSTRUCTION)},
    {
      "negative_prompt": ["blurry", "low quality"],
      "num_inference_steps": 3,
      "guidance_scale": 3.5,
    },
  )
  assert isinstance(theirs.text_encoder, transformers.Gemma2Model)


def test_a_saved_pipeline_with_the_default_instruction(
  tokenizer_directory, tmp_path
):
  ours = tiny.make_pipeline(tokenizer_directory)
  ours.save_pretrained(tmp_path)
  theirs = diffusers.SanaPipeline.from_pretrained(tmp_path)
  theirs.set_progress_bar_config(disable=True)
  latents = np.random.default_rng(1).normal(size=(1, 8, 8, 4))
  latents = latents.astype(np.float32)
  shared = {
    "num_inference_steps": 1,
    "height": 32,
    "width": 32,
    "max_sequence_length": tiny.LENGTH,
    "use_resolution_binning": False,
  }
  expected = theirs(
    PROMPTS[0], latents=channels_first(latents), output_type="np", **shared
  ).images
  found = ours(
    PROMPTS[0],
    latents=latents,
    complex_human_instruction=text.default_instruction(),
    **shared,
  )
  assert_close(found.images, expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_saved_sprint_pipeline(run_both, steps):
  middle = {} if steps == 2 else {"intermediate_timesteps": None}
  run_both(
    diffusers.SanaSprintPipeline,
    schedules.SCM(),
    {"complex_human_instruction": list(tiny.INSTRUCTION)} | middle,
    {"num_inference_steps": steps, "guidance_scale": 4.5},
    noises=steps,
  )


def test_converted_originals(tmp_path):
  """PyTorch diffusers has readers of its own for the original layouts."""
  config = tiny.transformer_config(qk_norm=None)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  components.save_transformer(tmp_path / "transformer", model, config)
  vae_config = tiny.autoencoder_config()
  vae = tiny.random_model(
    lambda: dc_ae.DCAE.from_config(vae_config, rngs=nnx.Rngs(0)), 1
  )
  components.save_autoencoder(tmp_path / "vae", vae, vae_config)
  dropped = {
    "transformer": ("pos_embed", "y_embedder.y_embedding"),
    "vae": (),
  }
  for name, cls in (
    ("transformer", diffusers.SanaTransformer2DModel),
    ("vae", diffusers.AutoencoderDC),
  ):
    old = tmp_path / f"{name}_old"
    convert.convert(tmp_path / name, old, to="original")
    file = old / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    # It drops these, but will not do without them.
    tensors |= {name: torch.zeros(1) for name in dropped[name]}
    safetensors_torch.save_file(tensors, file)
    expected = cls.from_pretrained(tmp_path / name).state_dict()
    found = cls.from_single_file(
      str(file), config=str(tmp_path / name), local_files_only=True
    ).state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
      torch.testing.assert_close(found[key], value, rtol=0, atol=0)
