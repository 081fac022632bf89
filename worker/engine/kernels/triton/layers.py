"""What lies between a decoder's matrix products, one Triton kernel each: RMS norm, gated activation, rotary embedding.

All compute in float32 and round once, to their input's format. `engine/fuse_cuda.py` puts them into models.
"""

import torch
import triton
import triton.language as tl

from worker.engine.kernels.triton.overlap import launch_options, start_early

SILU = 0
GELU_TANH = 1

_COLUMNS = 1024  # of a program of the activation kernel
_ROTARY_HEADS = 8  # of a program of the rotary kernel


@triton.jit(do_not_specialize=["num_inner"])
def _rms_norm_kernel(
    output,  # [num_rows, WIDTH]
    x,
    weight,  # [WIDTH]
    outer_stride,  # row r of x is at r // num_inner * outer_stride + r % num_inner * inner_stride
    inner_stride,
    num_inner,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_rows,)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    source = x + row // num_inner * outer_stride + row % num_inner * inner_stride
    values = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
    tl.store(output + row * WIDTH + columns, (values * scale * weights).to(output.dtype.element_ty), mask=mask)


@triton.jit
def multiply_gate(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up. For kernels."""
    # Both are x times a logistic function: SiLU of x itself, GELU's tanh form (arXiv:1606.08415) of twice its argument.
    argument = gate if ACTIVATION == 0 else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-argument)) * up


@triton.jit(do_not_specialize=["width"])
def _gated_kernel(
    output,  # [num_rows, width]
    x,  # [num_rows, 2 * width]: gate, then up
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_rows, tiles of BLOCK columns)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    result = multiply_gate(gate, up, ACTIVATION)
    tl.store(output + row * width + columns, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(x, cos, sin, heads, head_stride, num_heads, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    dims = tl.arange(0, BLOCK_HALF)
    is_dim = dims < HALF
    cos_first = tl.load(cos + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    places = x + (heads * head_stride)[:, None] + dims[None, :]
    mask = (heads < num_heads)[:, None] & is_dim[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, (first * cos_first - second * sin_first).to(x.dtype.element_ty), mask=mask)
    tl.store(places + HALF, (second * cos_second + first * sin_second).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def _rotary_kernel(
    query,  # [num_heads, num_tokens, 2 * HALF]
    key,  # [num_kv_heads, num_tokens, 2 * HALF]
    cos,  # [num_tokens, 2 * HALF]
    sin,
    query_head_stride,
    query_row_stride,
    key_head_stride,
    key_row_stride,
    cos_row_stride,
    sin_row_stride,
    num_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_tokens, tiles of HEADS query heads, then of key heads)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    cos += row * cos_row_stride
    sin += row * sin_row_stride
    num_query_tiles = (num_heads + HEADS - 1) // HEADS
    tile = tl.program_id(1)
    heads = tl.arange(0, HEADS)
    if tile < num_query_tiles:
        heads += tile * HEADS
        _rotate(query + row * query_row_stride, cos, sin, heads, query_head_stride, num_heads, HALF, BLOCK_HALF)
    else:
        heads += (tile - num_query_tiles) * HEADS
        _rotate(key + row * key_row_stride, cos, sin, heads, key_head_stride, num_kv_heads, HALF, BLOCK_HALF)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """Return x / rms(x) * (weight + offset) over the last dimension (arXiv:1910.07467), contiguous.

    `x` is [..., width]; Gemma's weights are stored less one, so that `offset` is 1 there.
    """
    width = x.shape[-1]
    if (
        x.ndim == 4 and x.shape[0] == 1 and x.stride(-1) == 1
    ):  # heads of a merged product: [1, num_tokens, heads, width]
        num_inner, outer_stride, inner_stride = x.shape[2], x.stride(1), x.stride(2)
    else:
        x = x.contiguous()
        num_inner, outer_stride, inner_stride = 1, width, 0
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(x.numel() // width,)](
        output,
        x,
        weight,
        outer_stride,
        inner_stride,
        num_inner,
        eps,
        offset,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
        **launch_options(x.device),
    )
    return output


def gated(x: torch.Tensor, activation: int) -> torch.Tensor:
    """Return activation(gate) * up of `x` [..., 2 * width], gate before up, contiguous."""
    width = x.shape[-1] // 2
    output = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (output.numel() // width, triton.cdiv(width, block))
    _gated_kernel[grid](output, x, width, ACTIVATION=activation, BLOCK=block, **launch_options(x.device))
    return output


def rotate_in_place(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn halves of each head against each other (RoPE, arXiv:2104.09864, as Llama lays it out).

    `query` is [1, num_heads, num_tokens, dim], `key` likewise, any strides but a contiguous last dimension; `cos` and
    `sin` are [1, num_tokens, dim].
    """
    num_heads, num_tokens, dim = query.shape[1:]
    num_kv_heads = key.shape[1]
    half = dim // 2
    num_tiles = triton.cdiv(num_heads, _ROTARY_HEADS) + triton.cdiv(num_kv_heads, _ROTARY_HEADS)
    _rotary_kernel[(num_tokens, num_tiles)](
        query,
        key,
        cos,
        sin,
        query.stride(1),
        query.stride(2),
        key.stride(1),
        key.stride(2),
        cos.stride(1),
        sin.stride(1),
        num_heads,
        num_kv_heads,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        HEADS=_ROTARY_HEADS,
        num_warps=1 if half <= 32 else 2,
        **launch_options(query.device),
    )
