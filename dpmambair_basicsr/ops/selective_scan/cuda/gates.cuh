// Activations, to a few units in the last place of their largest value nearby, and their derivatives.
__device__ inline float sigmoid(float x) { return reciprocal_fast(1 + exp2_fast(-1.4426950408889634f * x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_slope(float x) {
    const float bounded = x < -87 ? -87 : x;  // below, the slope is 0 and e would be infinite
    const float e = exp2_fast(-1.4426950408889634f * bounded), s = reciprocal_fast(1 + e);
    return s * fmaf(bounded, e * s, 1);  // e * s = 1 - s without cancellation
}
__device__ inline float normal(float x) { return fmaf(0.5f, erff(0.70710678118654752f * x), 0.5f); }  // cumulative
__device__ inline float gelu(float x) { return x * normal(x); }
__device__ inline float gelu_slope(float x) {
    return fmaf(0.39894228040143268f * x, exp2_fast(-0.72134752044448170f * x * x), normal(x));
}
