// Shared by the forward and backward kernels, for the omni scan and the plain selective scan. Compiled at run time by
// NVRTC, see runtime.py; the tests build the same files for the CPU. Macros, computed by plan.py:
//   N states; R rank of the step sizes, 0 in the plain scan, whose step sizes are one per channel; SOFTPLUS of them, 0 or
//   1; T steps of a chunk; TX, TD and TP: types of images, of plain step sizes and of projections (float, bf16, fp16).
// Shapes: b batch, l pixels, d channels, k scan orders, c chunks. A chunk is T positions in a row (directions 0, 2) or
// column order (1, 3); reversed directions visit the same chunks, and the positions of a chunk, from the last on.
// In the plain scan the orders are the groups of channels: each has d channels of its own, and all go forward.
struct Scan {
    const TX *x;             // (b, l, row); row is d, in the plain scan k * d
    const TD *delta;         // (b, l, row), in the plain scan
    const TP *projected;     // (b, l, k * (R + 2 N)): per order low-rank step sizes, B, C
    const float *dt_weight;  // (k, d, R)
    const float *dt_bias;    // (k, d)
    const float *A;          // (k * d, N), or (b, k * d, N), see A_sample
    const float *D;          // (k * d)
    float *states;           // (b, k, c, N, d): what each chunk adds, then what it starts from
    float *sums;             // (b, k, c, d) of the step sizes
    float *checkpoints;      // (b, k, c * T / CHECK, N, d), the state before every CHECK-th step, or null
    float *acc;              // (b, l, row), sums over the orders so far; out itself if TX is float
    TX *out;                 // (b, l, row)
    const TX *dy;            // (b, l, row)
    TD *ddelta;              // (b, l, row), in the plain scan
    float *adjoints;         // as states
    float *dparts;           // (blocks of channels, b, l, k * (R + 2 N))
    TP *dprojected;          // as projected; written instead of dparts if there is one block
    float *dparameters;      // (k, b * c, N + 2 + R, d): of A, D, dt_bias, dt_weight
    int batch, length, height, width, d, row, orders, chunks;
    int A_sample;            // elements from one sample's A to the next one's, 0 if all have the same
    int first, second;       // the orders that this launch handles; second is not read if P == 1, neither in the plain scan
    int accumulate, last;    // whether earlier launches left sums in acc; whether this is the last launch
    int direction[8];        // of the orders
};

static_assert(sizeof(Scan) == SCAN_BYTES, "plan.py has other fields");
static_assert(TS % U == 0 && CHECK % TS == 0 && CHECK % 4 == 0 && T % (2 * CHECK) == 0, "T, CHECK, TS, U do not fit");
#define LOG2_E 1.4426950408889634f
#define COLUMNS (R + 2 * N)
// Multiples of 16 bytes, for vector loads from shared memory.
#define RP (R ? (R + 3) / 4 * 4 : 4)
#define NP ((N + 3) / 4 * 4)
#define LOW (R ? R : 1)  // of arrays, which cannot be empty
#define PLAIN (R == 0)

// log(1 + e^x) to full relative accuracy: max(x, 0) + z P(z), z = e^-|x|; P of degree 9 is fitted to 5e-9.
__device__ inline float softplus(float x) {
    float z = exp2_fast(-LOG2_E * fabsf(x));
    float p = -0.0031760570127516985f;
    p = fmaf(p, z, 0.019542526453733444f);
    p = fmaf(p, z, -0.056373611092567444f);
    p = fmaf(p, z, 0.10543623566627502f);
    p = fmaf(p, z, -0.1526966691017151f);
    p = fmaf(p, z, 0.1966327428817749f);
    p = fmaf(p, z, -0.24951615929603577f);
    p = fmaf(p, z, 0.33329710364341736f);
    p = fmaf(p, z, -0.49999892711639404f);
    p = fmaf(p, z, 1.0f);
    return fmaxf(x, 0.0f) + z * p;
}

__device__ inline float positive(float step) { return SOFTPLUS ? softplus(step) : step; }

// Orders of the plain scan have one direction, and channels of their own behind those of the order before.
__device__ inline int direction(const Scan &o, int k) { return PLAIN ? 0 : o.direction[k]; }
__device__ inline int first_channel(const Scan &o, int k) { return PLAIN ? k * o.d : 0; }

// The pixel at a position of a direction's chunk order.
__device__ inline int pixel(const Scan &o, bool columns, int s) {
    return columns ? s % o.height * o.width + s / o.height : s;
}

// Exclusive chain over chunks, in place: states[c] becomes the initial state of chunk c. Blocks of 32 x CHAIN threads, 32
// (state, channel) pairs each. ADJOINT: from the end.
#define CHAIN 16
#define AHEAD 8
template <bool ADJOINT> __device__ inline void chain(const Scan &o, float *states) {
    __shared__ float decays[CHAIN][32], ends[CHAIN][32];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32, size = N * o.d, columns = (size + 31) / 32;
    const int column = min((int)blockIdx.x % columns * 32 + lane, size - 1), channel = column % o.d;
    const bool exists = blockIdx.x % columns * 32 + lane < size;
    const long long bk = blockIdx.x / columns;
    const int k = bk % o.orders;
    const float *A = o.A + bk / o.orders * o.A_sample;
    const float rate = LOG2_E * A[((long long)k * o.d + channel) * N + column / o.d];
    const bool backwards = (direction(o, k) >= 2) != ADJOINT;
    const int per = (o.chunks + CHAIN - 1) / CHAIN, begin = min(part * per, o.chunks), end = min(begin + per, o.chunks);
    states += bk * o.chunks * size + column;
    const float *sums = o.sums + bk * o.chunks * o.d + channel;
    float total = 0, state = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = begin; i < end; i += AHEAD) {
            float add[AHEAD], sum[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const long long c = backwards ? o.chunks - 1 - (i + j) : i + j;
                add[j] = i + j < end ? states[c * size] : 0;
                sum[j] = i + j < end ? sums[c * o.d] : 0;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const long long c = backwards ? o.chunks - 1 - (i + j) : i + j;
                if (pass && exists && i + j < end) states[c * size] = state;
                total += sum[j];
                state = exp2_fast(rate * sum[j]) * state + add[j];
            }
        }
        if (pass) break;
        decays[part][lane] = exp2_fast(rate * total);
        ends[part][lane] = state;
        __syncthreads();
        state = 0;
        for (int q = 0; q < part; q++) state = decays[q][lane] * state + ends[q][lane];
    }
}

// The pixels of a chunk in the order of a walk, -1 where there is none. Backwards: starting at position T - 1, whether or
// not it exists, so that both walks are in the same half of the chunk at any time.
__device__ inline int walk(const Scan &o, int k, bool backwards, int chunk, int step) {
    const long long s = (long long)chunk * T + (backwards ? T - 1 - step : step);
    return s < o.length ? pixel(o, direction(o, k) & 1, (int)s) : -1;
}

template <int M> __device__ inline void read(float (&v)[M], const float *p) {
    if (M >= 4) CHECK_ALIGNED(p);
#pragma unroll
    for (int i = 0; i < M / 4; i++) {
        const float4 q = ((const float4 *)p)[i];
        v[4 * i] = q.x, v[4 * i + 1] = q.y, v[4 * i + 2] = q.z, v[4 * i + 3] = q.w;
    }
#pragma unroll
    for (int i = M / 4 * 4; i < M; i++) v[i] = p[i];
}

// 0 where there is no pixel. Branch-free: it always reads something.
template <class V> __device__ inline float load_or_0(const V *x, int p, int stride) {
    const float value = to_float(load(at_pixel(x, max(p, 0), stride)));
    return p < 0 ? 0 : value;
}

// Copies ROWS rows of projections to shared memory: low-rank steps, then WEIGHTS * N of which the first SKIP * N are left
// out, each part from a multiple of 16 bytes on. Zeros where the pixel is negative. `find(row, p)` gives the source.
template <int ROWS, int THREADS, int WEIGHTS, int SKIP, int WIDTH, class Find>
__device__ inline void stage(float (*tile)[WIDTH], int stride, Find find) {
    constexpr int LANES = THREADS < 32 ? THREADS : 32, WARPS = THREADS / LANES, COPIED = R + WEIGHTS * N;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    if (warp >= WARPS) return;
#pragma unroll 4
    for (int row = warp; row < ROWS; row += WARPS) {
        int p;
        const TP *source = find(row, p);
        source = at_pixel(source, max(p, 0), stride);
#pragma unroll
        for (int i = 0; i < (COPIED + LANES - 1) / LANES; i++) {
            const int j = i * LANES + lane;
            if (j >= COPIED) continue;
            const float value = to_float(load(source + (j < R ? j : j + SKIP * N)));
            tile[row][j < R ? j : j < R + N ? j - R + RP : j - R - N + RP + NP] = p < 0 ? 0 : value;
        }
    }
}

// The data of its channel that each thread of `chunk_ends` and `outputs` needs.
struct Channel {
    float rate[N], weight[LOW], bias;
    __device__ inline Channel(const Scan &o, long long b, int k, int channel) {
        const long long i = (long long)k * o.d + min(channel, o.d - 1);
        const float *A = o.A + b * o.A_sample + i * N;
#pragma unroll
        for (int n = 0; n < N; n++) rate[n] = LOG2_E * __ldg(A + n);
#pragma unroll
        for (int r = 0; r < R; r++) weight[r] = __ldg(o.dt_weight + i * R + r);
        bias = __ldg(o.dt_bias + i);
    }
    // The step size before softplus: from low-rank ones, or from one of its own.
    __device__ inline float raw(const float *low, float own) const {
        if constexpr (PLAIN) return bias + own;
        float v[LOW], sum = bias;
        read(v, low);
#pragma unroll
        for (int r = 0; r < R; r++) sum = fmaf(weight[r], v[r], sum);
        return sum;
    }
};

// What a chunk adds to the state behind it, and the sum of its steps. ADJOINT: to the adjoint state before it, from dy.
// A thread for each of CB channels and of S chunks.
template <bool ADJOINT> __device__ inline void chunk_ends(const Scan &o, const TX *input, float *states) {
    constexpr int WIDTH = RP + NP + 4, THREADS = CB * S;
    __shared__ int pixels[S * T];
    __shared__ __align__(16) float tile[S * TS][WIDTH];
    const int blocks = (o.d + CB - 1) / CB, groups = (o.chunks + S - 1) / S, slot = threadIdx.x / CB;
    int rest = blockIdx.x;
    const int channel = rest % blocks * CB + threadIdx.x % CB;
    rest /= blocks;
    const int first = rest % groups * S;
    rest /= groups;
    const int k = rest % o.orders;
    const long long b = rest / o.orders, bk = rest;
    const bool exists = channel < o.d && first + slot < o.chunks, backwards = (direction(o, k) >= 2) != ADJOINT;
    for (int i = threadIdx.x; i < S * T; i += THREADS) pixels[i] = walk(o, k, backwards, first + i / T, i % T);
    const Channel c(o, b, k, channel);
    const TP *projected = o.projected + b * o.length * o.orders * COLUMNS + k * COLUMNS;
    const long long image = b * o.length * o.row + first_channel(o, k) + min(channel, o.d - 1);
    input += image;
    const TD *delta = PLAIN ? o.delta + image : nullptr;
    float h[N] = {}, total = 0;
#pragma unroll 1
    for (int t0 = 0; t0 < T; t0 += TS) {
        __syncthreads();
        stage<S * TS, THREADS, 1, ADJOINT>(tile, o.orders * COLUMNS, [&](int row, int &p) {
            p = pixels[row / TS * T + t0 + row % TS];
            return projected;
        });
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < TS; t += U) {
            const float *row = tile[slot * TS + t];
            float step[U], value[U];
            int p[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                p[u] = exists ? pixels[slot * T + t0 + t + u] : -1;
                value[u] = load_or_0(input, p[u], o.row);
                step[u] = PLAIN ? load_or_0(delta, p[u], o.row) : 0;
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                const float known = positive(c.raw(row + u * WIDTH, step[u]));
                step[u] = p[u] < 0 ? 0 : known;
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                float weight[N];
                read(weight, row + u * WIDTH + RP);
                total += step[u];
                const float drive = ADJOINT ? value[u] : step[u] * value[u];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float decay = exp2_fast(step[u] * c.rate[n]);
                    h[n] = ADJOINT ? decay * fmaf(drive, weight[n], h[n]) : fmaf(decay, h[n], drive * weight[n]);
                }
            }
        }
    }
    if (!exists) return;
    const long long at = bk * o.chunks + first + slot;
#pragma unroll
    for (int n = 0; n < N; n++) states[(at * N + n) * o.d + channel] = h[n];
    o.sums[at * o.d + channel] = total;
}
