"""Who takes part in a run, and what one is told when somebody is missing."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time

import jax
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


def test_what_is_wrong_in_one_of_several_processes_is_said_whole(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  budget = "the step does not fit\n" + 100 * "  1.00  parameters\n" + "knobs"
  said = launch.explain_peer_failure(MemoryError(budget))
  assert said == f"process 0 of 2 ends: {budget}"
  of_peer = launch.explain_peer_failure(RuntimeError("Connection reset"))
  assert "another process died first" in of_peer


def test_one_process_meets_nobody():
  launch.meet("here")
  compiled = launch.compile_and_meet(jax.jit(lambda x: 2 * x), 1.0)
  assert float(compiled(1.5)) == 3


MEET = """
import sys, time
import jax
from sana_jax.training import launch
rank, port = map(int, sys.argv[1:])
launch.join(
  launch.Cluster("coordinator", 2, rank, f"localhost:{port}"),
  timeout=100, heartbeat_timeout=50,
)
launch.meet("ready")
compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, *_, **__: "backend_compile" in name and compiled.append(name)
)
mesh = jax.make_mesh((8,), ("x",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

def slow(x):
  time.sleep(3 * rank)  # One process is slower to trace.
  return 2 * x

double = jax.jit(slow, out_shardings=everywhere)
started = time.monotonic()
for _ in range(2):  # A place may be met at again.
  compiled_double = launch.compile_and_meet(double, 1.0)
waited, programs = time.monotonic() - started, len(compiled)
assert float(compiled_double(1.0)) == 2
print(f"waited {waited} for {programs} and {len(compiled) - programs} more")
"""


@pytest.mark.slow
def test_processes_meet_when_the_slowest_has_compiled():
  with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
  flag = "--xla_force_host_platform_device_count=4"
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", MEET, str(rank), str(port)],
      env=os.environ | {"XLA_FLAGS": flag},
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  for process in pair:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    waited, programs, more = re.search(
      r"waited (\S+) for (\d+) and (\d+) more", output
    ).groups()
    assert float(waited) > 2.5
    # The call finds what was compiled for it.
    assert (programs, more) == ("1", "0")


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
