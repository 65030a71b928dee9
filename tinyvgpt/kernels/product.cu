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
//   grid    (N / 8, batch / (16·M)). A block makes 8 outputs of all its rows: many small blocks, so
//           that all multiprocessors read.
//   block   WARPS warps share K. Warp i takes chunks 4·i … 4·i + 3 of every 4·WARPS, a chunk being 8
//           numbers, 16 bytes; their sums are added up in shared memory, always in the same order.
//   warp    rows are the first operand of a tensor core's product, 16 of them for each of M, the 8
//           outputs its second. Lane 4·g + t has chunk t of row g, of x and of w alike. The order of
//           k within a product is then not that of memory but the same on both sides, which is all
//           that a sum asks for, and each operand is loaded 16 bytes at a time as it lies.
//
// Shared memory: the normalised rows (NORM), 16·M × (K + 8) numbers; a sum a warp, WARPS × 16·M × 8.
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

// Row x of K floats as VideoGPT normalises it, (x - μ)·(1e-5 + 1/√max(σ², 1e-12)) · gain + shift,
// by one warp; put(k, value) takes the numbers.
template <int K, class F>
__device__ __forceinline__ void normalise(const float* x, const float* gain, const float* shift, F put) {
    constexpr int each = (K + 31) / 32;
    int lane = threadIdx.x % 32;
    float v[each], sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) sum += v[i] = i * 32 + lane < K ? x[i * 32 + lane] : 0;
    float mean = sum_of_warp(sum) / K;
#pragma unroll
    for (int i = 0; i < each; ++i)
        if (i * 32 + lane < K) squares += (v[i] - mean) * (v[i] - mean);
    float factor = 1e-5f + rsqrtf(fmaxf(sum_of_warp(squares) / K, 1e-12f));
#pragma unroll
    for (int i = 0; i < each; ++i) {
        int k = i * 32 + lane;
        if (k < K) put(k, (v[i] - mean) * factor * gain[k] + shift[k]);
    }
}

template <class T> __device__ __forceinline__ T narrow(float x) {
    T y;
    y.bits = (unsigned short)pack<T>(x, 0);
    return y;
}

template <class T, int OUTPUT> __device__ __forceinline__ void put_output(void* y, long long at, float s) {
    if (OUTPUT == 1) s = __fdividef(s, 1 + __expf(-1.702f * s));
    if (OUTPUT < 2) ((T*)y)[at] = narrow<T>(s);
    else if (OUTPUT == 2) ((float*)y)[at] += s;
    else ((float*)y)[at] = s;
}

// x: batch rows, float32 if NORM, else 16 bits. w: N × K. gain, shift: of the norm, those of row b
// at b · norm_stride. bias: N numbers or null. Strides count numbers from a row to the next.
template <class T, int K, int M, int WARPS, bool NORM, int OUTPUT>
__global__ void __launch_bounds__(WARPS * 32) product(
    const void* x, const T* w, const float* gain, const float* shift, const float* bias, void* y,
    int batch, int outputs, int x_stride, int y_stride, int norm_stride) {
    static_assert(K % 8 == 0, "rows are read in chunks of 8 numbers");
    constexpr int chunks = K / 8, steps = (chunks + 4 * WARPS - 1) / (4 * WARPS), padded = K + 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * 16 * M, column = blockIdx.x * 8;
    const uint4 zero = make_uint4(0, 0, 0, 0);

    let_next_begin();
    uint4 weights[steps];
    bool exists = column + g < outputs;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        int chunk = 4 * (warp + i * WARPS) + t;
        weights[i] = zero;
        if (exists && chunk < chunks)
            weights[i] = __ldg((const uint4*)(w + (long long)(column + g) * K) + chunk);
    }

    wait_for_former();

    T* rows = (T*)shared;
    if constexpr (NORM) {
        for (int row = warp; row < 16 * M; row += WARPS) {
            int b = first + row;
            if (b >= batch) break;
            normalise<K>((const float*)x + (long long)b * x_stride, gain + b * norm_stride,
                         shift + b * norm_stride,
                         [&](int k, float value) { rows[row * padded + k] = narrow<T>(value); });
        }
        __syncthreads();
    }

    float c[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) c[m][0] = c[m][1] = c[m][2] = c[m][3] = 0;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        int chunk = 4 * (warp + i * WARPS) + t;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            uint4 half[2];  // of rows g and g + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int row = 16 * m + 8 * h + g, b = first + row;
                half[h] = zero;
                if (b < batch && chunk < chunks)
                    half[h] = NORM ? ((const uint4*)(rows + row * padded))[chunk]
                                   : ((const uint4*)((const T*)x + (long long)b * x_stride))[chunk];
            }
            unsigned low[4] = {half[0].x, half[1].x, half[0].y, half[1].y};
            unsigned high[4] = {half[0].z, half[1].z, half[0].w, half[1].w};
            mma<T>(c[m], low, weights[i].x, weights[i].y);
            mma<T>(c[m], high, weights[i].z, weights[i].w);
        }
    }

    float* sums = (float*)(shared + (NORM ? 16 * M * padded * 2 : 0));  // [warp][row][output]
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[(warp * 16 * M + 16 * m + g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[m][i];
    __syncthreads();
    for (int at = threadIdx.x; at < 16 * M * 8; at += WARPS * 32) {
        int b = first + at / 8, n = column + at % 8;
        if (b >= batch || n >= outputs) continue;
        float s = bias ? bias[n] : 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) s += sums[i * 16 * M * 8 + at];
        put_output<T, OUTPUT>(y, (long long)b * y_stride + n, s);
    }
}

// The layer norm by itself, a warp a row, where there are so many rows that every block of a
// product would make it again.
template <class T, int K>
__global__ void __launch_bounds__(32) norm(
    const float* x, const float* gain, const float* shift, T* y, int norm_stride) {
    long long b = blockIdx.x;
    let_next_begin();
    wait_for_former();
    normalise<K>(x + b * K, gain + b * norm_stride, shift + b * norm_stride,
                 [&](int k, float value) { y[b * K + k] = narrow<T>(value); });
}
