"""Shapes, who goes where, and what is reported."""

import numpy as np
import pytest

from sana_jax import resolution
from sana_jax.data import buckets, sampler


def sizes(name, shapes, problems=None):
  height, width = np.array(shapes).T
  return buckets.Sizes(name, height, width, problems or {})


@pytest.mark.parametrize("side", [512, 1024, 2048, 4096])
def test_published_sizes_have_the_published_bins(side):
  table = buckets.table("aspect", side, 32)
  assert table == dict(resolution.bins(side // 32, training=True))
  assert len(table) == 40


@pytest.mark.parametrize(("side", "multiple"), [(64, 8), (256, 32), (768, 32)])
def test_other_sizes_have_about_the_area_of_the_square(side, multiple):
  table = buckets.table("aspect", side, multiple)
  assert (side, side) in table.values()
  assert len(set(table.values())) == len(table) > 5
  for ratio, (height, width) in table.items():
    assert height % multiple == width % multiple == 0
    assert ratio == height / width
    # Both sides are rounded to whole multiples.
    rounding = multiple / 2 * (height + width) + multiple**2 / 4
    assert abs(height * width - side**2) <= rounding


def test_square_is_one_shape():
  assert buckets.table("square", 96, 32) == {1.0: (96, 96)}


def test_a_size_that_does_not_fit_the_model_is_refused():
  with pytest.raises(ValueError, match=r"image_size .*multiple of 32.*got 100"):
    buckets.table("aspect", 100, 32)
  with pytest.raises(ValueError, match="'square' or 'aspect', got 'round'"):
    buckets.table("round", 64, 32)


def test_pictures_go_to_the_nearest_ratio():
  rng = np.random.default_rng(0)
  shapes = rng.integers(50, 3000, (300, 2))
  table = buckets.table("aspect", 1024, 32)
  found = buckets.sort(*([sizes("a", shapes)], [1.0], table, 99))
  (population,) = found.populations
  assert sorted(np.concatenate(population.members)) == list(range(300))
  counts = [len(members) for members in population.members]
  assert counts == sorted(counts, reverse=True)
  for shape, members in zip(found.shapes, population.members, strict=True):
    assert len(members)
    for height, width in shapes[members]:
      ratio = min(table, key=lambda key: abs(key - height / width))  # noqa: B023
      assert table[ratio] == shape


def test_only_the_fullest_shapes_are_kept_and_the_rest_moves():
  table = {0.5: (32, 64), 1.0: (48, 48), 2.0: (64, 32), 4.0: (96, 24)}
  wide, square, tall, tower = (10, 20), (10, 10), (20, 10), (40, 10)
  first = sizes("a", [square, square, tall, square, tower])
  second = sizes("b", [wide, wide, tall, tall, square])
  found = buckets.sort([first, second], [1.0, 2.5], table, 2)
  assert found.shapes == ((48, 48), (64, 32))
  members = [[m.tolist() for m in p.members] for p in found.populations]
  # Wide ones are nearest to square, the tower to tall.
  assert members == [[[0, 1, 3], [2, 4]], [[0, 1, 4], [2, 3]]]
  assert [p.weight for p in found.populations] == [1.0, 2.5]
  assert [report.moved for report in found.reports] == [1, 2]
  assert str(found.reports[0]) == (
    "a: 5 records, 5 used, 1 moved to a kept shape"
  )


def test_records_with_problems_are_counted_by_reason():
  problems = {1: "cut off", 4: "too small", 5: "cut off"}
  source = sizes("a", [(8, 8)] * 6, problems)
  found = buckets.sort([source], [1.0], {1.0: (32, 32)}, 3)
  (report,) = found.reports
  assert (report.read, report.used) == (6, 3)
  assert report.skipped == {"cut off": 2, "too small": 1}
  assert found.populations[0].members[0].tolist() == [0, 2, 3]
  plans = sampler.BatchSampler(found.populations, 2, 0)
  assert buckets.describe(found, plans) == [
    "a: 6 records, 3 used, 2 skipped (cut off: record 1, record 5), "
    "1 skipped (too small: record 4)",
    "32x32: 1.5 batches per epoch",
  ]


def test_many_reasons_are_summed_up():
  problems = {i: f"reason {i // 2}" for i in range(1, 20)}
  found = buckets.sort(
    [sizes("a", [(8, 8)] * 30, problems)], [1.0], {1.0: (32, 32)}, 1
  )
  text = str(found.reports[0])
  assert text.startswith(
    "a: 30 records, 11 used, 2 skipped (reason 1: record 2, "
  )
  assert text.endswith(
    "2 skipped (reason 5: record 10, record 11), 9 skipped for 5 other reasons"
  )
  assert sum(found.reports[0].skipped.values()) == 19


def test_a_source_of_which_nothing_can_be_used_is_refused():
  good = sizes("good", [(8, 8)])
  bad = sizes("bad", [(8, 8)] * 2, {0: "empty", 1: "empty"})
  for sort in (
    lambda: buckets.sort([good, bad], [1.0, 1.0], {1.0: (32, 32)}, 3),
    lambda: buckets.group([good, bad], [1.0, 1.0], 3),
  ):
    with pytest.raises(ValueError, match=r"used of bad: .*2 skipped \(empty: "):
      sort()


def test_stored_shapes_are_grouped_as_they_are():
  shapes = [(64, 32), (32, 32), (32, 32), (32, 64), (64, 32), (32, 32)]
  found = buckets.group([sizes("a", shapes)], [1.0], 3)
  assert found.shapes == ((32, 32), (64, 32), (32, 64))
  members = [m.tolist() for m in found.populations[0].members]
  assert members == [[1, 2, 5], [0, 4], [3]]
  with pytest.raises(ValueError, match="max_buckets is 2, .* at 3 shapes"):
    buckets.group([sizes("a", shapes)], [1.0], 2)


def test_shapes_of_less_than_a_batch_are_given_up():
  table = {0.5: (32, 64), 1.0: (48, 48), 2.0: (64, 32), 4.0: (96, 24)}
  wide, square, tall, tower = (10, 20), (10, 10), (20, 10), (40, 10)
  source = sizes("a", [square] * 100 + [tower] * 16 + [tall] * 3 + [wide])
  found = buckets.sort([source], [1.0], table, 10, least=16)
  # Wide and tall ones are nearest to square; there are enough towers.
  assert found.shapes == ((48, 48), (96, 24))
  assert [len(m) for m in found.populations[0].members] == [104, 16]
  assert found.reports[0].moved == 4
  plans = sampler.BatchSampler(found.populations, 16, 0)
  for step in range(60):
    assert len(set(plans.batch(step).index.tolist())) == 16
  # Too few for any batch: one shape, and it is said.
  few = buckets.sort([sizes("a", [square, tall])], [1.0], table, 10, least=16)
  assert few.shapes == ((48, 48),)
  lines = buckets.describe(few, sampler.BatchSampler(few.populations, 16, 0))
  assert "of 2 pictures, fewer than a batch of 16 has" in lines[-1]


def test_stored_shapes_of_less_than_a_batch_stay():
  shapes = [(32, 32)] * 5 + [(64, 32)] * 2 + [(32, 64)] * 4
  source = sizes("a", shapes, {0: "cut off"})
  found = buckets.group([source], [1.0], 3)
  assert (found.reports[0].read, found.reports[0].used) == (11, 10)
  assert buckets.repeating(found, 2) == {}
  assert buckets.repeating(found, 4) == {(64, 32): 2}
  assert buckets.repeating(found, 9) == dict(
    zip([(32, 32), (32, 64), (64, 32)], [4, 4, 2], strict=True)
  )
  # Each is trained on as often as the others.
  plans = sampler.BatchSampler(found.populations, 4, 0)
  steps = range(plans.counts(3).end_step)
  assert len(steps) == 10
  rows = np.concatenate([plans.batch(step).index for step in steps])
  np.testing.assert_array_equal(np.bincount(rows)[1:], 4)


def test_a_report_names_everything_that_is_left_out():
  problems = {i: "cut off" for i in range(8)}
  source = buckets.Sizes(
    *("a", np.full(20, 8), np.full(20, 8), problems), key="{}.jpg".format
  )
  (report,) = buckets.sort([source], [1.0], {1.0: (32, 32)}, 1).reports
  assert "8 skipped (cut off: 0.jpg, 1.jpg, 2.jpg, ...)" in str(report)
  report = report.with_skipped({"x": "cut off", "y": "no picture"})
  assert report.to_json() == {
    "source": "a",
    "read": 22,
    "used": 12,
    "skipped": 10,
    "skipped_by_reason": {
      "cut off": [*(f"{i}.jpg" for i in range(8)), "x"],
      "no picture": ["y"],
    },
    "moved": 0,
  }
