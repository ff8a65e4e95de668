// The backward pass (see scan_common.cuh): what each chunk adds to the adjoint state before it, the chain over
// chunks from the end, all gradients. Further macros as for the forward pass; CC and W: a warp of `scan_gradients` has
// 8 CC channels, a block W such warps for each of P orders; SHARED bytes.
//
// A thread of `scan_gradients` has CC channels times NN states: sums over channels, for dB and dC, and over states, for dx
// and the step sizes, are then mostly within threads, and few shuffles remain. It processes CHECK steps at a time, from
// the last: their states are recomputed from the forward pass's checkpoint; those at the start of each LEAP steps are
// stored, and those in between are in registers.
#define LEAP 4
#define NN ((N + 3) / 4)
#define CW (8 * CC)
#define GROUPS (CHECK / LEAP)
#define ROW (CHECK + 4)  // + 4: rows in other banks

extern "C" __global__ void __launch_bounds__(CB * S, ENDS_BLOCKS) scan_adjoint_ends(const __grid_constant__ Scan o) {
    chunk_ends<true>(o, o.dy, o.adjoints);
}

extern "C" __global__ void __launch_bounds__(32 * CHAIN) scan_adjoint_chain(const __grid_constant__ Scan o) {
    chain<true>(o, o.adjoints);
}

// 1 - e^-x to full relative accuracy, x >= 0: the derivative of softplus where that is x.
__device__ inline float sigmoid_of_softplus(float x) {
    float series = fmaf(x, -1.0f / 6, 1.0f);
    series = fmaf(x * (-1.0f / 5), series, 1.0f);
    series = fmaf(x * (-1.0f / 4), series, 1.0f);
    series = fmaf(x * (-1.0f / 3), series, 1.0f);
    series = fmaf(x * (-1.0f / 2), series, 1.0f);
    return x < 0.25f ? x * series : 1 - exp2_fast(-LOG2_E * x);
}

// Sums of pairs over two lanes that differ in bit MASK: lanes without it keep the sums of the first half, others those
// of the second half.
template <int MASK, int M> __device__ inline void halve(float (&v)[M], float (&sums)[M / 2]) {
    const bool upper = threadIdx.x & MASK;
#pragma unroll
    for (int i = 0; i < M / 2; i++) {
        const float give = upper ? v[i] : v[i + M / 2], keep = upper ? v[i + M / 2] : v[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffff, give, MASK);
    }
}

struct Warp {
    float delta[CW][ROW];  // then the gradients of the step sizes before softplus
    float drive[CW][ROW];  // then the gradients of drive, = delta * x
    float dy[CW][ROW];     // then what goes to the step sizes by the decays
    float saved[GROUPS - 1][CC * NN][32];  // states at the starts of all LEAP steps but the first
    float sums[CHECK * COLUMNS];                            // gradients of the projections from this warp's channels
    float parameters[R + 2][32];                            // of D, dt_bias, dt_weight, lane = channel
};

struct Shared {
    float B[P][4 * NN][ROW], C[P][4 * NN][ROW], low[P][CHECK][RP];
    Warp warps[P * W];
    int pixels[P][T];
};
static_assert(sizeof(Shared) <= SHARED, "plan.py asks for too little");

struct Elements {  // of a thread: channels c * 8 + lane / 4 by states 4 * s + lane % 4
    float v[CC][NN];
    // From (.., N, d) at `p`, which has d channels of which those from `first` on are this warp's.
    __device__ inline void load(const float *p, int first, int d) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < CC; c++)
#pragma unroll
            for (int s = 0; s < NN; s++) {
                const int n = 4 * s + lane % 4, channel = first + c * 8 + lane / 4;
                v[c][s] = n < N && channel < d ? p[(long long)n * d + channel] : 0;
            }
    }
};

extern "C" __global__ void __launch_bounds__(32 * W * P, GRADIENTS_BLOCKS) scan_gradients(const __grid_constant__ Scan o) {
    DYNAMIC_SHARED(shared_bytes);
    Shared &shared = *(Shared *)shared_bytes;
    const int lane = threadIdx.x % 32, q = lane % 4, e = lane / 4, in_block = threadIdx.x / 32;
    const int slot = in_block / W, blocks = (o.d + CW * W - 1) / (CW * W), block = blockIdx.x % blocks;
    const int chunk = blockIdx.x / blocks % o.chunks, first = (block * W + in_block % W) * CW, channel = first + lane;
    const int rest = blockIdx.x / blocks / o.chunks, group = PLAIN ? rest % o.orders : 0;
    const long long b = PLAIN ? rest / o.orders : rest;
    const auto order_of = [&](int which) { return PLAIN ? group : which ? o.second : o.first; };
    const int k = order_of(slot), stride = o.orders * COLUMNS;
    const bool exists = lane < CW && channel < o.d;
    Warp &warp = shared.warps[in_block];
    for (int i = threadIdx.x; i < P * T; i += 32 * W * P) {
        const int order = order_of(i / T);
        shared.pixels[i / T][i % T] = walk(o, order, direction(o, order) >= 2, chunk, i % T);
    }
    for (int i = threadIdx.x; i < P * 4 * NN * ROW; i += 32 * W * P) {  // rows of states beyond N stay 0
        (&shared.B[0][0][0])[i] = 0;
        (&shared.C[0][0][0])[i] = 0;
    }
    const long long at = (b * o.orders + k) * o.chunks + chunk, of_channel = (long long)k * o.d + min(channel, o.d - 1);
    const float *A = o.A + b * o.A_sample + (long long)k * o.d * N;
    Elements rate, adjoint, dA = {};
    if (o.chunks > 1) adjoint.load(o.adjoints + at * N * o.d, first, o.d);
#pragma unroll
    for (int c = 0; c < CC; c++)
#pragma unroll
        for (int s = 0; s < NN; s++) {
            const int i = first + c * 8 + e, n = 4 * s + q;
            rate.v[c][s] = i < o.d && n < N ? LOG2_E * __ldg(A + (long long)i * N + n) : 0;
            if (o.chunks == 1) adjoint.v[c][s] = 0;
        }
    for (int r = 0; r < R + 2; r++) warp.parameters[r][lane] = 0;
    const float D = __ldg(o.D + of_channel), bias = __ldg(o.dt_bias + of_channel), *weight = o.dt_weight + of_channel * R;
    const long long image = b * o.length * o.row + first_channel(o, k) + min(channel, o.d - 1);
    const TX *x = o.x + image, *dy = o.dy + image;
    const TD *given = PLAIN ? o.delta + image : nullptr;
    TX *out = o.out + image;
    TD *ddelta = PLAIN ? o.ddelta + image : nullptr;
    float *acc = o.acc + image;
    const long long of_projected = b * o.length * stride + k * COLUMNS;
    TP *dprojected = o.dprojected + of_projected;
    float *dparts = o.dparts + (long long)block * o.batch * o.length * stride + of_projected;
    const int *pixels = shared.pixels[slot];

#pragma unroll 1
    for (int t0 = T - CHECK; t0 >= 0; t0 -= CHECK) {
        const float *checkpoint = o.checkpoints + (at * (T / CHECK) + t0 / CHECK) * N * o.d;
        if (t0 == T - CHECK) __syncthreads();
        for (int row = in_block; row < P * CHECK; row += W * P) {  // stage projections, those of a state side by side
            const int t = row % CHECK, which = row / CHECK, p = shared.pixels[which][t0 + t];
            const TP *source = o.projected + b * o.length * stride + order_of(which) * COLUMNS;
            source = at_pixel(source, max(p, 0), stride);
#pragma unroll
            for (int j = lane; j < COLUMNS; j += 32) {
                const float loaded = to_float(load(source + j)), value = p < 0 ? 0 : loaded;
                if (j < R) shared.low[which][t][j] = value;
                else if (j < R + N) shared.B[which][j - R][t] = value;
                else shared.C[which][j - R - N][t] = value;
            }
        }
        __syncthreads();
        Elements h;
        h.load(checkpoint, first, o.d);
        if (lane < CW) {
#pragma unroll 1
            for (int t = 0; t < CHECK; t += 4) {
                float4 delta, drive, out_gradient;
                float *step[3] = {&delta.x, &drive.x, &out_gradient.x};
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    const int p = exists ? pixels[t0 + t + u] : -1;
                    float raw = bias;
                    if constexpr (PLAIN) {
                        raw += load_or_0(given, p, o.row);
                    } else {
                        float low[LOW];
                        read(low, shared.low[slot][t + u]);
#pragma unroll
                        for (int r = 0; r < R; r++) raw = fmaf(__ldg(weight + r), low[r], raw);
                    }
                    const float known = positive(raw);
                    step[0][u] = p < 0 ? 0 : known;
                    step[1][u] = step[0][u] * load_or_0(x, p, o.row);
                    step[2][u] = load_or_0(dy, p, o.row);
                }
                CHECK_ALIGNED(&warp.delta[lane][t]);
                *(float4 *)&warp.delta[lane][t] = delta;
                *(float4 *)&warp.drive[lane][t] = drive;
                *(float4 *)&warp.dy[lane][t] = out_gradient;
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int group = 0; group < GROUPS - 1; group++) {  // forward to the last LEAP steps
            const int t = group * LEAP;
#pragma unroll
            for (int s = 0; s < NN; s++) {
                float B[LEAP];
                read(B, &shared.B[slot][4 * s + q][t]);
#pragma unroll
                for (int c = 0; c < CC; c++) {
                    float delta[LEAP], drive[LEAP];
                    read(delta, &warp.delta[c * 8 + e][t]);
                    read(drive, &warp.drive[c * 8 + e][t]);
#pragma unroll
                    for (int u = 0; u < LEAP; u++)
                        h.v[c][s] = fmaf(exp2_fast(delta[u] * rate.v[c][s]), h.v[c][s], drive[u] * B[u]);
                    warp.saved[group][c * NN + s][lane] = h.v[c][s];
                }
            }
        }
#pragma unroll 1
        for (int group = GROUPS - 1; group >= 0; group--) {
            const int t = group * LEAP;
            if (group == 0) {  // in place of a state that is no longer needed
                h.load(checkpoint, first, o.d);
#pragma unroll
                for (int i = 0; i < CC * NN; i++) warp.saved[0][i][lane] = h.v[i / NN][i % NN];
            }
            const float(*start)[32] = warp.saved[max(group - 1, 0)];
            float sums[2 * LEAP * NN] = {};  // over this thread's channels: dB, dC by step, by state
#pragma unroll
            for (int c = 0; c < CC; c++) {
                float delta[LEAP], drive[LEAP], gy[LEAP], flows[2 * LEAP] = {};  // by step: by the decays, to drive
                read(delta, &warp.delta[c * 8 + e][t]);
                read(drive, &warp.drive[c * 8 + e][t]);
                read(gy, &warp.dy[c * 8 + e][t]);
#pragma unroll
                for (int s = 0; s < NN; s++) {
                    float B[LEAP], C[LEAP], decay[LEAP], kept[LEAP], state = start[c * NN + s][lane];
                    read(B, &shared.B[slot][4 * s + q][t]);
                    read(C, &shared.C[slot][4 * s + q][t]);
#pragma unroll
                    for (int u = 0; u < LEAP; u++) {
                        decay[u] = exp2_fast(delta[u] * rate.v[c][s]);
                        kept[u] = decay[u] * state;
                        state = fmaf(drive[u], B[u], kept[u]);
                        sums[(LEAP + u) * NN + s] = fmaf(gy[u], state, sums[(LEAP + u) * NN + s]);
                    }
                    float behind = adjoint.v[c][s];
#pragma unroll
                    for (int u = LEAP - 1; u >= 0; u--) {
                        const float g = fmaf(C[u], gy[u], behind), flow = g * kept[u];
                        behind = decay[u] * g;
                        sums[u * NN + s] = fmaf(g, drive[u], sums[u * NN + s]);
                        flows[LEAP + u] = fmaf(g, B[u], flows[LEAP + u]);
                        flows[u] = fmaf(flow, rate.v[c][s], flows[u]);
                        dA.v[c][s] = fmaf(flow, delta[u], dA.v[c][s]);
                    }
                    adjoint.v[c][s] = behind;
                }
                // Over states: lane q keeps step q.
                float by_kind[2][LEAP] , half[LEAP], own[2];
#pragma unroll
                for (int u = 0; u < LEAP; u++)  // steps 0, 1 of both kinds, then steps 2, 3
                    by_kind[u / 2][u % 2] = flows[u], by_kind[u / 2][2 + u % 2] = flows[LEAP + u];
                float ordered[2 * LEAP];
#pragma unroll
                for (int i = 0; i < 2 * LEAP; i++) ordered[i] = by_kind[i / LEAP][i % LEAP];
                halve<2>(ordered, half);  // of both kinds two steps are left
                float last[LEAP] = {half[0], half[2], half[1], half[3]};
                halve<1>(last, own);
                __syncwarp();
                warp.dy[c * 8 + e][t + q] = own[0];
                warp.drive[c * 8 + e][t + q] = own[1];
            }
            // Over channels: lanes keep one of dB and dC, and one of the steps.
            float half[LEAP * NN], quarter[LEAP / 2 * NN], own[NN];
            halve<4>(sums, half);
            halve<8>(half, quarter);
            halve<16>(quarter, own);
            const int step = t + (e & 2) + e / 4, kind = e & 1;
#pragma unroll
            for (int s = 0; s < NN; s++) {
                const int n = 4 * s + q;
                if (n < N) warp.sums[step * COLUMNS + R + kind * N + n] = own[s];
            }
        }
        __syncwarp();
        if (lane < CW) {
            const bool second_half = P > 1 && t0 < T / 2, add = o.accumulate || second_half;
            const bool final = o.last && (P == 1 || second_half);
            float dD = 0, dbias = 0, dweight[LOW] = {};
#pragma unroll 1
            for (int t = 0; t < CHECK; t += 4) {
                float delta[4], to_drive[4], by_decay[4], value[4], gy[4], dx[4];
                float4 kept;
                float *raw_gradient = &kept.x;
                int p[4];
                read(delta, &warp.delta[lane][t]);
                read(to_drive, &warp.drive[lane][t]);
                read(by_decay, &warp.dy[lane][t]);
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    p[u] = exists ? pixels[t0 + t + u] : -1;
                    value[u] = load_or_0(x, p[u], o.row);
                    gy[u] = load_or_0(dy, p[u], o.row);
                    dx[u] = add && p[u] >= 0 ? *at_pixel(acc, p[u], o.row) : 0;
                }
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    const float slope = SOFTPLUS ? sigmoid_of_softplus(delta[u]) : p[u] < 0 ? 0 : 1;
                    const float g = fmaf(value[u], to_drive[u], by_decay[u] * (1 / LOG2_E)) * slope;
                    raw_gradient[u] = g;
                    dD = fmaf(gy[u], value[u], dD);
                    dbias += g;
                    if constexpr (PLAIN) {
                        if (p[u] >= 0) from_float(at_pixel(ddelta, p[u], o.row), g);
                    } else {
                        float low[LOW];
                        read(low, shared.low[slot][t + u]);
#pragma unroll
                        for (int r = 0; r < R; r++) dweight[r] = fmaf(g, low[r], dweight[r]);
                    }
                }
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    dx[u] += fmaf(delta[u], to_drive[u], D * gy[u]);
                    // acc is out if that is float.
                    if (sizeof(TX) < 4 && final && p[u] >= 0) from_float(at_pixel(out, p[u], o.row), dx[u]);
                    else if (p[u] >= 0) *at_pixel(acc, p[u], o.row) = dx[u];
                }
                *(float4 *)&warp.delta[lane][t] = kept;
            }
            warp.parameters[0][lane] += dD;
            warp.parameters[1][lane] += dbias;
#pragma unroll
            for (int r = 0; r < R; r++) warp.parameters[2 + r][lane] += dweight[r];
        }
        __syncwarp();
        // Gradients of the low-rank steps: 4 steps of each 8th one per lane.
        if (e / 2 < GROUPS && lane / 8 < GROUPS) {
#pragma unroll
            for (int i = 0; i < (R + 7) / 8; i++) {
                const int r = i * 8 + lane % 8, t = lane / 8 * 4;
                float sum[4] = {};
                const float *w = o.dt_weight + ((long long)k * o.d + first) * R + min(r, R - 1);
                const auto add = [&](int c, float weight_of_c) {
                    float g[4];
                    read(g, &warp.delta[c][t]);
#pragma unroll
                    for (int u = 0; u < 4; u++) sum[u] = fmaf(g[u], weight_of_c, sum[u]);
                };
                int c = 0;
#pragma unroll 1
                for (; c + 8 <= min(CW, o.d - first); c += 8, w += 8 * R) {
#pragma unroll
                    for (int j = 0; j < 8; j++) add(c + j, __ldg(w + j * R));
                }
#pragma unroll 1
                for (; c < min(CW, o.d - first); c++, w += R) add(c, __ldg(w));
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (r < R) warp.sums[(t + u) * COLUMNS + r] = sum[u];
            }
        }
        __syncthreads();
        const Warp *warps = shared.warps + slot * W;
#pragma unroll 4
        for (int i = threadIdx.x % (32 * W); i < CHECK * COLUMNS; i += 32 * W) {
            const int row = i / COLUMNS, p = pixels[t0 + row];
            float sum = 0;
#pragma unroll
            for (int w = 0; w < W; w++) sum += warps[w].sums[i];
            if (p < 0) continue;
            if (blocks == 1) from_float(at_pixel(dprojected, p, stride) + (i - row * COLUMNS), sum);
            else at_pixel(dparts, p, stride)[i - row * COLUMNS] = sum;
        }
    }
    float *parameters = o.dparameters + (((long long)k * o.batch + b) * o.chunks + chunk) * (N + 2 + R) * o.d;
#pragma unroll
    for (int c = 0; c < CC; c++)
#pragma unroll
        for (int s = 0; s < NN; s++) {
            const int i = first + c * 8 + e, n = 4 * s + q;
            if (i < o.d && n < N) parameters[(long long)n * o.d + i] = dA.v[c][s];
        }
    if (exists)
        for (int r = 0; r < R + 2; r++) parameters[(long long)(N + r) * o.d + channel] = warp.parameters[r][lane];
}
