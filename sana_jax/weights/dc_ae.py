"""Published DC-AE checkpoints: their tensor names and layouts.

There are two: that of diffusers repositories, and the original
`model.safetensors`, where the attention's matrices are 1x1 convolutions and
queries, keys and values are one tensor.
"""

from sana_jax import config as config_lib
from sana_jax.models import dc_ae
from sana_jax.weights import mapping

# Regular expressions of tensors that are no parameters of ours: PyTorch's batch
# norm counts the batches it has seen, and nothing reads it.
IGNORED = (r".*\.num_batches_tracked",)

# [groups * out, in, 1, 1] <-> [groups, in, out], square groups
_GROUPED_1X1 = mapping.Transform(
  lambda w: w.reshape(-1, w.shape[1], w.shape[1]).transpose(0, 2, 1),
  lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1], 1, 1),
)


def diffusers_rules(config: config_lib.DCAEConfig) -> list[mapping.Rule]:
  """Names of `vae/diffusion_pytorch_model.safetensors`."""
  return _rules(config, original=False)


def original_rules(config: config_lib.DCAEConfig) -> list[mapping.Rule]:
  """Names of `model.safetensors` of an original repository."""
  return _rules(config, original=True)


def _rules(
  config: config_lib.DCAEConfig, *, original: bool
) -> list[mapping.Rule]:
  return _encoder(config, original) + _decoder(config, original)


def _encoder(
  config: config_lib.DCAEConfig, original: bool
) -> list[mapping.Rule]:
  stages = dc_ae.encoder_stages(config)
  # The original wraps what has a shortcut, and what needs a shuffle.
  wrapped = "conv.conv" if _unshuffles(config) else "conv"
  into = "encoder.project_in" if original else "encoder.conv_in"
  if stages[0].depth:
    rules = _conv("encoder/conv_in", f"{into}.conv" if original else into)
  else:
    rules = _conv(
      "encoder/conv_in/conv", f"{into}.{wrapped if original else 'conv'}"
    )
  for s, stage in enumerate(stages):
    rules += _blocks("encoder", s, stage, first=0, original=original)
    if stage.depth and s + 1 < len(stages):
      prefix = _block_name("encoder", s, stage.depth, original)
      name = f"{prefix}.main.{wrapped}" if original else f"{prefix}.conv"
      rules += _conv(f"encoder/stages/{s}/down/conv", name)
  main = "main." if config.encoder_out_shortcut else ""
  out = f"project_out.{main}op_list.0.conv" if original else "conv_out"
  return rules + _conv("encoder/conv_out", f"encoder.{out}")


def _decoder(
  config: config_lib.DCAEConfig, original: bool
) -> list[mapping.Rule]:
  stages = dc_ae.decoder_stages(config)
  main = "main." if config.decoder_in_shortcut else ""
  into = f"project_in.{main}conv" if original else "conv_in"
  rules = _conv("decoder/conv_in", f"decoder.{into}")
  for s, stage in enumerate(stages):
    has_up = stage.depth > 0 and s + 1 < len(stages)
    if has_up:
      prefix = _block_name("decoder", s, 0, original)
      name = f"{prefix}.main.conv.conv" if original else f"{prefix}.conv"
      rules += _conv(f"decoder/stages/{s}/up/conv", name)
    rules += _blocks("decoder", s, stage, first=int(has_up), original=original)
  norm = "project_out.op_list.0" if original else "norm_out"
  rules += _norm("decoder/norm_out", f"decoder.{norm}", "rms_norm")
  out = "project_out.op_list.2.conv" if original else "conv_out"
  nested = ("", "") if stages[0].depth else ("/conv", ".conv")
  return rules + _conv(
    f"decoder/conv_out{nested[0]}", f"decoder.{out}{nested[1]}"
  )


def _unshuffles(config: config_lib.DCAEConfig) -> bool:
  return config.downsample_block_type == "pixel_unshuffle"


def _block_name(side: str, stage: int, index: int, original: bool) -> str:
  if original:
    return f"{side}.stages.{stage}.op_list.{index}"
  blocks = "down_blocks" if side == "encoder" else "up_blocks"
  return f"{side}.{blocks}.{stage}.{index}"


def _blocks(
  side: str, s: int, stage: dc_ae.StageSpec, *, first: int, original: bool
) -> list[mapping.Rule]:
  block = _res_block if stage.block == "ResBlock" else _vit_block
  rules = []
  for j in range(stage.depth):
    path = f"{side}/stages/{s}/blocks/{j}"
    name = _block_name(side, s, first + j, original)
    rules += block(path, name, stage, original)
  return rules


def _res_block(
  path: str, name: str, stage: dc_ae.StageSpec, original: bool
) -> list[mapping.Rule]:
  conv1, conv2, norm = (
    ("main.conv1.conv", "main.conv2.conv", "main.conv2.norm")
    if original
    else ("conv1", "conv2", "norm")
  )
  return [
    *_conv(f"{path}/conv1", f"{name}.{conv1}"),
    *_conv(f"{path}/conv2", f"{name}.{conv2}", bias=False),
    *_norm(f"{path}/norm", f"{name}.{norm}", stage.norm),
  ]


def _vit_block(
  path: str, name: str, stage: dc_ae.StageSpec, original: bool
) -> list[mapping.Rule]:
  ffn = f"{name}.local_module.main" if original else f"{name}.conv_out"
  inverted, depth, point, norm = (
    ("inverted_conv.conv", "depth_conv.conv", "point_conv.conv")
    + ("point_conv.norm",)
    if original
    else ("conv_inverted", "conv_depth", "conv_point", "norm")
  )
  tensors = (
    ("inverted/kernel", f"{inverted}.weight", mapping.CONV1X1),
    ("inverted/bias", f"{inverted}.bias", mapping.IDENTITY),
    ("depth_kernel", f"{depth}.weight", mapping.DEPTHWISE),
    ("depth_bias", f"{depth}.bias", mapping.IDENTITY),
    ("point/kernel", f"{point}.weight", mapping.CONV1X1),
  )
  return [
    *_attention(f"{path}/attention", name, stage, original),
    *(
      mapping.Rule(f"{path}/ffn/{ours}", (f"{ffn}.{theirs}",), *transform)
      for ours, theirs, transform in tensors
    ),
    *_norm(f"{path}/norm", f"{ffn}.{norm}", "rms_norm"),
  ]


def _attention(
  path: str, name: str, stage: dc_ae.StageSpec, original: bool
) -> list[mapping.Rule]:
  if original:
    module, matrix = f"{name}.context_module.main", mapping.CONV1X1
    qkv, out, norm = ("qkv.conv",), "proj.conv", "proj.norm"
    branch, depth, point = "aggreg", "0", "1"
  else:
    module, matrix = f"{name}.attn", mapping.LINEAR
    qkv, out, norm = ("to_q", "to_k", "to_v"), "to_out", "norm_out"
    branch, depth, point = "to_qkv_multiscale", "proj_in", "proj_out"
  rules = [
    mapping.Rule(
      f"{path}/qkv/kernel", tuple(f"{module}.{n}.weight" for n in qkv), *matrix
    ),
    mapping.Rule(f"{path}/out/kernel", (f"{module}.{out}.weight",), *matrix),
    *_norm(f"{path}/norm", f"{module}.{norm}", stage.norm),
  ]
  for i in range(len(stage.scales)):
    for ours, theirs, transform in (
      ("depth_kernel", depth, mapping.DEPTHWISE),
      ("point_kernel", point, _GROUPED_1X1),
    ):
      rules.append(
        mapping.Rule(
          f"{path}/branches/{i}/{ours}",
          (f"{module}.{branch}.{i}.{theirs}.weight",),
          *transform,
        )
      )
  return rules


def _conv(path: str, module: str, *, bias: bool = True) -> list[mapping.Rule]:
  rules = [mapping.Rule(f"{path}/kernel", (f"{module}.weight",), *mapping.CONV)]
  if bias:
    rules.append(mapping.Rule(f"{path}/bias", (f"{module}.bias",)))
  return rules


def _norm(path: str, module: str, kind: str) -> list[mapping.Rule]:
  tensors = [("scale", "weight"), ("bias", "bias")]
  if kind == "batch_norm":
    tensors += [("mean", "running_mean"), ("var", "running_var")]
  return [
    mapping.Rule(f"{path}/{ours}", (f"{module}.{theirs}",))
    for ours, theirs in tensors
  ]
