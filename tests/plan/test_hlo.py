"""How often the instructions of a program run."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax.plan import hlo

# As XLA:TPU writes a loop: its turns are in the condition only, and the start
# is not at zero. The outer loop runs twice, the inner one 7 - 3 times.
LOOPS = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={()->f32[8]{0}}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  ROOT %t = (s32[], f32[8]{0}) tuple(/*index=0*/%i, %wanted.1)
  %wanted.1 = f32[8]{0} sine(f32[8]{0} %x), metadata={op_name="a/b (c)"}
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %three = s32[] constant(3)
  %start = (s32[], f32[8]{0}) tuple(%three, %q)
  %w = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, \
body=%inner_body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}

%outer_condition (q: f32[8]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first = f32[8]{0} sine(%a)
  ROOT %o = f32[8]{0} while(%first), condition=%outer_condition, \
body=%outer_body, backend_config={"known_trip_count":{"n":"2"},"x":{"y":1}}
}
"""


def is_sine(instruction):
  return instruction.opcode == "sine"


def counts(text):
  return {
    one.instruction.name: one.times
    for one in hlo.executions(hlo.parse(text), is_sine)
  }


def test_what_nested_loops_hold_runs_as_often_as_both_turn():
  assert counts(LOOPS) == {"first": 1, "wanted.1": 2 * (7 - 3)}


def test_operands_and_attributes_are_told_apart():
  found = hlo.parse(LOOPS).computations["inner_body"]
  assert found["wanted.1"].operands == ("x",)
  assert found["wanted.1"].attributes.endswith('metadata={op_name="a/b (c)"}')
  assert found["t"].operands == ("i", "wanted.1")
  assert found["t"].shape == "(s32[], f32[8]{0})"
  assert found["p"].shape == "(s32[]{:T(128)}, f32[8]{0:T(128)})"


def test_all_branches_and_calls_count():
  text = """\
%yes (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %s1 = f32[] sine(%x)
}

%no (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %s2 = f32[] sine(%x)
}

ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %c = f32[] conditional(%p, %a, %a), branch_computations={%yes, %no}
  ROOT %f = f32[] fusion(%c), kind=kLoop, calls=%yes
}
"""
  found = [
    one.instruction.name for one in hlo.executions(hlo.parse(text), is_sine)
  ]
  assert sorted(found) == ["s1", "s1", "s2"]


def test_a_loop_whose_turns_cannot_be_told_is_an_error():
  unknown = LOOPS.replace("direction=LT", "direction=NE")
  with pytest.raises(ValueError, match="turns of loop w cannot be told"):
    counts(unknown)


def test_a_loop_with_nothing_wanted_need_not_be_understood():
  unknown = LOOPS.replace("direction=LT", "direction=NE")
  found = hlo.executions(hlo.parse(unknown), lambda one: one.name == "first")
  assert [one.times for one in found] == [1]


def test_a_text_that_is_no_program_is_an_error():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.parse("module @jit_f { }")


def test_a_compiled_scan_turns_as_often_as_it_says():
  def f(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=13)[0]

  text = jax.jit(f).lower(jnp.ones(4)).compile().as_text()
  assert list(counts(text).values()) == [13]
