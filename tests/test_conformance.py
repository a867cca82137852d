"""The reference cases below the directory SANA_JAX_REFKIT."""

import os
import pathlib

import numpy as np
import pytest

from tests import conformance

ROOT = os.environ.get("SANA_JAX_REFKIT")
CASES = (
  sorted(path.parent for path in pathlib.Path(ROOT).rglob("case.json"))
  if ROOT
  else []
)
# Relative to the norm of the reference; float32 over whole pipelines.
TOLERANCE = 1e-4

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
  "case_dir", CASES, ids=lambda d: "/".join(d.parts[-2:])
)
def test_reference_case(case_dir):
  case, reference = conformance.read_case(case_dir)
  if reason := conformance.out_of_scope(case):
    pytest.skip(reason)
  outputs = conformance.run_case(case_dir)
  for name, expected in reference.items():
    if not name.startswith("out."):
      continue
    found = outputs[name]
    assert found.shape == expected.shape, name
    if expected.dtype.kind in "iub":
      np.testing.assert_array_equal(found, expected, err_msg=name)
      continue
    floor = case["tensors"][name].get("fp32_floor") or 0.0
    # Where the reference is rounding noise around zero, only size matters.
    relative = 1000 * floor if floor > 0.01 else max(TOLERANCE, 10 * floor)
    error = np.linalg.norm(found.astype(np.float64) - expected)
    assert error <= relative * np.linalg.norm(expected), name
