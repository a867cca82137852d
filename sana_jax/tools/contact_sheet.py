"""Thumbnails and captions of a data set on one page without other files."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from sana_jax.data import transforms
from sana_jax.data.sources import access
from sana_jax.tools import examination

_SIDE = 160
_MOST = 300
_MOST_CHARACTERS = 600
_STYLE = """
body { font: 14px sans-serif; margin: 1.5em; }
main { display: flex; flex-wrap: wrap; gap: 12px; }
figure { width: 180px; margin: 0; padding: 6px; border: 1px solid #ccc; }
figure.ill { border-color: #c00; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
.code { color: #c00; }
"""


def page(
  source: access.FileSource,
  examined: Sequence[examination.Examined],
  report: Mapping[str, Any],
) -> str:
  """Returns the page: records with findings first, then an even choice."""
  ill = [record for record in examined if record.findings][:_MOST]
  well = [record for record in examined if not record.findings]
  room = _MOST - len(ill)
  step = max(1, -(-len(well) // max(room, 1)))
  shown = [*ill, *well[::step][:room]]
  figures = "\n".join(_figure(source, record) for record in shown)
  title = html.escape(f"{report['source']}: {report['records']:,} records")
  counts = "".join(
    f"<li>{html.escape(f['level'])}: {f['count']:,} "
    f"{html.escape(f['meaning'])}</li>"
    for f in report["findings"].values()
  )
  advice = "".join(f"<p>{html.escape(text)}</p>\n" for text in report["advice"])
  return (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
    f"<title>{title}</title><style>{_STYLE}</style>\n<h1>{title}</h1>\n"
    f"<ul>{counts}</ul>\n{advice}<p>{len(shown):,} are shown.</p>\n"
    f"<main>\n{figures}\n</main></html>\n"
  )


def _figure(source: access.FileSource, record: examination.Examined) -> str:
  size = "x".join(map(str, record.size)) if record.size else "not decoded"
  rows = [f"<b>{html.escape(record.key)}</b> {size}"]
  rows += [
    f'<span class="code">{html.escape(f"{f.code}: {f.detail}")}</span>'
    for f in record.findings
  ]
  picture = ""
  try:
    found = source[record.index]
    rows += [
      html.escape(f"{c.name}: {c.text[:_MOST_CHARACTERS]}")
      for c in found.captions
    ]
    if record.size:
      picture = _thumbnail(found.image)
  except (OSError, ValueError):
    pass  # Already among the findings.
  kind = "ill" if record.findings else "well"
  return (
    f'<figure class="{kind}">{picture}<figcaption>{"<br>".join(rows)}'
    "</figcaption></figure>"
  )


def _thumbnail(image: bytes) -> str:
  picture = transforms.decode(image)
  picture.thumbnail((_SIDE, _SIDE), PIL.Image.Resampling.BICUBIC)
  buffer = io.BytesIO()
  picture.save(buffer, "JPEG", quality=80)
  content = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f'<img alt="" src="data:image/jpeg;base64,{content}">'
