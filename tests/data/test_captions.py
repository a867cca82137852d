"""Captions are drawn as the reference's code or its paper says."""

import numpy as np
import pytest

from sana_jax.data import captions as captions_lib
from sana_jax.data import records

SCORED = (
  records.Caption("vila", "v", 27.10),
  records.Caption("prompt", "p", 27.23),
  records.Caption("intern", "i", 26.73),
)
DRAWS = 4000


def frequencies(captions, selection, seed=0):
  rng = np.random.default_rng(seed)
  drawn = [captions_lib.choose(captions, rng, selection) for _ in range(DRAWS)]
  return {c.text: drawn.count(c.text) / DRAWS for c in captions}


def test_the_power_law_has_the_published_example():
  selection = captions_lib.CaptionSelection(
    "clip_power", temperature=0.1, threshold=25.0
  )
  found = captions_lib.probabilities(np.array([27.10, 27.23, 26.73]), selection)
  # Three decimals are known.
  np.testing.assert_allclose(found, [0.342, 0.359, 0.298], atol=6e-4)
  # Four standard errors of 4000 draws.
  for text, p in zip("vpi", found, strict=True):
    assert abs(frequencies(SCORED, selection)[text] - p) < 0.031


def test_the_softmax_is_that_of_scores_over_temperature():
  selection = captions_lib.CaptionSelection("clip_softmax", temperature=0.5)
  scores = np.array([27.10, 27.23, 26.73])
  weights = np.exp(scores / 0.5)
  found = captions_lib.probabilities(scores, selection)
  np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-9)


def test_temperatures_below_a_hundredth_are_one_in_the_power_law():
  scores = np.array([27.10, 27.23])
  low, least = (
    captions_lib.probabilities(
      scores, captions_lib.CaptionSelection("clip_power", temperature=t)
    )
    for t in (1e-6, 0.01)
  )
  np.testing.assert_array_equal(low, least)


@pytest.mark.parametrize("method", ["clip_power", "clip_softmax"])
def test_low_scores_are_not_drawn_and_the_best_of_them_is_the_last_resort(
  method,
):
  selection = captions_lib.CaptionSelection(method, threshold=27.0)
  assert frequencies(SCORED, selection)["i"] == 0
  selection = captions_lib.CaptionSelection(method, threshold=30.0)
  assert frequencies(SCORED, selection)["p"] == 1
  unscored = tuple(records.Caption(c.name, c.text) for c in SCORED)
  assert frequencies(unscored, selection)["p"] == 1
  assert captions_lib.choose((), np.random.default_rng(), selection) == ""


def test_other_methods_take_the_first_all_or_what_is_asked_for():
  assert frequencies(SCORED, captions_lib.CaptionSelection())["p"] == 1
  unnamed = (SCORED[2], SCORED[0])
  assert frequencies(unnamed, captions_lib.CaptionSelection())["i"] == 1
  found = frequencies(SCORED, captions_lib.CaptionSelection("random"))
  np.testing.assert_allclose(list(found.values()), 1 / 3, atol=0.031)
  selection = captions_lib.CaptionSelection(
    "proportion", proportions={"vila": 1, "intern": 3, "absent": 9}
  )
  found = frequencies(SCORED, selection)
  np.testing.assert_allclose(list(found.values()), [1 / 4, 0, 3 / 4], atol=0.03)
  assert captions_lib.choose(SCORED[1:2], np.random.default_rng(), selection)


def test_equal_generators_draw_equal_captions():
  selection = captions_lib.CaptionSelection("clip_power")
  first, second = (np.random.default_rng(5) for _ in range(2))
  for _ in range(20):
    assert captions_lib.choose(SCORED, first, selection) == captions_lib.choose(
      SCORED, second, selection
    )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "best"}, "method must be one of first, random"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"threshold": -1.0}, "threshold must be at least 0"),
    ({"method": "proportion"}, "a caption name a positive weight"),
    (
      {"method": "proportion", "proportions": {"a": -1.0}},
      "proportions must be at least 0",
    ),
    ({"proportions": {"a": 1.0}}, "no effect on method 'first'"),
    ({"threshold": 25.0}, "threshold has no effect on method 'first'"),
    (
      {"method": "random", "temperature": 0.1},
      "temperature has no effect on method 'random'",
    ),
  ],
)
def test_impossible_selections_are_refused(options, message, unchecked):
  with pytest.raises(ValueError, match=message):
    captions_lib.CaptionSelection(**options)
