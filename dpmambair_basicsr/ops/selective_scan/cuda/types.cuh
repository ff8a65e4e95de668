// Half types, and what differs between NVRTC and the tests' build for the CPU.
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#ifdef HOST_SHIM
inline float to_float(bf16 x) { return half_to_float(x.bits, true); }
inline float to_float(fp16 x) { return half_to_float(x.bits, false); }
inline void from_float(bf16 *p, float x) { p->bits = half_from_float(x, true); }
inline void from_float(fp16 *p, float x) { p->bits = half_from_float(x, false); }
template <class V> V load(const V *p) { return *p; }
inline long long multiply_wide(int x, int y) { return (long long)x * y; }
#else
#define CHECK_ALIGNED(p)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
__device__ inline float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float reciprocal_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// By hand: NVRTC would forget that these are 32 bits wide.
__device__ inline long long multiply_wide(int x, int y) {
    long long product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
    return product;
}
__device__ inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float to_float(fp16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ inline void from_float(bf16 *p, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x)); }
__device__ inline void from_float(fp16 *p, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x)); }
__device__ inline bf16 load(const bf16 *p) { return bf16{__ldg(&p->bits)}; }
__device__ inline fp16 load(const fp16 *p) { return fp16{__ldg(&p->bits)}; }
__device__ inline float load(const float *p) { return __ldg(p); }
#endif
__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float *p, float x) { *p = x; }
// x + p * stride elements, by one instruction. A pixel has less than 2^31 bytes.
template <class V> __device__ inline V *at_pixel(V *x, int p, int stride) {
    return (V *)((char *)x + multiply_wide(p, stride * (int)sizeof(V)));
}
