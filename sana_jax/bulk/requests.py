"""Reads files of prompts: one request a line, bad lines told from good ones.

Four formats, by the file's ending: `.txt` (a prompt a line), `.jsonl` (an
object a line), `.csv` (a header, a row a request) and `.parquet`. Besides
`prompt`, a request may have the fields of a pipeline call: negative_prompt,
seed, image_index, num_images_per_prompt, the paths image, mask_image and
control_image, and every field of GenerationConfig.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from sana_jax.bulk import fields, inputs
from sana_jax.pipeline import checks, options

Settings = tuple[tuple[str, Any], ...]
Pictures = tuple[tuple[str, str], ...]

_PARQUET_ROWS = 4096
_NUMBERS = range(2**32)
_COUNT = "num_images_per_prompt"
_SIDES = ("height", "width")
# A bad line that says more has room for as many as lines that say nothing.
_MOST_RESERVED = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """The images of one line.

  Attributes:
    origin: the file it is from, or the flag.
    line: its number there, from 1.
    seed: None: the run's, whose images are counted through the whole run.
    image_index: number of the first image among those of the seed; None: where
      the count stands, or 0 for a request with a seed of its own.
    settings: sorted (name, value) pairs: what differs from the checkpoint's
      GenerationConfig. Equal ones are the same object.
    pictures: sorted (name, path) pairs, where there are any.
  """

  origin: str
  line: int
  prompt: str
  negative_prompt: str = ""
  seed: int | None = None
  image_index: int | None = None
  count: int = 1
  settings: Settings = ()
  pictures: Pictures = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """A line that no image can be made from.

  Attributes:
    count: of the images that it would have made; their numbers stay free, so
      that mending the line changes no other image.
  """

  origin: str
  line: int
  reason: str
  count: int = 1

  def __str__(self) -> str:
    return f"{self.origin}:{self.line}: {self.reason}"


Item = Request | Problem


class _UnreadableError(ValueError):
  """A record with a value that cannot be, but perhaps a readable count."""

  def __init__(self, error: ValueError, count: Any):
    super().__init__(str(error))
    self.count = count


class Reader:
  """Makes requests of records, with the command line's values as defaults.

  Args:
    negative_prompt: of lines without one; as `count`.
    settings: changes to the GenerationConfig, likewise.
    pictures: paths by name, likewise.

  Raises:
    ValueError: the defaults cannot be.
  """

  def __init__(
    self,
    *,
    negative_prompt: str = "",
    count: int = 1,
    settings: Mapping[str, Any] | None = None,
    pictures: Mapping[str, str] | None = None,
  ):
    self._negative_prompt = negative_prompt
    self._count = count
    self._defaults = dict(settings or {})
    self._known: dict[Settings, Settings] = {}
    self._pictures = dict(pictures or {})
    checks.image_count([""], count)
    self._plain = self._settings({})

  def read(self, path: epath.PathLike) -> Iterator[Item]:
    """Reads a file line by line; blank lines are skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read as what its name says it is.
    """
    path = epath.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"--prompt_file {path} does not exist.")
    if path.suffix not in _RECORDS:
      raise ValueError(
        f"--prompt_file {path} ends in {path.suffix!r}; expected one of "
        f"{', '.join(_RECORDS)}."
      )
    return self._requests(str(path), _RECORDS[path.suffix](path))

  def make(self, origin: str, line: int, record: Mapping[str, Any]) -> Request:
    """Makes a request of a record of converted values.

    Raises:
      ValueError: the record says what cannot be.
    """
    values = dict(record)
    prompt = values.pop("prompt", None)
    if prompt is None:
      raise ValueError("there is no prompt")
    if not prompt.strip():
      raise ValueError("the prompt is empty; describe what to draw")
    negative_prompt = values.pop("negative_prompt", self._negative_prompt)
    _check_text("prompt", prompt)
    _check_text("negative_prompt", negative_prompt)
    seed = values.pop("seed", None)
    index = values.pop("image_index", None)
    count = values.pop(_COUNT, self._count)
    checks.image_count([prompt], count)
    numbers = (seed or 0, index or 0, (index or 0) + count - 1)
    if any(number not in _NUMBERS for number in numbers):
      # Says why, but takes longer than all the rest.
      checks.image_numbers(*numbers[:2], 1)
      checks.image_numbers(0, numbers[2], 1)
    own = {name: values.pop(name) for name in inputs.NAMES if name in values}
    paths = self._pictures | own
    if empty := [name for name, path in paths.items() if not path.strip()]:
      raise ValueError(f"{', '.join(empty)}: expected the path of a picture")
    return Request(
      origin,
      line,
      prompt,
      negative_prompt,
      seed,
      index,
      count,
      self._settings(values) if values else self._plain,
      tuple(sorted(paths.items())),
    )

  def _requests(self, origin: str, records: "_Records") -> Iterator[Item]:
    for line, record in records:
      count = None
      try:
        values = record()
        count = values.get(_COUNT)
        yield self.make(origin, line, values)
      except _UnreadableError as error:
        yield self._problem(origin, line, error, error.count)
      except (ValueError, TypeError) as error:
        yield self._problem(origin, line, error, count)

  def _problem(
    self, origin: str, line: int, error: Exception, count: Any
  ) -> Problem:
    reason = " ".join(str(error).split()).rstrip(".")
    if not isinstance(count, int) or not 1 <= count <= _MOST_RESERVED:
      count = self._count
    return Problem(origin, line, reason, int(count))

  def _settings(self, changes: Mapping[str, Any]) -> Settings:
    """Merges with the defaults; checks what it has not seen before."""
    merged = dict(self._defaults)
    # A size takes the place of an aspect, and the other way round.
    if changes.get("aspect") is not None:
      merged = {k: v for k, v in merged.items() if k not in _SIDES}
    elif any(changes.get(side) is not None for side in _SIDES):
      merged.pop("aspect", None)
    merged |= changes
    settings = tuple(sorted(merged.items()))
    if settings not in self._known:
      options.GenerationConfig().replace(merged)
      self._known[settings] = settings
    return self._known[settings]


def usable(
  items: Iterable[Item],
  resolve: Callable[[Request, float | None], Settings],
) -> list[Item]:
  """Returns the items; problems in place of what a checkpoint cannot serve.

  Args:
    resolve: given a request and its image's height / width, returns its final
      settings or raises ValueError or TypeError; it is called once for requests
      that differ in texts, seed and counts only.
  """
  known: dict[Any, Settings | Exception] = {}
  return [
    _usable(item, resolve, known) if isinstance(item, Request) else item
    for item in items
  ]


def _usable(
  request: Request,
  resolve: Callable[[Request, float | None], Settings],
  known: dict[Any, Settings | Exception],
) -> Item:
  try:
    ratio = inputs.ratio(dict(request.pictures))
    names = tuple(name for name, _ in request.pictures)
    key = (request.settings, bool(request.negative_prompt), names, ratio)
    if key not in known:
      known[key] = _settings_or_error(resolve, request, ratio)
    settings = known[key]
    if isinstance(settings, Exception):
      raise settings
  except (ValueError, TypeError) as error:
    return refusal(request, error)
  if settings == request.settings:
    return request
  return dataclasses.replace(request, settings=settings)


def refusal(request: Request, error: Exception) -> Problem:
  """Returns what stands in place of a request that cannot be served."""
  reason = str(error).rstrip(".")
  return Problem(request.origin, request.line, reason, request.count)


def _settings_or_error(
  resolve: Callable[[Request, float | None], Settings],
  request: Request,
  ratio: float | None,
) -> Settings | Exception:
  try:
    return resolve(request, ratio)
  except (ValueError, TypeError) as error:
    return error


def _check_text(name: str, text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name} is no valid text: it has half of a surrogate pair, "
      f"{text[error.start]!a}, at position {error.start}"
    ) from error


def report(problems: Sequence[Problem], *, some_left: bool) -> None:
  """Tells of lines that cannot be used.

  Raises:
    ValueError: there are no others.
  """
  if problems and not some_left:
    raise ValueError(
      f"None of {len(problems)} requests can be made; the first: {problems[0]}."
    )
  for problem in problems:
    logging.error("left out: %s", problem)
  if problems:
    logging.error("requests left out: %d", len(problems))


# A record is made when it is asked for, so that its error can be caught there.
_Records = Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]


def _text_lines(path: epath.Path) -> _Records:
  for number, line in _lines(path):
    yield number, lambda line=line: {"prompt": _decode(line)}


def _json_lines(path: epath.Path) -> _Records:
  for number, line in _lines(path):
    yield number, lambda line=line: _converted(_json_object(_decode(line)))


def _csv_rows(path: epath.Path) -> _Records:
  # Other bytes than UTF-8 become lone surrogates, and those a bad line.
  with open(
    path, encoding="utf-8-sig", errors="surrogateescape", newline=""
  ) as file:
    rows = csv.reader(file, strict=True)
    header = _csv_header(path, rows)
    while True:
      first_line = rows.line_num + 1
      try:
        row = next(rows)
      except StopIteration:
        return
      except csv.Error as error:
        yield first_line, _raiser(f"broken CSV: {error}")
        continue
      if row:
        yield first_line, lambda row=row: _csv_record(header, row)


def _parquet_rows(path: epath.Path) -> _Records:
  try:
    # Only for those who use it: it takes a while to load.
    from pyarrow import parquet  # noqa: PLC0415
  except ImportError as error:
    raise ValueError(
      f"Reading {path} needs pyarrow: pip install pyarrow."
    ) from error
  try:
    file = parquet.ParquetFile(path)
  except (ValueError, OSError) as error:
    raise ValueError(
      f"--prompt_file {path} cannot be read as Parquet: {error}"
    ) from error
  with file:
    _check_header(path, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
      for row in batch.to_pylist():
        number += 1
        given = {name: v for name, v in row.items() if v is not None}
        yield number, lambda given=given: _converted(given)


_RECORDS: Mapping[str, Callable[[epath.Path], _Records]] = {
  ".txt": _text_lines,
  ".jsonl": _json_lines,
  ".csv": _csv_rows,
  ".parquet": _parquet_rows,
}


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      # The mark that Windows puts at the beginning.
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      if line := line.strip():
        yield number, line


def _decode(line: bytes) -> str:
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    raise ValueError("the line is not UTF-8") from error


def _json_object(line: str) -> Mapping[str, Any]:
  try:
    record = json.loads(line, parse_constant=_refuse_constant)
  except json.JSONDecodeError as error:
    raise ValueError(f"broken JSON: {error}") from error
  except RecursionError as error:
    raise ValueError("broken JSON: nested too deeply") from error
  if not isinstance(record, dict):
    raise ValueError(f"expected a JSON object, got {line[:40]}")
  return record


def _refuse_constant(name: str) -> None:
  raise ValueError(f"broken JSON: {name} is no number")


def _csv_header(path: epath.Path, rows: Iterator[list[str]]) -> list[str]:
  try:
    header = [name.strip() for name in next(rows, [])]
  except csv.Error as error:
    raise ValueError(
      f"--prompt_file {path} cannot be read as CSV: {error}."
    ) from error
  _check_header(path, header)
  return header


def _check_header(path: epath.Path, names: list[str]) -> None:
  if "prompt" not in names:
    raise ValueError(
      f"--prompt_file {path} has no column 'prompt', only {names}."
    )
  if len(set(names)) < len(names):
    raise ValueError(f"--prompt_file {path} names a column twice: {names}.")
  if unknown := sorted(set(names) - _KNOWN):
    raise ValueError(f"--prompt_file {path}: {_unknown_message(unknown)}.")


def _csv_record(header: list[str], row: list[str]) -> dict[str, Any]:
  if len(row) != len(header):
    raise ValueError(f"expected {len(header)} cells, got {len(row)}")
  cells = dict(zip(header, row, strict=True))
  record = {}
  for name, cell in cells.items():
    try:
      cell.encode()
    except UnicodeEncodeError as error:
      raise ValueError("the line is not UTF-8") from error
    try:
      if cell.strip():
        record[name] = _named(name, cell, fields.parse)
    except ValueError as error:
      count = cells.get(_COUNT, "").strip()
      raise _UnreadableError(
        error, int(count) if count.isdecimal() else None
      ) from error
  # An empty cell says nothing, but an image needs a prompt.
  return {"prompt": ""} | record


def _converted(record: Mapping[str, Any]) -> dict[str, Any]:
  try:
    if unknown := sorted(set(record) - _KNOWN):
      raise ValueError(_unknown_message(unknown))
    return {
      name: _named(name, value, fields.convert)
      for name, value in record.items()
      if value is not None or fields.is_optional(_TYPES[name])
    }
  except ValueError as error:
    raise _UnreadableError(error, record.get(_COUNT)) from error


def _named(name: str, value: Any, read: Callable[[Any, Any], Any]) -> Any:
  try:
    return read(value, _TYPES[name])
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def _unknown_message(names: list[str]) -> str:
  return f"unknown fields {names}; there are {sorted(_KNOWN)}"


def _raiser(message: str) -> Callable[[], Mapping[str, Any]]:
  def record():
    raise ValueError(message)

  return record


_TYPES = fields.SETTING_TYPES | fields.REQUEST_TYPES
_KNOWN = frozenset(_TYPES)
