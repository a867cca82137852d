"""Turns: nobody waits for all that another one has asked for."""

import random

import pytest

from sana_jax.app.waiting import FairQueue


def test_clients_take_turns_in_the_order_that_is_announced():
  queue = FairQueue()
  for i in range(3):
    queue.add("a", f"a{i}")
  queue.add("b", "b0")
  queue.add("c", "c0")
  queue.add("b", "b1")
  announced = queue.order()
  assert announced == ["a0", "b0", "c0", "a1", "b1", "a2"]
  assert [queue.take() for _ in range(6)] == announced
  with pytest.raises(IndexError):
    queue.take()


def test_nothing_is_lost_or_made_twice_whatever_the_order():
  rng = random.Random(0)
  queue, inside, taken = FairQueue(), {}, []
  for item in range(500):
    client = rng.choice("abcdef")
    queue.add(client, item)
    inside[item] = client
    if rng.random() < 0.4:
      expected = queue.order()[0]
      assert queue.take() == expected
      taken.append(expected)
      del inside[expected]
    if inside and rng.random() < 0.3:
      gone = rng.choice(list(inside))
      assert queue.remove(inside[gone], gone)
      assert not queue.remove(inside[gone], gone)
      del inside[gone]
    assert len(queue) == len(inside)
    assert queue.count("a") == list(inside.values()).count("a")
  assert sorted(queue.order()) == sorted(inside)
