// Decode attention: one query a sequence against a cache of keys and values. Chapter 14.
//
//     o = softmax(scale · q Kᵀ) V,    q: D numbers,  K: n × D,  V: n × DV,  n = lengths[b]
//
// A number of the cache is used once, for one multiplication, so the time is that of reading the
// cache: 2·(D + DV) bytes a key, 0.33 µs a MB at 3 TB/s. All that matters is to have enough bytes
// on the way, some 40 KB a multiprocessor, and all multiprocessors at work, even for one sequence.
//
//   grid    (splits, heads, batch). A block takes a part of the keys of one sequence and head. It
//           finds its part from lengths[b], so a grid serves all lengths. The block that finishes
//           last merges the parts, always in the same order (split-K, as in Flash-Decoding). With
//           CLUSTER > 1 a sequence and head's blocks are a cluster of so many, and send their parts
//           to the shared memory of one of them: a trip to device memory and back less.
//   block   WARPS warps. Neighbouring warps read neighbouring keys, 4 each.
//   warp    4 groups of 8 lanes. A group takes a key at a time: lane i has chunks i, i + 8, … of
//           its row, a chunk being 8 numbers, 16 bytes. Each group keeps a softmax of its own.
//   stage   KEYS keys a group. STAGES stages are on the way at once.
//
// In a decoding step the former kernel makes the query and the newest key and value. All other keys
// and values are there before: the first stages are under way while that kernel still runs.
//
// Shared memory: WARPS × STAGES × KEYS × (chunks a lane of k and of v) × 32 × 16 bytes. A lane
// copies its own chunks there and nobody else reads them, so there is nothing to wait for but the
// copy: shared memory serves as more registers. Afterwards: a result of DV + 2 floats a warp.
// Behind it, in a cluster: a result of each of its blocks.

extern __shared__ __align__(128) char shared[];

#ifndef __CUDACC_RTC__  // on a CPU, in tests
inline unsigned atomicInc(unsigned* p, unsigned most) {
    unsigned old = *p;
    *p = old >= most ? 0 : old + 1;
    return old;
}
#endif

constexpr int LANES = 8;             // share a key
constexpr int GROUPS = 32 / LANES;   // of a warp
constexpr int BLOCK = 32;            // keys of a layout's block
constexpr int GRANULE = 16;          // keys; splits begin at multiples of it
constexpr float LOWEST = -3.402823466e38f;  // below all scores, yet its differences are numbers
#define NONE (-__uint_as_float(0x7f800000))  // -infinity, the score of a key that isn't there
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Chunks of a row of D numbers that a lane has; those past the row's end are zeros.
template <int D> constexpr int chunks = (D + 8 * LANES - 1) / (8 * LANES);

// Attention over some of the keys: with scores s in powers of 2, most = max s,
// sum = Σ 2^(s - most) and o = Σ 2^(s - most) v, of which a lane has N numbers.
template <int N> struct Part {
    float most = LOWEST, sum = 0, o[N] = {};

    __device__ __forceinline__ void rescale(float most_now) {
        float factor = exp2_fast(most - most_now);
        most = most_now, sum *= factor;
#pragma unroll
        for (int i = 0; i < N; ++i) o[i] *= factor;
    }
};

// Which keys a block visits: numbers start … end - 1 of those that its query sees. With a layout
// these are the keys of the blocks that a row of it lists.
template <bool LAYOUT> struct Keys {
    int start, end;
    bool newest = false;  // whether the newest key is seen, and apart from these
    const int* blocks;

    // Takes this block's part; returns how many blocks have one. row: how many blocks of keys come
    // before the query's own, whether that is seen too, then which they are. fresh: the newest key
    // is not in the cache yet.
    __device__ __forceinline__ int choose(int length, const int* row, bool fresh) {
        end = length, newest = fresh;
        if (LAYOUT && length > 0) {  // the own block's later keys don't exist yet
            end = row[0] * BLOCK + (row[1] ? (length - 1) % BLOCK + 1 : 0), blocks = row + 2;
            newest = fresh && row[1];
        }
        end -= newest;
        unsigned granules = (end + GRANULE - 1) / GRANULE, splits = gridDim.x;
        unsigned each = max((granules + splits - 1) / splits, 1u);  // granules of a part
        start = blockIdx.x * each * GRANULE;
        end = min(end, start + (int)each * GRANULE);
        return max((granules + each - 1) / each, 1u);
    }
    __device__ __forceinline__ int at(int i, bool there) const {
        if (!LAYOUT) return i;
        return there ? __ldg(blocks + i / BLOCK) * BLOCK + i % BLOCK : 0;
    }
};

// Keys or values of one sequence and head, as a lane sees them: in chunks, its own first one at 0.
template <int D> struct Rows {
    const uint4* cache;
    int stride;  // from a row to the next

    template <class T> __device__ __forceinline__ Rows(const T* from, long long step) {
        cache = (const uint4*)from + threadIdx.x % LANES, stride = (int)(step / 8);
    }
    // Copies this lane's chunks of row `key` to slot[0], slot[32], …; zeros if not `there`.
    __device__ __forceinline__ void copy(uint4* slot, int key, bool there) const {
        const uint4* row = cache + key * stride;
#pragma unroll
        for (int i = 0; i < chunks<D>; ++i) {
            bool inside = LANES * (i + 1) <= D / 8 || threadIdx.x % LANES + LANES * i < D / 8;
            copy_async(slot + 32 * i, row + LANES * i, there && inside);
        }
    }
};

template <class T> __device__ __forceinline__ void unpack8(float (&x)[8], uint4 chunk) {
    unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 two = unpack<T>(words[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}

// This lane's chunks of a row of D numbers.
template <int D, class T>
__device__ __forceinline__ void load_chunks(uint4 (&row)[chunks<D>], const T* from) {
    int chunk = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < chunks<D>; ++i, chunk += LANES) {
        row[i] = make_uint4(0, 0, 0, 0);
        if (chunk < D / 8) row[i] = *(const uint4*)(from + chunk * 8);
    }
}

// The score of the key in slot[0], slot[STEP], …: each lane gets the sum over its group.
template <class T, int N, int STEP>
__device__ __forceinline__ float score(const float (&q)[N][8], const uint4* slot) {
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float k[8];
        unpack8<T>(k, slot[STEP * i]);
#pragma unroll
        for (int j = 0; j < 8; j += 2) even += q[i][j] * k[j], odd += q[i][j + 1] * k[j + 1];
    }
    float sum = even + odd;
#pragma unroll
    for (int bit = 1; bit < LANES; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    return sum;
}

// Adds p times the value in slot[0], slot[STEP], …
template <class T, int N, int STEP>
__device__ __forceinline__ void add_value(Part<8 * N>& part, float p, const uint4* slot) {
    part.sum += p;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float v[8];
        unpack8<T>(v, slot[STEP * i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) part.o[8 * i + j] += p * v[j];
    }
}

// The keys and values on their way to a lane, and what its group makes of them.
template <class T, int D, int DV, int WARPS, int STAGES, int KEYS, bool LAYOUT> struct Stream {
    static constexpr int apart = WARPS * GROUPS;  // from one key of a group to its next
    static constexpr int k_slots = chunks<D> * 32, slots = k_slots + chunks<DV> * 32;
    Rows<D> k;
    Rows<DV> v;
    Keys<LAYOUT> keys;
    uint4* ring;  // this lane's slots: STAGES stages of KEYS keys
    int first, steps;

    __device__ __forceinline__ Stream(const Rows<D>& k, const Rows<DV>& v, const Keys<LAYOUT>& keys)
        : k(k), v(v), keys(keys) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        ring = (uint4*)shared + warp * STAGES * KEYS * slots + lane;
        first = keys.start + threadIdx.x / LANES;
        steps = (keys.end - keys.start + apart * KEYS - 1) / (apart * KEYS);
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) request(stage, stage);
    }
    __device__ __forceinline__ int index(int step, int i) const {
        return first + (step * KEYS + i) * apart;
    }
    __device__ __forceinline__ void request(int step, int stage) {
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                bool there = index(step, i) < keys.end;
                int key = keys.at(index(step, i), there);
                uint4* slot = ring + (stage * KEYS + i) * slots;
                k.copy(slot, key, there);
                v.copy(slot + k_slots, key, there);
            }
        }
        copy_commit();  // an empty group, too, so that a wait counts steps
    }
    __device__ __forceinline__ void attend(
        Part<8 * chunks<DV>>& part, const float (&q)[chunks<D>][8]) {
        for (int step = 0, stage = 0; step < steps; ++step) {
            copy_wait<STAGES - 1>();
            const uint4* slot = ring + stage * KEYS * slots;
            float s[KEYS], most = part.most;
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                float sum = score<T, chunks<D>, 32>(q, slot + i * slots);
                s[i] = index(step, i) < keys.end ? sum : NONE;
                most = fmaxf(most, s[i]);
            }
            part.rescale(most);
#pragma unroll
            for (int i = 0; i < KEYS; ++i)
                add_value<T, chunks<DV>, 32>(
                    part, exp2_fast(s[i] - most), slot + i * slots + k_slots);
            request(step + STAGES, stage);  // into the slots that were just read
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
};

// Merges the groups of a warp and writes the result: most, sum, o.
template <int DV>
__device__ __forceinline__ void merge_groups(Part<8 * chunks<DV>> part, float* result) {
#pragma unroll
    for (int bit = LANES; bit < 32; bit *= 2) {
        part.rescale(fmaxf(part.most, __shfl_xor_sync(~0u, part.most, bit)));
        part.sum += __shfl_xor_sync(~0u, part.sum, bit);
#pragma unroll
        for (int i = 0; i < 8 * chunks<DV>; ++i)
            part.o[i] += __shfl_xor_sync(~0u, part.o[i], bit);
    }
    int lane = threadIdx.x % 32;
    if (lane == 0) result[0] = part.most, result[1] = part.sum;
#pragma unroll
    for (int i = 0; i < chunks<DV>; ++i) {
        int chunk = lane + LANES * i;
        if (lane >= LANES || chunk >= DV / 8) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) result[2 + chunk * 8 + j] = part.o[8 * i + j];
    }
}

// Merges results first, first + step, … of `count`, for columns 2·pair and 2·pair + 1: eight at a
// time, since one waits for memory as long as eight do.
template <int DV>
__device__ __forceinline__ Part<2> merge(
    const float* results, int first, int step, int count, int pair) {
    Part<2> all;
    for (int i = first; i < count; i += 8 * step) {
        float2 head[8], o[8];
        float most = all.most;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            int which = i + j * step;
            const float2* result = (const float2*)(results + min(which, count - 1) * (DV + 2));
            head[j] = result[0], o[j] = result[1 + pair];
            if (which >= count) head[j].x = NONE;
            most = fmaxf(most, head[j].x);
        }
        all.rescale(most);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float factor = exp2_fast(head[j].x - most);
            all.sum += factor * head[j].y;
            all.o[0] += factor * o[j].x, all.o[1] += factor * o[j].y;
        }
    }
    return all;
}

template <int DV>
__device__ __forceinline__ void put(float* result, int pair, const Part<2>& part) {
    if (pair == 0) *(float2*)result = make_float2(part.most, part.sum);
    *(float2*)(result + 2 + 2 * pair) = make_float2(part.o[0], part.o[1]);
}

// Merges this block's part with those of the other `parts` - 1 blocks of its cluster, in the last
// one's shared memory. False but for that block.
template <int DV>
__device__ __forceinline__ bool merge_cluster(Part<2>& part, float* results, int parts) {
    int pair = threadIdx.x, last = parts - 1;
    float2* mine = (float2*)(results + blockIdx.x * (DV + 2));
    cluster_wait();  // until all blocks have begun
    if (pair == 0) store_remote(mine, last, make_float2(part.most, part.sum));
    if (pair < DV / 2) store_remote(mine + 1 + pair, last, make_float2(part.o[0], part.o[1]));
    cluster_arrive();
    if ((int)blockIdx.x != last) return false;
    cluster_wait();  // until all have sent theirs
    if (pair < DV / 2) part = merge<DV>(results, 0, 1, parts, pair);
    return true;
}

// Merges this block's part with those of the other `parts` - 1 blocks of the same sequence and
// head. False but for the block that comes last: only it has all of them.
template <int DV, int WARPS>
__device__ __forceinline__ bool merge_blocks(
    Part<2>& part, float* partials, unsigned* arrived, int parts) {
    int pair = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* results = (float*)shared;
    if (pair < DV / 2) put<DV>(partials + blockIdx.x * (DV + 2), pair, part);
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();  // what the block wrote is seen before its count,
        // which goes back to 0 after parts - 1 and so is ready for the next launch,
        last = atomicInc(arrived, parts - 1) == parts - 1;
        __threadfence();  // and what others wrote is read after theirs
    }
    if (!__syncthreads_or(last)) return false;
    for (int i = lane; i < DV / 2; i += 32)
        put<DV>(results + warp * (DV + 2), i, merge<DV>(partials, warp, WARPS, parts, i));
    __syncthreads();
    if (pair < DV / 2) part = merge<DV>(results, 0, 1, WARPS, pair);
    return true;
}

// Writes a row of D numbers, of which the first lanes have their chunks.
template <int D, class T>
__device__ __forceinline__ void append(T* row, const uint4 (&from)[chunks<D>]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < chunks<D>; ++i)
        if (lane < LANES && lane + LANES * i < D / 8) ((uint4*)row)[lane + LANES * i] = from[i];
}

// q, k_new, v_new: a row for each (batch, head); caches (batch, head, capacity, D or DV); strides
// count numbers. layout, if there is one: for each head (stride layout_head) and each block of 32
// positions (stride layout_row) a row as in Keys::choose. o, lse: contiguous.
// partials: (batch, head, split, DV + 2); arrived: (batch, head), zeros, and left so.
// CLUSTER: blocks of a cluster, which are then all of a sequence and head, or 1.
template <class T, int D, int DV, int WARPS, int STAGES, int KEYS, int CLUSTER, bool LAYOUT>
__global__ void __launch_bounds__(WARPS * 32) decode(
    const T* q, T* k_cache, T* v_cache, const T* k_new, const T* v_new, const int* lengths,
    const int* layout, T* o, float* lse, float* partials, unsigned* arrived, int capacity,
    long long q_batch, long long q_head, long long k_batch, long long k_head, long long k_row,
    long long v_batch, long long v_head, long long v_row, long long k_new_batch,
    long long k_new_head, long long v_new_batch, long long v_new_head, long long layout_head,
    long long layout_row, float scale) {
    static_assert(WARPS > 1 && WARPS * 32 >= DV / 2, "a thread for each two columns");
    long long batch = blockIdx.z, head = blockIdx.y, which = batch * gridDim.y + head;
    int length = __ldcg(lengths + batch), newest = length - 1;
    bool wrong = length < 0 || length > capacity;  // gives NaN
    bool fresh = k_new && newest >= 0 && !wrong;
    const int* row = layout;
    if (LAYOUT && newest >= 0 && !wrong)
        row += head * layout_head + newest / BLOCK * layout_row;
    Keys<LAYOUT> keys;
    int parts = keys.choose(wrong ? 0 : length, row, fresh);
    if ((int)blockIdx.x >= parts) return;
    if constexpr (CLUSTER > 1)
        if (parts > 1) cluster_arrive();

    k_cache += batch * k_batch + head * k_head, v_cache += batch * v_batch + head * v_head;
    Rows<D> k(k_cache, k_row);
    Rows<DV> v(v_cache, v_row);
    Stream<T, D, DV, WARPS, STAGES, KEYS, LAYOUT> stream(k, v, keys);
    wait_for_former();
    let_next_begin();

    uint4 bits[chunks<D>];
    float query[chunks<D>][8];
    load_chunks<D>(bits, q + batch * q_batch + head * q_head);
#pragma unroll
    for (int i = 0; i < chunks<D>; ++i) {
        unpack8<T>(query[i], bits[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) query[i][j] *= scale * LOG2E;
    }
    Part<8 * chunks<DV>> mine;
    if (fresh && blockIdx.x == 0 && threadIdx.x < 32) {
        k_new += batch * k_new_batch + head * k_new_head;
        v_new += batch * v_new_batch + head * v_new_head;
        uint4 key[chunks<D>], value[chunks<DV>];
        load_chunks<D>(key, k_new), load_chunks<DV>(value, v_new);
        if (keys.newest) {
            float s = score<T, chunks<D>, 1>(query, key);
            if (threadIdx.x < LANES) mine.most = s, add_value<T, chunks<DV>, 1>(mine, 1, value);
        }
        append<D>(k_cache + newest * k_row, key), append<DV>(v_cache + newest * v_row, value);
    }
    stream.attend(mine, query);

    float* results = (float*)shared;
    __syncthreads();
    merge_groups<DV>(mine, results + threadIdx.x / 32 * (DV + 2));
    __syncthreads();
    int pair = threadIdx.x;
    Part<2> part;
    if (pair < DV / 2) part = merge<DV>(results, 0, 1, WARPS, pair);
    if constexpr (CLUSTER > 1) {
        constexpr int ring = WARPS * STAGES * KEYS * (chunks<D> + chunks<DV>) * 512;
        if (parts > 1 && !merge_cluster<DV>(part, (float*)(shared + ring), parts)) return;
    } else if (parts > 1) {
        partials += which * gridDim.x * (DV + 2);
        if (!merge_blocks<DV, WARPS>(part, partials, arrived + which, parts)) return;
    }
    if (pair >= DV / 2) return;
    float over = part.sum > 0 ? 1 / part.sum : wrong ? __uint_as_float(0x7fffffff) : 0;
    ((unsigned*)o)[which * (DV / 2) + pair] = pack<T>(part.o[0] * over, part.o[1] * over);
    if (pair == 0) lse[which] = wrong ? over : part.most * LN2 + logf(part.sum);
}
