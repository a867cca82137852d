"""What a thread was warned of, for those who asked it to work.

`warnings.catch_warnings` is for all threads at once, and leaves another's
settings behind where two use it at a time.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

_thread = threading.local()
_shown_before = warnings.showwarning


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
  """Collects this thread's warnings, each once; they are shown as before, too.

  For users' warnings alone: those of deprecations are for programmers.
  """
  _install()
  _thread.told = []
  try:
    yield _thread.told
  finally:
    _thread.told = None


def _install() -> None:
  global _shown_before  # noqa: PLW0603  the hook is the interpreter's
  # Else a warning is shown once in a process, and the next job has none.
  warnings.simplefilter("always", UserWarning)
  if warnings.showwarning is not _show:
    _shown_before = warnings.showwarning
    warnings.showwarning = _show


def _show(message, category, *place, **options) -> None:
  told = getattr(_thread, "told", None)
  text = str(message)
  if told is not None and category is UserWarning and text not in told:
    told.append(text)
  _shown_before(message, category, *place, **options)
