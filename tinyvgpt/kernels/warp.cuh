// What a warp can do beyond C++: instructions of tensor cores, matrix loads, asynchronous copies.
// Chapter 13 draws the fragments. Needs sm_80 or later.
//
// A fragment is a matrix spread over the 32 lanes of a warp, two 16-bit numbers a register. With
// g = lane / 4 and t = lane % 4, mma's operands and result are
//
//     A (16 × 16)  a[0]: row g,     columns 2t, 2t + 1      a[2]: the same rows, columns + 8
//                  a[1]: row g + 8, columns 2t, 2t + 1      a[3]
//     B (16 × 8)   b0: rows 2t, 2t + 1, column g            b1: rows + 8
//     C (16 × 8)   c[0], c[1]: row g, columns 2t, 2t + 1    c[2], c[3]: row g + 8

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

// Two floats, rounded to nearest, as one register; the first is the lower half.
template <class T> __device__ __forceinline__ unsigned pack(float low, float high);
template <> __device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> __device__ __forceinline__ unsigned pack<fp16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The two floats of a register.
template <class T> __device__ __forceinline__ float2 unpack(unsigned both);
template <> __device__ __forceinline__ float2 unpack<bf16>(unsigned both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<fp16>(unsigned both) {
    float2 two;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(two.x), "=f"(two.y) : "r"(both));
    return two;
}

// C += A·B on the warp's tensor core, sums in float32.
template <class T> __device__ __forceinline__ void mma(
    float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#define TINYVGPT_MMA(T, name)                                                                     \
    template <> __device__ __forceinline__ void mma<T>(                                           \
        float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {                        \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "               \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                      \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                      \
    }
TINYVGPT_MMA(bf16, "bf16")
TINYVGPT_MMA(fp16, "f16")

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// Four 8 × 8 matrices of 16-bit numbers from shared memory: lane i names row i % 8 of matrix i / 8
// (16 bytes), and gets columns 2t, 2t + 1 of row g of each (`transposed`: rows of column g).
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Copies 16 bytes from device to shared memory while the warp goes on, or fills them with zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Ends a group of copies; waits until all but the last `left` groups of this thread are there.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {  // of -inf: 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Clusters (sm_90 and later): blocks that run at the same time and reach each other's shared memory.
// A block arrives once it has begun, or has written; what others wrote before they arrived is there
// after the wait.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes to where `to` lies in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void store_remote(float2* to, unsigned rank, float2 value) {
    asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "st.shared::cluster.v2.f32 [there], {%2, %3};}"
        :: "r"(shared_address(to)), "r"(rank), "f"(value.x), "f"(value.y) : "memory");
}

// Kernels of a chain that are launched to overlap (sm_90 and later): the next one may begin once all
// blocks of this one have said so, and must wait before it touches what this one writes. Ours say so
// after their own wait; when a kernel begins, all but the one right before it have ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_former() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
