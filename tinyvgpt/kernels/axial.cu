// Axial attention: along one axis of a video, forward and backward. Chapter 14.
//
//     o = softmax(scale · q kᵀ) v      q, k, v, o: L × D, one for each row of the video and head
//
// A row is short (L ≤ 64), so a team of warps holds all of it: its softmax needs no running sums,
// and its gradient nothing of the forward pass, since P = softmax(scale · q kᵀ) is made again:
//
//     dv = Pᵀ do      dP = do vᵀ      dS = P ∘ (dP - rowsum(P ∘ dP))
//     dq = scale · dS k               dk = scale · dSᵀ q
//
// Rows lie anywhere: numbers of a head are contiguous, all else has strides. A team's threads copy
// its rows to shared memory by chunks of 8 numbers (16 bytes), neighbouring threads neighbouring
// chunks. Products are made on tensor cores from there, 16 rows a warp, and results go back the way
// the operands came.
//
//     L          video rows a team   rows of a tile   warps a team
//     1 … 8      16 / L              16               1     one mask keeps the rows apart
//     9 … 16     1                   16               1
//     17 … 32    1                   32               2     a warp has 16 of the queries; in the
//     33 … 48    1                   48               3     backward pass then 16 of the keys
//     49 … 64    1                   64               4
//
// A block has TEAMS teams. A thread gets so few registers that a multiprocessor can hold BLOCKS
// blocks, if its shared memory suffices: while some wait for their rows others multiply, so memory
// never rests, and a team needs no second set of tiles to load ahead.
//
// Shared memory of a team:
//     forward     q → o | k | v                               tiles of rows × D
//     backward    q | k | v → dq, dk, dv | do | P | dS        P, dS: rows × rows
// "→": results pass through, so that they are stored by chunks. D is padded to a multiple of 16.
//
// Limit: memory. Forward moves 4 tensors, 8·L·D bytes a row, for 4·L²·D FLOPs: L/2 a byte, and an
// H100 has time for 250 a byte. Backward moves 7 tensors, 14·L·D bytes, for 10·L²·D FLOPs.

extern __shared__ __align__(128) char shared[];

constexpr float LOG2_E = 1.4426950408889634f;

// How rows of L positions and D numbers are packed into tiles.
template <int D, int L> struct Pack {
    static constexpr int d = (D + 15) / 16 * 16;              // width of a tile
    static constexpr int count = L < 16 ? 16 / L : 1;         // video rows in it
    static constexpr int warps = (count * L + 15) / 16;       // of a team
    static constexpr int threads = 32 * warps;
    static constexpr int rows = 16 * warps;                   // of a tile, padding included
    static constexpr int numbers = rows * Tile<d>::stride;    // of a tile of q, k and so on
    static constexpr int square = rows * Tile<rows>::stride;  // of P and dS
};

// Chunks from one to the next along the axes not attended along, heads, and the axis attended
// along. A kernel's parameters are plain numbers: STRIDES declares them, STRIDES_OF collects them.
struct Strides { int outer, middle, inner, head, along; };
#define STRIDES(x) int x##_outer, int x##_middle, int x##_inner, int x##_head, int x##_along
#define STRIDES_OF(x) Strides{x##_outer, x##_middle, x##_inner, x##_head, x##_along}

// Which (row, head) of the video a team works on. If they are several, lane i knows the i-th.
struct Place {
    int outer, middle, inner, head;
    int rows;  // of the team's tile that exist

    template <int D, int L>
    static __device__ __forceinline__ Place of(
        int team, int items, unsigned middles, unsigned inners, unsigned heads) {
        constexpr int count = Pack<D, L>::count;
        int first = team * count;
        unsigned item = first + (count > 1 ? threadIdx.x % 32 % count : 0);
        Place place;
        place.rows = min(items - first, count) * L;
        place.head = item % heads, item /= heads;
        place.inner = item % inners, item /= inners;
        place.middle = item % middles, place.outer = item / middles;
        return place;
    }
    __device__ __forceinline__ long long start(Strides s) const {  // in chunks
        return (long long)outer * s.outer + (long long)middle * s.middle
            + (long long)inner * s.inner + (long long)head * s.head;
    }
};

// The chunk of a tensor that belongs to a tile's row; every lane of a warp must ask.
template <int D, int L>
__device__ __forceinline__ long long chunk_at(long long start, int along, int row, int chunk) {
    constexpr int count = Pack<D, L>::count;
    if (count > 1) start = __shfl_sync(~0u, start, min(row / L, count - 1));
    return start + (long long)(row % L) * along + chunk;
}

// Starts to copy a team's rows to a tile. What doesn't exist becomes zeros.
template <class T, int D, int L>
__device__ __forceinline__ void load(T* tile, const T* from, const Place& place, Strides s) {
    constexpr int d = Pack<D, L>::d, chunks = d / 8, threads = Pack<D, L>::threads;
    long long start = place.start(s);
#pragma unroll
    for (int i = 0; i < Pack<D, L>::rows * chunks / threads; ++i) {
        int at = i * threads + threadIdx.x % threads, row = at / chunks, chunk = at % chunks;
        long long source = chunk_at<D, L>(start, s.along, row, chunk);
        bool there = row < place.rows && chunk < D / 8;
        copy_async(tile + Tile<d>::at(row, chunk), from + (there ? source * 8 : 0), there);
    }
}

// Copies 16 rows of a tile, which this warp has written, to where they belong in a tensor.
template <class T, int D, int L>
__device__ __forceinline__ void store(
    T* to, const T* tile, int slab, const Place& place, Strides s) {
    constexpr int d = Pack<D, L>::d, chunks = d / 8;
    long long start = place.start(s);
    __syncwarp();
#pragma unroll 2  // more would only take registers
    for (int i = 0; i < chunks / 2; ++i) {
        int at = i * 32 + threadIdx.x % 32, row = slab * 16 + at / chunks, chunk = at % chunks;
        long long target = chunk_at<D, L>(start, s.along, row, chunk);
        if (row < place.rows && chunk < D / 8)
            *(uint4*)(to + target * 8) = *(const uint4*)(tile + Tile<d>::at(row, chunk));
    }
    __syncwarp();
}

// From here on a team's threads see what the others have copied or written.
template <int WARPS> __device__ __forceinline__ void meet() {
    if (WARPS == 1) __syncwarp(); else __syncthreads();
}

// Products of 16 rows of a, from row 16·slab on, with all rows of b; c[n] is the fragment of
// columns 8n … 8n + 7.
template <class T, int D, int N>
__device__ __forceinline__ void scores(float (&c)[N][4], const T* a, const T* b, int slab) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned x[4];
        ldmatrix(x, a + Tile<D>::at(16 * slab + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            unsigned y[4];
            int row = 16 * n + lane / 16 * 8 + lane % 8;
            ldmatrix(y, b + Tile<D>::at(row, 2 * k + lane / 8 % 2));
            mma<T>(c[2 * n], x, y[0], y[1]);
            mma<T>(c[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// The first operand of a product, 16 rows and 16 columns at a time: either the result of an earlier
// product, whose fragments are those of an operand but for rounding,
template <class T, int ROWS> struct Weights {
    const float (&p)[ROWS / 8][4];
    __device__ __forceinline__ void fragment(unsigned (&x)[4], int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = pack<T>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
    }
};
// or 16 columns of a tile, transposed.
template <class T, int ROWS> struct Transposed {
    const T* tile;
    int slab;
    __device__ __forceinline__ void fragment(unsigned (&x)[4], int k) const {
        int lane = threadIdx.x % 32, row = 16 * k + lane / 16 * 8 + lane % 8;
        ldmatrix_transposed(x, tile + Tile<ROWS>::at(row, 2 * slab + lane / 8 % 2));
    }
};

// c = A b, A of 16 rows and ROWS columns.
template <class T, int D, int ROWS, class A>
__device__ __forceinline__ void multiply(float (&c)[D / 8][4], const A& a, const T* b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        unsigned x[4];
        a.fragment(x, k);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned y[4];
            ldmatrix_transposed(y, b + Tile<D>::at(16 * k + lane % 16, 2 * n + lane / 16));
            mma<T>(c[2 * n], x, y[0], y[1]);
            mma<T>(c[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// Writes factor · c to 16 rows of a tile.
template <class T, int D>
__device__ __forceinline__ void put(T* tile, const float (&c)[D / 8][4], int slab, float factor) {
    int lane = threadIdx.x % 32, row = 16 * slab + lane / 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            T* to = tile + Tile<D>::at(row + 8 * half, n) + lane % 4 * 2;
            *(unsigned*)to = pack<T>(factor * c[n][2 * half], factor * c[n][2 * half + 1]);
        }
    }
}

// Sum, or largest, of the four lanes that share a fragment's rows.
__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float most_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Whether query i may look at key j of the same tile. A padding row may look somewhere, too, so
// that its softmax is a number; nothing else sees it.
template <int L, bool CAUSAL> __device__ __forceinline__ bool seen(int i, int j) {
    return (L < 16 ? i / L == j / L : j < L) && (!CAUSAL || j <= i);
}

// From s to 2^(factor · (s - largest)), a row's softmax but for its sum; over gets 1 / sum of the
// fragment's upper and lower rows. The largest weight is 1, which 16 bits hold exactly.
template <int L, bool CAUSAL, int N>
__device__ __forceinline__ void softmax(
    float (&s)[N][4], int slab, float factor, float (&over)[2]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = __int_as_float(0xff800000);  // -inf
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
            float& x = s[i / 2][2 * half + i % 2];
            int query = 16 * slab + 8 * half + lane / 4, key = i / 2 * 8 + lane % 4 * 2 + i % 2;
            if ((L % 16 || CAUSAL) && !seen<L, CAUSAL>(query, key)) x = __int_as_float(0xff800000);
            most = fmaxf(most, x);
        }
        most = most_of_four(most) * factor;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
            float& x = s[i / 2][2 * half + i % 2];
            x = exp2_fast(x * factor - most);
            sum += x;
        }
        over[half] = __fdividef(1, sum_of_four(sum));
    }
}

// Multiplies a fragment's upper and lower rows.
template <int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) c[i / 4][i % 4] *= by[i % 4 / 2];
}

// From P and dP to dS, in dP's place.
template <int N>
__device__ __forceinline__ void softmax_backward(const float (&p)[N][4], float (&dp)[N][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
            sum += p[i / 2][2 * half + i % 2] * dp[i / 2][2 * half + i % 2];
        sum = sum_of_four(sum);
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
            float& x = dp[i / 2][2 * half + i % 2];
            x = p[i / 2][2 * half + i % 2] * (x - sum);
        }
    }
}

// items: (row, head) of the video, of which there are outer × middles × inners × heads.
template <class T, int D, int L, bool CAUSAL, int TEAMS, int BLOCKS>
__global__ void __launch_bounds__(Pack<D, L>::threads * TEAMS, BLOCKS) axial_forward(
    const T* q, const T* k, const T* v, T* o, int items, int middles, int inners, int heads,
    STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(o), float scale) {
    using Pack = Pack<D, L>;
    constexpr int d = Pack::d, rows = Pack::rows;
    int warp = threadIdx.x / 32, team = warp / Pack::warps, slab = warp % Pack::warps;
    Place place = Place::of<D, L>(blockIdx.x * TEAMS + team, items, middles, inners, heads);
    T* q_tile = (T*)shared + team * 3 * Pack::numbers;
    T *k_tile = q_tile + Pack::numbers, *v_tile = k_tile + Pack::numbers;
    load<T, D, L>(q_tile, q, place, STRIDES_OF(q));
    load<T, D, L>(k_tile, k, place, STRIDES_OF(k));
    load<T, D, L>(v_tile, v, place, STRIDES_OF(v));
    copy_commit();
    copy_wait<0>();
    meet<Pack::warps>();

    float p[rows / 8][4], sums[d / 8][4], over[2];
    scores<T, d>(p, q_tile, k_tile, slab);
    softmax<L, CAUSAL>(p, slab, scale * LOG2_E, over);
    multiply<T, d, rows>(sums, Weights<T, rows>{p}, v_tile);
    multiply_rows(sums, over);
    __syncwarp();  // from here on q_tile's 16 rows are free: all lanes have read them
    put<T, d>(q_tile, sums, slab, 1);
    store<T, D, L>(o, q_tile, slab, place, STRIDES_OF(o));
}

// grad: do, the gradient of o. dq, dk and dv have the same strides.
template <class T, int D, int L, bool CAUSAL, int TEAMS, int BLOCKS>
__global__ void __launch_bounds__(Pack<D, L>::threads * TEAMS, BLOCKS) axial_backward(
    const T* q, const T* k, const T* v, const T* grad, T* dq, T* dk, T* dv, int items,
    int middles, int inners, int heads, STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(grad),
    STRIDES(dq), float scale) {
    using Pack = Pack<D, L>;
    constexpr int d = Pack::d, rows = Pack::rows;
    int warp = threadIdx.x / 32, team = warp / Pack::warps, slab = warp % Pack::warps;
    Place place = Place::of<D, L>(blockIdx.x * TEAMS + team, items, middles, inners, heads);
    T* q_tile = (T*)shared + team * (4 * Pack::numbers + 2 * Pack::square);
    T *k_tile = q_tile + Pack::numbers, *v_tile = k_tile + Pack::numbers;
    T *grad_tile = v_tile + Pack::numbers, *p_tile = grad_tile + Pack::numbers;
    T* ds_tile = p_tile + Pack::square;
    load<T, D, L>(q_tile, q, place, STRIDES_OF(q));
    load<T, D, L>(k_tile, k, place, STRIDES_OF(k));
    load<T, D, L>(v_tile, v, place, STRIDES_OF(v));
    load<T, D, L>(grad_tile, grad, place, STRIDES_OF(grad));
    copy_commit();
    copy_wait<0>();
    meet<Pack::warps>();

    float p[rows / 8][4], ds[rows / 8][4], over[2];
    scores<T, d>(p, q_tile, k_tile, slab);
    softmax<L, CAUSAL>(p, slab, scale * LOG2_E, over);
    multiply_rows(p, over);
    put<T, rows>(p_tile, p, slab, 1);
    scores<T, d>(ds, grad_tile, v_tile, slab);
    softmax_backward(p, ds);
    put<T, rows>(ds_tile, ds, slab, 1);
    meet<Pack::warps>();  // from here on v_tile's rows are a warp's own

    float sums[d / 8][4];
    multiply<T, d, rows>(sums, Weights<T, rows>{ds}, k_tile);
    put<T, d>(v_tile, sums, slab, scale);
    store<T, D, L>(dq, v_tile, slab, place, STRIDES_OF(dq));

    multiply<T, d, rows>(sums, Transposed<T, rows>{ds_tile, slab}, q_tile);
    put<T, d>(v_tile, sums, slab, scale);
    store<T, D, L>(dk, v_tile, slab, place, STRIDES_OF(dq));

    multiply<T, d, rows>(sums, Transposed<T, rows>{p_tile, slab}, grad_tile);
    put<T, d>(v_tile, sums, slab, 1);
    store<T, D, L>(dv, v_tile, slab, place, STRIDES_OF(dq));
}
