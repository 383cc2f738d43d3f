// A matrix product held in registers: out[r][c] = sum_k left[k][r] right[k][c] for a tile of TILE_ROWS x TILE_COLUMNS.
//
// pack_panel() turns rows of a row-major matrix (float32, bfloat16 or float16) into such a panel [depth][width], widened
// to float32, so that multiply_tile() reads both operands front to back. The tile is as large as the registers allow:
// per step of k, TILE_ROWS broadcasts and 2 loads feed 2 * TILE_ROWS multiply-adds. Every element is one chain of
// multiply-adds in the order of k, wherever it lies in the tile. A caller whose k is long calls it once per block of k
// with ACCUMULATE: short chains whose sums are added err less than one long chain.
#pragma once

#include "vectors.h"

namespace {

constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;
constexpr int TILE_COLUMNS = 2 * LANES;

enum ElementType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
template <int TYPE>
constexpr int64_t ELEMENT_BYTES = TYPE == FLOAT32 ? 4 : 2;

typedef float Quad __attribute__((vector_size(16), may_alias));
typedef uint32_t QuadBits __attribute__((vector_size(16), may_alias));
typedef float QuadAnywhere __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(8), aligned(2), may_alias));

// Four consecutive elements, widened.
template <int TYPE>
static inline Quad load_quad(const void* base, int64_t index) {
    if (TYPE == FLOAT32) return *reinterpret_cast<const QuadAnywhere*>(static_cast<const float*>(base) + index);
    const HalvesAnywhere halves = *reinterpret_cast<const HalvesAnywhere*>(static_cast<const uint16_t*>(base) + index);
    const QuadBits bits = __builtin_convertvector(halves, QuadBits);
    QuadBits wide;
    if (TYPE == BFLOAT16) {
        wide = bits << 16;
    } else {
        // The exponent is 112 too small after the shift; the product also normalises subnormal halves.
        const QuadBits magnitude = (bits & 0x7fff) << 13;
        Quad value;
        memcpy(&value, &magnitude, sizeof value);
        value = value * 0x1p112f;
        memcpy(&wide, &value, sizeof value);
        const QuadBits is_inf_or_nan = reinterpret_cast<QuadBits>(magnitude >= 0x0f800000u);
        wide = wide | (is_inf_or_nan & 0x7f800000u) | ((bits & 0x8000) << 16);
    }
    Quad value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

template <int TYPE>
static inline float load_one(const void* base, int64_t index) {
    if (TYPE == FLOAT32) return static_cast<const float*>(base)[index];
    alignas(8) uint16_t four[4] = {static_cast<const uint16_t*>(base)[index], 0, 0, 0};
    return load_quad<TYPE>(four, 0)[0];
}

static inline void store_quad(float* to, Quad x) { *reinterpret_cast<QuadAnywhere*>(to) = x; }

#if defined(__clang__)
#define FASTSEL_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define FASTSEL_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadBits{i, j, k, l})
#endif

// panel[k][r] = element k of row r for r < count, 0 for count <= r < WIDTH. Rows lie `stride` elements apart.
template <int WIDTH, int TYPE>
static void pack_panel_as(const void* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
    for (int first = 0; first < WIDTH; first += 4) {
        const int width = WIDTH - first < 4 ? WIDTH - first : 4;
        int64_t k = 0;
        if (width == 4 && count - first >= 4) {
            const int64_t a = first * stride, b = a + stride, c = b + stride, d = c + stride;
            const char* const next_rows = static_cast<const char*>(rows) + 4 * stride * ELEMENT_BYTES<TYPE>;
            for (; k + 4 <= depth; k += 4) {  // a 4 x 4 transposition in registers
                // Rows are too short for the processor to foresee the next four: 13.5 -> 10.4 ms for 113 MB.
                __builtin_prefetch(next_rows + (a + k) * ELEMENT_BYTES<TYPE>);
                __builtin_prefetch(next_rows + (b + k) * ELEMENT_BYTES<TYPE>);
                __builtin_prefetch(next_rows + (c + k) * ELEMENT_BYTES<TYPE>);
                __builtin_prefetch(next_rows + (d + k) * ELEMENT_BYTES<TYPE>);
                const Quad qa = load_quad<TYPE>(rows, a + k), qb = load_quad<TYPE>(rows, b + k);
                const Quad qc = load_quad<TYPE>(rows, c + k), qd = load_quad<TYPE>(rows, d + k);
                const Quad ab_low = FASTSEL_SHUFFLE(qa, qb, 0, 4, 1, 5), ab_high = FASTSEL_SHUFFLE(qa, qb, 2, 6, 3, 7);
                const Quad cd_low = FASTSEL_SHUFFLE(qc, qd, 0, 4, 1, 5), cd_high = FASTSEL_SHUFFLE(qc, qd, 2, 6, 3, 7);
                float* to = panel + k * WIDTH + first;
                store_quad(to, FASTSEL_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
                store_quad(to + WIDTH, FASTSEL_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
                store_quad(to + 2 * WIDTH, FASTSEL_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
                store_quad(to + 3 * WIDTH, FASTSEL_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
            }
        }
        for (; k < depth; ++k)
            for (int r = first; r < first + width; ++r)
                panel[k * WIDTH + r] = r < count ? load_one<TYPE>(rows, r * stride + k) : 0.0f;
    }
}

template <int WIDTH>
static void pack_panel(
    ElementType type, const void* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
    if (type == FLOAT32) pack_panel_as<WIDTH, FLOAT32>(rows, stride, count, depth, panel);
    if (type == BFLOAT16) pack_panel_as<WIDTH, BFLOAT16>(rows, stride, count, depth, panel);
    if (type == FLOAT16) pack_panel_as<WIDTH, FLOAT16>(rows, stride, count, depth, panel);
}

// out[r][c] = or += sum over k < depth of left[k][r] right[k][c], for ROWS x TILE_COLUMNS that fit the registers.
template <int ROWS, bool ACCUMULATE>
static inline void outer_products(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                                  int64_t depth, float* out, int64_t out_stride) {
    Floats low[ROWS] = {}, high[ROWS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const Floats right_low = load(right + k * right_stride), right_high = load(right + k * right_stride + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const Floats one = splat(left[k * left_stride + r]);
            low[r] += one * right_low;
            high[r] += one * right_high;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        float* const to = out + r * out_stride;
        store(to, ACCUMULATE ? load(to) + low[r] : low[r]);
        store(to + LANES, ACCUMULATE ? load(to + LANES) + high[r] : high[r]);
    }
}

// The same for a whole tile of packed panels.
template <bool ACCUMULATE>
static inline void multiply_tile(const float* left, const float* right, int64_t depth, float* out, int64_t out_stride) {
    outer_products<TILE_ROWS, ACCUMULATE>(left, TILE_ROWS, right, TILE_COLUMNS, depth, out, out_stride);
}

}  // namespace
