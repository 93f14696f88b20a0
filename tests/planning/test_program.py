"""A program's text against what it says: bytes, loops, what devices exchange."""

from tokgen.planning import program

TEXT = """HloModule jit_f, is_scheduled=true

%updating (p0: bf16[4,128], p1: bf16[1,128], p2: s32[]) -> bf16[4,128] {
  %p0 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%slicing (p0.1: bf16[1024,128], p1.1: s32[]) -> bf16[16,128] {
  %p0.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1.1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %part = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-slice(%p0.1, %p1.1, %zero.1)
  ROOT %less = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice(%part), slice={[0:16], [0:128]}
}

%body (arg: (s32[], bf16[4,128], bf16[1024,128])) -> (s32[], bf16[4,128], bf16[1024,128]) {
  %arg = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %cache = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %weights = bf16[1024,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %near = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%weights, %i), kind=kLoop, calls=%slicing
  %row = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} slice(%near), slice={[0:1], [0:128]}
  %cache.1 = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%cache, %row, %i), kind=kLoop, calls=%updating
  %again = bf16[1024,128]{0,1:T(8,128)(2,1)} copy(%weights)
  %i.1 = s32[]{:T(128)S(6)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) tuple(%i.1, %cache.1, %again)
}

%condition (arg.1: (s32[], bf16[4,128], bf16[1024,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (a: bf16[4,128], w: bf16[1024,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)S(6)} constant(0)
  %t = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) tuple(%start, %a, %w)
  %loop = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) while(%t), condition=%condition, body=%body
  ROOT %r = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501 - as a compiler writes it


def test_a_programs_bytes_are_those_that_leave_the_large_memory():
    made = program.Program(TEXT)
    (loop,) = made.loops(1000)
    # 16 rows of 128 are read of the weights; the cache gets one row, padded to a tile of 8; the
    # copy reads and writes all
    whole = 1024 * 128 * 2
    assert loop.turns == 5 and loop.bytes == 16 * 128 * 2 + 8 * 128 * 2 + 2 * whole
    assert made.bytes() == 5 * loop.bytes
    (move,) = loop.moves
    assert (move.name, move.size, move.bytes, move.times) == ("again", whole // 2, whole, 1)
    assert program.counted(loop.moves) == "1 of 0.3 MB" and program.counted([]) == "none"


def test_arrays_fill_their_tiles():
    found = program.array("bf16", "128,16,66,88", "0,3,1,2:T(8,128)(2,1)")
    assert found.bytes == 128 * 16 * 66 * 88 * 2 and found.far
    found = program.array("f32", "3,5", "1,0:T(8,128)S(1)")
    assert found.bytes == 8 * 128 * 4 and not found.far
    assert program.array("pred", "", "").bytes == 1


UNROLLED = """%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %i.1 = s32[] add(%i, %one)
  %start = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]) collective-permute-start(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,128]{1,0} collective-permute-done(%start)
  %i.2 = s32[] add(%i.1, %one)
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%i.2, %done)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(8)
  ROOT %less = pred[] compare(%i.3, %bound), direction=LT
}

%carried (a.1: bf16[8,128]) -> bf16[32,128] {
  %a.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,128]{1,0} all-gather(%a.1), channel_id=3, replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, dimensions={0}
}

%scattered (b.1: f32[64,128]) -> f32[16,128] {
  %b.1 = f32[64,128]{1,0} parameter(0)
  %sum = f32[64,128]{1,0} all-reduce(%b.1), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %at = s32[] constant(0)
  ROOT %own = f32[16,128]{1,0} dynamic-slice(%sum, %at, %at), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[8,128], b: f32[64,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[64,128]{1,0} parameter(1)
  %first = bf16[32,128]{1,0} fusion(%a), kind=kCustom, calls=%carried
  %again = bf16[32,128]{1,0} fusion(%a), kind=kCustom, calls=%carried
  %part = f32[16,128]{1,0} fusion(%b), kind=kCustom, calls=%scattered
  %all = f32[64,128]{1,0} all-reduce(%b), channel_id=5, replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501 - as a compiler writes it


def test_what_devices_exchange_counts_loops_and_one_of_each_channel():
    """The gather is carried by two fusions and is one; the loop counts by twos to eight."""
    found = {each.kind: each for each in program.Program(UNROLLED).collectives()}
    assert len(found) == len(program.Program(UNROLLED).collectives()) == 4
    assert found["all-gather"].ways == 4 and found["all-gather"].total == 32 * 128 * 2 * 3 / 4
    # of an all-reduce that is cut, each device receives its part of the others'
    assert found["reduce-scatter"].total == 64 * 128 * 4 * 3 / 4
    assert found["all-reduce"].total == 2 * 64 * 128 * 4 / 2
    assert (found["collective-permute"].times, found["collective-permute"].bytes) == (4, 2048)


def test_attributes_that_go_over_lines_end_no_computation():
    """As a kernel's metadata do."""
    line = "fusion(%weights, %i), kind=kLoop, calls=%slicing"
    wide = TEXT.replace(line, line + ', frontend_attributes={kernel_metadata={"a":1\n}}', 1)
    assert wide != TEXT
    (loop,), (same,) = (program.Program(text).loops(1000) for text in (wide, TEXT))
    assert (loop.turns, loop.moves) == (same.turns, same.moves)
