// The depthwise 3x3 convolution of images whose channels are side by side, zeros around them, with what follows it, and its
// gradients; that of x is the convolution of dy with the weights turned round. A lane has a channel, and a window of 3 x 3
// pixels that moves along a row. Macros: WARPS of a block, STRIP pixels of a row in `depthwise_outputs`, TX type of images,
// AFTER the function below that follows, CONVOLUTIONS whose results it takes: 1, or 2, those of a gate and of its value.
struct Image {
    const TX *x[2];          // (batch, height, width, channels)
    const float *weight[2];  // (9, channels)
    const float *bias[2];    // (channels), or null
    TX *out[2];              // as x
    const TX *dy;            // as x
    float *parts;            // (blocks, 10, channels): sums of the gradients of weight and bias
    int batch, height, width, channels, blocks;
};
static_assert(sizeof(Image) == BYTES, "pixels.py has other fields");

struct Window {
    const TX *rows[3];  // the channel in the first pixel of the row above, the row, the row below; null outside
    float v[3][3];      // by row, by column

    __device__ inline Window(const Image &o, const TX *x, long long image, int row, int channel, bool exists) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int at = row + i - 1;
            const bool inside = exists && at >= 0 && at < o.height;
            rows[i] = inside ? x + (image * o.height + at) * o.width * o.channels + channel : nullptr;
        }
    }
    __device__ inline float value(const Image &o, int i, int column) const {
        const bool inside = rows[i] && column >= 0 && column < o.width;
        return inside ? to_float(load(at_pixel(rows[i], column, o.channels))) : 0;
    }
    // The columns before and at `column`, where the next `move` goes.
    __device__ inline void start(const Image &o, int column) {
#pragma unroll
        for (int i = 0; i < 3; i++) v[i][1] = value(o, i, column - 1), v[i][2] = value(o, i, column);
    }
    __device__ inline void move(const Image &o, int column) {
#pragma unroll
        for (int i = 0; i < 3; i++) v[i][0] = v[i][1], v[i][1] = v[i][2], v[i][2] = value(o, i, column + 1);
    }
};

struct Convolution {
    Window window;
    float weight[9], bias;

    __device__ inline Convolution(const Image &o, int i, long long image, int row, int channel)
        : window(o, o.x[i], image, row, channel, true) {
#pragma unroll
        for (int j = 0; j < 9; j++) weight[j] = __ldg(o.weight[i] + j * o.channels + channel);
        bias = o.bias[i] ? __ldg(o.bias[i] + channel) : 0;
    }
    __device__ inline float next(const Image &o, int column) {
        window.move(o, column);
        float sum = bias;
#pragma unroll
        for (int j = 0; j < 9; j++) sum = fmaf(weight[j], window.v[j / 3][j % 3], sum);
        return sum;
    }
};

// What follows: from the results x and `value` of the convolutions at a place of the images.
__device__ inline void identity(const Image &o, long long at, float x, float) { from_float(o.out[0] + at, x); }
__device__ inline void silu(const Image &o, long long at, float x, float) { from_float(o.out[0] + at, silu(x)); }
__device__ inline void silu_gradient(const Image &o, long long at, float x, float) {
    from_float(o.out[0] + at, to_float(load(o.dy + at)) * silu_slope(x));
}
__device__ inline void gelu_gate(const Image &o, long long at, float x, float value) {
    from_float(o.out[0] + at, gelu(x) * value);
}
__device__ inline void gelu_gate_gradients(const Image &o, long long at, float x, float value) {
    const float dy = to_float(load(o.dy + at));
    from_float(o.out[0] + at, dy * value * gelu_slope(x));
    from_float(o.out[1] + at, dy * gelu(x));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, CONVOLUTIONS == 2 ? 3 : 0) depthwise_outputs(const __grid_constant__ Image o) {
    const int groups = (o.channels + 31) / 32, strips = (o.width + STRIP - 1) / STRIP, rows = (o.height + WARPS - 1) / WARPS;
    int rest = blockIdx.x;
    const int channel = rest % groups * 32 + threadIdx.x % 32;
    rest /= groups;
    const int first = rest % strips * STRIP;
    rest /= strips;
    const int row = rest % rows * WARPS + threadIdx.x / 32;
    const long long image = rest / rows;
    if (channel >= o.channels || row >= o.height) return;
    // Where there is one convolution they are the same, and the compiler drops what AFTER does not take.
    Convolution x(o, 0, image, row, channel), value(o, CONVOLUTIONS - 1, image, row, channel);
    x.window.start(o, first), value.window.start(o, first);
    const long long start = (image * o.height + row) * o.width * o.channels + channel;
#pragma unroll 4
    for (int column = first; column < min(first + STRIP, o.width); column++)
        AFTER(o, start + multiply_wide(column, o.channels), x.next(o, column), value.next(o, column));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) depthwise_weight_gradients(const __grid_constant__ Image o) {
    __shared__ float sums[10][32];
    const int groups = (o.channels + 31) / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = (int)blockIdx.x % groups * 32 + lane, block = blockIdx.x / groups;
    const bool exists = channel < o.channels;
    float own[10] = {};
    for (long long r = (long long)block * WARPS + warp; r < (long long)o.batch * o.height; r += (long long)o.blocks * WARPS) {
        Window window(o, o.x[0], r / o.height, (int)(r % o.height), channel, exists);
        const TX *dy = o.dy + r * o.width * o.channels + channel;
        window.start(o, 0);
#pragma unroll 4
        for (int column = 0; column < o.width; column++) {
            window.move(o, column);
            const float g = exists ? to_float(load(at_pixel(dy, column, o.channels))) : 0;
#pragma unroll
            for (int i = 0; i < 9; i++) own[i] = fmaf(g, window.v[i / 3][i % 3], own[i]);
            own[9] += g;
        }
    }
    for (int w = 0; w < WARPS; w++) {  // one after the other, so that sums have one order
        if (w == warp)
#pragma unroll
            for (int i = 0; i < 10; i++) sums[i][lane] = w ? sums[i][lane] + own[i] : own[i];
        __syncthreads();
    }
    for (int i = warp; i < 10; i += WARPS)
        if (exists) o.parts[((long long)block * 10 + i) * o.channels + channel] = sums[i][lane];
}
