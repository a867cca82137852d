"""Every benchmark, at sizes that take no time, and the page they make."""

import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from bench import (
  jax_training,
  ops,
  options,
  report,
  sample,
  startup,
  tpu_aot,
  train,
  training_loads,
  workloads,
)
from sana_jax import config as config_lib
from sana_jax import flops

FEW = ("--size=tiny", "--pairs=1", "--max_pairs=1", "--seconds=0.1")


@pytest.fixture
def keeps_platform():
  yield
  jax.config.update("jax_platforms", "cpu")


def environment(**changes):
  values = {
    "command": "python -m bench.x",
    "date": "2026-01-01",
    "commit": "abc",
    "device": "8 x cpu",
    "platform": "cpu",
    "processor": "a processor",
    "cores": 2,
    "python": "3.11",
    "versions": {"jax": "0.10.2"},
  }
  return values | changes


@pytest.mark.parametrize("module", [sample, train, startup])
def test_a_row_that_there_is_not_is_an_error(module, capsys):
  assert module.main(["--only=nothing"]) == 1
  assert "--only=nothing is no row; there are" in capsys.readouterr().err


def test_an_operation_that_there_is_not_is_an_error(capsys):
  assert ops.main(["--only=nothing"]) == 1
  assert "bench.ops: --only=nothing is no row" in capsys.readouterr().err


def test_rows_keep_their_order():
  assert options.choose(["c", "a"], ["a", "b", "c"]) == ["a", "c"]
  assert options.choose(None, ["a", "b"]) == ["a", "b"]


def test_operations_are_timed_and_recorded(tmp_path, capsys):
  file = tmp_path / "ops.json"
  names = [f"--only={name}" for name in ops.CASES if name.startswith("tiny")]
  assert ops.main([*names, "--seconds=0.001", f"--json={file}"]) == 0
  found = json.loads(file.read_text())
  assert found["kind"] == "bench.ops"
  assert len(found["rows"]) == 2 * len(names)
  for row in found["rows"]:
    assert row["seconds"] > 0
    assert row["bytes"] > 0
    assert row["errors"]["0"] == 0
  assert "| tiny_gated_conv" in capsys.readouterr().out


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
  def function(x, implementation=None):
    if implementation == "elsewhere":
      raise NotImplementedError("elsewhere needs a TPU.")
    return x * (3 if implementation == "wrong" else 2)

  case = ops.Case(function, ((2, 3),), 6.0, ("same", "elsewhere"))
  monkeypatch.setitem(ops.CASES, "case", case)
  rows = ops.measure("case", "float32", 0.001)
  assert [row["seconds"] is None for row in rows] == [False] * 4 + [True] * 2
  assert rows[4]["reason"] == "elsewhere needs a TPU."
  # Read and written once; with the gradient, 3 operands and 2 results.
  assert [row["bytes"] for row in rows[:2]] == [48, 120]
  ceiling = {"flops": 1e9, "bandwidth": 1e9}
  cells = ops.table({"rows": rows, "ceilings": ceiling})
  assert "no: elsewhere needs a TPU." in cells
  monkeypatch.setitem(
    ops.CASES, "case", case._replace(implementations=("wrong",))
  )
  with pytest.raises(AssertionError, match="case, wrong: 0 differs by 5.0e-01"):
    ops.measure("case", "float32", 0.001)


def test_work_is_that_of_the_analytic_model():
  size = workloads.SIZES["full"]
  checkpoint = size.checkpoints["1.6B"]()
  step, image = (
    workloads.work(checkpoint, size.workloads[name])
    for name in ("transformer_1024", "pipeline_1024")
  )
  forward = flops.forward(config_lib.sana_1600m(), 1024, 1024)
  assert step == 2 * forward
  # 20 guided steps, 8.37 TFLOP of decoding, about 2.1 of the text.
  assert image == pytest.approx(40 * forward + 10.5e12, rel=0.01)


def test_work_of_an_autoencoder_that_was_not_counted_is_unknown():
  size = workloads.SIZES["tiny"]
  checkpoint = size.checkpoints["tiny"]()
  for name, workload in size.workloads.items():
    known = name in ("text", "transformer", "sampler")
    assert (workloads.work(checkpoint, workload) is not None) == known


def test_batches_of_both_sides_are_alike_and_ragged():
  load = training_loads.LOADS["tiny"]["tiny"]
  first, second = (next(training_loads.batches(load)) for _ in range(2))
  assert all((first[name] == second[name]).all() for name in first)
  assert first["latents"].shape == (2, 4, 4, 4)
  assert first["text_mask"][:, 0].all()
  assert next(workloads.prompts(2)) != next(workloads.prompts(1))


def test_memory_of_a_step_is_told_by_what_it_is_for():
  load = training_loads.LOADS["tiny"]["tiny"]
  found = jax_training.memory_by_category(load)
  # Adam's two moments.
  assert found["optimiser"] == pytest.approx(2 * found["parameters"], rel=0.01)
  assert found["average"] == found["parameters"]
  assert found["temporaries"] > 0


def test_a_step_of_a_given_noise_trains():
  load = training_loads.LOADS["tiny"]["tiny"]
  made = jax_training.make_program(load, jax_training.fresh(load))
  state = made.init(jax.random.key(0))
  batch = next(training_loads.batches(load))
  losses = []
  for _ in range(5):
    state, scalars = made.step(state, {}, jax.random.key(1), batch)
    losses.append(float(scalars["loss"]))
  assert losses[-1] < losses[0]


def test_start_is_told_by_phase():
  found = startup.table(
    {
      "rows": [
        {"model": "m", "start": "cold", "import": 1, "trace": 2, "compile": 3}
      ]
    }
  )
  assert "| m     | cold  | 1 s    | 2 s             | 3 s     |" in found


def test_a_compiled_program_is_accounted_for():
  compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
  found = tpu_aot.account(compiled)
  assert found["flops"] == pytest.approx(2 * 8**3, rel=0.1)
  assert found["argument_bytes"] == 256
  # A CPU has neither cycles nor kernels.
  assert (found["estimated_cycles"], found["kernels"]) == (0, 0)


def test_cycles_and_kernels_are_read_from_the_program():
  text = '"estimated_cycles":"1234","memory_space":"1","offset":"0","size":"77"'
  assert tpu_aot._CYCLES.search(text)[1] == "1234"
  assert tpu_aot._SCOPED.findall(text) == ["77"]


@pytest.mark.tpu_aot
def test_an_operation_is_compiled_for_a_tpu(tmp_path, keeps_platform):
  pytest.importorskip("libtpu")
  name = "linear_attention_1600m_1024"
  code = tpu_aot.main([f"--output={tmp_path}", f"--row={name}", "--chip=v5e"])
  assert code == 0
  (found,) = tpu_aot.read(epath.Path(tmp_path))
  assert found["error"] is None
  assert found["estimated_cycles"] > 1e4
  assert found["grouped_convolutions"] == 0
  assert found["flops"] == pytest.approx(found["analytic_flops"], rel=0.2)


@pytest.mark.slow
@pytest.mark.long
def test_start_of_fresh_processes_is_timed(tmp_path):
  file = tmp_path / "start.json"
  code = startup.main(
    ["--only=sana_600m", "--pixels=64", "--repeats=1", f"--json={file}"]
  )
  assert code == 0
  cold, warm = json.loads(file.read_text())["rows"]
  assert warm["compile"] < cold["compile"]
  assert min(cold[phase] for phase in ("import", "trace")) > 0


@pytest.mark.parity
@pytest.mark.slow
def test_sampling_is_compared_with_diffusers(tmp_path, capsys):
  pytest.importorskip("diffusers")
  file = tmp_path / "sample.json"
  assert sample.main([*FEW, f"--json={file}"]) == 0
  found = json.loads(file.read_text())
  assert list(found["rows"]) == list(workloads.SIZES["tiny"].workloads)
  for row in found["rows"].values():
    assert max(row["errors"].values()) <= row["workload"]["tolerance"]
    assert row["ratio"]["low"] <= row["ratio"]["median"]
    assert row["memory"]["theirs"]["peak_host_bytes"] > 2**20
  assert "| pipeline" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.slow
def test_training_is_compared_with_a_plain_loop(tmp_path, capsys):
  pytest.importorskip("diffusers")
  file = tmp_path / "train.json"
  assert train.main([*FEW, f"--json={file}"]) == 0
  row = json.loads(file.read_text())["rows"]["tiny"]
  assert set(row["errors"]) == {"loss", "grad_norm"}
  assert row["ours"] > 0
  assert "Memory of our step" in capsys.readouterr().out


def test_the_page_has_each_record_with_its_command(tmp_path):
  rows = [
    {"model": "m", "start": "cold", "import": 1, "trace": 2, "compile": 3}
  ]
  (tmp_path / "start.json").write_text(
    json.dumps(
      {"kind": "bench.startup", "environment": environment(), "rows": rows}
    )
  )
  (tmp_path / "aot").mkdir()
  compiled = {
    "row": "decode_1024",
    "chip": "v5e",
    "error": "it does not fit",
    "environment": environment(),
  }
  (tmp_path / "aot" / "decode_1024_v5e.json").write_text(json.dumps(compiled))
  page = tmp_path / "page.md"
  assert report.main([f"--records={tmp_path}", f"--output={page}"]) == 0
  text = page.read_text()
  assert "## Start: a processor, 2 cores" in text
  assert "`python -m bench.x`" in text
  assert "no: it does not fit" in text


def test_the_page_is_that_of_the_records_that_are_kept():
  docs = epath.Path(__file__).parents[2] / "docs"
  page = (docs / "benchmarks.md").read_text()
  assert page == report.render(docs / "bench")


def test_a_record_of_no_known_kind_is_refused(tmp_path, capsys):
  (tmp_path / "x.json").write_text('{"kind": "bench.y"}')
  with pytest.raises(ValueError, match="x.json is a record of 'bench.y'"):
    report.render(epath.Path(tmp_path))
  assert report.main([f"--records={tmp_path}/none"]) == 1
  assert "there is no directory" in capsys.readouterr().err
