// Attention, rung 1: the formula as it stands. o = softmax(scale · q Kᵀ) V. Chapter 12.
//
// A block of D threads has one query. It works in three steps, between which all threads wait:
//
//     q ·  K            thread i takes keys i, i + D, i + 2D, …: a thread a score
//     [ s₀ s₁ s₂ … ]    the scores, in shared memory
//       ↓  ↓  ↓         p = exp(s − maximum), sum = Σ p: a maximum and a sum over all threads
//     [ p₀ p₁ p₂ … ]
//          Σ pⱼ vⱼ      thread c takes number c of o, over all keys: a thread an output
//
// Shared memory: S floats, the scores, then the weights p | D floats, for maximum and sum.
//
// Bound: every query reads all keys and values, 2 · S · D numbers, for 4 · S · D FLOP: with two
// bytes a number, one FLOP a byte. They come from the L2 cache, since other queries read them, too,
// but no memory is fast enough for that. The first step is worse: the 32 threads of a warp read 32
// different rows of K, one number of each at a time, so a load that could take one access to the
// cache takes 32. In the last step they read 32 numbers side by side.

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

// The sum or the maximum of what all threads of the block bring, by halving their number.
template <int THREADS, bool MAXIMUM>
__device__ __forceinline__ float reduce(float* room, float mine) {
    room[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            float other = room[threadIdx.x + half];
            room[threadIdx.x] = mine = MAXIMUM ? fmaxf(mine, other) : mine + other;
        }
    }
    __syncthreads();
    float result = room[0];
    __syncthreads();  // so that nobody uses the room again before all have read
    return result;
}

// q, k, v and o (batch, heads, length, D), contiguous. Grid: queries | batch · heads. D threads.
template <class T, int D>
__global__ void __launch_bounds__(D) naive(const T* __restrict__ q, const T* __restrict__ k,
                                           const T* __restrict__ v, T* __restrict__ o, int length,
                                           int causal, float scale) {
    static_assert((D & D - 1) == 0, "reduce halves the number of threads");
    float* weights = (float*)shared;
    float* room = weights + length;
    const int me = threadIdx.x, query = blockIdx.x, keys = causal ? query + 1 : length;
    const long long head = (long long)blockIdx.y * length * D;
    q += head + (long long)query * D, k += head, v += head, o += head + (long long)query * D;

    float most = LOWEST;
    for (int key = me; key < keys; key += D) {
        float score = 0;
        for (int c = 0; c < D; ++c) score += to_float(q[c]) * to_float(k[(long long)key * D + c]);
        weights[key] = score * scale;
        most = fmaxf(most, weights[key]);
    }
    most = reduce<D, true>(room, most);

    float sum = 0;
    for (int key = me; key < keys; key += D) {
        weights[key] = expf(weights[key] - most);
        sum += weights[key];
    }
    sum = reduce<D, false>(room, sum);

    float total = 0;
    for (int key = 0; key < keys; ++key)
        total += weights[key] * to_float(v[(long long)key * D + me]);
    store(o + me, total / sum);
}
