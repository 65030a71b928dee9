// Enough of CUDA to run the package's kernels on a CPU, thread by thread, for tests.
//
// It stands in for tinyvgpt/kernels/warp.cuh and for what NVRTC knows by itself. Each thread of a
// block is a fiber; what a warp or a block does together is a point where fibers wait for each
// other. Shared memory starts as NaN, and asynchronous copies land as late as they may, so that a
// kernel that reads too early reads NaN.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulated {
constexpr size_t STACK = 1 << 18, SHARED = 232448;
struct Copy { void* to; const void* from; bool there; };
struct Barrier { int size = 0, count = 0; unsigned generation = 0; };
struct Deposit { unsigned words[8]; const void* pointer; };
struct Thread {
    ucontext_t context;
    jmp_buf place;  // where it goes on
    uint3 index;
    int lane, warp;
    bool begun, done;
    unsigned turn;                          // of this warp's exchanges
    std::vector<std::vector<Copy>> groups;  // committed copies
    std::vector<Copy> open;
};
struct Warp { Barrier barrier; Deposit deposits[2][32]; };

inline jmp_buf scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block;
inline Thread* now;
inline uint3 block_index, block_size, grid_size;
inline std::function<void()> body;
struct Sent { unsigned rank; float2* to; float2 value; };
inline std::vector<Sent> sent;  // to blocks of the cluster that run later
inline long conflicts, matrix_loads;  // 16-byte rows that met in a bank, and loads of 8 rows

// Fibers begin in makecontext's way, then jump: unlike swapcontext that needs no system call.
__attribute__((noinline)) inline void yield() {
    if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread* thread) {
    now = thread;
    if (_setjmp(scheduler)) return;
    if (now->begun) _longjmp(now->place, 1);
    now->begun = true;
    setcontext(&now->context);
}

inline void wait(Barrier& barrier) {
    unsigned mine = barrier.generation;
    if (++barrier.count == barrier.size) {
        barrier.count = 0;
        ++barrier.generation;
    } else {
        while (barrier.generation == mine) yield();
    }
}

inline const Deposit* exchange(const Deposit& mine) {  // what all lanes of the warp deposit
    Warp& warp = warps[now->warp];
    Deposit* all = warp.deposits[now->turn++ % 2];
    all[now->lane] = mine;
    wait(warp.barrier);
    return all;
}

inline void enter() {
    body();
    if (!now->open.empty() || !now->groups.empty()) now->groups.clear();
    now->done = true;
    for (;;) yield();
}

inline void run_block(char* shared, size_t shared_bytes) {
    memset(shared, 0xff, shared_bytes);
    static std::vector<char> stacks;
    stacks.resize(threads.size() * STACK);
    for (size_t i = 0; i < threads.size(); ++i) {
        Thread& t = threads[i];
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = stacks.data() + i * STACK;
        t.context.uc_stack.ss_size = STACK;
        t.context.uc_link = nullptr;
        t.index = {(unsigned)i % block_size.x, (unsigned)i / block_size.x, 0};
        t.lane = i % 32, t.warp = i / 32, t.begun = t.done = false, t.turn = 0;
        t.groups.clear(), t.open.clear();
        makecontext(&t.context, enter, 0);
    }
    for (Warp& warp : warps) warp.barrier = {32, 0, 0};
    block = {(int)threads.size(), 0, 0};
    for (long idle = 0;;) {
        bool left = false;
        unsigned before = block.generation;
        for (Warp& warp : warps) before += warp.barrier.generation;
        int done = 0;
        for (Thread& t : threads) {
            if (t.done) { ++done; continue; }
            left = true;
            resume(&t);
        }
        if (!left) return;
        unsigned after = block.generation;
        int done_after = 0;
        for (Warp& warp : warps) after += warp.barrier.generation;
        for (Thread& t : threads) done_after += t.done;
        idle = after == before && done_after == done ? idle + 1 : 0;
        if (idle > 4) { fprintf(stderr, "deadlock: threads wait for threads that never come\n"); abort(); }
    }
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<P>*)args[I]...);
}
template <class... P>
void launch(void (*kernel)(P...), const unsigned* grid, const unsigned* size, size_t shared_bytes,
            char* shared, void** args) {
    if (shared_bytes > SHARED) { fprintf(stderr, "too much shared memory\n"); abort(); }
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {size[0], size[1], size[2]};
    threads.resize(size[0] * size[1] * size[2]);
    warps.resize((threads.size() + 31) / 32);
    body = [=] { call(kernel, args, std::index_sequence_for<P...>{}); };
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                block_index = {x, y, z};
                if (x == 0) sent.clear();
                run_block(shared, shared_bytes);
            }
}
}  // namespace emulated

#define threadIdx (emulated::now->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)
inline void __syncthreads() { emulated::wait(emulated::block); }
inline void __syncwarp(unsigned = ~0u) { emulated::wait(emulated::warps[emulated::now->warp].barrier); }
inline void __threadfence() {}

inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline float __int_as_float(int u) { return __uint_as_float((unsigned)u); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T, class U> T atomicAdd(T* p, U v) { T old = *p; *p += v; return old; }

template <class T> T __shfl_sync(unsigned, T value, int from, int width = 32) {
    emulated::Deposit d{};
    memcpy(d.words, &value, sizeof value);
    int lane = emulated::now->lane;
    const emulated::Deposit* all = emulated::exchange(d);
    T got;
    memcpy(&got, all[(lane / width) * width + from % width].words, sizeof got);
    return got;
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
    return __shfl_sync(mask, value, emulated::now->lane ^ bits);
}
inline int __any_sync(unsigned, int yes) {
    emulated::Deposit d{};
    d.words[0] = yes != 0;
    const emulated::Deposit* all = emulated::exchange(d);
    unsigned any = 0;
    for (int i = 0; i < 32; ++i) any |= all[i].words[0];
    return any;
}
inline int __syncthreads_or(int yes) {
    static int any;
    __syncthreads();
    any = 0;
    __syncthreads();
    if (yes) any = 1;
    __syncthreads();
    return any;
}

// From here on: tinyvgpt/kernels/warp.cuh.
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
inline unsigned bits_of(bf16, float x) {
    unsigned u = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline unsigned bits_of(fp16, float x) { _Float16 h = x; unsigned short u; memcpy(&u, &h, 2); return u; }
inline float value_of(bf16, unsigned u) { return __uint_as_float(u << 16); }
inline float value_of(fp16, unsigned u) {
    unsigned short s = u;
    _Float16 h;
    memcpy(&h, &s, 2);
    return h;
}
template <class T> unsigned pack(float low, float high) {
    return bits_of(T{}, low) | bits_of(T{}, high) << 16;
}
template <class T> float2 unpack(unsigned both) {
    return {value_of(T{}, both & 0xffff), value_of(T{}, both >> 16)};
}
template <class T> void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int lane = emulated::now->lane, g = lane / 4, t = lane % 4;
    const emulated::Deposit* all = emulated::exchange({{a[0], a[1], a[2], a[3], b0, b1}, nullptr});
    auto half = [](unsigned both, int k) { return value_of(T{}, k % 2 ? both >> 16 : both & 0xffff); };
    for (int i = 0; i < 4; ++i) {
        int column = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            int pair = k % 8 / 2;
            float x = half(all[4 * g + pair].words[i / 2 + 2 * (k / 8)], k);
            float y = half(all[4 * column + pair].words[4 + k / 8], k);
            sum += (double)x * y;
        }
        c[i] = (float)sum;
    }
}
inline void count_conflicts(const emulated::Deposit* all) {
    if (emulated::now->lane) return;
    for (int m = 0; m < 4; ++m) {
        int seen[8] = {};
        for (int r = 0; r < 8; ++r) ++seen[(uintptr_t)all[8 * m + r].pointer / 16 % 8];
        for (int n : seen) emulated::conflicts += n > 1 ? n - 1 : 0;
        ++emulated::matrix_loads;
    }
}
inline void ldmatrix(unsigned (&r)[4], const void* row) {
    int lane = emulated::now->lane;
    if ((uintptr_t)row % 16) { fprintf(stderr, "ldmatrix: a row is not aligned\n"); abort(); }
    const emulated::Deposit* all = emulated::exchange({{}, row});
    count_conflicts(all);
    for (int m = 0; m < 4; ++m)
        r[m] = ((const unsigned*)all[8 * m + lane / 4].pointer)[lane % 4];
    __syncwarp();
}
inline void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
    int lane = emulated::now->lane;
    if ((uintptr_t)row % 16) { fprintf(stderr, "ldmatrix: a row is not aligned\n"); abort(); }
    const emulated::Deposit* all = emulated::exchange({{}, row});
    count_conflicts(all);
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int i) { return ((const unsigned short*)all[8 * m + i].pointer)[lane / 4]; };
        r[m] = at(lane % 4 * 2) | (unsigned)at(lane % 4 * 2 + 1) << 16;
    }
    __syncwarp();
}
inline void copy_async(void* to, const void* from, bool there = true) {
    if ((uintptr_t)to % 16 || (there && (uintptr_t)from % 16)) {
        fprintf(stderr, "copy_async: not aligned\n");
        abort();
    }
    emulated::now->open.push_back({to, from, there});
}
inline void copy_commit() {
    emulated::now->groups.push_back(std::move(emulated::now->open));
    emulated::now->open.clear();
}
template <int left> void copy_wait() {
    auto& groups = emulated::now->groups;
    while ((int)groups.size() > left) {
        for (auto& c : groups.front())
            if (c.there) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16);
        groups.erase(groups.begin());
    }
}
inline float exp2_fast(float x) { return exp2f(x); }
inline void cluster_arrive() {}
inline void store_remote(float2* to, unsigned rank, float2 value) {
    emulated::sent.push_back({rank, to, value});
}
inline void cluster_wait() {  // blocks run one after the other along x, a cluster's last one last
    __syncthreads();
    for (auto& s : emulated::sent)
        if (s.rank == emulated::block_index.x) *s.to = s.value;
    __syncthreads();
}
inline void let_next_begin() {}
inline void wait_for_former() {}
