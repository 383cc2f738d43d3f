// Products of all rows with a few vectors, one column [n] after the other: what NovelSelect adds to its bounds.
//
// Rows are read once, as they lie, from memory; the vectors stay in the caches. The features lie across the lanes: a
// tile of ROWS x VECTORS chains in registers, each closed by the same sums of quarters, wherever a row or a vector lies.
#pragma once

#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int COLUMN_ROWS = 4;
constexpr int COLUMN_VECTORS = LANES == 16 ? 6 : 3;  // as many chains as there are registers

struct Columns {
    const float *rows, *vectors;
    int64_t rows_stride, vectors_stride, n, c, d;
    float* out;  // [c][n]
};

static inline Quad quarters(Floats sum) {
    Quad parts[LANES / 4];
    memcpy(parts, &sum, sizeof sum);
    if (LANES == 4) return parts[0];
    if (LANES == 8) return parts[0] + parts[LANES / 4 - 1];
    return (parts[0] + parts[1 % (LANES / 4)]) + (parts[2 % (LANES / 4)] + parts[LANES / 4 - 1]);
}

// Element i of the result is the sum of the elements of x[i].
static inline Quad sums_of_four(const Quad* x) {
    const Quad a = FASTSEL_SHUFFLE(x[0], x[1], 0, 4, 1, 5) + FASTSEL_SHUFFLE(x[0], x[1], 2, 6, 3, 7);
    const Quad b = FASTSEL_SHUFFLE(x[2], x[3], 0, 4, 1, 5) + FASTSEL_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
    return FASTSEL_SHUFFLE(a, b, 0, 1, 4, 5) + FASTSEL_SHUFFLE(a, b, 2, 3, 6, 7);
}

// Four rows and COUNT vectors. Rows past the end are the last one again: `live` of them are written.
template <int COUNT>
static void multiply_rows(const Columns& p, int64_t row, int64_t live, int64_t vector) {
    const float *x[COLUMN_ROWS], *v[COUNT];
    for (int r = 0; r < COLUMN_ROWS; ++r) x[r] = p.rows + (row + (r < live ? r : live - 1)) * p.rows_stride;
    for (int j = 0; j < COUNT; ++j) v[j] = p.vectors + (vector + j) * p.vectors_stride;
    Floats sums[COUNT][COLUMN_ROWS] = {};
    int64_t k = 0;
    for (; k + LANES <= p.d; k += LANES) {
        Floats rows[COLUMN_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < COLUMN_ROWS; ++r) rows[r] = load(x[r] + k);
#pragma GCC unroll 6
        for (int j = 0; j < COUNT; ++j) {
            const Floats one = load(v[j] + k);
#pragma GCC unroll 4
            for (int r = 0; r < COLUMN_ROWS; ++r) sums[j][r] += rows[r] * one;
        }
    }
#pragma GCC unroll 6
    for (int j = 0; j < COUNT; ++j) {
        Quad parts[COLUMN_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < COLUMN_ROWS; ++r) parts[r] = quarters(sums[j][r]);
        Quad total = sums_of_four(parts);
        for (int64_t i = k; i < p.d; ++i)
            for (int r = 0; r < COLUMN_ROWS; ++r) total[r] += x[r][i] * v[j][i];
        float* const to = p.out + (vector + j) * p.n + row;
        if (live == COLUMN_ROWS)
            store_quad(to, total);
        else
            for (int64_t r = 0; r < live; ++r) to[r] = total[r];
    }
}

// The last group of vectors has `count` of them.
template <int COUNT>
static void multiply_last(const Columns& p, int64_t row, int64_t live, int64_t vector, int64_t count) {
    if constexpr (COUNT > 0) {
        if (count == COUNT)
            multiply_rows<COUNT>(p, row, live, vector);
        else
            multiply_last<COUNT - 1>(p, row, live, vector, count);
    }
}

static void run_columns(const Columns& p, int threads) {
    const int64_t groups = (p.n + COLUMN_ROWS - 1) / COLUMN_ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * COLUMN_ROWS, live = p.n - row < COLUMN_ROWS ? p.n - row : COLUMN_ROWS;
        int64_t vector = 0;
        for (; vector + COLUMN_VECTORS <= p.c; vector += COLUMN_VECTORS)
            multiply_rows<COLUMN_VECTORS>(p, row, live, vector);
        multiply_last<COLUMN_VECTORS - 1>(p, row, live, vector, p.c - vector);
    }
}

}  // namespace
