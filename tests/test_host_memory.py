"""Freed memory that is kept: counted in page faults, which no load changes."""

import pathlib
import platform
import subprocess
import sys

import pytest

from sana_jax import host_memory

PROGRAM = """
import ctypes, resource, runpy, threading

SIZE, ROUNDS = 200 << 20, 3
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)

def touch():
  block = libc.malloc(SIZE)
  ctypes.memset(block, 1, SIZE)
  libc.free(block)

def rounds():
  touch()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(ROUNDS):
    touch()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

{imports}
if {keep}:
  # By its path: the package would import JAX.
  assert runpy.run_path({path!r})["keep_freed"]()
# Compiled programs run in threads, whose heaps are not the main one.
# They are given in turn.
for _ in range(3):
  thread = threading.Thread(target=rounds)
  thread.start()
  thread.join()
"""


def page_faults(*, keep: bool, imports: str = "") -> int:
  program = PROGRAM.format(
    path=host_memory.__file__, keep=keep, imports=imports
  )
  output = subprocess.run(
    [sys.executable, "-c", program],
    check=True,
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  return sum(map(int, output.stdout.split()))


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's"
)
def test_a_block_that_was_freed_is_not_fetched_from_the_system_again():
  # With pages of 2 MiB the system fetches a block in 100 faults.
  assert page_faults(keep=False) >= 300
  assert page_faults(keep=True) <= 30


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's"
)
def test_what_training_imports_starts_no_thread_with_a_heap_of_its_own():
  # Later threads would share that heap, and fetch large blocks every time.
  assert page_faults(keep=True, imports="import train") <= 30


def test_where_malloc_cannot_be_told_nothing_happens(monkeypatch):
  monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
  assert not host_memory.keep_freed()
