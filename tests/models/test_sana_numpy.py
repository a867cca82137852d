"""The transformer against its definition, written out once more in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.weights import mapping
from sana_jax.weights import sana as sana_weights

WIDTH, HEAD_DIM, CROSS_DIM = 16, 4, 8


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _silu(x):
  return x * _sigmoid(x)


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _layer_norm(x, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class _Reference:
  """The forward pass of one sample, in float64, on published tensor names."""

  def __init__(self, tensors, config):
    self.w = {k: v.astype(np.float64) for k, v in tensors.items()}
    self.config = config

  def linear(self, name, x):
    weight = self.w[f"{name}.weight"]
    y = x @ weight.reshape(weight.shape[0], -1).T
    return y + self.w.get(f"{name}.bias", 0.0)

  def rms(self, name, x):
    if f"{name}.weight" not in self.w:
      return x
    mean = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean + 1e-5) * self.w[f"{name}.weight"]

  def embedder(self, name, time):
    angles = time * 10000.0 ** (-np.arange(128) / 128)
    table = np.concatenate([np.cos(angles), np.sin(angles)])
    return self.linear(
      f"{name}.linear_2", _silu(self.linear(f"{name}.linear_1", table))
    )

  def qkv(self, name, x, context, head_dim):
    q = self.rms(f"{name}.norm_q", self.linear(f"{name}.to_q", x))
    k = self.rms(f"{name}.norm_k", self.linear(f"{name}.to_k", context))
    v = self.linear(f"{name}.to_v", context)
    heads = WIDTH // head_dim
    return (y.reshape(len(y), heads, head_dim) for y in (q, k, v))

  def self_attention(self, name, x):
    q, k, v = self.qkv(name, x, x, HEAD_DIM)
    scores = np.einsum("nhd,mhd->hnm", np.maximum(q, 0), np.maximum(k, 0))
    scores = scores / (scores.sum(-1, keepdims=True) + 1e-15)
    y = np.einsum("hnm,mhd->nhd", scores, v).reshape(x.shape)
    return self.linear(f"{name}.to_out.0", y)

  def cross_attention(self, name, x, text):
    q, k, v = self.qkv(name, x, text, CROSS_DIM)
    scores = np.exp(np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(CROSS_DIM))
    scores = scores / scores.sum(-1, keepdims=True)
    y = np.einsum("hnm,mhd->nhd", scores, v).reshape(x.shape)
    return self.linear(f"{name}.to_out.0", y)

  def ffn(self, name, x, height, width):
    y = _silu(self.linear(f"{name}.conv_inverted", x))
    y = y.reshape(height, width, -1)
    kernel = self.w[f"{name}.conv_depth.weight"]
    padded = np.pad(y, ((1, 1), (1, 1), (0, 0)))
    y = self.w[f"{name}.conv_depth.bias"] + sum(
      padded[i : i + height, j : j + width] * kernel[:, 0, i, j]
      for i in range(3)
      for j in range(3)
    )
    value, gate = np.split(y.reshape(height * width, -1), 2, axis=-1)
    return self.linear(f"{name}.conv_point", value * _silu(gate))

  def block(self, name, x, modulation, text, height, width):
    rows = self.w[f"{name}.scale_shift_table"] + modulation.reshape(6, WIDTH)
    shift1, scale1, gate1, shift2, scale2, gate2 = rows
    y = _layer_norm(x, self.config.norm_eps) * (1 + scale1) + shift1
    x = x + gate1 * self.self_attention(f"{name}.attn1", y)
    x = x + self.cross_attention(f"{name}.attn2", x, text)
    y = _layer_norm(x, self.config.norm_eps)
    y = y * self.w.get(f"{name}.norm2.weight", 1.0)
    y = y + self.w.get(f"{name}.norm2.bias", 0.0)
    y = y * (1 + scale2) + shift2
    return x + gate2 * self.ffn(f"{name}.ff", y, height, width)

  def __call__(self, latents, timestep, text, guidance):
    p = self.config.patch_size
    height, width = (n // p for n in latents.shape[:2])
    patches = latents.reshape(height, p, width, p, -1)
    patches = patches.transpose(0, 2, 4, 1, 3).reshape(height * width, -1)
    x = self.linear("patch_embed.proj", patches)
    prefix = "time_embed" if guidance is not None else "time_embed.emb"
    embedded = self.embedder(f"{prefix}.timestep_embedder", timestep)
    if guidance is not None:
      embedded += self.embedder("time_embed.guidance_embedder", guidance)
    modulation = self.linear("time_embed.linear", _silu(embedded))
    text = _gelu(self.linear("caption_projection.linear_1", text))
    text = self.rms(
      "caption_norm", self.linear("caption_projection.linear_2", text)
    )
    for i in range(self.config.num_layers):
      name = f"transformer_blocks.{i}"
      x = self.block(name, x, modulation, text, height, width)
    shift, scale = self.w["scale_shift_table"] + embedded
    x = self.linear("proj_out", _layer_norm(x, 1e-6) * (1 + scale) + shift)
    x = x.reshape(height, width, p, p, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(height * p, width * p, -1)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {
      "patch_size": 2,
      "out_channels": 6,
      "attention_bias": True,
      "norm_elementwise_affine": True,
      "norm_eps": 1e-2,
      "qk_norm": "rms_norm_across_heads",
      "guidance_embeds": True,
      "mlp_ratio": 1.5,
    },
  ],
)
def test_the_transformer_equals_its_definition(rng, options):
  config = config_lib.SanaConfig(
    **{
      "in_channels": 3,
      "out_channels": 3,
      "num_attention_heads": WIDTH // HEAD_DIM,
      "attention_head_dim": HEAD_DIM,
      "num_layers": 2,
      "num_cross_attention_heads": WIDTH // CROSS_DIM,
      "cross_attention_head_dim": CROSS_DIM,
      "cross_attention_dim": WIDTH,
      "caption_channels": 5,
    }
    | options
  )
  model = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    jax.eval_shape(
      lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
    ),
  )
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  latents = rng.normal(size=(4, 6, 3))
  text = rng.normal(size=(5, 5))
  guidance = 0.45 if config.guidance_embeds else None
  expected = _Reference(tensors, config)(
    latents, 321.5, text[[0, 2, 3]], guidance
  )
  with jax.default_matmul_precision("highest"):
    out = jax.jit(lambda **inputs: model(**inputs))(
      latents=jnp.asarray(latents[None], jnp.float32),
      timestep=jnp.array([321.5]),
      text=jnp.asarray(text[None], jnp.float32),
      text_mask=jnp.array([[True, False, True, True, False]]),
      guidance=None if guidance is None else jnp.array([guidance]),
    )
  # float32 against float64, relative to the size of the output.
  error = np.linalg.norm(out[0] - expected) / np.linalg.norm(expected)
  assert error < 2e-5
