// The depthwise 3x3 convolution of images whose channels are side by side, zeros around them, and its gradients; that of x
// is the convolution of dy with the weights turned round. A lane has a channel, and a window of 3 x 3 pixels that moves
// along a row. Macros: WARPS of a block, STRIP pixels of a row in `depthwise_outputs`, TX type of images.
struct Image {
    const TX *x, *dy;     // (batch, height, width, channels)
    TX *out;              // likewise
    const float *weight;  // (9, channels)
    const float *bias;    // (channels), or null
    float *parts;         // (blocks, 10, channels): sums of the gradients of weight and bias
    int batch, height, width, channels, blocks;
};
static_assert(sizeof(Image) == BYTES, "pixels.py has other fields");

struct Window {
    const TX *rows[3];  // the channel in the first pixel of the row above, the row, the row below; null outside
    float v[3][3];      // by row, by column

    __device__ inline Window(const Image &o, long long image, int row, int channel, bool exists) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int at = row + i - 1;
            const bool inside = exists && at >= 0 && at < o.height;
            rows[i] = inside ? o.x + (image * o.height + at) * o.width * o.channels + channel : nullptr;
        }
    }
    __device__ inline float value(const Image &o, int i, int column) const {
        const bool inside = rows[i] && column >= 0 && column < o.width;
        return inside ? to_float(load(rows[i] + (long long)column * o.channels)) : 0;
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

extern "C" __global__ void __launch_bounds__(32 * WARPS) depthwise_outputs(const __grid_constant__ Image o) {
    const int groups = (o.channels + 31) / 32, strips = (o.width + STRIP - 1) / STRIP, rows = (o.height + WARPS - 1) / WARPS;
    int rest = blockIdx.x;
    const int channel = rest % groups * 32 + threadIdx.x % 32;
    rest /= groups;
    const int first = rest % strips * STRIP;
    rest /= strips;
    const int row = rest % rows * WARPS + threadIdx.x / 32;
    const long long image = rest / rows;
    if (channel >= o.channels || row >= o.height) return;
    float weight[9];
#pragma unroll
    for (int i = 0; i < 9; i++) weight[i] = __ldg(o.weight + i * o.channels + channel);
    const float bias = o.bias ? __ldg(o.bias + channel) : 0;
    TX *out = o.out + (image * o.height + row) * o.width * o.channels + channel;
    Window window(o, image, row, channel, true);
    window.start(o, first);
#pragma unroll 4
    for (int column = first; column < min(first + STRIP, o.width); column++) {
        window.move(o, column);
        float sum = bias;
#pragma unroll
        for (int i = 0; i < 9; i++) sum = fmaf(weight[i], window.v[i / 3][i % 3], sum);
        from_float(out + (long long)column * o.channels, sum);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) depthwise_weight_gradients(const __grid_constant__ Image o) {
    __shared__ float sums[10][32];
    const int groups = (o.channels + 31) / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = (int)blockIdx.x % groups * 32 + lane, block = blockIdx.x / groups;
    const bool exists = channel < o.channels;
    float own[10] = {};
    for (long long r = (long long)block * WARPS + warp; r < (long long)o.batch * o.height; r += (long long)o.blocks * WARPS) {
        Window window(o, r / o.height, (int)(r % o.height), channel, exists);
        const TX *dy = o.dy + r * o.width * o.channels + channel;
        window.start(o, 0);
#pragma unroll 4
        for (int column = 0; column < o.width; column++) {
            window.move(o, column);
            const float g = exists ? to_float(load(dy + (long long)column * o.channels)) : 0;
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
