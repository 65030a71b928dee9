// Attention, rung 2: tiles in shared memory, and a softmax that needs no second look (Milakov &
// Gimelshein 2018; Dao et al. 2022, FlashAttention, algorithm 1). Chapter 12.
//
// A thread has one query, a block THREADS of them. The block loads KEYS keys and values, side by
// side, uses them for all its queries, and forgets them:
//
//     device memory      shared memory       registers of thread i
//     K ┌──────┐         ┌──────┐ K tile     q   its query
//       │ tile │ ──────→ │      │ ─────────→ s   STEP scores, masked
//       │      │         ├──────┤ V tile     p = exp(s − m)
//     V ┌──────┐ ──────→ │      │ ─────────→ o   += p · v
//       │ tile │         └──────┘
//
// The maximum m of a row is not known before its end, so m is the maximum so far. When it grows,
// what was summed with the old m is multiplied by exp(old m − m), which is what it lacks. So no
// score is kept: neither S of them in shared memory, as in rung 1, nor a matrix in device memory.
//
// Shared memory: K tile | V tile, KEYS × D floats each.
// Registers of a thread: D for q, D for o, STEP for s. All loops over them are unrolled, because
// registers have no addresses.
//
// Bound: a tile is read from device memory once for THREADS queries, so memory no longer matters.
// The 2 · S · D multiply-adds of a query do; a multiprocessor of an H100 does 128 a cycle. Shared
// memory keeps up: all threads of a warp read the same four numbers of a tile, which takes a cycle
// and feeds four multiply-adds of 32 threads, 128 again. So the floor is 4 · S² · D FLOP a head at
// 67 TFLOP/s (8 on a T4), and all else the kernel does comes on top.

extern __shared__ __align__(128) char shared[];

constexpr float LOWEST = -3.402823466e38f;  // below all scores

// Numbers as the GPU computes with them, and as they are stored. Unlike pack of warp.cuh, which
// converts two at once, this works on every GPU.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}
__device__ __forceinline__ float to_float(fp16 x) { return unpack<fp16>(x.bits).x; }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16* to, float x) {  // the upper half, rounded to nearest
    unsigned bits = __float_as_uint(x);
    to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
__device__ __forceinline__ void store(fp16* to, float x) {
#ifdef __CUDACC_RTC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    to->bits = pack<fp16>(x, 0);
#endif
}

// A query's softmax so far, and the sum over keys that goes with it.
template <int D, int STEP> struct Query {
    float q[D], o[D];
    float most = LOWEST, sum = 0;

    // The scores of STEP keys, one after the other in a tile.
    __device__ __forceinline__ void scores(float (&s)[STEP], const float* k_tile) const {
#pragma unroll
        for (int j = 0; j < STEP; ++j) s[j] = 0;
#pragma unroll
        for (int c = 0; c < D; c += 4)
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                float4 k = *(const float4*)(k_tile + j * D + c);
                s[j] += q[c] * k.x;
                s[j] += q[c + 1] * k.y;
                s[j] += q[c + 2] * k.z;
                s[j] += q[c + 3] * k.w;
            }
    }

    // Turns STEP scores into weights, and scales the sums if the maximum grew.
    __device__ __forceinline__ void softmax(float (&s)[STEP]) {
        float now = most;
#pragma unroll
        for (int j = 0; j < STEP; ++j) now = fmaxf(now, s[j]);
        float factor = __expf(most - now);
        most = now;
        sum *= factor;
#pragma unroll
        for (int c = 0; c < D; ++c) o[c] *= factor;
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            s[j] = __expf(s[j] - most);
            sum += s[j];
        }
    }

    // Adds STEP values by their weights.
    __device__ __forceinline__ void add(const float (&p)[STEP], const float* v_tile) {
#pragma unroll
        for (int j = 0; j < STEP; ++j)
#pragma unroll
            for (int c = 0; c < D; c += 4) {
                float4 v = *(const float4*)(v_tile + j * D + c);
                o[c] += p[j] * v.x;
                o[c + 1] += p[j] * v.y;
                o[c + 2] += p[j] * v.z;
                o[c + 3] += p[j] * v.w;
            }
    }
};

// Copies KEYS rows, of which `rows` are there, by all threads: neighbours read neighbours.
template <class T, int D, int KEYS, int THREADS>
__device__ __forceinline__ void load(float* tile, const T* from, int rows) {
    static_assert(KEYS * D % THREADS == 0);
#pragma unroll
    for (int i = 0; i < KEYS * D; i += THREADS) {
        int at = i + threadIdx.x;
        tile[at] = at / D < rows ? to_float(from[at]) : 0;
    }
}

// q, k, v and o (batch, heads, length, D), contiguous. Grid: tiles of queries | batch · heads.
template <class T, int D, int THREADS, int KEYS>
__global__ void __launch_bounds__(THREADS) tiled(const T* __restrict__ q, const T* __restrict__ k,
                                                 const T* __restrict__ v, T* __restrict__ o,
                                                 int length, int causal, float scale) {
    constexpr int STEP = 8;  // keys at a time
    float* k_tile = (float*)shared;
    float* v_tile = k_tile + KEYS * D;
    const int first = blockIdx.x * THREADS, query = first + threadIdx.x;
    const long long head = (long long)blockIdx.y * length * D;
    q += head + (long long)query * D, k += head, v += head, o += head + (long long)query * D;

    Query<D, STEP> mine;
#pragma unroll
    for (int c = 0; c < D; ++c) {
        mine.q[c] = query < length ? to_float(q[c]) * scale : 0;
        mine.o[c] = 0;
    }
    const int end = causal ? min(first + THREADS, length) : length;  // of what the block sees
    const int seen = causal ? min(query + 1, length) : length;       // of what the thread sees
    for (int key = 0; key < end; key += KEYS) {
        __syncthreads();  // nobody works on the old tiles any more
        load<T, D, KEYS, THREADS>(k_tile, k + (long long)key * D, length - key);
        load<T, D, KEYS, THREADS>(v_tile, v + (long long)key * D, length - key);
        __syncthreads();  // the tiles are complete
#pragma unroll 1
        for (int step = 0; step < KEYS; step += STEP) {
            float s[STEP];
            mine.scores(s, k_tile + step * D);
#pragma unroll
            for (int j = 0; j < STEP; ++j)
                if (key + step + j >= seen) s[j] = LOWEST;
            mine.softmax(s);
            mine.add(s, v_tile + step * D);
        }
    }
    if (query < length)
#pragma unroll
        for (int c = 0; c < D; ++c) store(o + c, mine.o[c] / mine.sum);
}
