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


def claim(
  directory: storage.Directory,
  identity: Mapping[str, Any],
  *,
  new_files: Iterable[str],
  overwrite: bool,
) -> None:
  """Makes a directory that of this run, or finds that it is already.

  Args:
    identity: JSON values that determine the images and the files.
    new_files: names that a new run must not find there.
    overwrite: remove the run that is there, and begin.

  Raises:
    FileExistsError: there is something else.
    ValueError: several hosts and `overwrite`.
  """
  path = directory.path
  path.mkdir(parents=True, exist_ok=True)
  content = json.dumps(identity, indent=2, ensure_ascii=False) + "\n"
  if overwrite:
    if identity["num_hosts"] > 1:
      raise ValueError(
        "--overwrite is for one host: several would remove each other's "
        f"files. Empty {path} first, or use another --output_dir."
      )
    _remove_run(path)
  elif (path / _RUN).exists():
    storage.check_same(
      path / _RUN,
      json.loads(content),
      program="sample.py",
      advice=(
        "use another --output_dir, or --overwrite to remove that run's files"
      ),
    )
    return
  else:
    there = set(os.listdir(path))
    for name in new_files:
      if name in there:
        raise FileExistsError(
          f"{path / name} exists; use another --output_dir, or --overwrite."
        )
  directory.write(_RUN, content.encode())
  directory.sync()


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
    self._recorded, self._missing, self._failed = self._recover()

  def __enter__(self) -> "Manifest":
    return self

  def __exit__(self, *_: Any) -> None:
    self._file.close()

  @property
  def units_to_do(self) -> list[int]:
    """Units without lines, or whose files are not what the lines say."""
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

  @property
  def failed_images(self) -> list[int]:
    """Images that an earlier process could not make."""
    return list(self._failed)

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
    failed: list[int] = []
    end = 0
    with self.path.open("rb") as file:
      for unit in self._units:
        lines = _read_lines(file, self._plan.indices(unit))
        if lines is None:
          break
        recorded[unit] = (end, file.tell())
        end = file.tell()
        failed += [line["index"] for line in lines if "error" in line]
        if not self._are_there(lines):
          missing.add(unit)
    self._file.truncate(end)
    return recorded, missing, failed

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
