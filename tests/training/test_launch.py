"""Who takes part in a run, and what one is told when somebody is missing."""

import http.server
import socket
import subprocess
import sys
import threading
import time

import pytest

from sana_jax.training import launch

SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "a,b",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
}


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    ({}, None),
    (SLURM, launch.Cluster("slurm", 2, 1)),
    (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    # An allocation in which no step was started.
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),
    (OPEN_MPI, launch.Cluster("ompi", 4, 3)),
    ({"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3"}, launch.Cluster("tpu", 4)),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    (
      {"TPU_WORKER_HOSTNAMES": "h0,h1", "MEGASCALE_NUM_SLICES": "2"},
      launch.Cluster("tpu", 4),
    ),
  ],
)
def test_launchers_tell_who_takes_part(environ, expected):
  assert launch.find_cluster(environ) == expected


def test_flags_win_over_launchers():
  found = launch.find_cluster(
    SLURM, coordinator="10.0.0.2:8476", num_processes=3, process_id=0
  )
  assert found == launch.Cluster("coordinator", 3, 0, "10.0.0.2:8476")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"coordinator": "a:1"}, "go together, got a:1, None and None"),
    ({"num_processes": 2, "process_id": 0}, "go together, got None, 2 and 0"),
    (
      {"coordinator": "a", "num_processes": 2, "process_id": 0},
      "must be HOST:PORT, .* got 'a'",
    ),
    (
      {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
      "from 0 to --num_processes - 1, got 2 of 2",
    ),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    launch.find_cluster({}, **flags)


class Metadata(http.server.BaseHTTPRequestHandler):
  """Answers as the metadata server of a TPU virtual machine does."""

  def do_GET(self):  # noqa: N802
    found = self.path.endswith("/attributes/worker-network-endpoints")
    assert self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if found and self.server.answer else 404)
    self.end_headers()
    self.wfile.write(self.server.answer.encode())

  def log_message(self, *args):
    del args


@pytest.mark.parametrize(
  ("answer", "count"),
  [("x:y:10.0.0.1,x:y:10.0.0.2", 2), ("host0", 1), ("", 1)],
)
def test_a_tpu_machine_says_how_large_its_pod_is(answer, count):
  with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      address = f"127.0.0.1:{server.server_address[1]}"
      assert launch.count_workers(address) == count
    finally:
      server.shutdown()
      thread.join()


def test_without_a_metadata_server_a_machine_is_on_its_own():
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    assert launch.count_workers(f"127.0.0.1:{unused.getsockname()[1]}") == 1


def test_one_process_has_no_peers_to_blame():
  assert launch.explain_peer_failure(ValueError("x")) is None


JOIN = """
import sys
from absl import logging
from sana_jax.training import launch
logging.set_verbosity(logging.INFO)
cluster = launch.Cluster({kind!r}, 2, {rank}, "localhost:{port}")
launch.join(cluster, timeout=2, heartbeat_timeout=10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "rank", "remedy"),
  [("coordinator", 0, "port can be reached"), ("tpu", 1, "--worker=all")],
)
def test_a_process_that_waits_in_vain_says_so(kind, rank, remedy):
  with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
  code = JOIN.format(kind="coordinator", rank=rank, port=port)
  if kind == "tpu":
    # The message of a pod, the way to wait of the others: here is no TPU.
    code = code.replace(
      "launch.join(cluster",
      "launch._give_up(cluster._replace(kind='tpu'), 2)\nlaunch.join(cluster",
    )
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert time.monotonic() - started < 60
  assert "not all 2 processes came within 2 s" in done.stderr
  assert "the same command must run on all hosts" in done.stderr
  assert remedy in done.stderr
  if kind == "coordinator":
    assert (
      f"waiting for 2 processes at localhost:{port} (coordinator, this is 0); "
      "run the same command on all" in done.stderr
    )
