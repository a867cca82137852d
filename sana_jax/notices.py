"""What is said of a result besides the result, and who hears it.

`warnings` has one set of hooks and filters for all threads of a process, so a
server could not tell by it whose request a warning is about.
"""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator

_hearer: contextvars.ContextVar[Callable[[str], None] | None] = (
  contextvars.ContextVar("hearer", default=None)
)


def warn(text: str, *, stacklevel: int = 1) -> None:
  """Tells whoever hears this thread; if nobody does, warns as `warnings` does.

  Args:
    text: for the users of a page, too.
    stacklevel: whose line the warning names; 1: the caller's.
  """
  tell = _hearer.get()
  if tell is None:
    warnings.warn(text, stacklevel=stacklevel + 1)
  else:
    tell(text)


@contextlib.contextmanager
def heard_by(tell: Callable[[str], None]) -> Iterator[None]:
  """Has what this thread is warned of told, in place of shown."""
  token = _hearer.set(tell)
  try:
    yield
  finally:
    _hearer.reset(token)
