"""More tries where they may help, and nowhere else."""

import pytest

from sana_jax.data import retrying


class Failing:
  """Raises so many times before it gives its value."""

  def __init__(self, failures, error):
    self.failures, self.error, self.calls = failures, error, 0

  def __call__(self):
    self.calls += 1
    if self.calls <= self.failures:
      raise self.error
    return "value"


def test_a_failure_that_passes_is_not_seen():
  read = Failing(2, OSError("busy"))
  assert retrying.call(read) == "value"
  assert read.calls == 3


def test_a_failure_that_lasts_is_raised_in_the_end():
  read = Failing(99, OSError("busy"))
  with pytest.raises(OSError, match="busy"):
    retrying.call(read)
  assert read.calls == 4


@pytest.mark.parametrize("error", [FileNotFoundError("a"), ValueError("b")])
def test_what_more_tries_do_not_mend_is_raised_at_once(error):
  read = Failing(1, error)
  with pytest.raises(type(error), match=str(error)):
    retrying.call(read)
  assert read.calls == 1
