"""Several processes become one run: who they are, waiting, and giving up.

A TPU pod, Slurm and Open MPI say themselves who takes part; anywhere else, the
command names a coordinator. One process on its own needs none of this.
"""

import importlib.util
import logging as std_logging
import os
import pathlib
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint as ocp
from absl import logging

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
# What JAX itself waits beyond our patience: ours has the better message.
_GRACE = 60
# The longest that processes wait for one that lives: the largest models compile
# for minutes, and so does a grid of 4K samples take.
_MEETING_SECONDS = 3600
_POD_COMMAND = (
  "gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all "
  '--command="COMMAND"'
)


class Cluster(NamedTuple):
  """The processes of a run.

  Attributes:
    kind: what told of them: "coordinator", "slurm", "ompi" or "tpu".
    num_processes: in all.
    process_id: of this one; None: JAX finds out.
    coordinator: host:port of process 0; None: JAX finds out.
  """

  kind: str
  num_processes: int
  process_id: int | None = None
  coordinator: str | None = None


def find_cluster(
  environ: Mapping[str, str],
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Cluster | None:
  """Finds out who takes part; None: this process alone.

  Args:
    environ: of the process.
    coordinator: host:port, by flag, as are the two others.

  Raises:
    ValueError: some of the three are missing, or do not fit.
  """
  given = (coordinator, num_processes, process_id)
  if any(value is not None for value in given):
    _check(coordinator, num_processes, process_id)
    found = Cluster("coordinator", num_processes, process_id, coordinator)
  elif all(name in environ for name in _SLURM):
    count, rank = environ["SLURM_NTASKS"], environ["SLURM_PROCID"]
    found = Cluster("slurm", int(count), int(rank))
  elif "OMPI_MCA_orte_hnp_uri" in environ:
    count = environ["OMPI_COMM_WORLD_SIZE"]
    found = Cluster("ompi", int(count), int(environ["OMPI_COMM_WORLD_RANK"]))
  else:
    found = Cluster("tpu", _tpu_hosts(environ))
  return found if found.num_processes > 1 else None


def join(cluster: Cluster, *, timeout: int, heartbeat_timeout: int) -> None:
  """Waits for the other processes; ends this one if some do not come.

  Args:
    timeout: seconds to wait for them.
    heartbeat_timeout: seconds after which a silent process counts as dead, and
      the others end.
  """
  who = "" if cluster.process_id is None else f", this is {cluster.process_id}"
  at = "" if cluster.coordinator is None else f" at {cluster.coordinator}"
  logging.info(
    "waiting for %d processes%s (%s%s); run the same command on all",
    *(cluster.num_processes, at, cluster.kind, who),
  )
  # A thread: where a process is missing, JAX ends this one by a signal.
  watchdog = threading.Timer(timeout, _give_up, (cluster, timeout))
  watchdog.daemon = True
  watchdog.start()
  explicit = cluster.kind == "coordinator"
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.num_processes if explicit else None,
    cluster.process_id if explicit else None,
    # A coordinator's processes may share a host; each sees its own devices.
    cluster_detection_method="deactivate" if explicit else None,
    initialization_timeout=timeout + _GRACE,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )
  watchdog.cancel()
  logging.info(
    "process %d of %d: %d local of %d devices; if one of the processes dies, "
    "all end within about %d s (--heartbeat_timeout), and the same command on "
    "all hosts continues from the last checkpoint",
    *(jax.process_index(), jax.process_count()),
    *(jax.local_device_count(), jax.device_count(), heartbeat_timeout),
  )


def meet(where: str) -> None:
  """Waits until all processes are here, without a collective.

  To be called before collectives where processes may be minutes apart: one
  compiles, or is sampling, and another is not. Collectives have little
  patience (Gloo's, on CPUs, have 30 s); this waits for whoever is alive.

  Args:
    where: the same in all processes.
  """
  # Of one process, orbax makes a function that does nothing.
  barrier = ocp.multihost.get_barrier_sync_fn()
  barrier(key=where, timeout_ms=1000 * _MEETING_SECONDS)


def compile_and_meet(
  function: jax.stages.Wrapped, *args: Any
) -> jax.stages.Compiled:
  """Compiles for these arguments; returns when all processes have done it.

  A process that has the program in its compilation cache is there at once;
  others compile for minutes.

  Args:
    function: jitted.
    args: arrays, or abstract ones with shardings.
  """
  compiled = function.lower(*args).compile()
  meet("compiled")
  return compiled


def leave(code: int) -> NoReturn:
  """Ends the process at once, after what was logged is written.

  Threads that wait for other processes, or for a checkpoint that failed, would
  hold up an ordinary exit for minutes.
  """
  std_logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def explain_peer_failure(error: Exception) -> str | None:
  """Returns what to do when a step failed, perhaps for another's sake.

  What was wrong in this process says itself what to do, and is left whole.
  """
  if jax.process_count() == 1:
    return None
  who = f"process {jax.process_index()} of {jax.process_count()}"
  if isinstance(error, MemoryError | ValueError | OSError | ArithmeticError):
    return f"{who} ends: {error}"
  return (
    f"{who} ends after {type(error).__name__}: "
    f"{' '.join(str(error).split())[:400]}. Where it speaks of a connection, "
    "another process died first: see its log. Run the same command again on "
    "all hosts: it continues from the last checkpoint"
  )


def _give_up(cluster: Cluster, timeout: int) -> None:
  remedy = (
    f"On a TPU pod, run it on all workers: {_POD_COMMAND}"
    if cluster.kind == "tpu"
    else "Start it on the others, and see that the coordinator's port can be "
    "reached from them"
  )
  logging.error(
    "not all %d processes came within %d s (--join_timeout): the same command "
    "must run on all hosts at the same time. %s",
    *(cluster.num_processes, timeout, remedy),
  )
  leave(1)


def _check(coordinator, num_processes, process_id) -> None:
  if None in (coordinator, num_processes, process_id):
    raise ValueError(
      "--coordinator, --num_processes and --process_id go together, got "
      f"{coordinator}, {num_processes} and {process_id}."
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(
      f"--coordinator must be HOST:PORT, such as 10.0.0.2:8476, got "
      f"{coordinator!r}."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id must be from 0 to --num_processes - 1, got {process_id} "
      f"of {num_processes}."
    )


def _tpu_hosts(environ: Mapping[str, str]) -> int:
  """Counts the hosts of a TPU pod, 1 where there is none."""
  slices = int(environ.get("MEGASCALE_NUM_SLICES", "1") or 1)
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if environ.get(name):
      return slices * len(environ[name].split(","))
  has_chips = any(
    pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0")
  )
  if not (has_chips and importlib.util.find_spec("libtpu")):
    return 1
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  return slices * count_workers(server)


def count_workers(server: str) -> int:
  """Asks the metadata server of a TPU virtual machine for its pod's size.

  Args:
    server: its host name, perhaps with a port.
  """
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return len(answer.read().decode().split(","))
  except (urllib.error.URLError, TimeoutError):
    # No such attribute, or no such server: a machine on its own.
    return 1
