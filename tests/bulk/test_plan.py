"""Plans are complete, disjoint over hosts, and pure."""

import collections

import numpy as np
import pytest

from sana_jax.bulk import plan, requests


def random_requests(rng, count=40):
  reader = requests.Reader()
  rows = []
  for line in range(count):
    record = {"prompt": f"prompt {line}"}
    if rng.random() < 0.5:
      record["height"] = int(rng.choice([8, 16, 24]))
    if rng.random() < 0.3:
      record["guidance_scale"] = float(rng.choice([1.0, 3.0]))
    if rng.random() < 0.3:
      record["seed"] = int(rng.integers(100))
    if rng.random() < 0.1:
      record["image_index"] = int(rng.integers(100))
    if rng.random() < 0.2:
      record["image"] = f"{rng.integers(3)}.png"
    record["num_images_per_prompt"] = int(rng.integers(1, 5))
    rows.append(reader.make("f", line + 1, record))
  return rows


@pytest.fixture(params=range(5))
def random_plan(request):
  rng = np.random.default_rng(request.param)
  return plan.make_plan(
    random_requests(rng),
    seed=int(rng.integers(100)),
    batch_size=int(rng.integers(1, 7)),
    images_per_unit=int(rng.integers(1, 30)),
  )


def units(p, numbers=None):
  return [
    p.unit(n) for n in (range(p.num_units) if numbers is None else numbers)
  ]


def images(some_units):
  return [i for u in some_units for b in u.batches for i in b.images]


def kind_of(image):
  return str(image.settings), tuple(image.pictures)


def test_every_image_is_made_once(random_plan):
  made = sorted(images(units(random_plan)))
  assert [i.index for i in made] == list(range(random_plan.num_images))
  assert made == list(random_plan.images())
  assert random_plan.num_images == sum(r.count for r in random_plan.requests)


def test_a_batch_has_one_kind_of_settings_and_every_kind_one_size(random_plan):
  sizes = collections.defaultdict(set)
  for unit in units(random_plan):
    for batch in unit.batches:
      (kind,) = {kind_of(image) for image in batch.images}
      assert 1 <= len(batch.images) <= batch.size <= random_plan.batch_size
      sizes[kind].add(batch.size)
  assert all(len(each) == 1 for each in sizes.values())


def test_kinds_follow_each_other_so_that_each_is_compiled_once(random_plan):
  kinds = [kind_of(i) for i in images(units(random_plan))]
  changes = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
  assert changes == len(set(kinds)) - 1


def test_units_have_as_many_batches_as_fit(random_plan):
  all_units = units(random_plan)
  sizes = [len(images([unit])) for unit in all_units]
  for number, unit in enumerate(all_units):
    assert random_plan.indices(number) == [i.index for i in images([unit])]
    assert (
      len(unit.batches) == 1 or sizes[number] <= random_plan.images_per_unit
    )
    if number + 1 < len(all_units):
      following = len(all_units[number + 1].batches[0].images)
      assert sizes[number] + following > random_plan.images_per_unit


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 64])
def test_hosts_share_the_units(random_plan, num_hosts):
  shares = [
    plan.units_of_host(random_plan.num_units, host, num_hosts)
    for host in range(num_hosts)
  ]
  assert sorted(u for s in shares for u in s) == list(
    range(random_plan.num_units)
  )


def test_a_plan_is_a_pure_function(random_plan):
  again = plan.make_plan(
    list(random_plan.requests),
    seed=random_plan.seed,
    batch_size=random_plan.batch_size,
    images_per_unit=random_plan.images_per_unit,
  )
  # Asked for in another order.
  later = units(again, reversed(range(again.num_units)))
  assert later[::-1] == units(random_plan)
  assert again.fingerprint() == random_plan.fingerprint()


def test_seeds_and_numbers_of_images():
  make = requests.Reader().make
  p = plan.make_plan(
    [
      make("f", 1, {"prompt": "a", "num_images_per_prompt": 2}),
      make("f", 2, {"prompt": "b", "seed": 7, "num_images_per_prompt": 2}),
      make("f", 3, {"prompt": "c"}),
      make("f", 4, {"prompt": "d", "image_index": 9}),
    ],
    seed=5,
  )
  assert [(i.seed, i.image_index) for i in p.images()] == [
    (5, 0),
    (5, 1),
    (7, 0),
    (7, 1),
    (5, 4),
    (5, 9),
  ]


def test_bad_lines_keep_numbers_free(random_plan):
  rng = np.random.default_rng(0)
  items = list(random_plan.items)
  bad = set(rng.choice(len(items), 10, replace=False).tolist())
  for i in bad:
    items[i] = requests.Problem("f", i + 1, "no", items[i].count)
  p = plan.make_plan(
    items,
    seed=random_plan.seed,
    batch_size=random_plan.batch_size,
    images_per_unit=random_plan.images_per_unit,
  )
  assert p.num_images == random_plan.num_images
  bad_prompts = {f"prompt {i}" for i in bad}
  expected = [i for i in random_plan.images() if i.prompt not in bad_prompts]
  assert list(p.images()) == expected
  assert sorted(images(units(p))) == expected
  # Mended, they follow in units of their own.
  generations = [int(i in bad) for i in range(len(items))]
  mended = plan.make_plan(
    random_plan.items,
    generations=generations,
    seed=random_plan.seed,
    batch_size=random_plan.batch_size,
    images_per_unit=random_plan.images_per_unit,
  )
  assert units(mended, range(p.num_units)) == units(p)
  assert mended.fingerprint() == p.fingerprint()
  assert mended.fingerprint(1) != p.fingerprint(1)
  assert list(mended.images()) == list(random_plan.images())
  late = images(units(mended, range(p.num_units, mended.num_units)))
  assert {image.prompt for image in late} == bad_prompts
  count = mended.num_units - p.num_units
  assert mended.unit_name(0) == f"images-00000-of-{p.num_units:05d}"
  assert mended.unit_name(p.num_units) == f"repaired-1-00000-of-{count:05d}"
  assert [k.size for k in mended.kinds()][: len(p.kinds())] == [
    k.size for k in p.kinds()
  ]


@pytest.mark.parametrize(
  "change",
  [
    {"prompt": "b"},
    {"negative_prompt": "b"},
    {"seed": 1},
    {"image_index": 1},
    {"num_images_per_prompt": 2},
    {"height": 64},
    {"image": "a.png"},
  ],
)
def test_the_fingerprint_sees_every_change_of_a_request(change):
  make = requests.Reader().make
  prints = {
    plan.make_plan([make(*place, {"prompt": "a"} | record)]).fingerprint()
    for place, record in (
      (("f", 1), {}),
      (("g", 2), {}),
      (("f", 1), change),
    )
  }
  assert len(prints) == 2


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"items": []}, "There is no prompt"),
    ({"batch_size": 0}, r"batch_size \(0\)"),
    ({"images_per_unit": 0}, r"images_per_shard \(0\)"),
    ({"seed": -1}, "seed must be in"),
  ],
)
def test_impossible_plans_are_refused(values, message):
  defaults = {"items": [requests.Request("f", 1, "a")]}
  with pytest.raises(ValueError, match=message):
    plan.make_plan(**defaults | values)


def test_a_host_that_does_not_exist_has_no_units():
  with pytest.raises(ValueError, match="got 2 of 2"):
    plan.units_of_host(5, 2, 2)
