"""The flags of commands that load a pipeline."""

from typing import Any

from absl import flags

# In --helpfull, the flags are of the command that defines them.
flags.disclaim_key_flags()


def define() -> dict[str, flags.FlagHolder[Any]]:
  """Defines those that all such commands have, by fields of `Loading`."""
  return {
    "dtype": flags.DEFINE_enum(
      "dtype", "float32", ["float32", "bfloat16"], "Of weights and computation."
    ),
    "variant": flags.DEFINE_string("variant", None, "Of weights, e.g. fp16."),
    "components": flags.DEFINE_string(
      "components", None, "Checkpoint that has what --checkpoint does not have."
    ),
    "step": flags.DEFINE_integer(
      "step", None, "Of a training run; None: the newest."
    ),
    "fp16_clamp": flags.DEFINE_boolean(
      "fp16_clamp", None, "Limit activations as float16 does; None: if needed."
    ),
    "vae_tile": flags.DEFINE_integer(
      "vae_tile",
      None,
      "Decode in tiles of so many pixels, which shows faintly.",
    ),
    "vae_window": flags.DEFINE_integer(
      "vae_window",
      None,
      "Decode in windows of so many pixels, the same up to rounding.",
    ),
    "controlnet": flags.DEFINE_string(
      "controlnet", None, "Directory, file or name."
    ),
    "offload_text_encoder": flags.DEFINE_boolean(
      "offload_text_encoder", None, "Keep it on the host; None: if needed."
    ),
  }
