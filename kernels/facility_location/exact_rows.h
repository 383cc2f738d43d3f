// Similarities of a few rows in float64: to all points, or to those that a screening in float32 or bytes lets through.
//
// Screening: |a . p - a~ . p~| <= |a - a~| |p| + |a~| |p - p~|, and a~ . p~ is rounded by at most (d + 2) 2^-24 |a~| |p~| in
// float32 (bytes: 4 * 2^-24, their sum is exact). Where the product stays below the point's best similarity by more
// than that, the row cannot improve the point. Nothing else is left out.
#pragma once

#include <math.h>
#include <omp.h>

#include "products.h"

namespace {

// One row in float64, filled up to padded_d with zeros. One loop a type, each a vector conversion.
static void widen_row(const void* points, int64_t type, int64_t offset, int64_t d, int64_t padded_d, double* row) {
    const float* const floats = static_cast<const float*>(points) + offset;
    if (type == FLOAT32)
        for (int64_t k = 0; k < d; ++k) row[k] = floats[k];
    else if (type == 3)
        memcpy(row, static_cast<const double*>(points) + offset, d * sizeof(double));
    else
        for (int64_t k = 0; k < d; ++k)
            row[k] = type == BFLOAT16 ? load_one<BFLOAT16>(points, offset + k) : load_one<FLOAT16>(points, offset + k);
    for (int64_t k = d; k < padded_d; ++k) row[k] = 0;
}

typedef double ExactAnywhere __attribute__((vector_size(LANES * 4), aligned(8), may_alias));
typedef double Exact __attribute__((vector_size(LANES * 4)));
constexpr int EXACT_LANES = LANES / 2;
constexpr int EXACT_POINTS = 4, EXACT_ROWS = LANES == 16 ? 4 : 2;

// out[q][p] = row q . point p, or their squared distance; each is one chain a lane, wherever it lies in the tile.
template <bool DISTANCE>
static void exact_tile(const double* rows, const double* points, int64_t padded_d, double out[][EXACT_POINTS]) {
    Exact sums[EXACT_ROWS][EXACT_POINTS] = {};
    for (int64_t k = 0; k < padded_d; k += EXACT_LANES) {
        Exact point[EXACT_POINTS];
        for (int p = 0; p < EXACT_POINTS; ++p) point[p] = *reinterpret_cast<const ExactAnywhere*>(points + p * padded_d + k);
        for (int q = 0; q < EXACT_ROWS; ++q) {
            const Exact row = *reinterpret_cast<const ExactAnywhere*>(rows + q * padded_d + k);
            for (int p = 0; p < EXACT_POINTS; ++p) {
                if (DISTANCE) {
                    const Exact difference = row - point[p];
                    sums[q][p] += difference * difference;
                } else {
                    sums[q][p] += row * point[p];
                }
            }
        }
    }
    for (int q = 0; q < EXACT_ROWS; ++q)
        for (int p = 0; p < EXACT_POINTS; ++p) {
            out[q][p] = 0;
            for (int lane = 0; lane < EXACT_LANES; ++lane) out[q][p] += sums[q][p][lane];
        }
}

constexpr int64_t SCREENED = 32;  // rows screened together, a bit of a mask each
constexpr int CHAINS = 4;         // multiply-adds of one sum that do not wait for each other
static_assert(SCREENED % TILE_COLUMNS == 0, "screened rows are whole panels");
constexpr float ROUNDING = 0x1p-24f, UP = 1.0f + 1e-5f;  // UP covers the rounding of the bounds themselves

// One panel of screened rows: |a - a~| and a bound of |a~| for each, which a point's length and error are multiplied by.
struct Screened {
    Panel panel;
    float errors[TILE_COLUMNS], lengths[TILE_COLUMNS];
};

// Packs rows [first, first + TILE_COLUMNS) of float32; `room` is TILE_COLUMNS * d floats for the panel, then d floats.
static Screened pack_screened(const Matrix& rows, int64_t first, bool in_bytes, int64_t d, float* scales, float* room) {
    Screened screened{{room, scales}, {}, {}};
    float lengths[TILE_COLUMNS], rests[TILE_COLUMNS] = {};
    const int64_t count = rows.count - first;
    if (in_bytes) {
        pack_bytes<TILE_COLUMNS>(
            rows, first, count, d, 128, room + TILE_COLUMNS * ((d + 3) / 4), reinterpret_cast<uint8_t*>(room), scales,
            nullptr, lengths, rests);
    } else {
        pack_panel<TILE_COLUMNS>(rows.type, rows.row(first), rows.stride, count, d, room);
        lengths_of_panel<TILE_COLUMNS>(room, d, lengths, nullptr);
    }
    for (int c = 0; c < TILE_COLUMNS; ++c) {
        const float length = lengths[c] * UP;
        screened.errors[c] = (rests[c] + ROUNDING * length) * UP;
        screened.lengths[c] = (length + rests[c]) * UP;
    }
    return screened;
}

// masks[v] gets a bit for each screened row whose similarity to point v may exceed best[v], for the points of a group.
static void screen_group(
    const Packed& points, int64_t first, int64_t count, int64_t d, const Screened& screened, int shift,
    const double* best, uint32_t* masks) {
    alignas(64) float tile[ROWS * TILE_COLUMNS];
    multiply(points, first, count, screened.panel, d, tile);
    const float terms = points.bytes ? 4.0f : static_cast<float>(d + 2);
    for (int64_t r = 0; r < count; ++r) {
        const int64_t v = first + r;
        const float length = points.lengths[v] * UP, rest = points.rests ? points.rests[v] : 0.0f;
        const float error = (rest + ROUNDING * length + terms * ROUNDING * (length + rest)) * UP;
        const float least = static_cast<float>(best[v]);
        const Floats threshold = splat(least - 4 * ROUNDING * fabsf(least));
        uint32_t bits = 0;
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            const Floats margin = (load(screened.errors + c) * length + load(screened.lengths + c) * error) * UP;
            bits |= bits_of(load(tile + r * TILE_COLUMNS + c) > threshold - margin) << c;
        }
        masks[v] |= bits << shift;
    }
}

// A dot product over padded_d, a multiple of CHAINS * EXACT_LANES.
static double exact_product(const double* row, const double* point, int64_t padded_d) {
    Exact sums[CHAINS] = {};
    for (int64_t k = 0; k < padded_d; k += CHAINS * EXACT_LANES)
        for (int chain = 0; chain < CHAINS; ++chain) {
            const int64_t at = k + chain * EXACT_LANES;
            sums[chain] += *reinterpret_cast<const ExactAnywhere*>(row + at) *
                           *reinterpret_cast<const ExactAnywhere*>(point + at);
        }
    const Exact sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int lane = 0; lane < EXACT_LANES; ++lane) total += sum[lane];
    return total;
}

}  // namespace
