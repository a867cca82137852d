"""Who is next: clients take turns, whatever they ask for."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

_T = TypeVar("_T")


class FairQueue(Generic[_T]):
  """A first-in-first-out queue for each client, served in turn.

  A client that comes new is served after those that wait already.
  """

  def __init__(self):
    self._queues: OrderedDict[str, deque[_T]] = OrderedDict()

  def __len__(self) -> int:
    return sum(map(len, self._queues.values()))

  def count(self, client: str) -> int:
    return len(self._queues.get(client, ()))

  def add(self, client: str, item: _T) -> None:
    self._queues.setdefault(client, deque()).append(item)

  def take(self) -> _T:
    """Removes and returns the next one.

    Raises:
      IndexError: nobody waits.
    """
    if not self._queues:
      raise IndexError("Nobody waits.")
    client, queue = self._queues.popitem(last=False)
    item = queue.popleft()
    if queue:
      self._queues[client] = queue  # at the end of the row
    return item

  def remove(self, client: str, item: _T) -> bool:
    """Says whether the item was there."""
    queue = self._queues.get(client, deque())
    if item not in queue:
      return False
    queue.remove(item)
    if not queue:
      del self._queues[client]
    return True

  def order(self) -> list[_T]:
    """Lists all in the order in which they would be taken."""
    rows = [list(queue) for queue in self._queues.values()]
    longest = max(map(len, rows), default=0)
    return [row[i] for i in range(longest) for row in rows if i < len(row)]
