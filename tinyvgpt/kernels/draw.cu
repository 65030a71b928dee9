// From logits to the next token and what the transformer reads of it. Chapter 15.
//
// A block a clip, a thread ITEMS neighbouring codes. Logits are first guided and divided by the
// temperature, then codes outside the k likeliest, and outside the likeliest that together reach
// top_p, are left out (as sampling.SamplingRule.probabilities); of the rest the one is taken at which
// the cumulative sum passes u.
//
// Which codes are kept is a matter of one number, the least that stays, and nothing is sorted for
// it: an unsigned number is found from its highest eight bits to its lowest, four times with a count
// for each of 256 values (a radix select). Probabilities are added up as whole numbers, multiples of
// 2^-46 of the likeliest: such sums don't depend on their order, so equal logits give equal tokens.
//
// Then, for the step that follows: the token's projected code vector and the next position's offset
// are added up to x, and the clip is one token longer.
//
// Limit: some trips to memory and some barriers, whatever the number of codes up to a few thousand,
// and more barriers for top-k, and for top-p.

typedef unsigned long long u64;

struct Shared {
    u64 bins[256], scan[32];
    float most[32];
    unsigned digit, token;
    u64 above;
};
__shared__ Shared block;

__device__ __forceinline__ float most_of_block(float x, int warps) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int bit = 16; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
    if (lane == 0) block.most[warp] = x;
    __syncthreads();
    x = block.most[lane < warps ? lane : 0];
#pragma unroll
    for (int bit = 16; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
    __syncthreads();
    return x;
}

// Sum over the threads before this one; total gets that over all.
__device__ __forceinline__ u64 sum_before(u64 x, int warps, u64& total) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 up_to = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        u64 other = __shfl_sync(~0u, up_to, max(lane - step, 0));
        if (lane >= step) up_to += other;
    }
    if (lane == 31) block.scan[warp] = up_to;
    __syncthreads();
    u64 before = up_to - x;
    total = 0;
    for (int i = 0; i < warps; ++i) {
        u64 one = block.scan[i];
        total += one, before += i < warp ? one : 0;
    }
    __syncthreads();
    return before;
}

// The least key such that keys above it weigh less than `limit`. Keys of weight 0 don't count.
template <int ITEMS>
__device__ __forceinline__ unsigned least_key(
    const unsigned (&keys)[ITEMS], const u64 (&weights)[ITEMS], double limit, int warps) {
    unsigned prefix = 0;
    u64 above = 0;  // weight of the keys above all that begin as the prefix
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += 32 * warps) block.bins[i] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
            if (weights[i] && (shift == 24 || keys[i] >> (shift + 8) == prefix))
                atomicAdd(&block.bins[keys[i] >> shift & 255], weights[i]);
        __syncthreads();
        u64 mine = threadIdx.x < 256 ? block.bins[255 - threadIdx.x] : 0, total;
        u64 higher = above + sum_before(mine, warps, total);
        // Of the values that occur, the lowest with less than the limit above it: the next one has
        // more, or there is none.
        u64 next = higher + mine;
        if (mine && (double)higher < limit && ((double)next >= limit || next == above + total))
            block.digit = 255 - threadIdx.x, block.above = higher;
        __syncthreads();
        prefix = prefix << 8 | block.digit, above = block.above;
        __syncthreads();
    }
    return prefix;
}

// logits: a row a clip, and if guided another of each, without its label, `clips` rows below. u: in
// [0, 1), (clips, positions). tokens: (clips, positions). lengths: of each row, the position to be
// drawn plus 1; they grow by 1. table: (codes, width). offsets: (positions, width), those of row b at
// b · offset_stride. x: (rows, width), what the next step begins with.
template <int THREADS, int ITEMS>
__global__ void __launch_bounds__(THREADS) draw(
    const float* logits, const double* u, long long* tokens, int* lengths, const float* table,
    const float* offsets, float* x, int codes, int positions, int width, int clips, int guided,
    int top_k, float guidance, float temperature, float top_p, long long offset_stride) {
    constexpr int warps = THREADS / 32;
    static_assert(THREADS >= 256, "a thread for each value of eight bits");
    const float none = -__uint_as_float(0x7f800000);
    int clip = blockIdx.x, position = __ldcg(lengths + clip) - 1, first = threadIdx.x * ITEMS;
    double at = u[(long long)clip * positions + position];
    wait_for_former();
    let_next_begin();
    logits += (long long)clip * codes;

    float z[ITEMS], most = none;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        z[i] = none;
        if (first + i < codes) {
            z[i] = logits[first + i];
            if (guided) {
                float without = logits[(long long)clips * codes + first + i];
                z[i] = without + guidance * (z[i] - without);
            }
        }
        most = fmaxf(most, z[i]);
    }
    most = most_of_block(most, warps);

    unsigned keys[ITEMS];  // ordered as the logits are
    u64 mass[ITEMS], sum = 0, total;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        unsigned bits = __float_as_uint(z[i]);
        keys[i] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        mass[i] = first + i < codes;
    }
    unsigned least = 0;
    if (top_k && temperature > 0) least = least_key(keys, mass, top_k, warps);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        float p = temperature > 0 ? __expf((z[i] - most) / temperature) : z[i] == most ? 1.f : 0.f;
        bool kept = first + i < codes && keys[i] >= least;
        mass[i] = kept ? (u64)(p * 70368744177664.0) : 0;  // 2^46
        keys[i] = __float_as_uint(p);
        sum += mass[i];
    }
    u64 before = sum_before(sum, warps, total);
    if (top_p < 1 && temperature > 0) {
        least = least_key(keys, mass, top_p * (double)total, warps);
        sum = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (keys[i] < least) mass[i] = 0;
            sum += mass[i];
        }
        before = sum_before(sum, warps, total);
    }

    if (threadIdx.x == 0) block.token = 0;  // if logits are no numbers
    __syncthreads();
    u64 target = temperature > 0 ? (u64)(at * (double)total) : 0;
    target = min(target, total - 1);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (before <= target && target < before + mass[i]) block.token = first + i;
        before += mass[i];
    }
    __syncthreads();

    int token = block.token;
    if (threadIdx.x == 0) tokens[(long long)clip * positions + position] = token;
    bool more = position + 1 < positions;
    for (int half = 0; half <= guided; ++half) {
        long long row = clip + half * clips;
        for (int i = threadIdx.x; i < width && more; i += THREADS)
            x[row * width + i] = table[(long long)token * width + i]
                + offsets[row * offset_stride + (long long)(position + 1) * width + i];
        if (threadIdx.x == 0) lengths[row] = position + 2;
    }
}
