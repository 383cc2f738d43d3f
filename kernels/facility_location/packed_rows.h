// Rows laid out for products: panels [panel][d][WIDTH] of floats, or of bytes at a scale for each row.
//
// Candidates are packed once for a whole run in panels of TILE_ROWS, the points of a call in panels of TILE_COLUMNS.
// A row in bytes is x = scale * byte + rest; the lengths of row and rest bound what any of its products can err.
#pragma once

#include <math.h>

#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 96;  // candidates that are worked on together; a multiple of every TILE_ROWS and TILE_COLUMNS
static_assert(ROWS % TILE_ROWS == 0 && ROWS % TILE_COLUMNS == 0, "a group of candidates is whole panels, both ways");
constexpr float SMALLEST_STEPS = 1e-36f;  // a row whose largest number is less counts as zeros in bytes

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline float* aligned(float* room) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room) + 63) & ~uintptr_t{63});
}

struct Matrix {
    const void* rows;
    int64_t stride, count;
    ElementType type;

    const void* row(int64_t i) const { return static_cast<const char*>(rows) + i * stride * (type == FLOAT32 ? 4 : 2); }
};

// Packed candidates: panels of floats, or panels of bytes with, for each candidate, its scale and -128 times the sum of
// its bytes. Behind them the lengths of the rows, and their squares (floats) or the lengths of their rests (bytes).
struct Packed {
    const float *panels, *lengths, *squares, *rests;
    const int8_t* bytes;
    const float* scales;
    const int32_t* offsets;

    Packed(const void* base, bool in_bytes, int64_t padded, int64_t d) {
        const int64_t quads = (d + 3) / 4;
        panels = static_cast<const float*>(base);
        bytes = in_bytes ? static_cast<const int8_t*>(base) : nullptr;
        scales = panels + padded * quads;
        offsets = reinterpret_cast<const int32_t*>(scales + padded);
        lengths = in_bytes ? scales + 2 * padded : panels + padded * d;
        squares = in_bytes ? nullptr : lengths + padded;
        rests = in_bytes ? lengths + padded : nullptr;
    }
    static int64_t floats(bool in_bytes, int64_t padded, int64_t d) {
        return in_bytes ? padded * ((d + 3) / 4) + 4 * padded : padded * d + 2 * padded;
    }
};

// The lengths of the WIDTH rows of a panel, and their squares; either may be null.
template <int WIDTH>
static void lengths_of_panel(const float* panel, int64_t d, float* lengths, float* squares) {
    double sums[WIDTH] = {};
    for (int64_t k = 0; k < d; ++k)
        for (int r = 0; r < WIDTH; ++r) sums[r] += static_cast<double>(panel[k * WIDTH + r]) * panel[k * WIDTH + r];
    for (int r = 0; r < WIDTH; ++r) {
        if (lengths) lengths[r] = static_cast<float>(sqrt(sums[r]));
        if (squares) squares[r] = static_cast<float>(sums[r]);
    }
}

// bytes[k / 4][WIDTH][4] of the rows of a panel as x = scale * byte, `zero` added to each byte; rows from `count` on, and
// columns up to a multiple of 4, are zeros. `row` is room for one row. offsets, lengths with rests may be null.
template <int WIDTH>
static void pack_bytes(
    const Matrix& matrix, int64_t first, int64_t count, int64_t d, int zero, float* row, uint8_t* bytes, float* scales,
    int32_t* offsets, float* lengths, float* rests) {
    const int64_t quads = (d + 3) / 4;
    for (int r = 0; r < WIDTH; ++r) {
        float largest = 0;
        if (r < count) {
            pack_panel<1>(matrix.type, matrix.row(first + r), matrix.stride, 1, d, row);
            for (int64_t k = 0; k < d; ++k) largest = fabsf(row[k]) > largest ? fabsf(row[k]) : largest;
        }
        const bool is_zero = largest < SMALLEST_STEPS;
        const float inverse = is_zero ? 0.0f : 127.0f / largest;
        scales[r] = is_zero ? 0.0f : largest / 127.0f;
        int32_t sum = 0;
        for (int64_t k = 0; k < 4 * quads; ++k) {
            const float scaled = !is_zero && k < d ? row[k] * inverse : 0.0f;
            const int32_t byte = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
            sum += byte;
            bytes[(k / 4 * WIDTH + r) * 4 + k % 4] = static_cast<uint8_t>(byte + zero);
        }
        if (offsets) offsets[r] = -128 * sum;
        if (!lengths) continue;
        double square = 0, rest = 0;
        for (int64_t k = 0; k < d && r < count; ++k) {
            const int byte = static_cast<uint8_t>(bytes[(k / 4 * WIDTH + r) * 4 + k % 4] - zero);
            const double value = row[k], left = value - static_cast<double>(scales[r]) * static_cast<int8_t>(byte);
            square += value * value, rest += left * left;
        }
        lengths[r] = static_cast<float>(sqrt(square)), rests[r] = static_cast<float>(sqrt(rest));
    }
}

}  // namespace
