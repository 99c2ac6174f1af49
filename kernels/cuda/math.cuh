/** Elementary functions: the polynomials of src/cpu/scalar/math.rs, operation for operation, so that a GPU, the CPU shim and the
 *  scalar code give the same bits. (Kernels are compiled with -fmad=false: a multiply-add is fused where it says `fmaf`, and
 *  nowhere else.) */
#pragma once

#include <math.h>

/** `2^n` for -126 <= n <= 127. */
__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((n + 127) << 23); }

/** `e^x` to 2 units in the last place; overflow and infinities as in IEEE 754, NaN stays. */
__device__ __forceinline__ float exp_f32(float x) {
    x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
    const float n = rintf(x * 1.44269504088896341f);
    const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float poly = 1.9875691500e-4f;
    poly = poly * r + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    const float mantissa = poly * (r * r) + r + 1.0f;
    // Two factors: n reaches 128 and -150, beyond the exponents of normal numbers. NaN has no integer; any will do.
    const int power = x == x ? static_cast<int>(n) : 0;
    return mantissa * power_of_two(power >> 1) * power_of_two(power - (power >> 1));
}

/** `x sigmoid(x)` (Elfwing et al. 2017, arXiv:1702.03118). */
__device__ __forceinline__ float silu(float x) { return x / (1.0f + exp_f32(-x)); }

/** The error function, to a relative error of 1.2e-7. */
__device__ __forceinline__ float erf_f32(float x) {
    const float magnitude = fabsf(x);
    if (magnitude < 1.0f) {
        const float square = x * x;
        float sum = 7.889119e-5f;
        sum = sum * square + -8.020841e-4f;
        sum = sum * square + 5.189535e-3f;
        sum = sum * square + -2.6854444e-2f;
        sum = sum * square + 1.12836e-1f;
        sum = sum * square + -3.7612626e-1f;
        sum = sum * square + 1.2837917e-1f;
        return sum * x + x;
    }
    const float t = magnitude > 4.0f ? 4.0f : magnitude;
    float sum = -2.168685e-5f;
    sum = sum * t + 4.4133636e-4f;
    sum = sum * t + -4.204562e-3f;
    sum = sum * t + 2.5208257e-2f;
    sum = sum * t + -1.0841858e-1f;
    sum = sum * t + -6.332199e-1f;
    sum = sum * t + -1.1295785f;
    sum = sum * t + 1.8804023e-4f;
    return x == x ? copysignf(1.0f - exp_f32(sum), x) : x;
}

/** `x Phi(x)`, the exact form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415). */
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.0f + erf_f32(x * 0.707106781186547524f)); }

/** The form with the hyperbolic tangent, as `x sigmoid(2 ..)`. */
__device__ __forceinline__ float gelu_tanh(float x) {
    const float inner = x * (x * x * 0.044715f + 1.0f);
    return x / (1.0f + exp_f32(-1.595769f * inner));
}
