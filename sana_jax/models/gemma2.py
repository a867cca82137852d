"""Gemma 2, the decoder-only language model that reads the captions.

SANA uses the hidden states after the final norm; nothing is generated.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sana_jax import config as config_lib
from sana_jax.nn import layers, stack
from sana_jax.ops import attention

_INIT = nnx.initializers.normal(0.02)


class KeysValues(NamedTuple):
  """What attention looks at of tokens; a stack of blocks has it stacked.

  Attributes:
    keys: after rotation.
  """

  keys: Float[Array, "*blocks b l kv_heads head_dim"]
  values: Float[Array, "*blocks b l kv_heads head_dim"]


class Prefix(NamedTuple):
  """Tokens that have been read, for texts which go on from them.

  Attributes:
    past: of every block.
    first: the hidden state of the first token after the final norm.
  """

  past: KeysValues
  first: Float[Array, "1 1 d"]


def rotary_embedding(
  length: int, head_dim: int, theta: float
) -> tuple[Float[Array, "l half"], Float[Array, "l half"]]:
  """Returns cos and sin of p / theta^(2 i / head_dim), slot p, pair i.

  The position is the slot index even where padding precedes a caption, as the
  published text states were made.

  Source: Su et al., arXiv:2104.09864, equation 15.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  positions = jnp.arange(length, dtype=jnp.float32)
  angles = positions[:, None] * (theta**-exponents)[None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "b l heads head_dim"],
  cos: Float[Array, "l half"],
  sin: Float[Array, "l half"],
) -> Float[Array, "b l heads head_dim"]:
  """Rotates the pairs (x_i, x_{i + head_dim / 2}) of every head."""
  # float32: bfloat16 cannot tell neighbouring positions apart beyond 256.
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[None, :, None], sin[None, :, None]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query softmax attention with rotary positions and a soft-cap.

  Args:
    scale: multiplies the logits.
    softcap: bound on the logits' magnitude; None: no bound.
  """

  def __init__(
    self,
    width: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    softcap: float | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.head_dim = head_dim
    self.scale = scale
    self.softcap = softcap
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    heads = common | {"axes": ("embed", "heads")}
    self.query = _linear(width, num_heads * head_dim, **heads)
    self.key = _linear(width, num_kv_heads * head_dim, **heads)
    self.value = _linear(width, num_kv_heads * head_dim, **heads)
    self.out = _linear(
      num_heads * head_dim, width, axes=("heads", "embed"), **common
    )

  def __call__(
    self,
    x: Float[Array, "b l d"],
    mask: Bool[Array, "#b l m"],
    cos: Float[Array, "l half"],
    sin: Float[Array, "l half"],
    past: KeysValues | None = None,
  ) -> tuple[Float[Array, "b l d"], KeysValues]:
    """Returns the result, and the keys and values of `x`.

    Args:
      past: of the m - l tokens before `x`, the same for every text.
    """
    heads = (*x.shape[:2], -1, self.head_dim)
    own = KeysValues(
      rotate(self.key(x).reshape(heads), cos, sin),
      self.value(x).reshape(heads),
    )
    seen = own if past is None else jax.tree.map(_append, past, own)
    y = attention.softmax_attention(
      rotate(self.query(x).reshape(heads), cos, sin),
      seen.keys,
      seen.values,
      mask=mask,
      scale=self.scale,
      softcap=self.softcap,
    )
    return self.out(y.reshape(*y.shape[:2], -1)), own


class GatedMLP(nnx.Module):
  """down(gelu(gate(x)) * up(x)), with the tanh form of gelu."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.gate = _linear(width, hidden, axes=("embed", "mlp"), **common)
    self.up = _linear(width, hidden, axes=("embed", "mlp"), **common)
    self.down = _linear(hidden, width, axes=("mlp", "embed"), **common)

  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    gate = jax.nn.gelu(self.gate(x), approximate=True)
    return self.down(gate * self.up(x))


class Gemma2Block(nnx.Module):
  """x + norm(attention(norm(x))), then y + norm(mlp(norm(y)))."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    attention_scale: float,
    attention_softcap: float | None,
    norm_eps: float,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    norm = functools.partial(_norm, width, norm_eps, param_dtype)
    self.pre_attention_norm = norm()
    self.attention = Attention(
      width,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      scale=attention_scale,
      softcap=attention_softcap,
      **common,
    )
    self.post_attention_norm = norm()
    self.pre_mlp_norm = norm()
    self.mlp = GatedMLP(width, hidden, **common)
    self.post_mlp_norm = norm()

  def __call__(
    self,
    x: Float[Array, "b l d"],
    mask: Bool[Array, "#b l m"],
    cos: Float[Array, "l half"],
    sin: Float[Array, "l half"],
    past: KeysValues | None = None,
  ) -> tuple[Float[Array, "b l d"], KeysValues]:
    """Returns the result, and what later tokens attend to; see `Attention`."""
    y, own = self.attention(self.pre_attention_norm(x), mask, cos, sin, past)
    x = x + self.post_attention_norm(y)
    return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))), own


class Gemma2(nnx.Module):
  """Token ids to hidden states, causally.

  A pad slot attends to the valid slots before it, so its state is that of a
  text that ends there. A slot with no valid slot before it (in front of a
  left-padded caption) averages over all slots; its state means nothing.

  Args:
    make_block: builds one block from a random key.
    windows: per block, how many slots back attention reaches, the query's own
      included; None: to the beginning.
    final_softcap: bound on the magnitude of `logits`; None: no bound.
    scan: see `nn.stack.run_blocks`, as `remat`.

  Source: Gemma 2, arXiv:2408.00118.
  """

  def __init__(
    self,
    vocab_size: int,
    width: int,
    *,
    make_block: Callable[[jax.Array], Gemma2Block],
    windows: tuple[int | None, ...],
    head_dim: int,
    rope_theta: float,
    norm_eps: float,
    final_softcap: float | None,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    self.windows = windows
    self.head_dim = head_dim
    self.rope_theta = rope_theta
    self.final_softcap = final_softcap
    self.scan = scan
    self.remat = remat
    self.embedding = nnx.Param(
      _INIT(rngs.params(), (vocab_size, width), param_dtype)
    )
    self.blocks = stack.make_blocks(make_block, rngs.params(), len(windows))
    self.norm = _norm(width, norm_eps, param_dtype)

  @classmethod
  def from_config(
    cls,
    config: config_lib.Gemma2Config,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ) -> "Gemma2":
    def make_block(key: jax.Array) -> Gemma2Block:
      return Gemma2Block(
        config.hidden_size,
        config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        norm_eps=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(key),
      )

    return cls(
      config.vocab_size,
      config.hidden_size,
      make_block=make_block,
      windows=_windows(config),
      head_dim=config.head_dim,
      rope_theta=config.rope_theta,
      norm_eps=config.rms_norm_eps,
      final_softcap=config.final_logit_softcapping,
      param_dtype=param_dtype,
      scan=scan,
      remat=remat,
      rngs=rngs,
    )

  def __call__(
    self,
    input_ids: Int[Array, "b l"],
    attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
    prefix: Prefix | None = None,
  ) -> Float[Array, "b l d"]:
    """Returns the hidden states after the final norm, in float32.

    Args:
      attention_mask: nonzero where a token is part of the text; None: all are.
      prefix: what every text has before these tokens; all of it is text.
    """
    past = prefix and prefix.past
    block_fn, windows = self._block_fn(input_ids.shape[1], attention_mask, past)
    x = stack.run_blocks(
      lambda *args: block_fn(*args)[0],
      self._embed(input_ids),
      self.blocks,
      windows,
      past,
      scan=self.scan,
      remat=self.remat,
    )
    return self.norm(x)

  def read_prefix(self, input_ids: Int[Array, "p"]) -> Prefix:
    """Reads tokens that texts begin with, for `__call__` to go on from."""
    block_fn, windows = self._block_fn(input_ids.shape[0])
    x, past = stack.collect_blocks(
      block_fn,
      self._embed(input_ids[None]),
      self.blocks,
      windows,
      None,
      scan=self.scan,
      remat=self.remat,
    )
    return Prefix(past, self.norm(x[:, :1]))

  def hidden_states(
    self,
    input_ids: Int[Array, "b l"],
    attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
  ) -> list[Float[Array, "b l d"]]:
    """Returns the embeddings and every block's output, the last one normed."""
    block_fn, windows = self._block_fn(input_ids.shape[1], attention_mask)
    states = [self._embed(input_ids)]
    for i in range(len(self.windows)):
      block = jax.tree.map(lambda leaf: leaf[i], self.blocks)  # noqa: B023
      states.append(block_fn(block, states[-1], windows[i], None)[0])
    states[-1] = self.norm(states[-1])
    return states

  def logits(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
    """Scores the next token: cap(hidden embedding^T), in float32."""
    embedding = self.embedding[...].astype(hidden.dtype)
    scores = jnp.einsum(
      "bld,vd->blv", hidden, embedding, preferred_element_type=jnp.float32
    )
    if self.final_softcap is None:
      return scores
    return self.final_softcap * jnp.tanh(scores / self.final_softcap)

  def _embed(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    # float32 residual stream: tens of blocks add small updates to a large sum.
    x = self.embedding[...][input_ids].astype(jnp.float32)
    return x * math.sqrt(x.shape[-1])

  def _block_fn(
    self,
    length: int,
    attention_mask: Array | None = None,
    past: KeysValues | None = None,
  ):
    """Returns run_blocks' block function and the windows it is mapped over."""
    before = 0 if past is None else past.keys.shape[2]
    total = before + length
    slots = jnp.arange(total)
    distance = slots[before:, None] - slots[None]
    allowed = (distance >= 0)[None]
    if attention_mask is not None:
      is_text = attention_mask.astype(bool)
      is_text = jnp.pad(is_text, ((0, 0), (before, 0)), constant_values=True)
      allowed = allowed & is_text[:, None]
    cos, sin = rotary_embedding(total, self.head_dim, self.rope_theta)
    cos, sin = cos[before:], sin[before:]

    def block_fn(block, x, window, past):
      return block(x, allowed & (distance < window)[None], cos, sin, past)

    reaches = [total if window is None else window for window in self.windows]
    return block_fn, jnp.array(reaches, jnp.int32)


def _append(
  past: Float[Array, "1 p kv_heads head_dim"],
  own: Float[Array, "b l kv_heads head_dim"],
) -> Float[Array, "b m kv_heads head_dim"]:
  past = jnp.broadcast_to(past, (own.shape[0], *past.shape[1:]))
  return jnp.concatenate([past, own], axis=1)


def _windows(config: config_lib.Gemma2Config) -> tuple[int | None, ...]:
  """Returns the reach of every block's attention.

  Raises:
    ValueError: the layer types are unknown or not one per block.
  """
  depth = config.num_hidden_layers
  windows = {"sliding_attention": config.sliding_window, "full_attention": None}
  kinds = config.layer_types
  if kinds is None:
    kinds = tuple(itertools.islice(itertools.cycle(windows), depth))
  if len(kinds) != depth or not set(kinds) <= set(windows):
    raise ValueError(
      f"text_encoder.layer_types must name one of {', '.join(windows)} for "
      f"each of the {depth} layers (num_hidden_layers), got {kinds}."
    )
  return tuple(windows[kind] for kind in kinds)


def _norm(width: int, eps: float, param_dtype: DTypeLike) -> layers.RMSNorm:
  return layers.RMSNorm(
    width, eps=eps, zero_centered=True, param_dtype=param_dtype
  )


def _linear(
  in_features: int,
  out_features: int,
  *,
  axes: tuple[str | None, str | None],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> layers.Linear:
  return layers.Linear(
    in_features,
    out_features,
    use_bias=False,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=_INIT,
    axes=axes,
    rngs=rngs,
  )


# Logical axes of every parameter, by path; see sana_jax/sharding.py.
PARAM_AXES = (
  (r"^embedding", ("vocab", "embed")),
  (r"^blocks/attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
  (r"^blocks/attention/out/kernel", ("layers", "heads", "embed")),
  (r"^blocks/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
  (r"^blocks/mlp/down/kernel", ("layers", "mlp", "embed")),
  (r"^blocks/(pre|post)_(attention|mlp)_norm/scale", ("layers", None)),
  (r"^norm/scale", (None,)),
)
