"""Reads again what a busy disk or network did not give at once."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds to wait before each further try; 1.3 in all, on every record that
# stays unreadable.
_PAUSES = (0.05, 0.25, 1.0)
# Another try gives the same.
_LASTING = (
  *(FileNotFoundError, PermissionError),
  *(IsADirectoryError, NotADirectoryError),
)


def call(read: Callable[[], T]) -> T:
  """Returns what `read` does, after more tries when it raises an OSError.

  Raises:
    OSError: every try did, or one of a kind that more tries do not mend.
  """
  for pause in _PAUSES:
    try:
      return read()
    except _LASTING:
      raise
    except OSError:
      time.sleep(pause)
  return read()
