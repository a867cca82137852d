"""A warning comes to the one whose work it is about, and to nobody else."""

import concurrent.futures
import threading
import warnings

import pytest

from sana_jax import notices


def test_with_nobody_to_hear_it_is_a_warning_of_the_callers_line():
  def careless():
    notices.warn("a", stacklevel=2)

  with pytest.warns(UserWarning, match="^a$") as shown:
    careless()  # this line
  with open(__file__, encoding="utf-8") as source:
    assert "# this line" in source.readlines()[shown[0].lineno - 1]
  assert shown[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_each_thread_hears_its_own_whatever_the_filters_are():
  both = threading.Barrier(2, timeout=10)

  def work(name):
    told = []
    with notices.heard_by(told.append):
      both.wait()
      # As libraries do: filters and hooks of all threads change.
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notices.warn(f"{name} 1")
        both.wait()
      for _ in range(2):
        notices.warn(f"{name} 2")
    return told

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    heard = list(pool.map(work, "ab"))
  assert heard == [[f"{name} {i}" for i in (1, 2, 2)] for name in "ab"]


def test_after_its_work_a_thread_is_warned_as_before():
  told = []
  with pytest.raises(RuntimeError), notices.heard_by(told.append):
    raise RuntimeError
  with pytest.warns(UserWarning, match="later"):
    notices.warn("later")
  assert told == []
