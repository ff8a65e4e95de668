// Runs CUDA C++ kernels on the CPU, for tests: blocks run one after the other, each thread of a block is a fiber,
// shared memory is static. Barriers and shuffles switch to the next fiber until all have arrived.
#pragma once
#define HOST_SHIM
// C headers only: g++ takes longer for the C++ ones than for the kernels.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define CHECK_ALIGNED(p) ((size_t)(p) % 16 ? abort() : (void)0)
#define DYNAMIC_SHARED(name) static char name[228 << 10] __attribute__((aligned(16)))

template <class V> V max(V a, V b) { return a < b ? b : a; }
template <class V> V min(V a, V b) { return b < a ? b : a; }

struct Index { unsigned x; };
struct float4 { float x, y, z, w; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
constexpr size_t STACK = 256 << 10;
struct Meeting { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t start; jmp_buf rest; bool begun, done; };
static Fiber fibers[1024];
static char *stacks = (char *)malloc(1024 * STACK);  // the system only allocates touched pages
static jmp_buf scheduler;
static unsigned current;
static Meeting block_meeting, warp_meeting[32];
static unsigned slots[1024];
static void (*body)(const void *);
static const void *arguments;

// By setjmp: swapcontext would make a system call each time.
static void yield() {
    const unsigned self = current;
    if (!_setjmp(fibers[self].rest)) _longjmp(scheduler, 1);
    threadIdx.x = self;
}

static void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.rest, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
}

// Threads that have returned never count as arrived: kernels must not return before a barrier.
static void meet(Meeting &m, unsigned size) {
    const unsigned generation = m.generation;
    if (++m.arrived == size) m.arrived = 0, m.generation++;
    else while (m.generation == generation) yield();
}
static unsigned warp_size() { return min(32u, blockDim.x - threadIdx.x / 32 * 32); }
static void meet_warp() { meet(warp_meeting[threadIdx.x / 32], warp_size()); }

static void enter() {
    body(arguments);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

static void launch(void (*kernel)(const void *), const void *args, unsigned grid, unsigned block) {
    const bool backwards = getenv("SHIM_BACKWARDS");
    body = kernel, arguments = args, gridDim.x = grid, blockDim.x = block;
    for (unsigned b = 0; b < grid; b++) {
        blockIdx.x = b;
        for (unsigned t = 0; t < block; t++) {
            Fiber &fiber = fibers[t];
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = stacks + t * STACK;
            fiber.start.uc_stack.ss_size = STACK;
            fiber.begun = fiber.done = false;
            makecontext(&fiber.start, enter, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (unsigned i = 0; i < block; i++) {
                const unsigned t = backwards ? block - 1 - i : i;  // one of the orders reveals a missing barrier
                if (fibers[t].done) continue;
                running = true, current = threadIdx.x = t;
                resume(fibers[t]);
            }
        }
    }
}
}  // namespace shim

inline void __syncthreads() { shim::meet(shim::block_meeting, blockDim.x); }
inline void __syncwarp(unsigned = ~0u) { shim::meet_warp(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    memcpy(&shim::slots[threadIdx.x], &value, 4);
    shim::meet_warp();
    memcpy(&value, &shim::slots[threadIdx.x ^ mask], 4);
    return shim::meet_warp(), value;
}
template <class V> V __ldg(const V *p) { return *p; }

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float half_to_float(unsigned short bits, bool bfloat) {
    unsigned wide = (unsigned)bits << 16;
    float value;
    _Float16 half;
    memcpy(&value, &wide, 4);
    memcpy(&half, &bits, 2);
    return bfloat ? value : (float)half;
}
inline unsigned short half_from_float(float x, bool bfloat) {
    unsigned wide;
    memcpy(&wide, &x, 4);
    unsigned short bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // NaNs aside
    _Float16 half = x;
    if (!bfloat) memcpy(&bits, &half, 2);
    return bits;
}
#define HOST_KERNEL(name, Arguments) \
    extern "C" void run_##name(const Arguments *o, unsigned grid, unsigned block) { \
        shim::launch([](const void *p) { name(*(const Arguments *)p); }, o, grid, block); \
    }
