"""The Triton kernel of gpu.py, in a file of its own because importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def lookup(  # type: ignore[no-untyped-def]
    x,
    codes,
    centroids,
    sums,
    n,
    rows,
    blocks,
    share,
    k,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums[s, i, r] = sum over the blocks j of share s of < x[i, j], centroids[codes[j, r]] >.

    A program for each tile of rows r and each s. x (n, blocks * D); codes (blocks, rows) uint8; centroids (k, D); sums
    (shares, n, rows) float32. N, ROWS and BLOCKS, powers of two, are the sizes of a tile.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    split = tl.program_id(1)
    line = tl.arange(0, N)  # (N,), of x
    total = tl.zeros((N, ROWS), dtype=tl.float32)
    end = tl.minimum((split + 1) * share, blocks)
    for first in range(split * share, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)  # (BLOCKS,)
        there = (block < end)[:, None] & (row < rows)[None, :]  # (BLOCKS, ROWS)
        at = block[:, None].to(tl.int64) * rows + row[None, :]
        code = tl.load(codes + at, mask=there, other=0).to(tl.int32)
        there = there & (code < k)  # no code reads past the centroids
        for j in range(D):
            entry = tl.load(centroids + code * D + j, mask=there, other=0).to(tl.float32)  # (BLOCKS, ROWS)
            where = line[:, None] * (blocks * D) + block[None, :] * D + j
            given = (line < n)[:, None] & (block < end)[None, :]
            number = tl.load(x + where, mask=given, other=0).to(tl.float32)  # (N, BLOCKS)
            total += tl.sum(number[:, :, None] * entry[None, :, :], 1)
    to = (split * n + line[:, None]) * rows + row[None, :]
    tl.store(sums + to, total, mask=(line < n)[:, None] & (row < rows)[None, :])
