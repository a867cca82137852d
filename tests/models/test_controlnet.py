import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import controlnet as controlnet_lib
from sana_jax.models import sana
from tests import tiny

DEPTH, BRANCH = 4, 2


def controlnet_config(**changes):
  """The branch of the tiny transformer."""
  names = {f.name for f in dataclasses.fields(config_lib.SanaControlNetConfig)}
  values = tiny.transformer_config(num_layers=BRANCH, patch_size=2).to_dict()
  values = {name: value for name, value in values.items() if name in names}
  return config_lib.SanaControlNetConfig(**values | changes)


def make_transformer(*, scan=True, **changes):
  options = {"num_layers": DEPTH, "patch_size": 2, "qk_norm": None}
  config = tiny.transformer_config(**options | changes)
  return tiny.random_model(
    lambda: sana.SanaTransformer.from_config(
      config, scan=scan, rngs=nnx.Rngs(0)
    ),
    0,
  )


def make_controlnet(*, scan=True, **changes):
  config = controlnet_config(**changes)
  return tiny.random_model(
    lambda: controlnet_lib.SanaControlNet.from_config(
      config, scan=scan, rngs=nnx.Rngs(0)
    ),
    1,
  )


def make_inputs(rng):
  """Latents, control latents, timestep, text, mask."""
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  mask = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
  shape = (2, 4, 6, 4)
  times = jnp.array([7.0, 900.0])
  return draw(*shape), draw(*shape), times, draw(2, 5, 12), mask


@functools.partial(jax.jit, static_argnames="wiring")
def steered(transformer, controlnet, inputs, scale, *, wiring):
  """The transformer with a branch."""
  latents, control, *condition = inputs
  residuals = controlnet_lib.control_residuals(
    controlnet,
    transformer,
    latents,
    control,
    *condition,
    conditioning_scale=scale,
    wiring=wiring,
  )
  after = controlnet_lib.first_block(wiring)
  return transformer(
    latents, *condition, residuals=residuals, residuals_after=after
  )


@jax.jit
def plain(transformer, inputs):
  """The transformer without a branch."""
  latents, _, *condition = inputs
  return transformer(latents, *condition)


def embed(model, timestep, text):
  """What modulates the blocks of a model, and what they attend to."""
  embedded = model.time_embed(timestep)
  modulation = model.time_modulation(jax.nn.silu(embedded)).reshape(2, 6, -1)
  return embedded, modulation, model.caption_embed(text)


def layer(stacked, index):
  return jax.tree.map(lambda leaf: leaf[index], stacked)


def finish(transformer, x, embedded):
  x = transformer.head(x, embedded)  # Patches of 2x2, rows first.
  b, h, w, _ = x.shape
  x = x.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, 2 * h, 2 * w, -1)


@jax.jit
def original_definition(transformer, controlnet, inputs, scale):
  """x = blocks[0](x); c = ctrl[i](c); x = blocks[i+1](x + after[i](c))."""
  latents, control, timestep, text, mask = inputs
  embedded, modulation, text = embed(transformer, timestep, text)
  run = lambda blocks, i, x: layer(blocks, i)(x, modulation, text, mask)  # noqa: E731
  x = run(transformer.blocks, 0, transformer.patch_embed(latents))
  c = x + controlnet.input_projection(transformer.patch_embed(control))
  for i in range(BRANCH):
    c = run(controlnet.blocks, i, c)
    after = layer(controlnet.output_projections, i)
    x = run(transformer.blocks, i + 1, x + scale * after(c))
  for i in range(BRANCH + 1, DEPTH):
    x = run(transformer.blocks, i, x)
  return finish(transformer, x, embedded)


@jax.jit
def diffusers_definition(transformer, controlnet, inputs, scale):
  """c = embed(x) + in(embed(control)); r[i - 1] is added after block i."""
  latents, control, timestep, text, mask = inputs
  _, modulation, caption = embed(controlnet, timestep, text)
  c = controlnet.input_projection(controlnet.patch_embed(control))
  c = c + controlnet.patch_embed(latents)
  added = {}
  for i in range(BRANCH):
    c = layer(controlnet.blocks, i)(c, modulation, caption, mask)
    added[i + 1] = scale * layer(controlnet.output_projections, i)(c)
  embedded, modulation, caption = embed(transformer, timestep, text)
  x = transformer.patch_embed(latents)
  for i in range(DEPTH):
    x = layer(transformer.blocks, i)(x, modulation, caption, mask)
    x = x + added.get(i, 0.0)
  return finish(transformer, x, embedded)


def relative(found, expected):
  return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


DEFINITIONS = {
  "original": original_definition,
  "diffusers": diffusers_definition,
}


@pytest.mark.parametrize("wiring", controlnet_lib.WIRINGS)
def test_a_wiring_equals_its_definition(rng, wiring):
  inputs = make_inputs(rng)
  transformer, controlnet = make_transformer(), make_controlnet()
  with jax.default_matmul_precision("highest"):
    expected = DEFINITIONS[wiring](transformer, controlnet, inputs, 0.7)
    for scan in (True, False):
      found = steered(
        make_transformer(scan=scan),
        make_controlnet(scan=scan),
        inputs,
        0.7,
        wiring=wiring,
      )
      # float32; the compiled programs add in different orders.
      assert relative(found, expected) < 1e-4
    assert relative(plain(transformer, inputs), expected) > 0.01


def test_residuals_are_proportional_to_the_scale(rng):
  transformer, controlnet = make_transformer(), make_controlnet()

  @jax.jit
  def residuals(scale):
    return controlnet_lib.control_residuals(
      controlnet, transformer, *make_inputs(rng), conditioning_scale=scale
    )

  whole, quarter = residuals(1.0), residuals(0.25)
  assert whole.shape == (BRANCH, 2, 2, 3, 16)
  np.testing.assert_allclose(quarter, whole / 4, rtol=1e-6)


def test_a_fresh_branch_changes_nothing_and_learns(rng):
  transformer, inputs = make_transformer(), make_inputs(rng)
  controlnet = jax.jit(
    lambda key: controlnet_lib.SanaControlNet.from_config(
      controlnet_config(), rngs=nnx.Rngs(key)
    )
  )(jax.random.key(0))

  def loss(controlnet):
    out = steered(transformer, controlnet, inputs, 1.0, wiring="diffusers")
    return jnp.square(out).mean(), out

  (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    controlnet
  )
  # float32; the compiled programs add in different orders.
  assert relative(found, plain(transformer, inputs)) < 1e-4
  size = jnp.abs(grads.output_projections.kernel[...]).max(axis=(1, 2))
  assert (size > 0).all()


def test_bfloat16_branches_return_float32_residuals(rng):
  controlnet = jax.eval_shape(
    lambda: controlnet_lib.SanaControlNet.from_config(
      controlnet_config(),
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )
  )
  residuals = jax.eval_shape(
    lambda model, inputs: model(*inputs), controlnet, make_inputs(rng)
  )
  assert residuals.dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_listed_at_once(rng):
  latents, control, *condition = make_inputs(rng)
  transformer = make_transformer(num_layers=BRANCH)
  controlnet = make_controlnet(
    num_attention_heads=3,
    num_cross_attention_heads=3,
    cross_attention_dim=24,
    caption_channels=13,
    patch_size=1,
  )
  with pytest.raises(ValueError, match="ControlNet: control_latents") as error:
    controlnet_lib.control_residuals(
      controlnet, transformer, latents, control[:1], *condition
    )
  for part in (
    "have shape (1, 4, 6, 4), the latents (2, 4, 6, 4)",
    "the width is 24, that of the transformer 16",
    "the patch size is 1, that of the transformer 2",
    "the patch embedding is (4, 24), that of the transformer (16, 16)",
    "the caption width is 13, that of the transformer 12",
    "2 residuals, the first after block 1, are too many for a transformer of 2",
  ):
    assert part in str(error.value)


def test_sprint_models_have_no_original_wiring(rng):
  latents, control, *condition = make_inputs(rng)
  with pytest.raises(ValueError, match="no transformer with guidance_embeds"):
    controlnet_lib.control_residuals(
      make_controlnet(),
      make_transformer(guidance_embeds=True),
      latents,
      control,
      *condition,
      wiring="original",
    )


@pytest.mark.parametrize("scale", [float("nan"), np.float32("inf")])
def test_a_scale_must_be_finite(rng, scale):
  latents, control, *condition = make_inputs(rng)
  with pytest.raises(ValueError, match="conditioning_scale must be finite"):
    controlnet_lib.control_residuals(
      make_controlnet(),
      make_transformer(),
      latents,
      control,
      *condition,
      conditioning_scale=scale,
    )


def test_an_unknown_wiring_is_an_error():
  with pytest.raises(ValueError, match="wiring must be one of .* got 'other'"):
    controlnet_lib.first_block("other")


@pytest.mark.parametrize(
  ("shape", "after", "message"),
  [
    ((2, 2, 2, 3, 15), 1, r"residuals must have shape \(blocks, 2, 2, 3, 16\)"),
    ((2, 2, 4, 6, 16), 1, r"residuals must have shape \(blocks, 2, 2, 3, 16\)"),
    ((DEPTH, 2, 2, 3, 16), 1, "4 residuals, the first after block 1, do not"),
    ((1, 2, 2, 3, 16), -1, "the first after block -1"),
  ],
)
def test_residuals_must_fit_the_transformer(rng, shape, after, message):
  latents, _, *condition = make_inputs(rng)
  with pytest.raises(ValueError, match=message):
    make_transformer()(
      latents,
      *condition,
      residuals=jnp.asarray(rng.normal(size=shape), jnp.float32),
      residuals_after=after,
    )
