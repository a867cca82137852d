"""What the devices of a program send, by hand and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import sharding
from sana_jax.plan import collectives, theory

MESH = {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
FSDP = "replica_groups=[2,4]<=[8]"
DATA = "replica_groups=[4,2]<=[2,4]T(1,0)"


def program(*lines: str, computations: str = "") -> str:
  body = "\n".join(f"  {line}" for line in lines)
  return f"""\
HloModule jit_step

{computations}
ENTRY %main (a: f32[2]) -> f32[2] {{
{body}
  ROOT %r = f32[2] parameter(0)
}}
"""


@pytest.mark.parametrize(
  ("line", "kind", "axes", "sent"),
  [
    (
      f"%g = bf16[8,16]{{1,0}} all-gather(%a), channel_id=1, {FSDP}",
      *("all-gather", ("fsdp",), 2 * 128 * 3 / 4),
    ),
    (
      "%g = (f32[2,16]{1,0}, f32[8,16]{1,0:T(8,128)S(1)}) "
      f"all-gather-start(%a), channel_id=1, {FSDP}",
      *("all-gather", ("fsdp",), 4 * 128 * 3 / 4),
    ),
    (
      "%g = ((f32[2], s8[2]), (f32[8], s8[8])) all-gather-start(%a, %b), "
      f"{FSDP}",
      *("all-gather", ("fsdp",), (4 + 1) * 8 * 3 / 4),
    ),
    (
      f"%s = f32[2,16]{{1,0}} reduce-scatter(%a), {FSDP}, to_apply=%add",
      *("reduce-scatter", ("fsdp",), 4 * 128 * 3 / 4),
    ),
    (
      "%s = ((f32[8,16]), f32[2,16]) reduce-scatter-start(%a), "
      f"{FSDP}, to_apply=%add",
      *("reduce-scatter", ("fsdp",), 4 * 128 * 3 / 4),
    ),
    (
      f"%r2 = (bf16[10], f32[6]) all-reduce(%a, %b), {DATA}, to_apply=%add",
      *("all-reduce", ("data",), 2 * (20 + 24) / 2),
    ),
    (
      f"%r2 = (bf16[10], f32[6]) all-reduce-start(%a, %b), {DATA}",
      *("all-reduce", ("data",), 2 * (20 + 24) / 2),
    ),
    (
      "%r2 = pred[10] all-reduce(%a), replica_groups={}, to_apply=%or",
      *("all-reduce", ("data", "fsdp"), 2 * 10 * 7 / 8),
    ),
    (
      f"%x = (f32[3], f32[3], f32[3], f32[3]) all-to-all(%a, %b, %c), {FSDP}",
      *("all-to-all", ("fsdp",), 48 * 3 / 4),
    ),
    # Half of the devices send to their neighbour.
    (
      "%p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%a), "
      "source_target_pairs={{0,1},{2,3},{4,5},{6,7}}",
      *("collective-permute", ("fsdp",), 32 * 4 / 8),
    ),
    (
      f"%b = f32[8] collective-broadcast(%a), {DATA}",
      *("collective-broadcast", ("data",), 32),
    ),
  ],
)
def test_bytes_of_every_kind(line, kind, axes, sent):
  (found,) = collectives.collectives(program(line), MESH)
  assert (found.kind, found.axes, found.times) == (kind, axes, 1)
  assert found.bytes == sent


def test_the_end_of_an_exchange_and_one_of_a_single_device_send_nothing():
  text = program(
    "%d = f32[8] all-gather-done(%g)",
    "%r2 = f32[8] all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add",
  )
  assert collectives.collectives(text, MESH) == []


def test_what_is_wrapped_to_run_beside_other_work_counts_once():
  wrapped = f"""\
%wrapped (x: f32[8]) -> f32[2] {{
  %x = f32[8] parameter(0)
  ROOT %s = f32[2] reduce-scatter(%x), {FSDP}, to_apply=%add
}}
"""
  text = program(
    "%b = ((f32[8]), f32[2]) async-start(%a), calls=%wrapped",
    "%e = f32[2] async-done(%b), calls=%wrapped",
    computations=wrapped,
  )
  (found,) = collectives.collectives(text, MESH)
  assert (found.kind, found.bytes) == ("reduce-scatter", 32 * 3 / 4)


def test_a_fusion_that_keeps_a_share_of_a_sum_is_a_reduce_scatter():
  fused = f"""\
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[2,4] {{
  %x = f32[8,4] parameter(0)
  %sum = f32[8,4] all-reduce(%x), channel_id=1, {FSDP}, to_apply=%add
  %start = s32[] constant(2)
  %mine = f32[2,4] dynamic-slice(%sum, %start, %zero), sizes={{2,4}}
  ROOT %b = f32[8] bitcast(%mine)
}}
"""
  call = "%f = f32[8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
  (found,) = collectives.collectives(program(call, computations=fused), MESH)
  assert (found.kind, found.bytes) == ("reduce-scatter", 128 * 3 / 4)


def test_a_fusion_that_keeps_shares_of_several_sums_is_a_reduce_scatter():
  cut = "dynamic-slice(%{0}, %start, %zero), sizes={{2,4}}"
  fused = f"""\
%all-reduce-scatter.1 (x: f32[8,4], y: f32[8,4]) -> (f32[2,4], f32[2,4]) {{
  %x = f32[8,4] parameter(0)
  %y = f32[8,4] parameter(1)
  %sums = (f32[8,4], f32[8,4]) all-reduce(%x, %y), {FSDP}, to_apply=%add
  %sum0 = f32[8,4] get-tuple-element(%sums), index=0
  %sum1 = f32[8,4] get-tuple-element(%sums), index=1
  %start = s32[] constant(2)
  %mine = f32[2,4] {cut.format("sum0")}
  %other = f32[2,4] {cut.format("sum1")}
  ROOT %t = (f32[2,4], f32[2,4]) tuple(%mine, %other)
}}
"""
  call = "%f = (f32[2,4], f32[2,4]) fusion(%a), calls=%all-reduce-scatter.1"
  (found,) = collectives.collectives(program(call, computations=fused), MESH)
  assert (found.kind, found.bytes) == ("reduce-scatter", 2 * 128 * 3 / 4)
  kept_whole = fused.replace("%mine, %other", "%mine, %sum1")
  (found,) = collectives.collectives(
    program(call, computations=kept_whole), MESH
  )
  assert (found.kind, found.bytes) == ("all-reduce", 2 * 2 * 128 * 3 / 4)


def test_pieces_of_one_gathering_beside_other_work_count_once():
  piece = (
    "%g{0} = f32[8] all-gather(%a{0}), channel_id=7, " + FSDP + ", "
    'frontend_attributes={{chain_id="{1}"}}'
  )
  text = program(*(piece.format(n, n // 3) for n in range(6)))
  assert [one.bytes for one in collectives.collectives(text, MESH)] == [24, 24]


def test_totals_are_by_axes_and_kind():
  gather = f"all-gather(%a), {FSDP}"
  text = program(
    f"%g = f32[8] {gather}",
    f"%h = f32[16] {gather}",
    f"%r2 = f32[4] all-reduce(%a), {DATA}",
  )
  assert collectives.totals(collectives.collectives(text, MESH)) == {
    (("fsdp",), "all-gather"): 24 + 48,
    (("data",), "all-reduce"): 16,
  }


def compiled_stack(mesh_axes, depth=2, width=8):
  """A step of matrices under a scan, sharded over all devices but copies."""
  mesh = sharding.make_mesh(mesh_axes, jax.devices()[:8])

  def place(*spec):
    return NamedSharding(mesh, PartitionSpec(*spec))

  def loss(w, x):
    def layer(x, w):
      x = jax.lax.with_sharding_constraint(x, place(("data", "fsdp")))
      return jnp.tanh(x @ w), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

  weights = place(None, "fsdp")
  w = jax.ShapeDtypeStruct((depth, width, width), np.float32, sharding=weights)
  x = jax.ShapeDtypeStruct(
    (16, width), np.float32, sharding=place(("data", "fsdp"))
  )
  step = jax.jit(jax.grad(loss), out_shardings=weights)
  return step.lower(w, x).compile().as_text(), w, mesh


def test_a_compiled_stack_gathers_each_layer_forward_and_backward():
  depth, width = 2, 8
  text, w, mesh = compiled_stack({"fsdp": 8}, depth, width)
  sums = collectives.totals(collectives.collectives(text, mesh.shape))
  least = theory.least_bytes(w, mesh.shape, np.float32)
  one_pass = depth * width * width * 4 * 7 / 8
  key = (("fsdp",), "all-gather")
  assert sums[key] == least[key] == 2 * one_pass
  # XLA:CPU has no reduce-scatter: it sums, which sends twice as much.
  assert least[("fsdp",), "reduce-scatter"] == one_pass
  assert sums[("fsdp",), "all-reduce"] == pytest.approx(2 * one_pass, rel=0.05)


def test_copies_of_a_sharded_stack_sum_their_shards():
  text, w, mesh = compiled_stack({"data": 2, "fsdp": 4})
  least = theory.least_bytes(w, mesh.shape, np.float32)
  shard = 2 * 8 * 8 * 4 / 4
  assert least[("data",), "all-reduce"] == 2 * shard / 2
  found = collectives.collectives(text, mesh.shape)
  assert {axis for one in found for axis in one.axes} == {"data", "fsdp"}


def test_gathering_what_is_no_parameter_is_told():
  _, w, mesh = compiled_stack({"data": 2, "fsdp": 4})
  text = program(
    f"%g = f32[1,8,8] all-gather(%a), {FSDP}",
    f"%s = f32[16,127] all-gather(%a), {FSDP}",
    f"%h = f32[16,128] all-gather(%a), {FSDP}, "
    'metadata={op_name="jit(f)/dot"}',
  )
  found = collectives.collectives(text, mesh.shape)
  told = theory.gathered_activations(found, w, mesh.shape, image_elements=2048)
  assert [one.op_name for one in told] == ["jit(f)/dot"]


def test_parts_of_a_parameter_between_two_steps_are_no_activations():
  _, w, mesh = compiled_stack({"data": 1, "fsdp": 8})
  text = program(
    f"%half = f32[8,4] all-gather(%a), {FSDP}",
    f"%more = f32[8,5] all-gather(%a), {FSDP}",
  )
  found = collectives.collectives(text, mesh.shape)
  told = theory.gathered_activations(found, w, mesh.shape, image_elements=16)
  assert [one.arrays[0].elements for one in told] == [40]
