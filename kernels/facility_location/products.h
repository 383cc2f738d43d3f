// tile[r][column] = candidate r . point column, for up to ROWS packed candidates and one panel of TILE_COLUMNS points.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "packed_rows.h"

namespace {

// A bit for each lane that is true.
static inline uint32_t bits_of(Ints truth) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(truth));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<uint32_t>(truth[lane] & 1) << lane;
    return bits;
#endif
}

constexpr int64_t DEPTH_BLOCK = 256;  // terms of one chain of multiply-adds; longer sums are added block by block

static void multiply_group(const float* candidates, const float* points, int64_t d, int64_t count, float* tile) {
    for (int64_t k = 0; k < d; k += DEPTH_BLOCK) {
        const int64_t depth = smaller(DEPTH_BLOCK, d - k);
        for (int64_t r = 0; r < count; r += TILE_ROWS) {
            const float* left = candidates + r * d + k * TILE_ROWS;
            const float* right = points + k * TILE_COLUMNS;
            if (k == 0)
                multiply_tile<false>(left, right, depth, tile + r * TILE_COLUMNS, TILE_COLUMNS);
            else
                multiply_tile<true>(left, right, depth, tile + r * TILE_COLUMNS, TILE_COLUMNS);
        }
    }
}

#if defined(__AVX512VNNI__)
// sums[lane] += the four products of unsigned by signed bytes. The intrinsic makes GCC 12 keep sums on the stack.
static inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// As multiply_group, from bytes: points are stored plus 128, which each candidate's offset takes away again.
static void multiply_bytes(
    const int8_t* candidates, const float* scales, const int32_t* offsets, const uint8_t* points, const float* point_scales,
    int64_t quads, int64_t count, float* tile) {
    const Floats point_scale[2] = {load(point_scales), load(point_scales + LANES)};
    for (int64_t r = 0; r < count; r += TILE_ROWS) {
        const int8_t* left = candidates + r * quads * 4;
        __m512i low[TILE_ROWS], high[TILE_ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i) low[i] = high[i] = _mm512_set1_epi32(offsets[r + i]);
        for (int64_t k = 0; k < quads; ++k) {
            const __m512i right_low = _mm512_loadu_si512(points + k * TILE_COLUMNS * 4);
            const __m512i right_high = _mm512_loadu_si512(points + k * TILE_COLUMNS * 4 + 64);
#pragma GCC unroll 12
            for (int i = 0; i < TILE_ROWS; ++i) {
                int32_t four;
                memcpy(&four, left + (k * TILE_ROWS + i) * 4, 4);
                const __m512i one = _mm512_set1_epi32(four);
                add_products(low[i], right_low, one);
                add_products(high[i], right_high, one);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i) {
            float* const to = tile + (r + i) * TILE_COLUMNS;
            const Ints sums[2] = {reinterpret_cast<Ints>(low[i]), reinterpret_cast<Ints>(high[i])};
            for (int half = 0; half < 2; ++half)
                store(to + half * LANES, __builtin_convertvector(sums[half], Floats) * (scales[r + i] * point_scale[half]));
        }
    }
}
#endif

// A panel of points as multiply() takes it: floats, or bytes plus 128 with their scales.
struct Panel {
    const float* floats;
    const float* scales;
};

// `count` candidates from first_row on. In bytes: the processor has AVX-512 VNNI, or nothing was packed so.
static inline void multiply(
    const Packed& candidates, int64_t first_row, int64_t count, const Panel& points, int64_t d, float* tile) {
    if (!candidates.bytes) return multiply_group(candidates.panels + first_row * d, points.floats, d, count, tile);
#if defined(__AVX512VNNI__)
    const int64_t quads = (d + 3) / 4;
    multiply_bytes(
        candidates.bytes + first_row * quads * 4, candidates.scales + first_row, candidates.offsets + first_row,
        reinterpret_cast<const uint8_t*>(points.floats), points.scales, quads, count, tile);
#endif
}

}  // namespace
