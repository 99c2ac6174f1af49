/** CUDA's built-in vector types, as far as kernels use them. */
#pragma once

#include <cstdint>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SHIM_VECTOR(T, name, bytes)                                            \
    struct alignas(2 * bytes) name##2 { T x, y; };                             \
    struct alignas(4 * bytes) name##4 { T x, y, z, w; };                       \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SHIM_VECTOR(float, float, 4)
SHIM_VECTOR(int, int, 4)
SHIM_VECTOR(uint32_t, uint, 4)
SHIM_VECTOR(uint16_t, ushort, 2)
SHIM_VECTOR(signed char, char, 1)
#undef SHIM_VECTOR
