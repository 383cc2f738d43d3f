// Vectors of float32 as wide as the instruction set has registers, with exp and tanh.
//
// GCC/Clang vector types: + - * / and comparisons work lane by lane, a ternary selects by lane, and the compiler picks
// the instructions. A NaN lane stays NaN through exponential() and hyperbolic_tangent(); greater(a, b) is b where a is
// NaN. Compile without -ffast-math: re-association would fold the rounding in exponential() away.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), may_alias));
typedef float FloatsAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntsAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr float LOWEST_FLOAT = -3.40282347e+38f;

// {} + x needs -fno-signed-zeros to become a broadcast instead of an addition.
static inline Floats splat(float x) { return Floats{} + x; }
static inline Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
static inline void store(float* to, Floats x) { *reinterpret_cast<FloatsAnywhere*>(to) = x; }
static inline Ints load(const int32_t* from) { return *reinterpret_cast<const IntsAnywhere*>(from); }
static inline void store(int32_t* to, Ints x) { *reinterpret_cast<IntsAnywhere*>(to) = x; }
static inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }

// e^x for x <= 88; arguments below -87 count as -87 (1.6e-38). Relative error at most 2e-7: x = n ln 2 + r with
// |r| <= ln 2 / 2, ln 2 in two parts, e^r by the polynomial of Cephes' expf.
static inline Floats exponential(Floats x) {
    x = greater(splat(-87.0f), x);
    const Floats rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (x * 1.44269504088896341f + rounder) - rounder;
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.0f;
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats power_of_two;
    memcpy(&power_of_two, &exponent, sizeof exponent);
    return p * power_of_two;
}

// tanh x, relative error at most 3e-7: Cephes' polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
static inline Floats hyperbolic_tangent(Floats x) {
    const Floats square = x * x;
    Floats p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    p = p * square * x + x;
    const Floats doubled = lesser(splat(44.0f), x + x);  // tanh(22) is 1 in float32
    const Floats q = 1.0f - 2.0f / (exponential(doubled) + 1.0f);
    return square < 0.390625f ? p : q;
}

}  // namespace
