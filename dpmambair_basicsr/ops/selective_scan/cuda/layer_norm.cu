// Layer norm over the channels of each pixel, which are side by side, with or without a factor silu(gate), and its
// gradients. A warp has a pixel at a time, its channels in registers: they are read once. Macros: C channels, WARPS of a
// block, TX type of images, GATE 0 or 1, TG type of the gate.
#define VALUES ((C + 31) / 32)

struct Pixels {
    const TX *x, *dy;     // (pixels, C)
    TX *out;              // y, or the gradient of x
    const TG *gate;       // (pixels, C), if GATE
    TG *dgate;            // likewise
    const float *weight;  // (C)
    const float *bias;    // (C)
    float *parts;         // (blocks, 2, C): sums of the gradients of weight and bias
    long long pixels;
    float eps;
};
static_assert(sizeof(Pixels) == BYTES, "pixels.py has other fields");

__device__ inline float over_warp(float value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0xffffffff, value, mask);
    return value;
}

// v = (x - mean) / deviation; returns 1 / deviation. 0 behind the last channel.
__device__ inline float normalize(const Pixels &o, long long pixel, float (&v)[VALUES]) {
    const int lane = threadIdx.x % 32;
    const TX *x = o.x + pixel * C;
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const int j = lane + 32 * i;
        v[i] = j < C ? to_float(load(x + min(j, C - 1))) : 0;
        sum += v[i];
    }
    const float mean = over_warp(sum) / C;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        v[i] = lane + 32 * i < C ? v[i] - mean : 0;
        squares = fmaf(v[i], v[i], squares);
    }
    const float scale = 1 / sqrtf(over_warp(squares) / C + o.eps);
#pragma unroll
    for (int i = 0; i < VALUES; i++) v[i] *= scale;
    return scale;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) layer_norm_outputs(const __grid_constant__ Pixels o) {
    const int lane = threadIdx.x % 32;
    for (long long p = (long long)blockIdx.x * WARPS + threadIdx.x / 32; p < o.pixels; p += (long long)gridDim.x * WARPS) {
        float v[VALUES];
        normalize(o, p, v);
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int j = lane + 32 * i;
            if (j >= C) continue;
            const float y = fmaf(v[i], __ldg(o.weight + j), __ldg(o.bias + j));
            from_float(o.out + p * C + j, GATE ? y * silu(to_float(load(o.gate + p * C + j))) : y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, C <= 544 ? 2 : 0) layer_norm_gradients(const __grid_constant__ Pixels o) {
    __shared__ float sums[2][C];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float dweight[VALUES] = {}, dbias[VALUES] = {};
    for (long long p = (long long)blockIdx.x * WARPS + warp; p < o.pixels; p += (long long)gridDim.x * WARPS) {
        float v[VALUES], g[VALUES], mean = 0, product = 0;
        const float scale = normalize(o, p, v);
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int j = lane + 32 * i, k = min(j, C - 1);
            float dy = j < C ? to_float(load(o.dy + p * C + k)) : 0;
            if (GATE && j < C) {
                const float gate = to_float(load(o.gate + p * C + j)), y = fmaf(v[i], __ldg(o.weight + j), __ldg(o.bias + j));
                from_float(o.dgate + p * C + j, dy * y * silu_slope(gate));
                dy *= silu(gate);
            }
            dweight[i] = fmaf(dy, v[i], dweight[i]);
            dbias[i] += dy;
            g[i] = dy * __ldg(o.weight + k);
            mean += g[i];
            product = fmaf(g[i], v[i], product);
        }
        mean = over_warp(mean) / C;
        product = over_warp(product) / C;
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int j = lane + 32 * i;
            if (j < C) from_float(o.out + p * C + j, scale * (g[i] - mean - v[i] * product));
        }
    }
    for (int w = 0; w < WARPS; w++) {  // one after the other, so that sums have one order
        if (w == warp)
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                const int j = lane + 32 * i;
                if (j >= C) continue;
                sums[0][j] = w ? sums[0][j] + dweight[i] : dweight[i];
                sums[1][j] = w ? sums[1][j] + dbias[i] : dbias[i];
            }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * C; i += 32 * WARPS) o.parts[(long long)blockIdx.x * 2 * C + i] = (&sums[0][0])[i];
}
