"""The doctor on a data set that people have looked through."""

import json
import pathlib

from sana_jax.tools import doctor

EMOJI = pathlib.Path(__file__).parents[2] / "sana_jax" / "assets" / "emoji_64"


def test_the_emoji_are_twins_and_small_and_nothing_else(capsys):
  code = doctor.main(
    [str(EMOJI), "--split=heldout", "--image_size=512", "--json"]
  )
  assert code == 1
  report = json.loads(capsys.readouterr().out)
  assert (report["records"], report["usable"]) == (80, True)
  findings = {
    code: [(item["key"], item["detail"]) for item in found["items"]]
    for code, found in report["findings"].items()
  }
  assert findings.keys() == {"duplicate", "tiny"}
  assert findings["duplicate"] == [
    ("heldout/32", "like heldout/1"),
    ("heldout/75", "like heldout/72"),
  ]
  # 64 pixels, judged by the square of 512.
  assert [key for key, _ in findings["tiny"]] == [
    f"heldout/{number}" for number in range(80)
  ]
  assert report["resolutions"] == {"below 256": 80}
  assert report["aspects"] == {"0.95-1.05": 80}
  (bucket,) = report["buckets"]
  assert (bucket["height"], bucket["width"], bucket["count"]) == (512, 512, 80)
  assert bucket["cropped"] == 0
