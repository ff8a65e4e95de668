// The forward pass, in three phases (see scan_common.cuh): what each chunk adds to the state, the chain over chunks, the
// outputs. A thread has one channel of one chunk, its N states in registers; projections are staged in shared memory,
// from where all channels read them. Further macros: CB channels and S chunks of a block, P orders of one family (rows or
// columns) that a block of `outputs` handles, TS steps staged at a time, U steps unrolled, CHECK, ENDS_BLOCKS and
// OUTPUTS_BLOCKS per multiprocessor.
extern "C" __global__ void __launch_bounds__(CB * S, ENDS_BLOCKS) scan_ends(const __grid_constant__ Scan o) {
    chunk_ends<false>(o, o.x, o.states);
}

extern "C" __global__ void __launch_bounds__(32 * CHAIN) scan_chain(const __grid_constant__ Scan o) {
    chain<false>(o, o.states);
}

// y. Two orders over the same chunk start at its two ends. In the first half of their steps each writes what the other
// then adds to, so that sums have one order and no atomics.
extern "C" __global__ void __launch_bounds__(CB * S * P, OUTPUTS_BLOCKS) scan_outputs(const __grid_constant__ Scan o) {
    constexpr int WIDTH = RP + 2 * NP + 4, THREADS = CB * S * P, SLOTS = S * P;
    __shared__ int pixels[SLOTS * T];
    __shared__ __align__(16) float tile[SLOTS * TS][WIDTH];
    const int blocks = (o.d + CB - 1) / CB, groups = (o.chunks + S - 1) / S, slot = threadIdx.x / CB;
    int rest = blockIdx.x;
    const int channel = rest % blocks * CB + threadIdx.x % CB;
    rest /= blocks;
    const int chunk_0 = rest % groups * S, chunk = chunk_0 + slot / P;
    rest /= groups;
    const int group = PLAIN ? rest % o.orders : 0;
    const long long b = PLAIN ? rest / o.orders : rest;
    const auto order_of = [&](int which) { return PLAIN ? group : which ? o.second : o.first; };
    const int k = order_of(slot % P);
    const bool exists = channel < o.d && chunk < o.chunks;
    for (int i = threadIdx.x; i < SLOTS * T; i += THREADS) {
        const int order = order_of(i / T % P);
        pixels[i] = walk(o, order, direction(o, order) >= 2, chunk_0 + i / T / P, i % T);
    }
    const Channel c(o, b, k, channel);
    const float D = __ldg(o.D + (long long)k * o.d + min(channel, o.d - 1));
    const TP *projected = o.projected + b * o.length * o.orders * COLUMNS;
    const long long image = b * o.length * o.row + first_channel(o, k) + min(channel, o.d - 1);
    const long long at = (b * o.orders + k) * o.chunks + chunk;
    const TX *x = o.x + image;
    const TD *delta = PLAIN ? o.delta + image : nullptr;
    TX *out = o.out + image;
    float *acc = o.acc + image;
    float h[N];
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = exists && o.chunks > 1 ? o.states[(at * N + n) * o.d + channel] : 0;
#pragma unroll 1
    for (int t0 = 0; t0 < T; t0 += TS) {
        __syncthreads();  // orders the two halves' writes to acc, too
        stage<SLOTS * TS, THREADS, 2, 0>(tile, o.orders * COLUMNS, [&](int row, int &p) {
            p = pixels[row / TS * T + t0 + row % TS];
            return projected + order_of(row / TS % P) * COLUMNS;
        });
        __syncthreads();
        if (o.checkpoints && exists && t0 % CHECK == 0) {
#pragma unroll
            for (int n = 0; n < N; n++) o.checkpoints[((at * (T / CHECK) + t0 / CHECK) * N + n) * o.d + channel] = h[n];
        }
        const bool second_half = P > 1 && t0 >= T / 2, add = o.accumulate || second_half;
        const bool final = o.last && (P == 1 || second_half);
#pragma unroll 1
        for (int t = 0; t < TS; t += U) {
            const float *row = tile[slot * TS + t];
            float step[U], value[U], sum[U];
            int p[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                p[u] = exists ? pixels[slot * T + t0 + t + u] : -1;
                value[u] = load_or_0(x, p[u], o.row);
                step[u] = PLAIN ? load_or_0(delta, p[u], o.row) : 0;
                sum[u] = add && p[u] >= 0 ? *at_pixel(acc, p[u], o.row) : 0;
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                const float known = positive(c.raw(row + u * WIDTH, step[u]));
                step[u] = p[u] < 0 ? 0 : known;
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                float B[N], C[N];
                read(B, row + u * WIDTH + RP);
                read(C, row + u * WIDTH + RP + NP);
                const float drive = step[u] * value[u];
                float y[2] = {D * value[u], 0};
#pragma unroll
                for (int n = 0; n < N; n++) {
                    h[n] = fmaf(exp2_fast(step[u] * c.rate[n]), h[n], drive * B[n]);
                    y[n % 2] = fmaf(C[n], h[n], y[n % 2]);
                }
                sum[u] += y[0] + y[1];
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                // acc is out if that is float.
                if (sizeof(TX) < 4 && final && p[u] >= 0) from_float(at_pixel(out, p[u], o.row), sum[u]);
                else if (p[u] >= 0) *at_pixel(acc, p[u], o.row) = sum[u];
            }
        }
    }
}
