"""Runs reference cases: python -m tests.conformance CASE_DIR OUT.safetensors.

A case directory has case.json, reference.safetensors and the model's files; the
outputs are written under the reference's names and in its layouts.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
import safetensors.numpy

from sana_jax.weights import files
from tests import (
  conformance_controlnet,
  conformance_lora,
  conformance_pipeline,
  conformance_scheduler,
  conformance_text,
  conformance_transformer,
  conformance_vae,
)

Arrays = dict[str, np.ndarray]

_RUNNERS = {
  "lora": conformance_lora.lora_case,
  "pipeline": conformance_pipeline.pipeline_case,
  "scheduler": conformance_scheduler.scheduler_case,
  "text": conformance_text.text_case,
  "transformer": conformance_transformer.transformer_case,
  "vae": conformance_vae.vae_case,
}
_PIPELINES = (
  "SanaControlNetPipeline",
  "SanaPAGPipeline",
  "SanaPipeline",
  "SanaSprintImg2ImgPipeline",
  "SanaSprintPipeline",
)


def read_case(case_dir: pathlib.Path) -> tuple[dict, Arrays]:
  """Returns the contents of case.json, and all recorded tensors."""
  case = json.loads((case_dir / "case.json").read_text(encoding="utf-8"))
  recorded = files.open_safetensors(case_dir / "reference.safetensors")
  return case, {name: np.asarray(value) for name, value in recorded.items()}


def out_of_scope(case: dict) -> str | None:
  """Says why a case cannot be run; None: it can."""
  group, _, name = case["case"].partition("/")
  kind = case.get("kind", "")
  if group not in _RUNNERS:
    return f"{group} cases are not implemented"
  if group == "pipeline" and kind not in _PIPELINES:
    return f"{kind} is not implemented"
  return None


def run_case(case_dir: pathlib.Path) -> Arrays:
  """Computes a case's outputs with the public API, from its inputs alone."""
  case, recorded = read_case(case_dir)
  inputs = {k: v for k, v in recorded.items() if k.startswith("in.")}
  runner = _RUNNERS[case["case"].partition("/")[0]]
  if runner is _RUNNERS["transformer"] and "ControlNet" in case.get("kind", ""):
    runner = conformance_controlnet.controlnet_case
  with jax.default_matmul_precision("highest"):
    outputs = runner(case, inputs, case_dir)
  return {k: np.asarray(v, order="C") for k, v in outputs.items()}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("case_dir", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")
  case, _ = read_case(args.case_dir)
  reason = out_of_scope(case)
  if reason:
    sys.stderr.write(f"{case['case']}: {reason}.\n")
    return 1
  args.out.parent.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(run_case(args.case_dir), args.out)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
