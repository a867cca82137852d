"""What a client is told when there is no image. Messages are for people."""

from collections.abc import Mapping


class InvalidRequestError(ValueError):
  """A request that cannot be.

  Attributes:
    field: of `GenerationRequest`, or of the endpoint; None: of no single one.
  """

  def __init__(self, field: str | None, message: str):
    super().__init__(message)
    self.field = field
    self.message = message

  def told(self, names: Mapping[str, str]) -> str:
    """Returns the message in the words of those who are told.

    Args:
      names: what they know the fields as.
    """
    name = names.get(self.field or "")
    # A message begins with its field, or does not name it.
    if name is None or self.message.split(" ", 1)[0] != self.field:
      return self.message
    return name + self.message.removeprefix(self.field)


class BusyError(RuntimeError):
  """The queue is full.

  Attributes:
    retry_after: seconds after which there may be room.
  """

  def __init__(self, message: str, retry_after: int):
    super().__init__(message)
    self.retry_after = retry_after


class ClosedError(RuntimeError):
  """The service is ending, and makes no more images."""


class JobError(RuntimeError):
  """An admitted request that came to nothing; what happened is in the log."""


class CancelledError(JobError):
  """The job was given up before it was done."""
