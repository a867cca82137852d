"""The names of a batch are those of the records in it."""

import numpy as np

from sana_jax import config as config_lib
from sana_jax.data import examples, loader, names, sampler
from tests.precompute import sources


def test_names_of_a_plan_are_keys_in_the_order_of_the_rows():
  pictures = [sources.Pictures(7), sources.Pictures(5, seed=1)]
  populations = [
    sampler.Population(f"s{i}", 1.0, (np.arange(len(source)),))
    for i, source in enumerate(pictures)
  ]
  plans = sampler.BatchSampler(populations, 4, seed=3)
  name = names.of_plans(plans, pictures)
  for step in (0, 5):
    plan = plans.batch(step)
    expected = [
      f"{pictures[s].name}: {pictures[s][int(i)].key}"
      for s, i in zip(plan.source, plan.index, strict=True)
    ]
    assert name(step) == expected


def test_names_of_emoji_follow_their_examples():
  config = config_lib.DataConfig(split="heldout")
  source = examples.load_source(config)
  by_picture = {
    source[i]["image"].tobytes(): source[i]["name"] for i in range(len(source))
  }
  batches = loader.example_batches(examples.image_examples(config, 5), 4)
  batch = next(iter(batches(loader.Host(), 3)))
  found = names.of_examples(examples.names(config, 5), 4)(3)
  assert len(found) == 4
  for picture, name in zip(batch["images"], found, strict=True):
    pixels = np.round((picture + 1) * 127.5).astype(np.uint8)
    assert by_picture[pixels.tobytes()] == name
