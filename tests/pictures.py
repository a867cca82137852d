"""Pictures and captions in every format that a source can have."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from sana_jax.data.sources import grouping

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


def picture(rng, height=24, width=32):
  """Smooth random colours: no two are alike, and they compress."""
  small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
  image = PIL.Image.fromarray(small)
  return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def encode(image, form="JPEG", **options):
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def files(rng):
  """A folder's files by name: unicode, depth, scores, several captions."""
  return {
    "b/näh 猫.jpg": encode(picture(rng)),
    "b/näh 猫.txt": b" first line\n\nsecond line \n",
    "a.v2.png": encode(picture(rng, 40, 20), "PNG"),
    "a.v2.json": json.dumps(
      {"width": 20, "prompt": "short", "long_caption": "a long one"}
    ).encode(),
    "a.v2_clip_score.json": json.dumps(
      {"a.v2": {"prompt": "27.5", "long_caption": 26}}
    ).encode(),
    "c.webp": encode(picture(rng, 30, 30), "WEBP"),
    "c.json": json.dumps({"c": {"VILA": "nested", "prompt": None}}).encode(),
    "d.jpg": encode(picture(rng)),
  }


def write_folder(root, contents):
  for name, content in contents.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def write_tar(path, contents):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
    for name, content in contents.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def write_parquet(path, source, row_group_size=3):
  """Writes records of another source; the first two captions are columns."""
  rows = [
    {
      "key": record.key,
      "image": {"bytes": record.image, "path": source.file_name(i)},
      **{f"{c.name}_caption": c.text for c in record.captions[1:]},
      **{c.name: c.text for c in record.captions[:1]},
    }
    for i, record in enumerate(source)
  ]
  names = sorted({name for row in rows for name in row})
  columns = {name: [row.get(name) for row in rows] for name in names}
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
  return path


def stems(contents):
  return sorted(
    grouping.split_suffix(name)[0]
    for name in contents
    if grouping.is_image(name)
  )


# A little more than the square bucket of 512.
SIDE = 520


def planted(rng):
  """A folder's files, and (code, key) of every fault in it."""

  def make(height=SIDE, width=SIDE):
    return picture(rng, height, width)

  def sixteen_bit():
    values = np.asarray(make().convert("L"), np.uint16) * 257
    return encode(PIL.Image.fromarray(values), "PNG")

  def animation():
    buffer = io.BytesIO()
    first, second = (make().quantize(16) for _ in range(2))
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    return buffer.getvalue()

  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  twin = make()
  whole = encode(make())
  files = {
    "healthy.jpg": encode(make()),
    "wide 猫.webp": encode(make(SIDE, 780), "WEBP"),
    "truncated.jpg": whole[: len(whole) * 2 // 3],
    "no_image.jpg": rng.bytes(2000),
    "zero.png": b"",
    "cmyk.jpg": encode(make().convert("CMYK")),
    "sixteen.png": sixteen_bit(),
    "palette.png": encode(make().quantize(64), "PNG"),
    "moving.gif": animation(),
    "really_a.png": encode(make()),
    "turned.jpg": encode(make(SIDE, 700), exif=exif),
    "ten_to_one.jpg": encode(make(300, 3000)),
    "tiny.jpg": encode(make(90, 90)),
    "twin_a.png": encode(twin, "PNG"),
    "twin_b.jpg": encode(twin, quality=70),
    "long.jpg": encode(make()),
    "empty.jpg": encode(make()),
    "bare.jpg": encode(make()),
    "garbled.jpg": encode(make()),
  }
  for name in list(files):
    stem = name.rpartition(".")[0]
    files[f"{stem}.txt"] = f"a <b>picture</b> of {stem[:6]}".encode()
  files["long.txt"] = b"cat " * 20_000
  files["empty.txt"] = b" \n"
  files["garbled.txt"] = b"\xff\xfe"
  files["lonely.txt"] = b"nobody"
  del files["bare.txt"]
  faults = {
    ("truncated", "truncated"),
    ("unreadable", "no_image"),
    ("unreadable", "zero"),
    ("cmyk", "cmyk"),
    ("sixteen_bit", "sixteen"),
    ("palette", "palette"),
    ("animated", "moving"),
    ("wrong_extension", "really_a"),
    ("rotated", "turned"),
    ("extreme_aspect", "ten_to_one"),
    ("tiny", "tiny"),
    ("duplicate", "twin_b"),
    ("long_caption", "long"),
    ("empty_caption", "empty"),
    ("missing_caption", "bare"),
    ("unreadable_record", "garbled"),
    ("orphan", "lonely.txt"),
  }
  return files, faults
