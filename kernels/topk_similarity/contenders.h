// What both searches of topk_similarity are made of: heaps of contenders, tiles of similarities, and taking one into the
// other. Included by cpu_native.cpp.
#pragma once

#include <math.h>

#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int POINTS = 96;  // a multiple of every TILE_ROWS
constexpr int64_t DEPTH_BLOCK = 256;  // terms of one chain of multiply-adds; longer sums are added block by block
constexpr int64_t BLOCK_BYTES = 640 << 10;
constexpr int64_t TASKS_PER_THREAD = 4;
static_assert(POINTS % TILE_ROWS == 0, "a group of points is whole panels");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename Value>
struct Contender {
    Value value;
    int32_t point;
};
// Best first: the larger value, of equals the lower point.
template <typename Value>
static inline bool is_better(Contender<Value> a, Contender<Value> b) {
    return a.value > b.value || (a.value == b.value && a.point < b.point);
}

// heap[0] is the worst; the entry at `place` may be better than its children, which is put right.
template <typename Value>
static void sift_down(Contender<Value>* heap, int64_t count, int64_t place) {
    const Contender<Value> moved = heap[place];
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= count) break;
        if (child + 1 < count && is_better(heap[child], heap[child + 1])) ++child;
        if (!is_better(moved, heap[child])) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = moved;
}

// Keeps the best `most`; *count of them are there.
template <typename Value>
static void keep(Contender<Value>* heap, int64_t most, int32_t* count, Contender<Value> one) {
    if (*count < most) {
        int64_t place = (*count)++;
        while (place > 0 && is_better(heap[(place - 1) / 2], one)) {
            heap[place] = heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        heap[place] = one;
    } else if (is_better(one, heap[0])) {
        heap[0] = one;
        sift_down(heap, most, 0);
    }
}

// Turns a heap into an array with the best first.
template <typename Value>
static void sort_heap(Contender<Value>* heap, int64_t count) {
    for (int64_t last = count - 1; last > 0; --last) {
        const Contender<Value> worst = heap[0];
        heap[0] = heap[last];
        sift_down(heap, last, 0);
        heap[last] = worst;
    }
}

struct Problem {
    const void *queries, *points;
    int64_t query_stride, point_stride;
    ElementType type;
    const float* centre;  // null: dot products
    const int64_t* exclude;
    int64_t b, n, d, k, kept;
};

static inline const void* row_of(const void* rows, int64_t stride, ElementType type, int64_t row) {
    return static_cast<const char*>(rows) + row * stride * (type == FLOAT32 ? 4 : 2);
}

// similarities[w][column] for `count` points and one tile of queries; points beyond count, up to a panel, are not read.
static void multiply_group(const float* points, const float* queries, int64_t d, int64_t count, float* similarities) {
    for (int64_t k = 0; k < d; k += DEPTH_BLOCK) {
        const int64_t depth = smaller(DEPTH_BLOCK, d - k);
        for (int64_t w = 0; w < count; w += TILE_ROWS) {
            const float* left = points + w * d + k * TILE_ROWS;
            const float* right = queries + k * TILE_COLUMNS;
            if (k == 0)
                multiply_tile<false>(left, right, depth, similarities + w * TILE_COLUMNS, TILE_COLUMNS);
            else
                multiply_tile<true>(left, right, depth, similarities + w * TILE_COLUMNS, TILE_COLUMNS);
        }
    }
}

template <int WIDTH>
static void subtract_centre(float* panel, const float* centre, int64_t d) {
    for (int64_t k = 0; k < d; ++k)
        for (int r = 0; r < WIDTH; ++r) panel[k * WIDTH + r] -= centre[k];
}

// |p|^2 / 2 of the points of a panel.
static void half_squares(const float* panel, int64_t d, float* out) {
    float total[TILE_ROWS] = {};
    for (int64_t k = 0; k < d; k += DEPTH_BLOCK) {
        float block[TILE_ROWS] = {};
        for (int64_t i = k; i < smaller(k + DEPTH_BLOCK, d); ++i)
            for (int r = 0; r < TILE_ROWS; ++r) block[r] += panel[i * TILE_ROWS + r] * panel[i * TILE_ROWS + r];
        for (int r = 0; r < TILE_ROWS; ++r) total[r] += block[r];
    }
    for (int r = 0; r < TILE_ROWS; ++r) out[r] = 0.5f * total[r];
}

// `count` rows of the points from `first` on, less the centre, as panels [WIDTH rows][d].
template <int WIDTH>
static void pack_block(const void* rows, int64_t stride, const Problem& p, int64_t first, int64_t count, float* packed) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        float* const panel = packed + i * p.d;
        pack_panel<WIDTH>(p.type, row_of(rows, stride, p.type, first + i), stride, count - i, p.d, panel);
        if (p.centre) subtract_centre<WIDTH>(panel, p.centre, p.d);
    }
}

static inline bool any_lane(Ints mask) {
    uint64_t words[LANES / 2], any = 0;
    memcpy(words, &mask, sizeof mask);
    for (int i = 0; i < LANES / 2; ++i) any |= words[i];
    return any != 0;
}

// What a task knows of one block of queries; arrays over queries.
struct State {
    float *threshold, *lowest;
    int32_t* count;
    Contender<float>* heaps;  // [queries][kept]
};

// Takes `count` points, numbered from first_point, into the state of LANES queries starting at `query`. Where points do
// not come in the order of their numbers, one that equals the worst kept contender may be better: AT_LEAST.
template <bool AT_LEAST>
static void take_group(
    float* similarities, const float* offsets, int64_t first_point, int64_t count, int64_t kept, State state,
    int64_t query, int64_t live) {
    Floats lowest = load(state.lowest + query), threshold = load(state.threshold + query);
    for (int64_t w = 0; w < count; w += TILE_ROWS) {
        const int64_t stop = smaller(w + TILE_ROWS, count);
        Ints hits = Ints{};
        for (int64_t i = w; i < stop; ++i) {
            Floats s = load(similarities + i * TILE_COLUMNS);
            if (offsets) {
                s -= offsets[i];
                store(similarities + i * TILE_COLUMNS, s);
            }
            lowest = lesser(s, lowest);  // a NaN is less than nothing
            hits |= AT_LEAST ? s >= threshold : s > threshold;
        }
        if (!any_lane(hits)) continue;
        for (int64_t i = w; i < stop; ++i)
            for (int64_t lane = 0; lane < live; ++lane) {
                const float s = similarities[i * TILE_COLUMNS + lane];
                const float least = state.threshold[query + lane];
                if (!(s > least || (AT_LEAST && s == least && s > -INFINITY))) continue;
                Contender<float>* const heap = state.heaps + (query + lane) * kept;
                int32_t* const there = state.count + query + lane;
                keep(heap, kept, there, {s, static_cast<int32_t>(first_point + i)});
                if (*there == kept) state.threshold[query + lane] = heap[0].value;
            }
        threshold = load(state.threshold + query);
    }
    store(state.lowest + query, lowest);
}

}  // namespace
