// swiglu and its gradient on a CPU: one pass over memory, as wide as the registers.
//
// Every element is formed from its own inputs, in any order: threads take equal runs of elements. An output may lie
// where an input lies, since each vector is read before it is written.

#include <omp.h>

#include "export.h"
#include "vectors.h"

namespace {

// 1 / (1 + e^-x) for x >= -88.
static inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Calls body(first, count) for LANES elements at a time of this thread's share, the last ones with a smaller count.
template <typename Body>
static inline void for_each_vector(int64_t size, const Body& body) {
    const int64_t vectors = (size + LANES - 1) / LANES;
#pragma omp for schedule(static)
    for (int64_t v = 0; v < vectors; ++v) body(v * LANES, size - v * LANES < LANES ? size - v * LANES : LANES);
}

static inline Floats load_some(const float* from, int64_t count) {
    if (count == LANES) return load(from);
    Floats x = {};
    memcpy(&x, from, count * sizeof(float));
    return x;
}
// Gates below -88 count as -88, where the sigmoid is 6e-39: exponential() takes no more, and their product stays small.
static inline Floats load_gate(const float* from, int64_t count) {
    return greater(splat(-88.0f), load_some(from, count));
}
static inline void store_some(float* to, Floats x, int64_t count) {
    if (count == LANES)
        store(to, x);
    else
        memcpy(to, &x, count * sizeof(float));
}

}  // namespace

FASTSEL_EXPORT(swiglu)(const float* gate, const float* up, float* out, int64_t size, int32_t threads) {
#pragma omp parallel num_threads(threads)
    for_each_vector(size, [=](int64_t at, int64_t count) {
        const Floats z = load_gate(gate + at, count);
        store_some(out + at, z * sigmoid(z) * load_some(up + at, count), count);
    });
}

FASTSEL_EXPORT(swiglu_gradient)(
    const float* gate, const float* up, const float* d_out, float* d_gate, float* d_up, int64_t size, int32_t threads) {
#pragma omp parallel num_threads(threads)
    for_each_vector(size, [=](int64_t at, int64_t count) {
        const Floats z = load_gate(gate + at, count), d = load_some(d_out + at, count), s = sigmoid(z);
        const Floats u = load_some(up + at, count);
        store_some(d_gate + at, d * u * s * (1.0f + z * (1.0f - s)), count);
        store_some(d_up + at, z * s * d, count);
    });
}
