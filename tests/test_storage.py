"""Files are there whole or not at all."""

import errno
import os
import subprocess
import sys

import pytest
from array_record.python import array_record_module

from sana_jax import storage


def test_a_written_file_is_whole_and_leaves_nothing_else(tmp_path, rng):
  content = rng.bytes(1000)
  directory = storage.Directory(tmp_path)
  directory.write("a.bin", b"old")
  directory.write("a.bin", content)
  directory.sync()
  assert (tmp_path / "a.bin").read_bytes() == content
  assert os.listdir(tmp_path) == ["a.bin"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  directory = storage.Directory(tmp_path)
  directory.write("a", b"old")

  def interrupted():
    temporary = directory.temporary("a")
    with storage.removing_on_error(temporary, tmp_path / "a"):
      temporary.write_bytes(b"ne")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert os.listdir(tmp_path) == ["a"]
  assert (tmp_path / "a").read_bytes() == b"old"


def test_hosts_leave_each_others_temporary_files_alone(tmp_path):
  first, second = (storage.Directory(tmp_path, host) for host in (1, 2))
  first.temporary("x").write_bytes(b"1")
  second.temporary("x").write_bytes(b"2")
  first.remove_temporary_files()
  assert not first.temporary("x").exists()
  assert second.temporary("x").read_bytes() == b"2"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_comes_with_advice(tmp_path, number):
  error = OSError(number, os.strerror(number))
  explained = storage.explained(error, tmp_path / "a.png")
  assert explained.errno == number
  assert str(tmp_path / "a.png") in str(explained)
  assert "run the same command again" in str(explained)


def test_other_errors_stay_as_they_are(tmp_path):
  error = PermissionError(errno.EACCES, "no")
  assert storage.explained(error, tmp_path) is error


LIMITED = """
import pathlib, resource, sys
from sana_jax import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
directory = storage.Directory(pathlib.Path(sys.argv[1]))
directory.write("small", b"x" * 900)
try:
  directory.write("large", b"x" * 1100)
except OSError as error:
  sys.exit(str(error))
"""


def test_a_file_that_does_not_fit_leaves_no_half(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", LIMITED, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert "File too large. Make room" in done.stderr
  assert os.listdir(tmp_path) == ["small"]


def test_records_are_read_back_in_order(tmp_path, rng):
  contents = [rng.bytes(int(size)) for size in rng.integers(1, 9000, 20)]
  file = storage.RecordFile(tmp_path / "half", tmp_path / "whole")
  for content in contents:
    file.write(content)
  file.close()
  reader = array_record_module.ArrayRecordReader(str(tmp_path / "half"))
  assert reader.read_all() == contents


def test_a_record_file_that_cannot_be_written_says_what_it_was_to_be(tmp_path):
  # The library notices late.
  with pytest.raises(OSError, match="Cannot write .*whole: .*same command"):
    write_one(tmp_path / "no" / "half", tmp_path / "whole")


def write_one(path, becomes):
  file = storage.RecordFile(path, becomes)
  file.write(b"record")
  file.close()


def test_a_file_is_open_in_one_process_at_a_time(tmp_path):
  path = tmp_path / "a"
  with (
    storage.open_alone(path, "wait"),
    pytest.raises(BlockingIOError, match="is writing .*a; end it"),
  ):
    storage.open_alone(path, "end it")
  storage.open_alone(path, "wait").close()


def check(path, identity, **options):
  storage.check_same(
    path, identity, program="a program", advice="do so", **options
  )


def test_another_run_is_refused_and_what_differs_is_said(tmp_path):
  path = tmp_path / "run.json"
  path.write_text('{"a": 1, "b": [2], "name": "x"}')
  check(path, {"a": 1, "b": [2], "name": "x"})
  check(path, {"a": 1, "b": [2], "name": "y"}, free=("name",))
  with pytest.raises(
    FileExistsError, match=r"another run \(b was .2., is 3; c was null, is 4\)"
  ):
    check(path, {"a": 1, "b": 3, "c": 4}, free=("name",))
  path.write_text("[")
  with pytest.raises(FileExistsError, match="is not from a program"):
    check(path, {"a": 1})
