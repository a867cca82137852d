"""How programs are compiled that run for a moment, of which there are many."""

import importlib.metadata

# In a sixth of the time, measured for a gradient of tests/models/test_sana.py.
XLA_FLAGS = "--xla_backend_optimization_level=0"
_RELEASE = importlib.metadata.version("jaxlib").split(".")[:2]
if tuple(map(int, _RELEASE)) < (0, 11):
  # Later ones have no other way, and take half of the time.
  XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
