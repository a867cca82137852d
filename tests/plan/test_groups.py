"""Groups of devices, in all the ways XLA writes them."""

import pytest

from sana_jax.plan import groups

ROWS = [(0, 1, 2, 3), (4, 5, 6, 7)]
COLUMNS = [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
  ("written", "expected"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
    ("replica_groups={}", [tuple(range(8))]),
    ("replica_groups=[2,4]<=[8]", ROWS),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", COLUMNS),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ROWS),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", COLUMNS),
    # The mesh is of permuted devices: 0 4 1 5 2 6 3 7.
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      COLUMNS,
    ),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [tuple(range(8))]),
    # Of an axis of 8, the part that comes after 2 and has size 2.
    (
      "replica_groups=mesh['a'=8] {'a':(2)2}",
      [(0, 2), (1, 3), (4, 6), (5, 7)],
    ),
    (
      "source_target_pairs={{0,1},{1,0},{4,5}}",
      [(0, 1), (1, 0), (4, 5)],
    ),
  ],
)
def test_every_way_of_writing_groups_is_read(written, expected):
  text = f"channel_id=3, {written}, use_global_device_ids=true"
  assert groups.parse(text, 8) == expected


def test_groups_written_otherwise_are_an_error():
  with pytest.raises(ValueError, match="Cannot read which devices"):
    groups.parse("replica_groups=everyone", 8)


@pytest.mark.parametrize(
  ("members", "axes"),
  [
    (ROWS, ("fsdp",)),
    (COLUMNS, ("data",)),
    ([tuple(range(8))], ("data", "fsdp")),
    ([(0, 1), (1, 2)], ("fsdp",)),
    ([(3,), (4,)], ()),
  ],
)
def test_axes_are_those_along_which_members_differ(members, axes):
  mesh = {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
  assert groups.axes_of(members, mesh) == axes
