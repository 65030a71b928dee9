// The backward pass of attention (Dao 2023, FlashAttention-2, algorithm 2), in two passes, without
// atomics: the same input gives the same bits. Chapter 14.
//
// With S = scale · QKᵀ, P = exp(S − lse), O = PV and dO the gradient of O:
//
//     δ  = rowsum(dO ∘ O)           one number a query, by flash_backward_sums.cu
//     dP = dO Vᵀ,  dS = P ∘ (dP − δ)
//     dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// P is not kept by the forward pass but computed again, tile by tile. Both passes are one kernel,
// in two roles. A block owns a tile of rows and visits tiles of others:
//
//     KEYS    owns keys,    visits queries:  Sᵀ = K Qᵀ,  dPᵀ = V dOᵀ,  dV += Pᵀ dO,  dK += dSᵀ Q
//     else    owns queries, visits keys:     S  = Q Kᵀ,  dP  = dO Vᵀ,                dQ += dS K
//
// So `own` is K or Q and `own_v` V or dO; `other` and `other_v` are the same with roles exchanged.
// Each warp has ROWS of the block's own rows. Of a tile of TILE others it takes STEP at a time: two
// products give P and dS, spread over registers just as the next product wants its left operand,
// and what they add to stays in registers until the end. A tile nobody looks at is not visited; one
// that is looked at in part is masked: at the diagonal if causal, at the last keys, and in blocks
// of 32 × 32 if there is a layout (SPARSE).
//
//     head dim   role      warps × ROWS   TILE   STEP   registers for sums, P and dS (own rows)
//     ≤ 64       keys      4 × 32         64     32     2 · 64 + 64
//                queries   4 × 32         64     32         64 + 64 (+ 64, if HELD as here)
//     ≤ 128      keys      4 × 16         64     64     2 · 64 + 64
//                queries   4 × 32         32     32        128 + 64
//     ≤ 160      keys      4 × 16         32     32     2 · 80 + 32
//                queries   4 × 16         32     32         80 + 32 (+ 80)
//
// Shared memory: own | own_v | two stages of (other | other_v | for KEYS, lse and −δ of the
// queries). While one stage is worked on, the other is filled. 64 to 105 KB, two blocks an H100's
// multiprocessor.
//
// Bound: 7 products of 2 · Sq · Sk · d FLOP (half of it if causal) where the mathematics asks for
// 5, all on the tensor cores; and what these read of shared memory, 128 bytes a cycle: 16 × 16
// numbers (512 bytes) feed ROWS / 8 products of 16 × 8 × 16.

extern __shared__ __align__(128) char shared[];

// Copies rows to a tile, asynchronously, by eight threads a row, each at chunks eight apart: what
// differs from copy to copy is then known to the compiler, but for the source's row.
template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(T* tile, const T* from, int stride, int rows) {
    static_assert(THREADS % 64 == 0, "rows of a thread must lie multiples of eight apart");
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    tile += Tile<D>::at(row, chunk), from += (long long)row * stride + chunk * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += THREADS / 8)
#pragma unroll
        for (int c = 0; c < D / 8; c += 8)
            if (c + 8 <= D / 8 || c + chunk < D / 8)
                copy_async(tile + r * Tile<D>::stride + c * 8, from + (long long)r * stride + c * 8,
                           row + r < rows);
}

// Calls f(number, m, n, i) for every number of 16 · M × 8 · N that lie in a warp's registers:
// row 16 m + g + 8 (i / 2), column 8 n + 2 t + i % 2, with g = lane / 4 and t = lane % 4.
template <int M, int N, class F>
__device__ __forceinline__ void each(float (&x)[M][N][4], F f) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) f(x[m][n][i], m, n, i);
}

// Where a lane's row of a matrix load begins, for 16 × 16 numbers as A (or B, if transposed), or B.
template <int D> __device__ __forceinline__ int place_a(int lane) {
    return Tile<D>::at(lane % 16, lane / 16);
}
template <int D> __device__ __forceinline__ int place_b(int lane) {
    return Tile<D>::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// The same place so many rows (a multiple of 8) and columns (of 16) further: see `Tile`.
template <int D> __device__ __forceinline__ int moved(int place, int row, int column) {
    return (D % 64 ? place + column : place ^ column) + row * Tile<D>::stride;
}

// Fragments of a warp's own rows, for all its products.
template <class T, int D, int M>
__device__ __forceinline__ void hold(unsigned (&a)[D / 16][M][4], const T* own, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int m = 0; m < M; ++m)
            ldmatrix(a[k][m], own + moved<D>(place_a<D>(lane), 16 * m, 16 * k));
}

// c += own · otherᵀ: 16·M rows of one tile, 8·N of the other. `own` is in registers if HELD.
template <class T, int D, bool HELD, int M, int N>
__device__ __forceinline__ void multiply(
    float (&c)[M][N][4], const unsigned (&held)[D / 16][M][4], const T* own, const T* other,
    int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if constexpr (HELD) {
                for (int i = 0; i < 4; ++i) a[m][i] = held[k][m][i];
            } else {
                ldmatrix(a[m], own + moved<D>(place_a<D>(lane), 16 * m, 16 * k));
            }
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix(b, other + moved<D>(place_b<D>(lane), 8 * n, 16 * k));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(c[m][n], a[m], b[0], b[1]);
                mma<T>(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum += w · other: w is 16·M × 8·N in registers, `other` 8·N rows of a tile.
template <class T, int D, int M, int N>
__device__ __forceinline__ void accumulate(
    float (&sum)[M][D / 8][4], const float (&w)[M][N][4], const T* other, int lane) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            a[m][0] = pack<T>(w[m][n][0], w[m][n][1]), a[m][1] = pack<T>(w[m][n][2], w[m][n][3]);
            a[m][2] = pack<T>(w[m][n + 1][0], w[m][n + 1][1]);
            a[m][3] = pack<T>(w[m][n + 1][2], w[m][n + 1][3]);
        }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            ldmatrix_transposed(b, other + moved<D>(place_a<D>(lane), 8 * n, 8 * j));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(sum[m][j], a[m], b[0], b[1]);
                mma<T>(sum[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Which queries see which keys. A query at i sees the keys up to i + shift, and none past the end.
template <bool KEYS> struct Sight {
    int shift, keys;
    // The other rows that own row r sees: from first(r) on if it is a key, else up to last(r).
    __device__ __forceinline__ int first(int r) const { return r - shift; }
    __device__ __forceinline__ int last(int r) const { return min(r + shift, keys - 1); }
    // Whether own rows r … r + rows − 1 see any, and all, of others c … c + columns − 1.
    __device__ __forceinline__ bool any(int r, int rows, int c, int columns) const {
        return KEYS ? c + columns - 1 >= first(r) : c <= last(r + rows - 1);
    }
    __device__ __forceinline__ bool all(int r, int rows, int c, int columns) const {
        return KEYS ? c >= first(r + rows - 1) : c + columns - 1 <= last(r);
    }
    __device__ __forceinline__ bool sees(int r, int c) const { return all(r, 1, c, 1); }
};

// Writes a warp's sums, times `factor`, by way of its rows of a tile, so that stores are 16 bytes.
template <class T, int D, int M>
__device__ __forceinline__ void store(
    T* to, long long stride, int rows, float (&sum)[M][D / 8][4], float factor, T* tile, int lane) {
    each(sum, [&](float& x, int m, int j, int i) {
        T* two = tile + Tile<D>::at(16 * m + 4 * i + lane / 4, j) + lane % 4 * 2;
        if (i % 2 == 0) *(unsigned*)two = pack<T>(x * factor, sum[m][j][i + 1] * factor);
    });
    __syncwarp();
    for (int i = lane; i < 16 * M * (D / 8); i += 32) {
        int row = i / (D / 8), chunk = i % (D / 8);
        if (row < rows)
            *(uint4*)(to + row * stride + chunk * 8) = *(uint4*)(tile + Tile<D>::at(row, chunk));
    }
}

// The layout's blocks of 32 × 32 tokens, a bit each (layout.py), for a block of BLOCK own rows and
// tiles of TILE others. Without a layout, all of them.
template <int BLOCK, int TILE, bool SPARSE> struct Wanted {
    const unsigned* words;
    int from, count, stride;  // rows of 32 tokens from this block's first on; words of each
    // Bits of 32 own rows: the lowest for the tile's first 32 others, higher ones for later others.
    __device__ __forceinline__ unsigned bits(int row, int tile) const {
        if (!SPARSE) return ~0u;
        const int bit = tile * (TILE / 32);
        return row < count ? words[from + row * stride + bit / 32] >> bit % 32 : 0;
    }
    // The first tile, from `tile` on, that any of the block's rows wants; `end` or more if none.
    __device__ __forceinline__ int next(int tile, int end) const {
        if (!SPARSE) return tile;
        while (tile < end) {
            unsigned any = 0;
#pragma unroll
            for (int row = 0; row < BLOCK / 32; ++row) any |= bits(row, tile);
            if (any) return tile + (__ffs(any) - 1) / (TILE / 32);
            tile = (tile / (1024 / TILE) + 1) * (1024 / TILE);
        }
        return end;
    }
};

// The rows that a block visits, and the two stages in shared memory where it has TILE of them.
template <class T, int D, int DV, bool KEYS, int TILE, int THREADS> struct Visited {
    static constexpr int V = TILE * Tile<D>::stride, PER_QUERY = V + TILE * Tile<DV>::stride;
    static constexpr int STAGE = PER_QUERY + (KEYS ? 4 * TILE : 0);  // numbers of 16 bits
    T* stages;
    const T *other, *other_v;
    const float* per_query;
    int row_stride, v_row_stride, length, padded;

    __device__ __forceinline__ void fetch(int tile, int stage) const {
        const int row = tile * TILE, left = length - row, i = threadIdx.x * 4;
        T* to = stages + stage * STAGE;
        load_rows<T, D, TILE, THREADS>(to, other + (long long)row * row_stride, row_stride, left);
        load_rows<T, DV, TILE, THREADS>(
            to + V, other_v + (long long)row * v_row_stride, v_row_stride, left);
        if (KEYS && i < TILE) {
            float* numbers = (float*)(to + PER_QUERY) + i;
            copy_async(numbers, per_query + row + i);
            copy_async(numbers + TILE, per_query + padded + row + i);
        }
    }
};

// A warp's 16 · M own rows: what it sums up, and how it takes 8 · N others.
template <class T, int D, int DV, bool KEYS, int M, int N, bool HELD> struct Work {
    T *own, *own_v;  // its rows in shared memory
    int first;       // number of its first row
    float scale;     // times log2(e), for exp2
    unsigned held[D / 16][M][4], held_v[DV / 16][M][4];  // its rows, if HELD
    float lse[M][2], minus_delta[M][2];                  // of its rows, unless KEYS
    float d[M][D / 8][4], d_v[M][DV / 8][4];             // the sums

    __device__ __forceinline__ void begin(const float* per_query, int padded, int length) {
        const int lane = threadIdx.x % 32;
        each(d, [](float& x, int, int, int) { x = 0; });
        each(d_v, [](float& x, int, int, int) { x = 0; });
        if constexpr (HELD) {
            hold<T, D, M>(held, own, lane);
            hold<T, DV, M>(held_v, own_v, lane);
        }
        for (int i = 0; i < 2 * M && !KEYS; ++i) {
            const int row = first + 8 * i + lane / 4;
            lse[i / 2][i % 2] = row < length ? per_query[row] : __int_as_float(0x7f800000);
            minus_delta[i / 2][i % 2] = row < length ? per_query[padded + row] : 0;
        }
    }

    // Others from number `column` on: y and y_v in shared memory, and if they are queries, their
    // lse and −δ. Bit b of `bits` is 0 if none of others 32 b … 32 b + 31 is seen.
    __device__ __forceinline__ void take(
        const T* y, const T* y_v, const float* lses, const float* minus_deltas, int column,
        unsigned bits, const Sight<KEYS>& sight) {
        constexpr unsigned FULL = (1u << (8 * N + 31) / 32) - 1;
        const int lane = threadIdx.x % 32, t = lane % 4 * 2;
        float p[M][N][4] = {}, ds[M][N][4];
        if (!(bits & FULL) || !sight.any(first, 16 * M, column, 8 * N)) return;
        multiply<T, D, HELD>(p, held, own, y, lane);
        if ((bits & FULL) != FULL || !sight.all(first, 16 * M, column, 8 * N))
            each(p, [&](float& x, int m, int n, int i) {
                const int row = first + lane / 4 + 16 * m + i / 2 * 8;
                if (!(bits >> n / 4 & 1) || !sight.sees(row, column + t + 8 * n + i % 2))
                    x = __int_as_float(0xff800000);  // −∞, so that P is 0
            });
        each(p, [&](float& x, int m, int n, int i) {
            x = exp2_fast(x * scale - (KEYS ? lses[8 * n + t + i % 2] : lse[m][i / 2]));
        });
        if constexpr (KEYS) accumulate<T, DV>(d_v, p, y_v, lane);
        each(ds, [&](float& x, int m, int n, int i) {
            x = KEYS ? minus_deltas[8 * n + t + i % 2] : minus_delta[m][i / 2];
        });
        multiply<T, DV, HELD>(ds, held_v, own_v, y_v, lane);
        each(ds, [&](float& x, int m, int n, int i) { x *= p[m][n][i]; });
        accumulate<T, D>(d, ds, y, lane);
    }

    // Writes the sums as rows number `out`, out + every, …; the warp's own rows are given up.
    __device__ __forceinline__ void finish(
        T* to, T* to_v, long long out, int every, int rows, float factor) {
        store<T, D>(to + out * D, every * D, rows, d, factor, own, threadIdx.x % 32);
        if constexpr (KEYS)
            store<T, DV>(to_v + out * DV, every * DV, rows, d_v, 1, own_v, threadIdx.x % 32);
    }
};

template <class T, int D, int DV, bool KEYS, int WARPS, int ROWS, int TILE, int STEP, bool HELD,
          bool SPARSE>
__global__ void __launch_bounds__(WARPS * 32) flash_backward(
    const T* own, const T* own_v, const T* other, const T* other_v, const float* per_query,
    const unsigned* words, T* d_own, T* d_own_v, int own_length, int other_length, int padded,
    int shift, int word_rows, int word_stride, int word_head, int own_row, int own_v_row,
    int other_row, int other_v_row, long long own_head, long long own_v_head, long long other_head,
    long long other_v_head, long long own_batch, long long own_v_batch, long long other_batch,
    long long other_v_batch, float scale) {
    constexpr int BLOCK = WARPS * ROWS, THREADS = WARPS * 32;
    T* own_tile = (T*)shared;
    T* own_v_tile = own_tile + BLOCK * Tile<D>::stride;
    // The longest work first, if causal.
    const int block = KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x, first = block * BLOCK;
    const int warp_row = threadIdx.x / 32 * ROWS, head = blockIdx.y, heads = gridDim.y;
    const long long batch = blockIdx.z;
    const Sight<KEYS> sight{shift, KEYS ? own_length : other_length};
    const Wanted<BLOCK, TILE, SPARSE> wanted{
        words, head * word_head + first / 32 * word_stride, word_rows - first / 32, word_stride};

    own += batch * own_batch + head * own_head + (long long)first * own_row;
    own_v += batch * own_v_batch + head * own_v_head + (long long)first * own_v_row;
    load_rows<T, D, BLOCK, THREADS>(own_tile, own, own_row, own_length - first);
    load_rows<T, DV, BLOCK, THREADS>(own_v_tile, own_v, own_v_row, own_length - first);
    per_query += (batch * heads + head) * 2 * padded;
    using Others = Visited<T, D, DV, KEYS, TILE, THREADS>;
    const Others others{
        own_v_tile + BLOCK * Tile<DV>::stride, other + batch * other_batch + head * other_head,
        other_v + batch * other_v_batch + head * other_v_head, per_query, other_row, other_v_row,
        other_length, padded};

    const int seen = KEYS ? other_length : sight.last(min(first + BLOCK, own_length) - 1) + 1;
    const int end = (seen + TILE - 1) / TILE;
    int tile = wanted.next(KEYS ? max(0, sight.first(first)) / TILE : 0, end), stage = 0;
    if (tile < end) others.fetch(tile, stage);
    copy_commit();

    Work<T, D, DV, KEYS, ROWS / 16, STEP / 8, HELD> work;
    work.own = own_tile + warp_row * Tile<D>::stride;
    work.own_v = own_v_tile + warp_row * Tile<DV>::stride;
    work.first = first + warp_row, work.scale = scale * 1.44269504f;
    copy_wait<0>();
    __syncthreads();
    work.begin(per_query, padded, own_length);

    while (tile < end) {
        const int next = wanted.next(tile + 1, end);
        if (next < end) others.fetch(next, stage ^ 1);
        copy_commit();
        const unsigned bits = wanted.bits(warp_row / 32, tile);
        const T* x = others.stages + stage * Others::STAGE;
        const T* x_v = x + Others::V;
        const float* lses = (const float*)(x + Others::PER_QUERY);
#pragma unroll
        for (int step = 0; step < TILE; step += STEP)
            work.take(
                x + step * Tile<D>::stride, x_v + step * Tile<DV>::stride, lses + step,
                lses + TILE + step, tile * TILE + step, bits >> step / 32, sight);
        copy_wait<0>();
        __syncthreads();  // the next tile is there, and nobody works on this one any more
        tile = next, stage ^= 1;
    }

    const long long out = (batch * own_length + work.first) * heads + head;  // (B, S, nh, d)
    work.finish(d_own, d_own_v, out, heads, own_length - work.first, scale);
}
