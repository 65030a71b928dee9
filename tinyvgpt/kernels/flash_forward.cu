// Attention, forward (Dao 2023, FlashAttention-2, algorithm 1): o = softmax(scale · Q Kᵀ) V without
// ever keeping a whole row of scores. Chapter 14.
//
// A block of threads has WARPS × ROWS queries and walks over a list of key tiles:
//
//     S = Q Kᵀ,  P = 2^(S · scale · log2(e) − m),  sum += rowsum(P),  O += P V     for every tile
//     o = O / sum,  lse = (m + log2(sum)) / log2(e)                                at the end
//
// The list makes the kind of attention: all tiles (full), those up to the diagonal (causal), or
// those with a bit set in a layout (block-sparse; see layout.py). Within a tile each warp skips the
// STEPs of keys that its own queries don't see, and masks single scores only where it must.
//
// m need not be the row's maximum: any number near it gives the same o. So it is moved, and O and
// sum are scaled, only when a score is more than SLACK above it, which after the first tile hardly
// ever happens. P is then at most 2^SLACK, which bf16 and fp16 hold as exactly as 1.
//
// The tile tables are DENSE and SPARSE in flash.py:
//     WARPS × ROWS   queries of a block; a warp's ROWS are 16 or 32. With 32 each fragment of K
//                    and V serves two products, so shared memory is read half as often.
//     TILE, STAGES   keys in shared memory at a time, and how many such tiles: one is worked on,
//                    the others are on their way
//     STEP           keys whose scores are in registers at a time; 32 if SPARSE
//     HELD           whether Q stays in registers
//     BLOCKS         of threads that a multiprocessor is to hold, which limits registers
//
// Registers of a thread, besides addresses: DV · ROWS / 32 for O, STEP · ROWS / 32 for S, and
// D · ROWS / 64 for Q if HELD. At most 255 in all, so two blocks of 128 threads a multiprocessor.
// Shared memory: Q, later o (WARPS · ROWS rows) | STAGES × (K: TILE rows | V: TILE rows).
//
// Bound: 2 · Sq · Sk · (D + DV) FLOP on tensor cores, half of it if causal. Beside them five
// instructions a score (maximum, multiply-add, exp2, sum, half a conversion), which overlap the
// products, and what these read from shared memory: 16 × 16 numbers of K or V (512 bytes, four
// cycles) feed ROWS / 8 products of 16 × 8 × 16. Device memory matters little: a key's
// 2 · (D + DV) bytes serve WARPS · ROWS queries, and come from the L2 cache for all but the first.

extern __shared__ __align__(128) char shared[];

constexpr int BLOCK = 32;                   // queries and keys of a layout's bit
constexpr float SLACK = 8;                  // in powers of two
constexpr float LOWEST = -3.402823466e38f;  // below all scores, yet its differences are numbers
constexpr float LN2 = 0.6931471805599453f;

// Where the chunk `by` (an even number) chunks further in a row lies, if a row's chunk 0 or 1 lies
// at `at`: then by has no bit in common with it, and what the swizzle makes of both is one ^.
template <int D> __device__ __forceinline__ int along(int at, int by) {
    return D % 64 ? at + by * 8 : (at ^ by % 8 * 8) + by / 8 * 64;
}

// A thread's part in copying rows of D numbers to a tile: one chunk of every AT_ONCEth row. What does
// not change from tile to tile is computed once.
template <class T, int D, int THREADS> struct Copier {
    static constexpr int CHUNKS = D / 8, AT_ONCE = THREADS / CHUNKS;
    static constexpr bool SAME = D % 64 || AT_ONCE % 8 == 0;  // the swizzle of all its rows
    const T* from;
    int stride, row, chunk, at;

    __device__ __forceinline__ Copier(const T* rows, int row_stride)
        : stride(row_stride), row(threadIdx.x / CHUNKS), chunk(threadIdx.x % CHUNKS) {
        from = rows + (long long)row * stride + chunk * 8;
        at = Tile<D>::at(row, chunk);
    }
    // Rows first … first + ROWS - 1; those at or past `end` are filled with zeros.
    template <int ROWS> __device__ __forceinline__ void copy(T* tile, int first, int end) const {
        const T* source = from + (long long)first * stride;
#pragma unroll
        for (int r = 0; r < ROWS; r += AT_ONCE) {
            int to = SAME ? at + r * Tile<D>::stride : Tile<D>::at(row + r, chunk);
            if ((THREADS % CHUNKS == 0 || row < AT_ONCE) && (ROWS % AT_ONCE == 0 || row + r < ROWS))
                copy_async(tile + to, source, first + row + r < end);
            source += (long long)AT_ONCE * stride;
        }
    }
};

// The tiles of keys that a block of threads visits, in order: `tile`, until it is `end` or more.
template <int TILE, bool SPARSE> struct KeyTiles {
    int tile = -1, end;
    // SPARSE: bits of the block's rows of the layout; `word` has those of word `at` still to come.
    const unsigned* rows;
    int row_count, words, at = -1;
    unsigned word = 0;

    __device__ __forceinline__ KeyTiles(int keys, const unsigned* rows, int row_count, int words)
        : end((keys + TILE - 1) / TILE), rows(rows), row_count(row_count), words(words) {
        next();
    }
    __device__ __forceinline__ void next() {
        if constexpr (!SPARSE) {
            ++tile;
        } else {
            constexpr int bits = TILE / BLOCK;  // of a tile
            while (!word) {
                if (++at >= words) {
                    tile = end;
                    return;
                }
                for (int r = 0; r < row_count; ++r) word |= __ldg(rows + r * words + at);
            }
            int first = (__ffs(word) - 1) / bits * bits;
            word &= ~(((1u << bits) - 1) << first);
            tile = (at * 32 + first) / bits;
        }
    }
};

// Copies tiles of keys and values to stages in shared memory, ahead of the work.
template <class T, int D, int DV, int TILE, int THREADS, bool SPARSE> struct Stages {
    static constexpr int VALUES = TILE * Tile<D>::stride;  // where in a stage they begin
    static constexpr int SIZE = VALUES + TILE * Tile<DV>::stride;
    Copier<T, D, THREADS> keys;
    Copier<T, DV, THREADS> values;
    KeyTiles<TILE, SPARSE> ahead;  // the tile to be copied next
    int sk;

    __device__ __forceinline__ void load(T* stage) {
        if (ahead.tile < ahead.end) {
            keys.template copy<TILE>(stage, ahead.tile * TILE, sk);
            values.template copy<TILE>(stage + VALUES, ahead.tile * TILE, sk);
            ahead.next();
        }
        copy_commit();
    }
};

// A warp's queries, M · 16 rows: their softmax so far, and the sum over keys that goes with it.
template <class T, int D, int DV, int M, int STEP, bool HELD> struct Queries {
    static constexpr int N = STEP / 8;  // fragments of scores in a row

    int q_at, k_at, v_at;  // where in a tile this lane's part of a matrix load begins
    unsigned held[HELD ? M : 1][HELD ? D / 16 : 1][4];
    float o[M][DV / 8][4], most[M][2], sum[M][2];  // rows g and g + 8 of each fragment

    // Rows 16·m … 16·m + 15, numbers 16·k … 16·k + 15 of Q.
    __device__ __forceinline__ void load_q(unsigned (&a)[4], int m, int k) const {
        ldmatrix(a, (T*)shared + along<D>(q_at, 2 * k) + m * 16 * Tile<D>::stride);
    }

    __device__ __forceinline__ void start(int row) {  // of Q in shared memory
        const int lane = threadIdx.x % 32;
        q_at = Tile<D>::at(row + lane % 16, lane / 16);
        k_at = Tile<D>::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
        v_at = Tile<DV>::at(lane % 16, lane / 16);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            most[m][0] = most[m][1] = LOWEST;
            sum[m][0] = sum[m][1] = 0;
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
            if constexpr (HELD) {
#pragma unroll
                for (int k = 0; k < D / 16; ++k) load_q(held[m][k], m, k);
            }
        }
    }

    // S = Q Kᵀ for the STEP keys at shared[keys].
    __device__ __forceinline__ void scores(float (&s)[M][N][4], int keys) const {
        keys += k_at;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
        // If Q is at hand, 32 keys at a time: the maximum of the first overlaps the next products.
        constexpr int PART = HELD && N % 4 == 0 ? 4 : N;
#pragma unroll
        for (int i = 0; i < N / PART * (D / 16); ++i) {
            const int part = i / (D / 16) * PART, k = i % (D / 16);
            unsigned a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if constexpr (HELD) {
                    for (int j = 0; j < 4; ++j) a[m][j] = held[m][k][j];
                } else {
                    load_q(a[m], m, k);
                }
            }
#pragma unroll
            for (int n = part; n < part + PART; n += 2) {
                unsigned b[4];
                ldmatrix(b, (T*)shared + along<D>(keys, 2 * k) + n * 8 * Tile<D>::stride);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma<T>(s[m][n], a[m], b[0], b[1]);
                    mma<T>(s[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // −∞ for keys that a query doesn't see: those after `last`, counted from the step's first, for
    // the warp's first query, one more for each further query; and those from `count` on.
    __device__ __forceinline__ void mask(float (&s)[M][N][4], int last, int count) const {
        const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = m * 16 + lane / 4 + i / 2 * 8;
                int seen = min(last + row + 1, count) - column - i % 2;
#pragma unroll
                for (int n = 0; n < N; ++n)
                    if (n * 8 >= seen) s[m][n][i] = -__int_as_float(0x7f800000);
            }
    }

    // Moves a row's m to its maximum so far, where `top` is this thread's part of it.
    __device__ __forceinline__ void move(float top, int m, int half) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float now = fmaxf(most[m][half], top), factor = exp2_fast(most[m][half] - now);
        most[m][half] = now;
        sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
            o[m][n][2 * half] *= factor;
            o[m][n][2 * half + 1] *= factor;
        }
    }

    // P of S, as left operands of the next product: two fragments of S side by side are one of P.
    __device__ __forceinline__ void softmax(
        unsigned (&p)[M][STEP / 16][4], const float (&s)[M][N][4], float scale) {
        float top[M][2];
        bool far = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float t = s[m][0][2 * half];
#pragma unroll
                for (int n = 0; n < N; ++n)
                    t = fmaxf(t, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top[m][half] = t * scale;
                far |= top[m][half] > most[m][half] + SLACK;
            }
        if (__any_sync(~0u, far)) {
#pragma unroll
            for (int m = 0; m < M; ++m) move(top[m][0], m, 0), move(top[m][1], m, 1);
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x = exp2_fast(fmaf(s[m][n][2 * half], scale, -most[m][half]));
                    float y = exp2_fast(fmaf(s[m][n][2 * half + 1], scale, -most[m][half]));
                    sum[m][half] += x + y;
                    p[m][n / 2][n % 2 * 2 + half] = pack<T>(x, y);
                }
    }

    // O += P V for the STEP keys whose values are at shared[values].
    __device__ __forceinline__ void add(const unsigned (&p)[M][STEP / 16][4], int values) {
        values += v_at;
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k)
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                unsigned b[4];
                ldmatrix_transposed(
                    b, (T*)shared + along<DV>(values, n) + k * 16 * Tile<DV>::stride);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma<T>(o[m][n], p[m][k], b[0], b[1]);
                    mma<T>(o[m][n + 1], p[m][k], b[2], b[3]);
                }
            }
    }

    // Takes STEP keys into account; last and count as for `mask`.
    template <bool MASKED>
    __device__ __forceinline__ void visit(int keys, int values, int last, int count, float scale) {
        float s[M][N][4];
        unsigned p[M][STEP / 16][4];
        scores(s, keys);
        if constexpr (MASKED) mask(s, last, count);
        softmax(p, s, scale);
        add(p, values);
    }

    // Stores the `count` first rows of lse, and of o: through shared memory, where the warp's rows
    // of Q begin at q, so that a thread writes 16 bytes.
    __device__ __forceinline__ void finish(T* q, T* o_out, int o_row, float* lse, int count) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum[m][half];
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                int row = m * 16 + half * 8 + lane / 4;
                if (lane % 4 == 0 && row < count) lse[row] = (most[m][half] + log2f(total)) * LN2;
                float factor = total == 0 ? 0 : __fdividef(1, total);
#pragma unroll
                for (int n = 0; n < DV / 8; ++n)
                    *(unsigned*)(q + Tile<D>::at(row, n) + lane % 4 * 2) =
                        pack<T>(o[m][n][2 * half] * factor, o[m][n][2 * half + 1] * factor);
            }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < M * 16 * DV / 8; i += 32) {
            int row = i / (DV / 8), chunk = i % (DV / 8);
            if (row < count)
                *(uint4*)(o_out + (long long)row * o_row + chunk * 8) =
                    *(uint4*)(q + Tile<D>::at(row, chunk));
        }
    }
};

// q (batch, heads, sq, D), k (…, sk, D), v (…, sk, DV), o (…, sq, DV) by strides in numbers; lse
// (batch, heads, sq). Query i sees keys 0 … i + behind. layout: null or words of bits, `words` for
// each of `layout_rows` blocks of queries, layout_head words from a head to the next. scale
// includes log2(e).
// Grid: heads at a time, of the batch · heads there are | tiles of queries | how many such times.
// So blocks of threads that run together have few heads, whose keys and values the L2 cache can
// hold, and the longest rows come first.
template <class T, int D, int DV, int WARPS, int ROWS, int TILE, int STEP, int STAGES, int HELD,
          int BLOCKS, int SPARSE>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) flash_forward(
    const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
    const unsigned* __restrict__ layout, T* __restrict__ o, float* __restrict__ lse, int batch,
    int heads, int sq, int sk, int behind, int layout_rows, int words, int q_row, int k_row,
    int v_row, int o_row, long long q_batch, long long q_head, long long k_batch,
    long long k_head, long long v_batch, long long v_head, long long o_batch, long long o_head,
    long long layout_head, float scale) {
    static_assert(STAGES > 1 && TILE % STEP == 0 && (!SPARSE || STEP == BLOCK));
    using Staged = Stages<T, D, DV, TILE, 32 * WARPS, SPARSE>;
    constexpr int OWN = WARPS * ROWS, FIRST = OWN * Tile<D>::stride;  // where stages begin
    const int pair = blockIdx.z * gridDim.x + blockIdx.x, head = pair % heads;
    if (pair >= batch * heads) return;
    const long long item = pair / heads;
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN;         // the block's first query
    const int own = threadIdx.x / 32 * ROWS, mine = first + own;  // the warp's
    layout += head * layout_head;
    KeyTiles<TILE, SPARSE> tiles(  // with keys up to the one that the last query sees
        min(sk, min(first + OWN, sq) + behind), layout + first / BLOCK * words,
        min((OWN + BLOCK - 1) / BLOCK, layout_rows - first / BLOCK), words);
    Staged stages{{k + item * k_batch + head * k_head, k_row},
                  {v + item * v_batch + head * v_head, v_row}, tiles, sk};
    Copier<T, D, 32 * WARPS>(q + item * q_batch + head * q_head, q_row)
        .template copy<OWN>((T*)shared, first, sq);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage)
        stages.load((T*)shared + FIRST + stage * Staged::SIZE);
    copy_wait<STAGES - 2>();
    __syncthreads();
    Queries<T, D, DV, ROWS / 16, STEP, HELD> queries;
    queries.start(own);

    for (int stage = 0, free = STAGES - 1; tiles.tile < tiles.end; tiles.next()) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this tile is there, and nobody needs the one before
        stages.load((T*)shared + FIRST + free * Staged::SIZE);
        unsigned seen = ~0u;  // a bit for each STEP
        if constexpr (SPARSE) {
            int bit = tiles.tile * (TILE / BLOCK), row = mine / BLOCK;
            seen = row < layout_rows ? __ldg(layout + row * words + bit / 32) >> bit % 32 : 0;
        }
#pragma unroll
        for (int step = 0; step < TILE / STEP; ++step) {
            const int key = tiles.tile * TILE + step * STEP, last = mine + behind - key;
            if (last + ROWS <= 0 || !(seen >> step & 1)) continue;  // all after the warp's queries
            const int k_at = FIRST + stage * Staged::SIZE + step * STEP * Tile<D>::stride;
            const int v_at = FIRST + stage * Staged::SIZE + Staged::VALUES +
                             step * STEP * Tile<DV>::stride;
            if (last < STEP - 1 || key + STEP > sk)
                queries.template visit<true>(k_at, v_at, last, sk - key, scale);
            else
                queries.template visit<false>(k_at, v_at, last, sk - key, scale);
        }
        free = stage;
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    queries.finish((T*)shared + own * Tile<D>::stride,
                   o + item * o_batch + head * o_head + (long long)mine * o_row, o_row,
                   lse + (item * heads + head) * sq + mine, sq - mine);
}
