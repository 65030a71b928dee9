// Attention, rung 3: the products on tensor cores. Chapter 13.
//
// One instruction of a warp, mma, multiplies a 16 × 16 by a 16 × 8 matrix on a tensor core; each
// thread would need 64 multiply-adds for it. A warp has 16 queries, a block WARPS · 16. Matrices
// are spread over the 32 lanes of a warp as warp.cuh says:
//
//     device memory       shared memory                      registers of a warp
//     Q ─────────────────────────────────────────────→ q    16 × D          left operand
//     K, KEYS rows ─────→ K tile ──ldmatrix──────────→      16 numbers × 8 keys, right operand
//                                                       s    16 × KEYS       = Q Kᵀ, in float32
//                                                       p    16 × KEYS       = exp(s − m), a left
//                                                                            operand as it lies
//     V, KEYS rows ─────→ V tile ──ldmatrix, transposed →    16 keys × 8 numbers, right operand
//     O ←──────────────────────────────────────────────  o    16 × D          += P V, in float32
//
// Two scores side by side in a lane's s become one register of p: the second product takes the
// first one's result without moving it between lanes. A row lies in four lanes, so its maximum and
// sum take two exchanges (shuffles).
//
// Shared memory: K tile | V tile, KEYS rows of D 16-bit numbers each, row after row.
//
// Bound: the 4 · S² · D FLOP of a head would be 4.3 µs of an H100's tensor cores at S 4096 and D 64.
// They starve here. ldmatrix reads eight rows at once, 16 bytes of each. Rows are 2 · D bytes
// apart, a multiple of the 128 bytes that all 32 banks give in a cycle:
//
//     bank    0 … 3   4 … 7   8 … 11          28 … 31
//     row 0   [here]
//     row 1   [here]                           all eight rows meet in four banks, which give
//      …        …                              one after the other: 8 cycles instead of 1
//     row 7   [here]
//
// One ldmatrix of four such matrices takes 32 cycles of the multiprocessor and feeds two products
// of 4096 FLOP: 256 FLOP a cycle, 59 TFLOP/s on an H100 and no more.

extern __shared__ __align__(128) char shared[];

constexpr float LOWEST = -3.402823466e38f;  // below all scores

// Where chunk `chunk` (numbers 8 · chunk … 8 · chunk + 7) of a row lies in a tile.
template <int D> __device__ __forceinline__ int at(int row, int chunk) {
    return row * D + chunk * 8;
}

// Copies KEYS rows, of which `rows` are there, by all threads of the block, 16 bytes at a time.
template <class T, int D, int KEYS, int THREADS>
__device__ __forceinline__ void load(T* tile, const T* from, int rows) {
    constexpr int CHUNKS = D / 8;
    static_assert(THREADS % CHUNKS == 0 && KEYS * CHUNKS % THREADS == 0);
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS; i += THREADS) {
        int row = (i + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
        uint4 numbers = make_uint4(0, 0, 0, 0);
        if (row < rows) numbers = *(const uint4*)(from + row * D + chunk * 8);
        *(uint4*)(tile + at<D>(row, chunk)) = numbers;
    }
}

// A warp's 16 queries: their softmax so far, and the sum over keys that goes with it. A lane has
// parts of rows g = lane / 4 and g + 8.
template <class T, int D, int KEYS> struct Queries {
    unsigned q[D / 16][4];
    float o[D / 8][4], most[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};

    // Reads queries from device memory, `rows` of them.
    __device__ __forceinline__ void start(const T* from, int rows) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = g + i % 2 * 8, column = k * 16 + i / 2 * 8 + 2 * t;
                q[k][i] = row < rows ? *(const unsigned*)(from + row * D + column) : 0;
            }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
    }

    // S = Q Kᵀ.
    __device__ __forceinline__ void scores(float (&s)[KEYS / 8][4], const T* k_tile) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                unsigned b[4];
                int row = n * 8 + lane / 16 * 8 + lane % 8, chunk = 2 * k + lane / 8 % 2;
                ldmatrix(b, k_tile + at<D>(row, chunk));
                mma<T>(s[n], q[k], b[0], b[1]);
                mma<T>(s[n + 1], q[k], b[2], b[3]);
            }
    }

    // LOWEST for keys that a query doesn't see. The warp's first query sees `seen` keys of the
    // tile, each further query `more` more, and none more than `most_seen`.
    __device__ __forceinline__ void mask(
        float (&s)[KEYS / 8][4], int seen, int more, int most_seen) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = g + i / 2 * 8, key = n * 8 + 2 * t + i % 2;
                if (key >= min(seen + row * more, most_seen)) s[n][i] = LOWEST;
            }
    }

    // P = exp(scale · S − m), where m is each row's maximum so far, and P's sum.
    __device__ __forceinline__ void softmax(
        unsigned (&p)[KEYS / 16][4], float (&s)[KEYS / 8][4], float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            float now = most[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                s[n][2 * half] *= scale;
                s[n][2 * half + 1] *= scale;
                now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            }
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            float factor = __expf(most[half] - now);
            most[half] = now;
            sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                o[n][2 * half] *= factor;
                o[n][2 * half + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                float x = __expf(s[n][2 * half] - now), y = __expf(s[n][2 * half + 1] - now);
                sum[half] += x + y;
                p[n / 2][n % 2 * 2 + half] = pack<T>(x, y);
            }
        }
    }

    // O += P V.
    __device__ __forceinline__ void add(const unsigned (&p)[KEYS / 16][4], const T* v_tile) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                unsigned b[4];
                ldmatrix_transposed(b, v_tile + at<D>(k * 16 + lane % 16, n + lane / 16));
                mma<T>(o[n], p[k], b[0], b[1]);
                mma<T>(o[n + 1], p[k], b[2], b[3]);
            }
    }

    // Writes o, `rows` rows of it.
    __device__ __forceinline__ void finish(T* to, int rows) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
            int row = g + half * 8;
            if (row < rows)
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    *(unsigned*)(to + row * D + n * 8 + 2 * t) =
                        pack<T>(o[n][2 * half] / sum[half], o[n][2 * half + 1] / sum[half]);
        }
    }
};

// q, k, v and o (batch, heads, length, D), contiguous. Grid: tiles of queries | batch · heads.
template <class T, int D, int WARPS, int KEYS>
__global__ void __launch_bounds__(32 * WARPS, D > 64 ? 2 : 3) tensor_cores(
    const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ o,
    int length, int causal, float scale) {
    T* k_tile = (T*)shared;
    T* v_tile = k_tile + KEYS * D;
    const int first = blockIdx.x * WARPS * 16, mine = first + threadIdx.x / 32 * 16;
    const long long head = (long long)blockIdx.y * length * D;
    k += head, v += head;

    Queries<T, D, KEYS> queries;
    queries.start(q + head + (long long)mine * D, length - mine);
    const int end = causal ? min(first + WARPS * 16, length) : length;  // of what the block sees
    for (int key = 0; key < end; key += KEYS) {
        __syncthreads();  // nobody works on the old tiles any more
        load<T, D, KEYS, 32 * WARPS>(k_tile, k + (long long)key * D, length - key);
        load<T, D, KEYS, 32 * WARPS>(v_tile, v + (long long)key * D, length - key);
        __syncthreads();  // the tiles are complete
        float s[KEYS / 8][4];
        unsigned p[KEYS / 16][4];
        queries.scores(s, k_tile);
        const int seen = causal ? mine + 1 - key : KEYS;  // of the tile, by the first query
        if (min(seen, length - key) < KEYS) queries.mask(s, seen, causal, length - key);
        queries.softmax(p, s, scale);
        queries.add(p, v_tile);
    }
    queries.finish(o + head + (long long)mine * D, length - mine);
}
