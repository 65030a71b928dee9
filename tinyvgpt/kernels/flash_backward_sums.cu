// What the backward pass of attention wants to know of each query: lse · log2(e) and −δ, where
// δ = rowsum(dO ∘ O). Then P is one fused multiply-add and one exp2, and dP − δ a product whose sum
// starts at −δ. Queries that see no key, and those past the end, get an infinite lse: their P is 0.
//
// Eight lanes a query, 16 bytes of O and of dO a lane at a time; 32 queries a block. No shared
// memory. Bound: the bytes of O and dO. Chapter 14.

template <class T>
__global__ void __launch_bounds__(256) flash_row_sums(
    const T* o, const T* grad, const float* lse, float* per_query, int length, int padded, int d,
    long long o_batch, long long o_head, long long o_row, long long grad_batch,
    long long grad_head, long long grad_row) {
    const int row = blockIdx.x * 32 + threadIdx.x / 8, lane = threadIdx.x % 8;
    const int head = blockIdx.y, heads = gridDim.y;
    const long long batch = blockIdx.z;
    float sum = 0;
    if (row < length) {
        const T* x = o + batch * o_batch + head * o_head + row * o_row;
        const T* y = grad + batch * grad_batch + head * grad_head + row * grad_row;
        for (int i = lane * 8; i < d; i += 64) {
            uint4 a = *(const uint4*)(x + i), b = *(const uint4*)(y + i);
            unsigned as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 p = unpack<T>(as[j]), r = unpack<T>(bs[j]);
                sum += p.x * r.x + p.y * r.y;
            }
        }
    }
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (lane) return;
    const float infinity = __int_as_float(0x7f800000);
    float most = row < length ? lse[(batch * heads + head) * length + row] : -infinity;
    per_query += (batch * heads + head) * 2 * padded + row;
    per_query[0] = most == -infinity ? infinity : most * 1.44269504f;
    per_query[padded] = -sum;
}
