"""The reader of bundles on lines written by hand, and the arithmetic of the estimate on the tree that comes of them."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kernels import Mask
from kernels.attention.tpu import tuning
from kernels.static_estimate import (
    CHIPS,
    CompileError,
    Geometry,
    Kernel,
    chip_process,
    compile_program,
    compiler,
    estimate,
)
from kernels.static_estimate.attention import attention_geometry
from kernels.static_estimate.bundles import Part, parse
from kernels.static_estimate.estimate import grid_step

# A grid loop (0x2 to 0x1b): a branch around all the work, in it what starts a row, two bodies, what ends a row.
FILE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.vmem [shape: bf16[8,8]] /* window 0
{"block": 1} */  ;;  %s2 = smov 0 }
   0x1   :  { %4 = sst [smem:[#allocation2_spill]] %s1 } /* Start region 1 */
   0x2 LB: > { %s5 = sadd.s32 1, %s2  ;;  %6 = vst [vmem:[#allocation9_spill] sm:$0xff] %v1_v0 } /* Start region 9 */
   0x3   : > { %132 = sbr.rel (%p3) target = $region8 }
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > { %8 = dma.hbm_to_vmem [thread:$0] %s7 }
   0x8   : > { %9 = sbr.rel (%p4) target = $region4 } /* Start region 3 */
   0x9   : > {}
   0xa   : > {}
   0xb   : > {}
   0xc   : > {}
   0xd   : > { %10 = vst [vmem:[#allocation3] sm:$0xff] %v0_v0 } /* a row starts: "vmatmul.bf16" in a comment */
   0xe PF: > { %11 = sbr.rel (%p5) target = $region5 } /* Start/End empty region 4 :: Start region 44 */
   0xf   : > {}
  0x10   : > {}
  0x11   : > {}
  0x12   : > {}
  0x13   : > { %v3_v1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v2  ;;  %v4_v1 = vmatmul.mubr.f32.gmra.mrb[0].mxu1 %v2 }
  0x14   : > { %v5_v0 = vpow2.f32 %v3_v1  ;;  %v6_v0 = vadd.xlane.f32.xlu0 %v3_v1 }
  0x15 PF: > { %12 = sbr.rel (%p6) target = $region8 } /* Start/End empty region 5 */
  0x16   : > {}
  0x17   : > {}
  0x18   : > {}
  0x19   : > {}
  0x1a   : > { %v7_v1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v2  ;;  %v8_v0 = vld [vmem:[#allocation9_spill] sm:$0xff] }
  0x1b PF: > { %14 = sbr.rel (!%p7) target = $region9 } /* Start/End empty region 8 :: End region 3 */
  0x1c   :  {}
  0x1d   :  {}
  0x1e   :  {}
  0x1f   :  {}
  0x20   :  { %2600 = vsyncpa [#allocation6], 1 } /* End region 1 :: exit bundle: %toy */
"""


def kernel(grid=(2, 3)) -> Kernel:
    return Kernel("toy", grid, parse(FILE.splitlines(keepends=True)))


def test_bundles_become_a_tree_of_loops_and_branches():
    tree = kernel().bundles
    (loop,) = tree.parts
    (guard,) = loop.parts
    assert (tree.kind, loop.kind, guard.kind) == ("kernel", "loop", "branch")
    assert [(part.start, part.stop) for part in (tree, loop, guard)] == [(0, 33), (2, 32), (8, 27)]
    assert [(part.start, part.stop) for part in guard.parts] == [(13, 14), (19, 21), (26, 27)]
    assert (tree.bundles, loop.bundles, guard.bundles) == (3, 11, 15)
    assert tree.all_bundles == 33


def test_instructions_are_counted_where_they_stand_and_comments_are_not():
    loop = kernel().bundles.parts[0]
    first, masked, full = loop.parts[0].parts
    assert first.matmuls == {}
    assert masked.matmuls == {"bf16": 1, "f32": 1}
    assert masked.operations == {"vmatmul": 2, "eup": 1, "xlu": 1}
    assert full.operations == {"vmatmul": 1, "fill": 1}
    assert loop.operations == {"spill": 1, "dma": 1}  # a vector's; the scalar's, before the loop, is none
    assert kernel().bundles.operations == {}
    assert loop.parts[0].operations == {}
    assert loop.all_matmuls == {"bf16": 2, "f32": 1}


def test_a_step_is_what_always_runs_bodies_and_rows():
    step = grid_step(kernel().bundles)
    assert (step.pipeline, step.always.bundles, step.always.parts) == (11, 15, [])
    assert [body.start for body in step.bodies] == [19, 26]
    assert [row.start for row in step.rows] == [13]


def test_the_sum_by_hand():
    # v5e: 4 units, 16 cycles for a bf16 product and 8 for a float32 one. The body with both needs 6 cycles in 2
    # bundles, the other 4 in 1.
    found = estimate(kernel(), Geometry(bodies=(1, 5), rows=(2,)), "v5e")
    cycles = 6 * 26 + 1 * 6 + 5 * 4 + 2 * 1
    assert found.cycle_milliseconds == pytest.approx(cycles / 1.5e6)
    assert found.floor_milliseconds == pytest.approx((5 * 4 + 1 * 6) / 1.5e6)
    assert found.milliseconds == found.cycle_milliseconds
    assert found.spills == 1


def test_steps_may_be_given_and_bytes_bound_from_below():
    found = estimate(kernel((2, None)), Geometry(bodies=(0, 0), steps=10, hbm_bytes=820_000_000), "v5e")
    assert found.cycle_milliseconds == pytest.approx(260 / 1.5e6)
    assert found.milliseconds == found.memory_milliseconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("grid", "geometry", "message"),
    [
        ((2, None), Geometry(bodies=(5, 1)), "must give its steps"),
        (None, Geometry(bodies=(5, 1)), "must give its steps"),
        ((2, 3), Geometry(bodies=(6,)), r"has 2 parts that multiply \(2, 1 bundles\), the geometry gives 1 numbers"),
        (
            (2, 3),
            Geometry(bodies=(5, 1), rows=()),
            r"has 1 other conditional parts \(1 bundles\), the geometry gives 0",
        ),
        ((2, 3), Geometry(bodies=(5, 1), trips=(3,)), "has 0 loops inside a step"),
    ],
)
def test_a_geometry_of_another_kernel_is_an_error(grid, geometry, message):
    with pytest.raises(ValueError, match=message):
        estimate(kernel(grid), geometry, "v5e")


def test_what_was_written_as_two_bodies_and_became_one_runs_for_both():
    both = kernel()
    both.bundles.parts[0].parts[0].parts.pop()  # the second body
    one = estimate(both, Geometry(bodies=(1, 5), rows=(2,)), "v5e")
    assert one == estimate(both, Geometry(bodies=(6,), rows=(2,)), "v5e")
    assert one.floor_milliseconds == pytest.approx(6 * 6 / 1.5e6)


def test_the_last_number_of_rows_stands_for_all_that_follow():
    def estimated(*rows):
        two = kernel()
        two.bundles.parts[0].parts[0].parts.append(Part("branch", 26, 27, bundles=10))
        return estimate(two, Geometry(bodies=(1, 5), rows=rows), "v5e").cycle_milliseconds

    assert estimated(2) == estimated(2, 2)
    assert estimated(2, 3) - estimated(2) == pytest.approx(10 / 1.5e6)
    with pytest.raises(ValueError, match="2 other conditional parts .* gives 3 numbers"):
        estimated(1, 2, 3)


def test_branches_beside_the_work_fetch_and_run_at_every_step():
    fetching, (loop,) = kernel(), kernel().bundles.parts
    loop.parts.insert(0, Part("branch", 3, 7, bundles=4, parts=[Part("branch", 5, 6, bundles=2)]))
    fetching.bundles.parts[:] = [loop]
    step = grid_step(fetching.bundles)
    assert (step.pipeline, len(step.bodies), len(step.rows)) == (11 + 4 + 2, 2, 1)


INNER = """\
   0x0 LB: > { %s5 = smov 0 } /* Start region 1 */
   0x1 LB: >> { %v3_v1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v2_v2 } /* Start region 2 */
   0x2   : >> { %9 = sbr.rel (%p4) target = $region2 }
   0x3   : >> {}
   0x4   : >> {}
   0x5   : >> {}
   0x6   : >> {}
   0x7   : > { %14 = sbr.rel (!%p7) target = $region1 }
   0x8   : {}
   0x9   : {}
   0xa   : {}
   0xb   : {} /* exit bundle: %inner */
"""


def test_a_loop_inside_a_step_runs_as_often_as_the_geometry_says():
    inner = Kernel("inner", (4,), parse(INNER.splitlines(keepends=True)))
    found = estimate(inner, Geometry(trips=(2.5,)), "v6e")
    assert found.cycle_milliseconds == pytest.approx(4 * (6 + 2.5 * 6) / 1.75e6)
    assert found.floor_milliseconds == pytest.approx(4 * 2.5 * 4 / 1.75e6)
    assert estimate(inner, Geometry(bodies=(4, 0), trips=(2.5,)), "v6e") == found
    with pytest.raises(ValueError, match="has 0 parts that multiply"):
        estimate(inner, Geometry(bodies=(3, 0), trips=(2.5,)), "v6e")
    with pytest.raises(ValueError, match="has 1 loops inside a step"):
        estimate(inner, Geometry(), "v6e")


def test_branches_inside_a_loop_run_as_often_as_their_shares_say():
    branches = [Part("branch", at, at + 1, bundles=size, matmuls=Counter(bf16=5)) for at, size in ((3, 10), (5, 30))]
    beside = Part("branch", 7, 8, bundles=7)  # multiplies nothing: counts as taken
    inner = Part("loop", 2, 9, bundles=5, parts=[*branches, beside])
    toy = Kernel("toy", (4,), Part("kernel", 0, 20, parts=[Part("loop", 1, 10, bundles=6, parts=[inner])]))
    found = estimate(toy, Geometry(trips=(2.5,), shares=(0.75, 0.25)), "v5e")
    floor = 5 * 16 / 4  # more than the first one's bundles
    assert found.cycle_milliseconds == pytest.approx(4 * (6 + 2.5 * (5 + 7 + 0.75 * floor + 0.25 * 30)) / 1.5e6)
    assert found.floor_milliseconds == pytest.approx(4 * 2.5 * floor / 1.5e6)
    taken = estimate(toy, Geometry(trips=(2.5,)), "v5e")
    assert taken.cycle_milliseconds == pytest.approx(4 * (6 + 2.5 * (5 + 7 + floor + 30)) / 1.5e6)
    with pytest.raises(ValueError, match="has 2 conditional parts that multiply inside others .* gives 3 numbers"):
        estimate(toy, Geometry(trips=(2.5,), shares=(0.5, 0.25, 0.25)), "v5e")
    inner.parts = [Part("branch", 3, 7, bundles=0, parts=branches), beside]  # the compiler asks first
    assert estimate(toy, Geometry(trips=(2.5,), shares=(0.75, 0.25)), "v5e") == found


EXIT = """\
   0x0   :  { %16 = sbr.rel (%p198_p0) target = $region4 }
   0x1   :  {}
   0x2   :  {}
   0x3   :  {}
   0x4   :  {}
   0x5   :  { %151 = sfence } /* Start region 3 */
   0x6 PF:  {} /* exit bundle: %metadata */
"""


def test_what_is_no_such_file_is_an_error():
    with pytest.raises(ValueError, match="found no bundle"):
        parse(["Schedule analysis:\n"])
    with pytest.raises(ValueError, match="the last of 7 bundles is not the kernel's exit"):
        parse(FILE.splitlines(keepends=True)[:12])


def test_a_branch_that_no_comment_answers_goes_to_the_exit():
    (branch,) = parse(EXIT.splitlines(keepends=True)).parts
    assert (branch.kind, branch.start, branch.stop) == ("branch", 5, 6)


def test_peaks_are_the_published_ones():
    """2 · 16 rows · side² per vmatmul on every unit; one TensorCore of v5p and tpu7x, which have two."""
    side = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}
    peak = {"v5e": 197e12, "v5p": 459e12 / 2, "v6e": 918e12, "tpu7x": 2307e12 / 2}
    for name, chip in CHIPS.items():
        flops = 2 * 16 * side[name] ** 2 * chip.matrix_units / chip.matmul_cycles * chip.clock
        assert flops == pytest.approx(peak[name], rel=0.02), name


def test_a_compiled_kernel_finds_its_call_by_name(tmp_path, monkeypatch):
    def call(name, *grid):
        block = SimpleNamespace(block_shape=(pl.Squeezed(), pl.Element(8), 16))
        return {"name": name, "grid_mapping": SimpleNamespace(grid=grid, block_mappings=[block])}

    monkeypatch.setattr(compiler, "_dump", SimpleNamespace(name=str(tmp_path)))
    for name in ("jvp_toy_outer_.2", "toy.1", "ragged-dot-none"):
        (tmp_path / f"17-{name}-03-final_bundles.txt").write_text(FILE)
        (tmp_path / f"17-{name}-02-schedule-analysis_final_bundles.txt").write_text("")
    calls = [call("toy", 2, 3), call("toy_outer", 5, object())]
    outer = compiler._kernel("jvp_toy_outer_.2", ', metadata={op_name="x"}', calls)
    assert (outer.name, outer.grid, outer.blocks) == ("toy_outer", (5, None), ((1, 8, 16),))
    assert compiler._kernel("toy.1", "", calls).grid == (2, 3)
    hlo = ', frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,2048,640"}, metadata={}'
    ragged = compiler._kernel("ragged-dot-none", hlo, calls)
    assert (ragged.name, ragged.grid, ragged.attributes["ragged_dot_tiling"]) == (
        "ragged-dot-none",
        None,
        "128,2048,640",
    )
    with pytest.raises(CompileError, match="wrote 0 files of final bundles for the kernel other.1"):
        compiler._kernel("other.1", "", calls)
    unnamed = compiler._kernel("toy.1", "", [call(None, 7), call("other", 2)])
    assert (unnamed.name, unnamed.grid) == ("toy.1", (7,))


def test_calls_whose_results_nobody_reads_are_no_kernels_of_the_program():
    def copied(x, name):
        def body(a, out):
            out[...] = a[...]

        return pl.pallas_call(body, out_shape=x, name=name)(x)

    def program(x):
        copied(x, "dead")
        return copied(jax.jit(lambda y: copied(y, "inner"))(x), "outer")

    jaxpr = jax.make_jaxpr(program)(jnp.ones((8, 128))).jaxpr
    assert [call["name"] for call in compiler._pallas_calls(jaxpr)] == ["inner", "outer"]


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(causal=True, window=300)], ids=["full", "causal", "window"]
)
def test_a_backward_in_pieces_of_keys_has_the_bodies_of_one_and_more_rows(monkeypatch, mask):
    q, k = (jax.ShapeDtypeStruct((2, 1280, heads, 64), jnp.bfloat16) for heads in (4, 2))
    # 1 heads H queries, 1 heads keys H
    kernel = Kernel("attention_backward", None, None, ((1, 1, 64, 256), (1, 1, 256, 64)))
    whole = attention_geometry(kernel, q, k, k, mask)
    monkeypatch.setattr(tuning, "GRADIENT_BYTES", 8 * 128 * 2 * 256)
    split = attention_geometry(kernel, q, k, k, mask)
    assert split.bodies == whole.bodies and all(whole.bodies)
    assert whole.rows[0] == 2 * 2 and split.rows[0] == 3 * 2 * 2
    # Of a piece that a query block sees nothing of, it still visits one block.
    assert whole.rows[1] == 4 * 2 * 5 and split.rows[1] == 3 * whole.rows[1]
    assert split.steps >= max(sum(whole.bodies), split.rows[1])


def test_an_unknown_chip_and_a_process_that_is_no_chip_s():
    with pytest.raises(ValueError, match="found chip 'v3', expected one of v5e"):
        chip_process("v3")
    with pytest.raises(RuntimeError, match="submit it there"):
        compile_program(lambda: 0, ())
