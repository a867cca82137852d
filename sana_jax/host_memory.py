"""How the process holds memory that it has freed."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed() -> bool:
  """Makes the C library keep what is freed; returns whether it does.

  On a CPU, a compiled program allocates its temporaries anew in every call. By
  default, blocks of their size are returned to the system when freed: every
  call then pays for the first touch of each page again. Kept, they are there
  for the next call, and the process stays as large as it once was.

  Only glibc can be told; elsewhere this does nothing. To be called before JAX
  looks for devices, and before any thread has a heap of its own (importing
  pyarrow starts one that has): all later threads would share that heap.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError, TypeError):
    return False
  # One heap for all threads, since only the main one can grow without limit;
  # no mapping for single blocks; never shrunk.
  settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
  return all([mallopt(name, value) == 1 for name, value in settings])
