import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import sharding, tree
from sana_jax.models import sana
from sana_jax.nn import low_rank
from sana_jax.weights import components, lora, mapping
from sana_jax.weights import sana as sana_weights
from tests import tiny

WIDTH, CHANNELS, CAPTIONS = 16, 4, 12
# [out, in] of modules of the tiny transformer, one of every kind.
TARGETS = {
  "patch_embed.proj": (WIDTH, CHANNELS, 2, 2),
  "time_embed.emb.timestep_embedder.linear_1": (WIDTH, 256),
  "time_embed.linear": (6 * WIDTH, WIDTH),
  "caption_projection.linear_1": (WIDTH, CAPTIONS),
  "transformer_blocks.0.attn1.to_q": (WIDTH, WIDTH),
  "transformer_blocks.0.attn1.to_v": (WIDTH, WIDTH),
  "transformer_blocks.1.attn1.to_k": (WIDTH, WIDTH),
  "transformer_blocks.1.attn1.to_out.0": (WIDTH, WIDTH),
  "transformer_blocks.0.attn2.to_q": (WIDTH, WIDTH),
  "transformer_blocks.0.attn2.to_v": (WIDTH, WIDTH),
  "transformer_blocks.1.attn2.to_out.0": (WIDTH, WIDTH),
  "transformer_blocks.1.ff.conv_inverted": (80, WIDTH, 1, 1),
  "transformer_blocks.0.ff.conv_point": (WIDTH, 40, 1, 1),
  "proj_out": (4 * CHANNELS, WIDTH),
}


def _config():
  return tiny.transformer_config(patch_size=2)


def _model(seed=0, **options):
  return tiny.random_model(
    lambda: sana.SanaTransformer.from_config(
      _config(), rngs=nnx.Rngs(0), **options
    ),
    seed,
  )


def _pair(rng, shape, rank, alpha):
  ones = (1, 1) * (len(shape) == 4)
  down = 0.3 * rng.normal(size=(rank, *shape[1:])).astype(np.float32)
  up = 0.3 * rng.normal(size=(shape[0], rank, *ones)).astype(np.float32)
  return lora.Pair(down, up, float(alpha))


def _lora(rng, targets=TARGETS, rank=3, alpha=5):
  """Ranks and alphas vary from module to module."""
  return lora.Lora(
    {
      name: _pair(rng, shape, rank + i % 2, alpha + i % 3)
      for i, (name, shape) in enumerate(targets.items())
    }
  )


def _inputs(rng):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  mask = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
  return draw(2, 4, 6, CHANNELS), jnp.array([7.0, 900.0]), draw(2, 5, 12), mask


@jax.jit
def _run(model, *inputs):
  with jax.default_matmul_precision("highest"):
    return model(*inputs)


def _named_leaves(model):
  return zip(tree.leaf_names(model), jax.tree.leaves(model), strict=True)


def _relative(found, expected):
  found, expected = (np.asarray(a, np.float64) for a in (found, expected))
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def _tensors(model):
  return mapping.save(model, sana_weights.diffusers_rules(_config()))


def test_fusing_adds_the_scaled_product_to_the_published_weights(rng):
  model = _model()
  adapters = [(_lora(rng), 0.5), (_lora(rng, rank=1), -0.75)]
  expected = _tensors(model)
  for adapter, scale in adapters:
    for name, pair in adapter.pairs.items():
      product = pair.up.reshape(-1, pair.rank) @ pair.down.reshape(
        pair.rank, -1
      )
      weight = expected[f"{name}.weight"]
      update = scale * pair.alpha / pair.rank * product.reshape(weight.shape)
      expected[f"{name}.weight"] = weight + update
  found = _tensors(lora.fuse(model, adapters))
  for name, weight in expected.items():
    # float32 sums of a few products.
    np.testing.assert_allclose(found[name], weight, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("scan", [True, False])
def test_attached_and_fused_adapters_compute_the_same(rng, scan):
  model, inputs = _model(scan=scan), _inputs(rng)
  adapters = [(_lora(rng), 0.5), (_lora(rng, rank=1), -0.75)]
  fused = _run(lora.fuse(model, adapters), *inputs)
  attached = _run(lora.attach(model, adapters), *inputs)
  assert _relative(attached, fused) < 1e-4  # float32 in another order
  assert _relative(fused, _run(model, *inputs)) > 0.01


def test_adapters_may_be_attached_one_after_the_other(rng):
  model, inputs = _model(), _inputs(rng)
  first, second = _lora(rng), _lora(rng, {"proj_out": TARGETS["proj_out"]})
  at_once = lora.attach(model, [(first, 1.0), (second, 2.0)])
  in_turn = lora.attach(lora.attach(model, [(first, 1.0)]), [(second, 2.0)])
  np.testing.assert_allclose(
    _run(at_once, *inputs), _run(in_turn, *inputs), atol=1e-5
  )


def test_another_scale_compiles_nothing_and_zero_is_the_base(rng):
  model, inputs, adapter = _model(), _inputs(rng), _lora(rng)
  traces = []

  @jax.jit
  def run(model, *inputs):
    traces.append(1)
    return model(*inputs)

  outputs = {
    scale: run(lora.attach(model, [(adapter, scale)]), *inputs)
    for scale in (1.0, 0.3, 0.0)
  }
  assert len(traces) == 1
  np.testing.assert_allclose(outputs[0.0], _run(model, *inputs), rtol=1e-5)
  assert _relative(outputs[0.3], outputs[0.0]) > 1e-3


@pytest.mark.parametrize("apply", [lora.fuse, lora.attach])
def test_no_adapters_change_nothing(apply):
  model = _model()
  assert jax.tree.leaves(apply(model, [])) == jax.tree.leaves(model)


@pytest.mark.parametrize("apply", [lora.fuse, lora.attach])
def test_untouched_parameters_are_shared_and_the_model_is_unchanged(rng, apply):
  model = _model()
  before = jax.tree.map(np.asarray, model)
  name = "transformer_blocks.1.attn2.to_k"
  adapter = _lora(rng, {name: (WIDTH, WIDTH)})
  changed = apply(model, [(adapter, 1.0)])
  jax.tree.map(np.testing.assert_array_equal, model, before)
  leaves = dict(_named_leaves(changed))
  touched = (
    {"blocks/cross_attention/kv/kernel"} if apply is lora.fuse else set()
  )
  for path, leaf in _named_leaves(model):
    assert (leaves[path] is leaf) == (path not in touched), path


def test_bfloat16_weights_are_rounded_once(rng):
  model = _model(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
  model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
  exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
  adapters = [(_lora(rng), 0.7)]
  fused = lora.fuse(model, adapters)
  expected = lora.fuse(exact, adapters)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
    fused,
    expected,
  )
  attached = lora.attach(model, adapters)
  assert {leaf.dtype for leaf in jax.tree.leaves(attached)} == {
    jnp.dtype(jnp.bfloat16)
  }
  inputs = _inputs(rng)
  # bfloat16 has 8 bits; errors of a few layers.
  assert _relative(_run(attached, *inputs), _run(expected, *inputs)) < 0.05


def test_sharded_models_stay_sharded(rng):
  model, inputs = _model(), _inputs(rng)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  shardings = sharding.param_shardings(model, sana.PARAM_AXES, mesh)
  placed = sharding.place(model, shardings)
  adapters = [(_lora(rng), 0.7)]
  expected = _run(lora.fuse(model, adapters), *inputs)
  fused = lora.fuse(placed, adapters)
  jax.tree.map(
    lambda leaf, place: (
      leaf.sharding.is_equivalent_to(place, leaf.ndim)
      or pytest.fail(f"{leaf.sharding} is not {place}")
    ),
    fused,
    shardings,
  )
  attached = lora.attach(placed, adapters)
  for variant in (fused, attached):
    # float32, summed in another order on every mesh.
    assert _relative(_run(variant, *inputs), expected) < 1e-4
  rows = (*sana.PARAM_AXES, *low_rank.PARAM_AXES)
  sharding.param_shardings(attached, rows, mesh)  # raises on what has no row


def test_a_saved_adapter_loads_unchanged(tmp_path, rng):
  adapter = _lora(rng)
  lora.save(tmp_path / "style", adapter)
  lora.save(tmp_path / "style.safetensors", adapter)
  for path in (tmp_path / "style", tmp_path / "style.safetensors"):
    loaded = lora.load(path)
    assert loaded.pairs.keys() == adapter.pairs.keys()
    for name, pair in adapter.pairs.items():
      found = loaded.pairs[name]
      np.testing.assert_array_equal(found.down, pair.down)
      np.testing.assert_array_equal(found.up, pair.up)
      assert found.alpha == pair.alpha


def test_guided_models_have_their_own_module_names(rng):
  config = tiny.transformer_config(guidance_embeds=True)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  name = "time_embed.guidance_embedder.linear_2"
  pair = _pair(rng, (WIDTH, WIDTH), 2, 2)
  fused = lora.fuse(model, [(lora.Lora({name: pair}), 1.0)])
  np.testing.assert_allclose(
    fused.guidance_embed.linear_2.kernel[...]
    - model.guidance_embed.linear_2.kernel[...],
    (pair.up @ pair.down).T,
    atol=1e-5,
  )


def test_all_that_does_not_fit_is_listed_at_once(rng):
  square = (WIDTH, WIDTH)
  targets = {
    "transformer_blocks.0.attn1.to_qkv": square,
    "transformer_blocks.2.attn1.to_q": square,
    "transformer_blocks.0.ff.conv_depth": (80, 1, 3, 3),
    "proj_out": (8, 8),
  }
  adapters = [(_lora(rng, targets, rank=2), 1.0), (_lora(rng, {}), np.inf)]
  for apply in (lora.fuse, lora.attach):
    with pytest.raises(ValueError, match="does not fit the model") as error:
      apply(_model(), adapters)
    for part in (
      "to_qkv is not a linear layer of the model",
      "transformer_blocks.2.attn1.to_q is beyond the 2 blocks of the model",
      "conv_depth is a depthwise convolution, which cannot have",
      "proj_out has lora_A (3, 8) and lora_B (8, 3), but the model's weight "
      "(16, 16) needs (3, 16) and (16, 3)",
      "the scale must be finite, got inf",
      "possible targets are caption_projection.linear_1, ",
      "transformer_blocks.<block>.attn1.to_out.0, ",
    ):
      assert part in str(error.value)


def test_a_kernel_that_is_not_there_is_named(rng):
  model = _model()
  model.head.projection.kernel = nnx.Param({"int8": jnp.ones((2,), jnp.int8)})
  adapter = _lora(rng, {"proj_out": TARGETS["proj_out"]})
  with pytest.raises(
    ValueError, match="proj_out has no kernel of real numbers"
  ):
    lora.attach(model, [(adapter, 1.0)])


def test_an_empty_adapter_is_not_saved(tmp_path):
  with pytest.raises(ValueError, match="has no updates"):
    lora.save(tmp_path, lora.Lora({}))


@pytest.mark.parity
def test_diffusers_reads_what_is_saved(tmp_path, rng):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  model, inputs = _model(), _inputs(rng)
  components.save_transformer(tmp_path / "transformer", model, _config())
  adapter = _lora(rng)
  lora.save(tmp_path / "style", adapter)
  theirs = diffusers.SanaTransformer2DModel.from_pretrained(
    tmp_path / "transformer"
  )
  pipe = diffusers.SanaPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=None,
    transformer=theirs,
    scheduler=None,
  )
  pipe.load_lora_weights(tmp_path / "style")
  latents, timestep, text, mask = (
    torch.from_numpy(np.array(array)) for array in inputs
  )
  for scale in (1.0, -0.5):
    with torch.no_grad():
      expected = theirs(
        latents.permute(0, 3, 1, 2),
        encoder_hidden_states=text,
        timestep=timestep,
        encoder_attention_mask=mask.long(),
        attention_kwargs={"scale": scale},
      ).sample
    found = _run(lora.fuse(model, [(adapter, scale)]), *inputs)
    # float32 on both sides, relative to the size of the output.
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert _relative(found, expected) < 1e-4
    unmodified = _run(model, *inputs)
    assert _relative(unmodified, expected) > 0.01


@pytest.mark.parity
def test_what_diffusers_saves_is_read(tmp_path, rng):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  peft = pytest.importorskip("peft")
  model, inputs = _model(), _inputs(rng)
  components.save_transformer(tmp_path / "transformer", model, _config())
  theirs = diffusers.SanaTransformer2DModel.from_pretrained(
    tmp_path / "transformer"
  )
  torch.manual_seed(0)
  config = peft.LoraConfig(
    r=3,
    lora_alpha=7,
    target_modules=["to_q", "to_out.0", "conv_point", "linear_1", "proj"],
    rank_pattern={"transformer_blocks.1.attn2.to_q": 5},
    alpha_pattern={"linear_1": 2},
    use_rslora=True,
    init_lora_weights=False,
  )
  theirs.add_adapter(config)
  theirs.save_lora_adapter(tmp_path / "style")
  latents, timestep, text, mask = (
    torch.from_numpy(np.array(array)) for array in inputs
  )
  with torch.no_grad():
    expected = theirs(
      latents.permute(0, 3, 1, 2),
      encoder_hidden_states=text,
      timestep=timestep,
      encoder_attention_mask=mask.long(),
    ).sample.permute(0, 2, 3, 1)
  found = _run(
    lora.attach(model, [(lora.load(tmp_path / "style"), 1.0)]), *inputs
  )
  # float32 on both sides, relative to the size of the output.
  assert _relative(found, expected.numpy()) < 1e-4
  assert _relative(_run(model, *inputs), expected.numpy()) > 0.01
