"""What is done: run.json names a directory's run, manifest.jsonl its images.

A unit's lines are appended in one write, after its files are complete. A
restart reads them back and makes what is missing.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from sana_jax import storage
from sana_jax.bulk import plan as plan_lib

_RUN = "run.json"
# Made of all images; not in the manifest.
GRID = "grid.png"
_ADVICE = "use another --output_dir, or --overwrite to remove that run's files"
# Of the beginning of a run; a restart takes them over.
_NOT_COMPARED = frozenset({"available_bytes", "left_out", "repairs"})


def read_run(directory: storage.Directory) -> dict[str, Any] | None:
  """Returns what run.json says; None: there is no run.

  Raises:
    FileExistsError: something else wrote it.
  """
  path = directory.path / _RUN
  try:
    there = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except ValueError:
    there = None
  if not isinstance(there, dict):
    raise FileExistsError(
      f"{path} is not from sample.py; use another --output_dir."
    )
  return there


def claim(
  directory: storage.Directory,
  identity: Mapping[str, Any],
  *,
  start: Mapping[str, Any],
  repairs: Sequence[Any] = (),
  new_files: Iterable[str],
  overwrite: bool,
) -> dict[str, Any]:
  """Makes a directory that of this run, or finds that it is already.

  Args:
    identity: JSON values that determine the images and the files.
    start: further values; those of the process that began the run count.
    repairs: a JSON value for each set of mended lines; see `history`.
    new_files: names that a new run must not find there.
    overwrite: remove the run that is there, and begin.

  Returns:
    run.json: identity, start and "repairs".

  Raises:
    FileExistsError: there is something else.
    ValueError: several hosts and `overwrite`.
  """
  path = directory.path
  path.mkdir(parents=True, exist_ok=True)
  # As it will be read back, with lists only.
  run = json.loads(json.dumps({**identity, **start, "repairs": repairs}))
  if overwrite:
    if identity["num_hosts"] > 1:
      raise ValueError(
        "--overwrite is for one host: several would remove each other's "
        f"files. Empty {path} first, or use another --output_dir."
      )
    _remove_run(path)
    directory.write(_RUN, _content(run))
    directory.sync()
    return run
  if (there := read_run(directory)) is None:
    names = set(os.listdir(path))
    for name in new_files:
      # Another host may have begun meanwhile.
      if name in names and _RUN not in os.listdir(path):
        raise FileExistsError(
          f"{path / name} exists; use another --output_dir, or --overwrite."
        )
    if directory.create(_RUN, _content(run)):
      directory.sync()
      return run
    there = read_run(directory) or {}
  storage.check_same(
    path / _RUN,
    {name: run[name] for name in identity},
    program="sample.py",
    advice=_ADVICE,
    free=_NOT_COMPARED,
  )
  known = there.get("repairs", [])
  if run["repairs"][: len(known)] != known:
    raise FileExistsError(
      f"{path} holds another run (lines that were mended have changed since); "
      "use another --output_dir, or --overwrite to remove that run's files."
    )
  if run["repairs"] != known:
    there |= {"repairs": run["repairs"]}
    directory.write(_RUN, _content(there))
    directory.sync()
  return there


class Manifest:
  """The finished units of one host; held open, and by one process only.

  Raises:
    BlockingIOError: another process has it open.
  """

  def __init__(
    self,
    directory: storage.Directory,
    plan: plan_lib.Plan,
    *,
    host_index: int = 0,
    num_hosts: int = 1,
  ):
    self.path = directory.path / _name(host_index, num_hosts)
    self._directory = directory
    self._plan = plan
    self._units = plan_lib.units_of_host(plan.num_units, host_index, num_hosts)
    self._file = _open_alone(self.path)
    directory.remove_temporary_files()
    self._recorded, self._missing = self._recover()

  def __enter__(self) -> "Manifest":
    return self

  def __exit__(self, *_: Any) -> None:
    self._file.close()

  @property
  def units_to_do(self) -> list[int]:
    """Units without lines, or with failures, or without the lines' files."""
    return [
      unit
      for unit in self._units
      if unit not in self._recorded or unit in self._missing
    ]

  def count(self) -> tuple[int, int]:
    """Returns how many images are this host's, and how many are finished."""
    sizes = {unit: len(self._plan.indices(unit)) for unit in self._units}
    total = sum(sizes.values())
    return total, total - sum(sizes[unit] for unit in self.units_to_do)

  def append(self, unit: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Records that a unit is finished.

    Raises:
      OSError: it cannot be written; then nothing is.
    """
    content = "".join(
      json.dumps(line, ensure_ascii=False) + "\n" for line in lines
    ).encode()
    if unit in self._recorded:
      self._replace(unit, content)
      return
    end = self._file.seek(0, os.SEEK_END)
    try:
      rest = memoryview(content)
      while rest:  # once, unless the disk is full
        rest = rest[self._file.write(rest) :]
      os.fsync(self._file.fileno())
    except OSError as error:
      self._file.truncate(end)
      raise storage.explained(error, self.path) from error
    self._recorded[unit] = (end, end + len(content))

  def _recover(self):
    """Reads the lines of whole units, and cuts off what follows them."""
    recorded: dict[int, tuple[int, int]] = {}
    missing: set[int] = set()
    end = 0
    with self.path.open("rb") as file:
      for unit in self._units:
        lines = _read_lines(file, self._plan.indices(unit))
        if lines is None:
          break
        recorded[unit] = (end, file.tell())
        end = file.tell()
        # What failed is tried again: memory or a file may be there by now.
        if any("error" in line for line in lines) or not self._are_there(lines):
          missing.add(unit)
    self._file.truncate(end)
    return recorded, missing

  def _are_there(self, lines: Sequence[Mapping[str, Any]]) -> bool:
    files = {line["file"]: line["bytes"] for line in lines if "file" in line}
    for name, size in files.items():
      try:
        if (self._directory.path / name).stat().st_size != size:
          return False
      except FileNotFoundError:
        return False
    return True

  def _replace(self, unit: int, content: bytes) -> None:
    """Exchanges the lines of a unit whose files had to be made again.

    They are the same lines, unless the machine is another one by now.
    """
    self._missing.discard(unit)
    start, end = self._recorded[unit]
    before = self.path.read_bytes()
    if before[start:end] == content:
      return
    self._directory.write(
      self.path.name, before[:start] + content + before[end:]
    )
    self._file.close()
    self._file = _open_alone(self.path)
    longer = len(content) - (end - start)
    for other, (first, last) in self._recorded.items():
      if last >= end:
        moved = first if other == unit else first + longer
        self._recorded[other] = (moved, last + longer)


def _read_lines(
  file: BinaryIO, indices: Sequence[int]
) -> list[dict[str, Any]] | None:
  """Reads the lines of these images; None: they are not all there."""
  lines = []
  for index in indices:
    content = file.readline()
    if not content.endswith(b"\n"):
      return None
    try:
      line = json.loads(content)
    except ValueError:
      return None
    if not isinstance(line, dict) or line.get("index") != index:
      return None
    lines.append(line)
  return lines


def _open_alone(path: pathlib.Path) -> BinaryIO:
  """Opens a manifest for appending."""
  return storage.open_alone(path, "wait for it, or use another --output_dir")


def _name(host_index: int, num_hosts: int) -> str:
  if num_hosts == 1:
    return "manifest.jsonl"
  return f"manifest-{host_index:05d}-of-{num_hosts:05d}.jsonl"


def _content(run: Mapping[str, Any]) -> bytes:
  return (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode()


def _remove_run(path: pathlib.Path) -> None:
  """Removes the files of manifests, the manifests, and grid.png.

  run.json stays until another takes its place: should this be cut short, the
  directory is still known to hold a run.
  """
  for manifest in path.glob("manifest*.jsonl"):
    with _open_alone(manifest), manifest.open("rb") as file:
      for content in file:
        try:
          name = json.loads(content).get("file")
        except ValueError:
          continue  # the half line of a killed process
        # A name only: never a file elsewhere, whatever the manifest says.
        if name and name == pathlib.Path(name).name:
          (path / name).unlink(missing_ok=True)
      (path / GRID).unlink(missing_ok=True)
      manifest.unlink()
