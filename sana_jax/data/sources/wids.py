"""The reference's index of tar files, wids-meta.json.

{"name": ..., "wids_version": 1, "shardlist": [{"url": "00000.tar",
"nsamples": 1000}, ...]}; relative addresses start at the file's directory.
"""

from collections.abc import Mapping
from typing import Any

from sana_jax.data import storage
from sana_jax.data.sources import caption_files, webdataset

FILE_NAME = "wids-meta.json"


def open_wids(location: storage.Location) -> webdataset.TarSource:
  """Opens the tar files that a wids-meta.json lists, in its order.

  Args:
    location: of the file, or of its directory.

  Raises:
    FileNotFoundError: there is no such file, or a tar file is missing.
    ValueError: it is not an index, or promises more records than a tar file
      has.
  """
  if location.is_dir():
    location = location / FILE_NAME
  if not location.is_file():
    raise FileNotFoundError(f"There is no {location}: expected {FILE_NAME}.")
  value = caption_files.parse_json(location.read(), str(location))
  shards = value.get("shardlist")
  if not isinstance(shards, list) or not shards:
    raise ValueError(
      f'{location} has no "shardlist", only {sorted(value)}: expected '
      '{"shardlist": [{"url": "00000.tar", "nsamples": 1000}, ...]}.'
    )
  source = webdataset.TarSource(
    [_shard(location, entry) for entry in shards], str(location)
  )
  problems = [
    f"{entry['url']}: {entry['nsamples']} promised, {count} with a picture"
    for entry, count in zip(shards, source.counts, strict=True)
    if entry.get("nsamples", 0) > count
  ]
  if problems:
    raise ValueError(
      f"{location} promises more records than its tar files hold: "
      f"{'; '.join(problems)}. Copy them again, or write the index anew."
    )
  return source


def _shard(location: storage.Location, entry: Any) -> storage.Location:
  if not isinstance(entry, Mapping) or not isinstance(entry.get("url"), str):
    raise ValueError(
      f'{location} lists {entry!r}: expected {{"url": "00000.tar", '
      '"nsamples": 1000}.'
    )
  url = entry["url"]
  if "://" in url or url.startswith("/"):
    return storage.Location.of(url)
  return location.parent() / url
