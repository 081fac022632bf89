"""Paged attention in Triton: four kernels, launched by `engine/attention/triton_paged.py`.

    tile_kernel     which tiles the long sequences of a step are made of, once for all layers
    store_kernel    keys and values of a step go to their slots
    attend_kernel   one tile of rows attends over one share of its sequence's context
    merge_kernel    the shares of a row become its output

A tile's rows are the queries of one sequence times the query heads that share a kv head, so that keys are read once for
all of them. A long context is cut into a fixed number of shares that different programs compute (split-K, Flash-
Decoding), and how long each is, is read on the device: a captured launch serves any lengths. Softmax is computed online
(FlashAttention-2, arXiv:2307.08691) in float32 and base 2.

    keys    [num_blocks, num_kv_heads, PAGE, key_dim]      one head of a block is one piece of memory
    values  [num_blocks, num_kv_heads, PAGE, value_dim]
"""

import triton
import triton.language as tl

from worker.engine.kernels.triton.overlap import start_early

LOG2_E = tl.constexpr(1.4426950408889634)
WIDTH = tl.constexpr(128)  # sequences or tiles looked at together


@triton.jit(do_not_specialize=["num_heads"])
def store_kernel(
    key,  # [num_tokens, num_heads, key_dim]
    value,  # [num_tokens, num_heads, value_dim]
    keys,
    values,
    slots,  # [num_tokens] int32
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    num_heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_tokens, tiles of BLOCK_HEADS kv heads)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    is_head = heads < num_heads
    slot = tl.load(slots + row).to(tl.int64)
    # Of the slot within each head of its block, in tokens.
    places = (slot // PAGE * num_heads + heads) * PAGE + slot % PAGE

    dims = tl.arange(0, BLOCK_KEY)[None, :]
    mask = is_head & (dims < KEY_DIM)
    data = tl.load(key + row * key_row_stride + heads * key_head_stride + dims, mask=mask)
    tl.store(keys + places * KEY_DIM + dims, data, mask=mask)

    dims = tl.arange(0, BLOCK_VALUE)[None, :]
    mask = is_head & (dims < VALUE_DIM)
    data = tl.load(value + row * value_row_stride + heads * value_head_stride + dims, mask=mask)
    tl.store(values + places * VALUE_DIM + dims, data, mask=mask)


@triton.jit
def _num_tiles(num_queries, most_short_queries, QUERIES: tl.constexpr):
    return tl.where(num_queries > most_short_queries, (num_queries + QUERIES - 1) // QUERIES, 0)


@triton.jit(
    do_not_specialize=["num_tiles", "most_short_queries"],
    do_not_specialize_on_alignment=["query_starts"],
)
def tile_kernel(
    tiles,  # [num_tiles, 2] int32: sequence, -1 behind the last tile, and which of its tiles
    query_starts,  # [num_seqs + 1] int32
    num_tiles,
    most_short_queries,  # sequences with at most so many queries have no tiles
    QUERIES: tl.constexpr,  # of a tile
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_seqs,)."""
    start_early(OVERLAPS)
    seq = tl.program_id(0)
    offsets = tl.arange(0, WIDTH)
    num_before = 0
    for first in range(0, seq, WIDTH):
        seqs = first + offsets
        starts = tl.load(query_starts + seqs, mask=seqs < seq, other=0)
        ends = tl.load(query_starts + seqs + 1, mask=seqs < seq, other=0)
        num_before += tl.sum(_num_tiles(ends - starts, most_short_queries, QUERIES), axis=0)
    num_queries = tl.load(query_starts + seq + 1) - tl.load(query_starts + seq)
    end = num_before + _num_tiles(num_queries, most_short_queries, QUERIES)
    for first in range(num_before, end, WIDTH):
        places = first + offsets
        tl.store(tiles + 2 * places, seq, mask=places < end)
        tl.store(tiles + 2 * places + 1, places - num_before, mask=places < end)
    if seq == tl.num_programs(0) - 1:
        for first in range(end, num_tiles, WIDTH):
            places = first + offsets
            tl.store(tiles + 2 * places, -1, mask=places < num_tiles)


@triton.jit
def _attend_to(
    peak,  # [ROWS] float32: largest score so far
    total,  # [ROWS] float32: sum of 2 ** (score - peak)
    output,  # [ROWS, BLOCK_VALUE] float32: the same sum, of values
    query,  # [ROWS, BLOCK_KEY]
    positions,  # [ROWS, 1]
    first,  # of the tile's tokens
    low,  # tokens before it are not read
    high,  # nor are tokens from here on
    keys,  # of the kv head
    values,
    table,
    key_page_stride,
    value_page_stride,
    scale,
    softcap,
    window,
    biases,  # [ROWS] of pointers: to the bias by distance of each row's head; not read without HAS_BIAS
    num_distances,
    MASKED: tl.constexpr,  # some row does not see some token, or the tile reaches out of low:high
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Let every row see TOKENS more tokens."""
    tokens = first + tl.arange(0, TOKENS)
    key_dims = tl.arange(0, BLOCK_KEY)[None, :]
    value_dims = tl.arange(0, BLOCK_VALUE)[None, :]
    # Where nothing is read there are zeros: a NaN left behind in a block by another sequence must not come in, and a
    # weight of 0 would not stop it.
    if MASKED:
        is_read = (tokens >= low) & (tokens < high)
        pages = tl.load(table + tokens // PAGE, mask=is_read, other=0).to(tl.int64)
        key_mask = is_read[:, None] & (key_dims < KEY_DIM)
        value_mask = is_read[:, None] & (value_dims < VALUE_DIM)
    else:
        pages = tl.load(table + tokens // PAGE).to(tl.int64)
        key_mask = key_dims < KEY_DIM
        value_mask = value_dims < VALUE_DIM
    places = (tokens % PAGE)[:, None]
    key = tl.load(
        keys + pages[:, None] * key_page_stride + places * KEY_DIM + key_dims,
        mask=key_mask,
        other=0.0,
    )
    value = tl.load(
        values + pages[:, None] * value_page_stride + places * VALUE_DIM + value_dims,
        mask=value_mask,
        other=0.0,
    )
    if AS_FLOAT32:
        key = key.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0))
    if HAS_BIAS:
        distances = tl.minimum(tl.maximum(positions - tokens[None, :], 0), num_distances - 1)
        scores += tl.load(biases[:, None] + distances)
    scores *= LOG2_E
    if MASKED:
        is_seen = tokens[None, :] <= positions
        if HAS_WINDOW:
            is_seen &= tokens[None, :] > positions - window
        scores = tl.where(is_seen, scores, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no peak, and -inf less -inf is NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(value.dtype)
    if AS_FLOAT32:
        weights = weights.to(tl.float32)
        value = value.to(tl.float32)
    output = tl.dot(weights, value, output * decay[:, None], input_precision="ieee")
    return new_peak, total, output


@triton.jit(
    do_not_specialize=[*("num_heads", "num_kv_heads", "table_stride", "window", "most_short_queries", "num_distances")],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "tables"],
)
def attend_kernel(
    output,  # [num_tokens, num_heads, VALUE_DIM], or the shares [num_tokens, num_heads, SHARES, VALUE_DIM] float32
    peaks_and_totals,  # [num_tokens, num_heads, SHARES, 2] float32; not touched when SHARES is 1
    query,  # [num_tokens, num_heads, KEY_DIM]
    keys,
    values,
    tables,  # [num_seqs, table_stride] int32
    query_starts,  # [num_seqs + 1] int32
    context_lens,  # [num_seqs] int32
    tiles,  # [num_tiles, 2] int32, of `tile_kernel`; not read if SHORT
    sinks,  # [num_heads] float32; not read without HAS_SINKS
    distance_bias,  # [num_heads, num_distances] float32; not read without HAS_BIAS
    num_distances,
    query_row_stride,
    query_head_stride,
    key_page_stride,
    value_page_stride,
    table_stride,
    num_heads,
    num_kv_heads,
    most_short_queries,  # of a sequence that the launch that is SHORT has; the others are left to the other one
    scale,
    softcap,
    window,
    SHORT: tl.constexpr,
    SHARES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AS_FLOAT32: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 products
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of one kv head that share a tile
    QUERIES: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,  # of a tile: at least QUERIES * HEADS, a power of two
    TOKENS: tl.constexpr,  # of the context at a time, a power of two
    LEAST_TILES: tl.constexpr,  # of TOKENS that a share has: of a short context the last shares are empty
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (sequences if SHORT, else tiles; kv heads times tiles of their query heads; SHARES)."""
    start_early(OVERLAPS)
    if SHORT:
        seq = tl.program_id(0)
        tile = 0
    else:
        # The last tiles of a prompt see most of it: begin with them, so that they do not end last.
        place = tl.num_programs(0) - 1 - tl.program_id(0)
        seq = tl.load(tiles + 2 * place)
        if seq < 0:
            return
        tile = tl.load(tiles + 2 * place + 1)
    first_row = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - first_row
    first_query = tile * QUERIES
    if SHORT and ((num_queries > most_short_queries) | (num_queries == 0)):
        return
    context_len = tl.load(context_lens + seq)
    group = num_heads // num_kv_heads
    num_head_tiles = tl.num_programs(1) // num_kv_heads
    kv_head = tl.program_id(1) // num_head_tiles
    share = tl.program_id(2)

    # Row r of the tile is query r // HEADS, head r % HEADS.
    rows = tl.arange(0, ROWS)
    group_heads = tl.program_id(1) % num_head_tiles * HEADS + rows % HEADS
    queries = first_query + rows // HEADS
    is_row = (rows < QUERIES * HEADS) & (queries < num_queries) & (group_heads < group)
    heads = kv_head * group + group_heads
    positions = context_len - num_queries + queries

    key_dims = tl.arange(0, BLOCK_KEY)[None, :]
    row_ids = (first_row + queries).to(tl.int64)
    loaded = tl.load(
        query + (row_ids * query_row_stride + heads * query_head_stride)[:, None] + key_dims,
        mask=is_row[:, None] & (key_dims < KEY_DIM),
        other=0.0,
    )
    if AS_FLOAT32:
        loaded = loaded.to(tl.float32)

    # The tokens that any row sees, and this share of them.
    first_position = context_len - num_queries + first_query
    end = tl.minimum(context_len, first_position + QUERIES)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first_position + 1 - window, 0)
    first_token = low // PAGE * PAGE
    tiles_per_share = tl.maximum(tl.cdiv(tl.cdiv(end - first_token, TOKENS), SHARES), LEAST_TILES)
    begin = first_token + share * tiles_per_share * TOKENS
    end = tl.minimum(end, begin + tiles_per_share * TOKENS)

    keys += kv_head.to(tl.int64) * (PAGE * KEY_DIM)
    values += kv_head.to(tl.int64) * (PAGE * VALUE_DIM)
    table = tables + seq.to(tl.int64) * table_stride
    biases = distance_bias + tl.where(is_row, heads, 0) * num_distances
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    result = tl.zeros([ROWS, BLOCK_VALUE], dtype=tl.float32)
    masked_from = begin
    if not HAS_WINDOW:
        # Up to here every row sees every token.
        num_whole = tl.maximum(tl.minimum(end, first_position + 1) - begin, 0) // TOKENS
        masked_from = begin + num_whole * TOKENS
        for first in range(begin, masked_from, TOKENS):
            peak, total, result = _attend_to(
                peak, total, result, loaded, positions[:, None], first, low, end, keys, values, table,
                key_page_stride, value_page_stride, scale, softcap, window, biases, num_distances, False, HAS_WINDOW,
                HAS_SOFTCAP, HAS_BIAS, AS_FLOAT32, KEY_DIM, VALUE_DIM, PAGE, TOKENS, BLOCK_KEY, BLOCK_VALUE,
            )  # fmt: skip
    for first in range(masked_from, end, TOKENS):
        peak, total, result = _attend_to(
            peak, total, result, loaded, positions[:, None], first, low, end, keys, values, table,
            key_page_stride, value_page_stride, scale, softcap, window, biases, num_distances, True, HAS_WINDOW,
            HAS_SOFTCAP, HAS_BIAS, AS_FLOAT32, KEY_DIM, VALUE_DIM, PAGE, TOKENS, BLOCK_KEY, BLOCK_VALUE,
        )  # fmt: skip

    places = row_ids * num_heads + heads
    value_dims = tl.arange(0, BLOCK_VALUE)[None, :]
    mask = is_row[:, None] & (value_dims < VALUE_DIM)
    if SHARES == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=is_row, other=0.0) * LOG2_E
            new_peak = tl.maximum(peak, sink)
            result *= tl.exp2(peak - new_peak)[:, None]
            total = total * tl.exp2(peak - new_peak) + tl.exp2(sink - new_peak)
        result /= total[:, None]
        tl.store(output + places[:, None] * VALUE_DIM + value_dims, result.to(output.dtype.element_ty), mask=mask)
    else:
        places = places * SHARES + share
        # An empty share has no peak, by which the merge knows that it has no output either.
        tl.store(peaks_and_totals + 2 * places, peak, mask=is_row)
        tl.store(peaks_and_totals + 2 * places + 1, total, mask=is_row)
        tl.store(output + places[:, None] * VALUE_DIM + value_dims, result, mask=mask & (end > begin))


@triton.jit(
    do_not_specialize=["num_heads", "most_short_queries"],
    do_not_specialize_on_alignment=["query_starts"],
)
def merge_kernel(
    output,  # [num_tokens, num_heads, VALUE_DIM]
    shares,  # [num_tokens, num_heads, SHARES, VALUE_DIM] float32
    peaks_and_totals,  # [num_tokens, num_heads, SHARES, 2] float32
    query_starts,
    sinks,
    num_heads,
    most_short_queries,
    HAS_SINKS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (sequences times QUERIES; heads; tiles of BLOCK_DIMS value dimensions)."""
    start_early(OVERLAPS)
    seq = tl.program_id(0) // QUERIES
    query = tl.program_id(0) % QUERIES
    head = tl.program_id(1)
    first_row = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - first_row
    if (num_queries > most_short_queries) | (query >= num_queries):
        return
    place = (first_row + query).to(tl.int64) * num_heads + head
    share = tl.arange(0, BLOCK_SHARES)
    places = place * SHARES + share
    peaks = tl.load(peaks_and_totals + 2 * places, mask=share < SHARES, other=float("-inf"))
    totals = tl.load(peaks_and_totals + 2 * places + 1, mask=share < SHARES, other=0.0)
    peak = tl.max(peaks, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head) * LOG2_E
        peak = tl.maximum(peak, sink)
    weights = tl.exp2(peaks - peak)
    total = tl.sum(weights * totals, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    dims = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    is_held = (peaks > float("-inf"))[:, None] & (dims < VALUE_DIM)[None, :]
    parts = tl.load(shares + places[:, None] * VALUE_DIM + dims[None, :], mask=is_held, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(output + place * VALUE_DIM + dims, result.to(output.dtype.element_ty), mask=dims < VALUE_DIM)
