"""The kernels of `triton_step`; that module documents the table, the blocks and the settings."""

# Triton reads a kernel's annotations, so only annotations that it knows are allowed.

import triton
import triton.language as tl


@triton.jit
def _elements(row, start, BLOCK: tl.constexpr):
    """(places in the flat state, positions in the parameter, which of them exist) of a block."""
    places = start + tl.arange(0, BLOCK)
    exists = places < tl.load(row + 6)
    index = tl.load(row + 4)
    masked = (index + tl.zeros([BLOCK], dtype=tl.int64)) != 0  # 0: every element is active
    positions = tl.load(index.to(tl.pointer_type(tl.int32)) + places, mask=exists & masked, other=0)
    return places, tl.where(masked, positions, places), exists


@triton.jit
def squares(table, blocks, sums, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """sums[block] = sum of the squares of the block's gradients."""
    block = tl.program_id(0)
    row = table + tl.load(blocks + 2 * block) * 8
    _, positions, exists = _elements(row, tl.load(blocks + 2 * block + 1), BLOCK)
    gradients = tl.load(row + 1).to(tl.pointer_type(GRAD))
    gradient = tl.load(gradients + positions, mask=exists, other=0.0).to(tl.float32)
    tl.store(sums + block, tl.sum(gradient * gradient, axis=0))


@triton.jit
def factor(sums, count, norm, max_norm, BLOCK: tl.constexpr):
    """norm[0] = root of the sums' total; norm[1] = min(1, max_norm / (norm + 1e-6)), and NaN where the norm is."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(sums + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float64)
    root = tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)
    scale = max_norm / (root + 1e-6)
    tl.store(norm, root)
    tl.store(norm + 1, tl.where(scale > 1.0, 1.0, scale))


@triton.jit
def adamw(
    table,
    blocks,
    settings,
    norm,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CLIP: tl.constexpr,
    ONLY_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step a block of one parameter's active elements; below float32 through its master values.

    ONLY_FINITE: if the norm is not finite, nothing changes.
    """
    block = tl.program_id(0)
    row = table + tl.load(blocks + 2 * block) * 8
    places, positions, exists = _elements(row, tl.load(blocks + 2 * block + 1), BLOCK)
    if ONLY_FINITE:
        size = tl.abs(tl.zeros([BLOCK], dtype=tl.float32) + tl.load(norm))
        exists = exists & (size <= 3.4028235e38)  # the largest float32; false for NaN
    group = settings + tl.load(row + 7) * 8
    decay, beta1, toward1 = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    beta2, toward2 = tl.load(group + 3), tl.load(group + 4)
    step_size, correction2 = tl.load(group + 5).to(tl.float32), tl.load(group + 6).to(tl.float32)
    eps = tl.load(group + 7)

    gradients = tl.load(row + 1).to(tl.pointer_type(GRAD)) + positions
    values = tl.load(row).to(tl.pointer_type(PARAM)) + positions
    exp_avgs = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + places
    exp_avg_sqs = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + places
    gradient = tl.load(gradients, mask=exists, other=0.0).to(tl.float32)
    if CLIP:
        gradient = gradient * tl.load(norm + 1)
    if tl.float32 == PARAM:
        value = tl.load(values, mask=exists, other=0.0)
    else:
        masters = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + places
        value = tl.load(masters, mask=exists, other=0.0)
    exp_avg = tl.load(exp_avgs, mask=exists, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=exists, other=0.0)

    wide = gradient.to(tl.float64)
    value = tl.where(decay == 0.0, value, (value.to(tl.float64) - decay * value.to(tl.float64)).to(tl.float32))
    exp_avg = (beta1 * exp_avg.to(tl.float64) + toward1 * wide).to(tl.float32)
    exp_avg_sq = (beta2 * exp_avg_sq.to(tl.float64) + toward2 * wide * wide).to(tl.float32)
    root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.zeros_like(exp_avg_sq) + correction2)
    divisor = (root.to(tl.float64) + eps).to(tl.float32)
    value = value - tl.div_rn(step_size * exp_avg, divisor)

    tl.store(exp_avgs, exp_avg, mask=exists)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=exists)
    if tl.float32 != PARAM:
        tl.store(masters, value, mask=exists)
    tl.store(values, value.to(PARAM), mask=exists)
