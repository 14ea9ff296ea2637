"""From scores to weights in the Hopper forward: masks, ALiBi, softcap, the softmax step and its
end; see ``sm90_forward``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .sm90_forward_work import (
    LN2,
    LOG2E,
    ROWS,
    SHAPES,
    first_key_of,
    head_of,
    here,
    key_end,
    row_of,
)

# Weights grow to 2 to this power before their row's reference moves.
MOST_GROWTH = gl.constexpr(8.0)


@gluon.constexpr_function
def part_layouts(parts):
    """Of the numbers of columns a and c, of threads t, and of rows, in ``apart``'s layout."""
    s = gl.SliceLayout
    return (s(0, s(2, s(3, parts))), s(0, s(1, s(2, parts))), s(0, s(1, s(3, parts))),
            s(1, s(2, s(3, parts))))  # fmt: skip


@gluon.jit
def apart(work, s, first_key):
    """(scores, their columns, the number of the first key that a thread has less first_key's).

    The registers of a thread hold columns 8a + 2t + c with t the thread's place among four. Taken
    apart like that, what depends on a column is a constant for each register and one or two numbers
    for each row, so no register holds column numbers.
    """
    BLOCK_N: gl.constexpr = work.config.BLOCK_N
    parts = s.reshape([ROWS, BLOCK_N // 8, 4, 2])
    LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
    column = gl.arange(0, BLOCK_N // 8, layout=LAYOUTS[0])[None, :, None, None] * 8
    column = column + gl.arange(0, 2, layout=LAYOUTS[1])[None, None, None, :]
    origin = gl.arange(0, 4, layout=LAYOUTS[2])[None, None, :, None] * 2 + here(first_key)
    return parts, column, origin


@gluon.jit
def together(work, parts, s):
    """Scores that ``apart`` took apart, as ``s`` were."""
    SCORES: gl.constexpr = s.type.layout
    return gl.convert_layout(parts.reshape([ROWS, work.config.BLOCK_N]), SCORES,
                             assert_trivial=True)  # fmt: skip


@gluon.jit
def part_rows(work, first_row, parts):
    """The rows of scores taken apart."""
    LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
    return row_of(work, first_row, gl.arange(0, ROWS, layout=LAYOUTS[3]))[:, None, None, None]


@gluon.jit
def mask_scores(work, span, s, first_row, first_key):
    """-inf where a row does not see a key."""
    parts, column, origin = apart(work, s, first_key)
    row = part_rows(work, first_row, parts)
    seen = column < key_end(work, span, row) - origin
    if work.config.HAS_LEFT:
        seen = seen & (column >= first_key_of(work, span, row) - origin)
    return together(work, gl.where(seen, parts, float("-inf")), s)


@gluon.jit
def biased(work, span, s, first_row, first_key, slope):
    """``s`` less ``slope`` times the distance between a row's position and a key, with HAS_ALIBI.

    Distances are exact in float32 up to 2^24.
    """
    if work.config.HAS_ALIBI:
        parts, column, origin = apart(work, s, first_key)
        LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
        position = part_rows(work, first_row, parts) + (span.rows_k - span.rows_q)
        distance = gl.abs((position - origin).to(gl.float32) - column.to(gl.float32))
        slope = gl.convert_layout(slope, LAYOUTS[3], assert_trivial=True)
        parts = parts - slope[:, None, None, None] * distance
        s = together(work, parts, s)
    return s


@gluon.jit
def slopes_of(work, span, ROW_LAYOUT: gl.constexpr):
    """The consumer's rows' slopes in units of the unscaled scores, with HAS_ALIBI."""
    i = gl.arange(0, ROWS, ROW_LAYOUT)
    slope = gl.full([ROWS], 0.0, gl.float32, ROW_LAYOUT)
    if work.config.HAS_ALIBI:
        head = head_of(work, span, i) + i * 0
        at = work.slopes + span.sequence.to(gl.int64) * work.step_slope
        slope = gl.load(at + head) * (LOG2E / work.scale_log2)
    return slope


@gluon.jit
def mask_if_needed(work, span, s, first_row, first_key):
    """Scores of consumer rows from ``first_row`` on with keys from ``first_key`` on, masked unless
    every row sees every key."""
    outside = first_key + work.config.BLOCK_N > key_end(work, span, first_row)
    if work.config.HAS_LEFT:
        outside = outside | (
            first_key < first_key_of(work, span, first_row + work.config.POSITIONS - 1)
        )
    if outside:
        s = mask_scores(work, span, s, first_row, first_key)
    return s


@gluon.jit
def capped(work, s):
    """tanh(s * cap_scale): scores in units of the cap, with HAS_SOFTCAP."""
    if work.config.HAS_SOFTCAP:
        s = 1.0 - 2.0 / (1.0 + gl.exp2(s * (2.0 * LOG2E * work.cap_scale)))
    return s


# Whether a row of the warp moved is a bit that the language has no value for: one a warp, which a
# branch can read without a vote of its own. It lives in a predicate register that is declared once.
@gluon.constexpr_function
def declare_flag(lane):
    return f".reg .pred moved_{lane}; mov.b32 $0, 0;"


@gluon.constexpr_function
def read_flag(lane):
    return f"selp.b32 $0, 1, 0, moved_{lane};"


@gluon.constexpr_function
def settle_text(lane):
    return f"""{{
        .reg .pred a, b;
        setp.gt.f32 a, $4, $6;
        setp.gt.f32 b, $5, $7;
        selp.f32 $0, $4, $2, a;
        selp.f32 $1, $5, $3, b;
        or.pred a, a, b;
        vote.sync.any.pred moved_{lane}, a, 0xffffffff;
    }}"""


@gluon.jit
def settle_maximum(m, m_new, limit, LANE: gl.constexpr):
    """``m_new`` where it is above ``limit``, else ``m``; notes whether a row of the warp moved.

    A thread holds two rows, and both are settled at once.
    """
    return gl.inline_asm_elementwise(
        settle_text(LANE), "=f,=f,f,f,f,f,f,f", [m, m_new, limit], dtype=gl.float32,
        is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def warp_has_moved(LANE: gl.constexpr):
    """What the last settle_maximum of this consumer noted; may differ between warps."""
    moved = gl.inline_asm_elementwise(read_flag(LANE), "=r", [], dtype=gl.int32, is_pure=False,
                                      pack=1)  # fmt: skip
    return moved != 0


@gluon.jit
def weights_of(work, s, maximum, MAYBE_EMPTY: gl.constexpr):
    """(exp2 of the scaled scores less the scaled row maximum, that maximum)."""
    shift = maximum
    if MAYBE_EMPTY:  # a row that has seen no key yet: every weight is 0, not NaN
        shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    shift = shift * work.scale_log2
    return gl.exp2(s * work.scale_log2 - gl.expand_dims(shift, 1)), shift


@gluon.jit
def growth_of(work, m, shift, sums):
    """(ROWS, 1): what ``sums`` with reference ``m`` are multiplied by for that of ``shift``."""
    factor = gl.exp2(m * work.scale_log2 - shift)
    return gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout)), 1)


@gluon.jit
def partial_sums(p, BLOCK_N: gl.constexpr):
    """(ROWS, 4): the sums of what each of the four threads that share a row holds."""
    return gl.sum(gl.sum(p.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def finish_rows(work, span, row, head, m, total, sinks):
    """(whether a row sees a key, what its weights are divided by, its log-sum-exp).

    ``head`` is its query head, one for all or one for each row.
    """
    sees = total > 0.0
    if work.config.LENGTHS != SHAPES:
        sees = sees & (row < span.rows_q)
    exponent = m * work.scale_log2
    divisor = total
    empty = work.empty_lse
    if work.config.HAS_SINKS:
        sink = gl.load(sinks + head).to(gl.float32)
        # Of a sink above all scores the weights may vanish, never the sum overflow.
        top = gl.maximum(exponent, sink * LOG2E)
        down = gl.where(sees, gl.exp2(exponent - top), 1.0)
        total = total * down + gl.exp2(sink * LOG2E - top)
        divisor = total / down
        exponent = top
        empty = sink
    lse = gl.where(sees, (exponent + gl.log2(total)) * LN2, empty)
    return sees, divisor, lse
