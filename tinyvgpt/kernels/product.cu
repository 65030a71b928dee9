// A few rows times a matrix, with what stands beside it in a transformer. Chapter 15.
//
//     y[b, n] = Σ a[b, k] · w[n, k],    a = x, or the layer norm of x,    b < batch,  w: N × K
//
// When one token a sequence is decoded, a layer is a chain of such products. Each number of w is
// used `batch` times, so up to some hundred rows the time is that of reading w: 2·N·K bytes, 0.33 µs
// a MB at 3 TB/s. A kernel of 2 MB takes less than the pauses around it: so the norm before a
// product and the bias, activation or sum behind it are made on the way. The weights don't depend on
// what came before: a kernel begins while the former one still runs, and has them in registers when
// that ends.
//
//   grid    (N / (8·C), batch / (16·M)). A block makes 8·C outputs of its 16·M rows: few, so that all
//           multiprocessors read, and where outputs are many, twice as many, so that all blocks run
//           at once and leave room for the next kernel's.
//   block   WARPS warps share K. Warp i takes chunks 4·i … 4·i + 3 of every 4·WARPS, a chunk being 8
//           numbers, 16 bytes; their sums are added up in shared memory, always in the same order.
//   warp    rows are the first operand of a tensor core's product, 16 of them for each of M, 8
//           outputs its second, for each of C. Lane 4·g + t has chunk t of row g, of x and of w
//           alike. The order of k within a product is then not that of memory but the same on both
//           sides, which is all that a sum asks for, and each operand is loaded 16 bytes at a time
//           as it lies.
//   norm    VideoGPT's, (x - μ)·(1e-5 + 1/√max(σ², 1e-12)) · gain + shift. Each warp has its part of
//           the rows in registers and tells the others its sums of x and x²: a row is read once.
//
// Shared memory: a sum of each warp for each row and output, WARPS × 16·M × 8·C floats; before it, for
// a norm, gains and shifts, 2·K floats or 2·K a row, and (WARPS + 1) × 16 pairs of sums.
//
// OUTPUT is what becomes of a sum s, to which bias[n] is added first where there is one:
//     0   y = s                      (16 bits)
//     1   y = s·σ(1.702 s), GELU     (16 bits)
//     2   y = y + s                  (float32: the residual stream)
//     3   y = s                      (float32: logits)

extern __shared__ __align__(128) char shared[];

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
    return x;
}

// A layer norm of up to 16 rows, of which a lane has chunks first, first + 4·WARPS, … of rows g and
// g + 8. Shared memory: gains and shifts of `apart` rows, or of one for all; the sums.
template <class T, int K, int WARPS> struct Norm {
    static constexpr int chunks = K / 8, steps = (chunks + 4 * WARPS - 1) / (4 * WARPS);
    const int first = threadIdx.x / 32 * 4 + threadIdx.x % 4, g = threadIdx.x % 32 / 4;
    int batch, apart;
    float *gains = (float*)shared, *shifts;
    float2* sums;  // [warp][row], then μ and factor [row]

    // Begins to load what doesn't depend on x.
    __device__ __forceinline__ Norm(const float* gain, const float* shift, int stride, int batch)
        : batch(batch), apart(stride ? batch : 1) {
        shifts = gains + apart * K, sums = (float2*)(shifts + apart * K);
        for (int i = threadIdx.x; i < apart * K / 4; i += WARPS * 32) {
            long long at = (long long)(4 * i / K) * stride + 4 * i % K;
            copy_async(gains + 4 * i, gain + at);
            copy_async(shifts + 4 * i, shift + at);
        }
        copy_commit();
    }
    __device__ __forceinline__ float* end() const { return (float*)(sums + (WARPS + 1) * 16); }

    __device__ __forceinline__ static void load(float (&to)[8], const float* from) {
        float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
        to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
        to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    }
    __device__ __forceinline__ bool has(int h, int i) const {
        return g + 8 * h < batch && first + 4 * WARPS * i < chunks;
    }
    // Makes a of x.
    __device__ __forceinline__ void apply(uint4 (&a)[steps][2], const float* x, int stride) const {
        float v[2][steps][8] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < steps; ++i) {
                if (has(h, i))
                    load(v[h][i], x + (long long)(g + 8 * h) * stride + (first + 4 * WARPS * i) * 8);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += v[h][i][j], squares += v[h][i][j] * v[h][i][j];
            }
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2) {
                sum += __shfl_xor_sync(~0u, sum, bit);
                squares += __shfl_xor_sync(~0u, squares, bit);
            }
            if (threadIdx.x % 4 == 0)
                sums[threadIdx.x / 32 * 16 + g + 8 * h] = make_float2(sum, squares);
        }
        copy_wait<0>();
        __syncthreads();
        if (threadIdx.x < 16) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) {
                float2 two = sums[i * 16 + threadIdx.x];
                sum += two.x, squares += two.y;
            }
            float mean = sum / K, variance = squares / K - mean * mean;
            sums[WARPS * 16 + threadIdx.x] =
                make_float2(mean, 1e-5f + rsqrtf(fmaxf(variance, 1e-12f)));
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float2 found = sums[WARPS * 16 + g + 8 * h];
            int row = apart > 1 ? (g + 8 * h) * K : 0;
#pragma unroll
            for (int i = 0; i < steps; ++i) {
                a[i][h] = make_uint4(0, 0, 0, 0);
                if (!has(h, i)) continue;
                int at = row + (first + 4 * WARPS * i) * 8;
                float gain[8], shift[8], y[8];
                load(gain, gains + at), load(shift, shifts + at);
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    y[j] = (v[h][i][j] - found.x) * found.y * gain[j] + shift[j];
                a[i][h] = make_uint4(pack<T>(y[0], y[1]), pack<T>(y[2], y[3]),
                                     pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
            }
        }
    }
};

template <class T> __device__ __forceinline__ T narrow(float x) {
    T y;
    y.bits = (unsigned short)pack<T>(x, 0);
    return y;
}

template <class T, int OUTPUT>
__device__ __forceinline__ void put_output(void* y, long long at, float s, float residual) {
    if (OUTPUT == 1) s = __fdividef(s, 1 + __expf(-1.702f * s));
    if (OUTPUT < 2) ((T*)y)[at] = narrow<T>(s);
    else ((float*)y)[at] = OUTPUT == 2 ? residual + s : s;
}

// x: batch rows, float32 if NORM, else 16 bits. w: N × K. gain, shift: of the norm, those of row b
// at b · norm_stride. bias: N numbers or null. Strides count numbers from a row to the next.
template <class T, int K, int M, int C, int WARPS, bool NORM, int OUTPUT>
__global__ void __launch_bounds__(WARPS * 32, M == 1 && (!NORM || K <= 32 * WARPS) ? 2 : 1) product(
    const void* x, const T* w, const float* gain, const float* shift, const float* bias, void* y,
    int batch, int outputs, int x_stride, int y_stride, int norm_stride) {
    static_assert(K % 8 == 0, "rows are read in chunks of 8 numbers");
    static_assert(M == 1 || !NORM, "more than 16 rows are normalised before");
    constexpr int chunks = K / 8, steps = (chunks + 4 * WARPS - 1) / (4 * WARPS), rows = 16 * M;
    constexpr int columns = 8 * C, threads = WARPS * 32;
    constexpr int each = (rows * columns + threads - 1) / threads;  // sums that a thread adds up
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * rows, column = blockIdx.x * columns;
    const int n = column + threadIdx.x % columns;  // the output whose sums are this thread's
    const uint4 zero = make_uint4(0, 0, 0, 0);

    uint4 weights[steps][C], normed[steps][2];
#pragma unroll
    for (int i = 0; i < steps; ++i)
#pragma unroll
        for (int j = 0; j < C; ++j) {
            int chunk = 4 * (warp + i * WARPS) + t, output = column + 8 * j + g;
            weights[i][j] = zero;
            if (output < outputs && chunk < chunks)
                weights[i][j] = __ldg((const uint4*)(w + (long long)output * K) + chunk);
        }
    float start = bias && n < outputs ? __ldg(bias + n) : 0, residual[each] = {};
    float* sums = (float*)shared;  // [warp][row][column]
    if constexpr (NORM) {
        Norm<T, K, WARPS> norm(gain, shift, norm_stride, batch);
        wait_for_former();
        let_next_begin();
        norm.apply(normed, (const float*)x, x_stride);
        sums = norm.end();
    } else {
        wait_for_former();
        let_next_begin();
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
        int at = threadIdx.x + i * threads, b = first + at / columns;
        if (OUTPUT == 2 && at < rows * columns && b < batch && n < outputs)
            residual[i] = ((const float*)y)[(long long)b * y_stride + n];
    }

#pragma unroll(M < 3 ? M : 2)  // of more, what is on its way would not fit into registers
    for (int m = 0; m < M; ++m) {
        float c[C][4] = {};
#pragma unroll
        for (int i = 0; i < steps; ++i) {
            int chunk = 4 * (warp + i * WARPS) + t;
            uint4 half[2];  // of rows g and g + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int b = first + 16 * m + 8 * h + g;
                half[h] = NORM ? normed[i][h] : zero;
                if (!NORM && b < batch && chunk < chunks)
                    half[h] = ((const uint4*)((const T*)x + (long long)b * x_stride))[chunk];
            }
            unsigned low[4] = {half[0].x, half[1].x, half[0].y, half[1].y};
            unsigned high[4] = {half[0].z, half[1].z, half[0].w, half[1].w};
#pragma unroll
            for (int j = 0; j < C; ++j) {
                mma<T>(c[j], low, weights[i][j].x, weights[i][j].y);
                mma<T>(c[j], high, weights[i][j].z, weights[i][j].w);
            }
        }
#pragma unroll
        for (int j = 0; j < C; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = warp * rows + 16 * m + g + i / 2 * 8;
                sums[row * columns + 8 * j + 2 * t + i % 2] = c[j][i];
            }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < each; ++i) {
        int at = threadIdx.x + i * threads, b = first + at / columns;
        if (at >= rows * columns || b >= batch || n >= outputs) continue;
        float s = start;
#pragma unroll
        for (int j = 0; j < WARPS; ++j) s += sums[j * rows * columns + at];
        put_output<T, OUTPUT>(y, (long long)b * y_stride + n, s, residual[i]);
    }
}

// The layer norm by itself, a warp a row, for more rows than 16: every block of a product would make
// it again.
template <class T, int K>
__global__ void __launch_bounds__(32) norm(
    const float* x, const float* gain, const float* shift, T* y, int norm_stride) {
    constexpr int each = (K + 31) / 32;
    const int lane = threadIdx.x;
    long long b = blockIdx.x;
    float gains[each], shifts[each], v[each], sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
        int k = i * 32 + lane;
        gains[i] = k < K ? __ldg(gain + b * norm_stride + k) : 0;
        shifts[i] = k < K ? __ldg(shift + b * norm_stride + k) : 0;
    }
    wait_for_former();
    let_next_begin();
#pragma unroll
    for (int i = 0; i < each; ++i) sum += v[i] = i * 32 + lane < K ? x[b * K + i * 32 + lane] : 0;
    float mean = sum_of_warp(sum) / K;
#pragma unroll
    for (int i = 0; i < each; ++i)
        if (i * 32 + lane < K) squares += (v[i] - mean) * (v[i] - mean);
    float factor = 1e-5f + rsqrtf(fmaxf(sum_of_warp(squares) / K, 1e-12f));
#pragma unroll
    for (int i = 0; i < each; ++i)
        if (i * 32 + lane < K)
            y[b * K + i * 32 + lane] = narrow<T>((v[i] - mean) * factor * gains[i] + shifts[i]);
}
