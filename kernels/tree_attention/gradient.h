// The gradient of attention within segments that share nothing: what a query's result passes back to its segment.
//
//     p = softmax(scale q k^T),  dv = p^T do,  ds = p (do v^T - <do, result>) scale,  dq = ds k,  dk = ds^T q
//
// One task is a segment and a key head. Its blocks of GRADIENT_ROWS (query, head) pairs follow one another; scores and
// their gradients of a block lie in cache as [row][key], up to the block's last key: keys after it are never multiplied.
// All five products are outer_products(); dv and dk read p and ds as they lie, dq packs ds by rows first. A task writes
// its own outputs only, so that the bits do not depend on the threads.
#pragma once

#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int64_t GRADIENT_ROWS = 96;
constexpr int64_t KEYS_MULTIPLE = 96;       // of every TILE_ROWS and TILE_COLUMNS
constexpr int64_t GRADIENT_DEPTH = 256;     // terms of one chain of multiply-adds; longer sums are added block by block
static_assert(KEYS_MULTIPLE % TILE_ROWS == 0 && KEYS_MULTIPLE % TILE_COLUMNS == 0, "keys are whole tiles, both ways");

static inline int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct GradientProblem {
    Rows query, key, value, d_out;
    int64_t h, hk, d, dv;
    const int64_t* starts;
    int64_t segments;
    int64_t window;  // 0 = none
    float scale;
    float *d_query, *d_key, *d_value;  // [t, h, d], [t, hk, d], [t, hk, dv], contiguous

    int64_t group() const { return h / hk; }
    int64_t tokens_of_block() const { return group() < GRADIENT_ROWS ? GRADIENT_ROWS / group() : 1; }
    int64_t rows_of_block() const { return rounded_up(tokens_of_block() * group(), TILE_ROWS); }
    int64_t wide_d() const { return rounded_up(d, TILE_COLUMNS); }
    int64_t wide_dv() const { return rounded_up(dv, TILE_COLUMNS); }
};

// A thread's room. Panels are [panel][depth][TILE_COLUMNS] of keys or [panel][depth][TILE_ROWS] of a block's rows.
struct GradientRoom {
    float *key_panels, *value_panels, *keys, *d_keys, *d_values;                      // of a segment
    float *queries, *d_outs, *query_panels, *d_out_panels, *weights, *d_scores, *d_queries, *panel;  // of a block
    int64_t keys_stride;  // of weights and d_scores

    GradientRoom(const GradientProblem& p, int64_t longest, float* base) {
        const int64_t n = rounded_up(longest, KEYS_MULTIPLE), m = p.rows_of_block();
        keys_stride = n;
        float* at = base;
        const auto take = [&at](int64_t floats) { float* const here = at; at += rounded_up(floats, LANES); return here; };
        key_panels = take(n * p.d), value_panels = take(n * p.dv), keys = take(n * p.wide_d());
        d_keys = take(n * p.wide_d()), d_values = take(n * p.wide_dv());
        queries = take(m * p.wide_d()), d_outs = take(m * p.wide_dv());
        query_panels = take(m * p.d), d_out_panels = take(m * p.dv);
        weights = take(m * n), d_scores = take(m * n), d_queries = take(m * p.wide_d()), panel = take(TILE_ROWS * n);
        floats = at - base;
    }
    int64_t floats;
};

static void copy_row(const float* from, int64_t count, int64_t width, float* to) {
    memcpy(to, from, count * sizeof(float));
    for (int64_t i = count; i < width; ++i) to[i] = 0.0f;
}

// Of one row: scores of keys low .. high become weights, and products <d_out, value> gradients of scores; both are 0 for
// keys outside oldest .. newest, up to `padded`.
static void differentiate_softmax(
    float* scores, float* products, int64_t low, int64_t high, int64_t padded, int64_t oldest, int64_t newest,
    float scale) {
    alignas(64) int32_t numbers[LANES];
    for (int i = 0; i < LANES; ++i) numbers[i] = i;
    const Ints lane = load(numbers), first = Ints{} + static_cast<int32_t>(oldest), last = Ints{} + static_cast<int32_t>(newest);
    const auto is_seen = [&](int64_t k) {
        const Ints key = lane + static_cast<int32_t>(k);
        return (key >= first) & (key <= last);
    };
    Floats maximum = splat(LOWEST_FLOAT);
    for (int64_t k = low; k < high; k += LANES) {
        const Floats z = is_seen(k) ? scale * load(scores + k) : splat(LOWEST_FLOAT);
        store(scores + k, z);
        maximum = greater(z, maximum);
    }
    float largest = LOWEST_FLOAT;
    for (int i = 0; i < LANES; ++i) largest = maximum[i] > largest ? maximum[i] : largest;
    Floats sums = Floats{}, weighted = Floats{};
    for (int64_t k = low; k < high; k += LANES) {
        const Ints seen = is_seen(k);
        const Floats weight = seen ? exponential(load(scores + k) - largest) : Floats{};
        store(scores + k, weight);
        sums += weight;
        weighted += seen ? weight * load(products + k) : Floats{};
    }
    float sum = 0, mean = 0;
    for (int i = 0; i < LANES; ++i) sum += sums[i], mean += weighted[i];
    const float inverse = 1.0f / sum;
    mean *= inverse;
    for (int64_t k = low; k < high; k += LANES) {
        const Floats weight = inverse * load(scores + k);
        store(scores + k, weight);
        store(products + k, is_seen(k) ? weight * (load(products + k) - mean) * scale : Floats{});
    }
    for (int64_t k = high; k < padded; k += LANES) store(scores + k, Floats{}), store(products + k, Floats{});
}

// out[key][c] += sum over rows of left[row][key] right[row][c], keys low .. high.
static void add_by_key(
    const float* left, int64_t left_stride, const float* right, int64_t width, int64_t rows, int64_t low, int64_t high,
    float* out) {
    for (int64_t k = low; k < high; k += TILE_ROWS)
        for (int64_t c = 0; c < width; c += TILE_COLUMNS)
            outer_products<TILE_ROWS, true>(left + k, left_stride, right + c, width, rows, out + k * width + c, width);
}

static void differentiate_block(
    const GradientProblem& p, const GradientRoom& room, int64_t first, int64_t head, int64_t begin, int64_t end) {
    const int64_t group = p.group(), rows = (end - begin) * group, padded_rows = rounded_up(rows, TILE_ROWS);
    const int64_t wide_d = p.wide_d(), wide_dv = p.wide_dv(), n = room.keys_stride;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = first + begin + r / group, one = head * group + r % group;
        copy_row(p.query.at(token, one), p.d, wide_d, room.queries + r * wide_d);
        copy_row(p.d_out.at(token, one), p.dv, wide_dv, room.d_outs + r * wide_dv);
    }
    for (int64_t r = 0; r < padded_rows; r += TILE_ROWS) {
        pack_panel<TILE_ROWS>(FLOAT32, room.queries + r * wide_d, wide_d, rows - r, p.d, room.query_panels + r * p.d);
        pack_panel<TILE_ROWS>(FLOAT32, room.d_outs + r * wide_dv, wide_dv, rows - r, p.dv, room.d_out_panels + r * p.dv);
    }
    const int64_t low = p.window ? larger(0, begin + 1 - p.window) / KEYS_MULTIPLE * KEYS_MULTIPLE : 0;
    const int64_t high = rounded_up(end, TILE_COLUMNS), padded = rounded_up(end, KEYS_MULTIPLE);
    for (int64_t k = low; k < high; k += TILE_COLUMNS)
        for (int64_t r = 0; r < padded_rows; r += TILE_ROWS) {
            multiply_tile<false>(
                room.query_panels + r * p.d, room.key_panels + k * p.d, p.d, room.weights + r * n + k, n);
            multiply_tile<false>(
                room.d_out_panels + r * p.dv, room.value_panels + k * p.dv, p.dv, room.d_scores + r * n + k, n);
        }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t newest = begin + r / group, oldest = p.window ? larger(0, newest + 1 - p.window) : 0;
        differentiate_softmax(
            room.weights + r * n, room.d_scores + r * n, low, high, padded, oldest, newest, p.scale);
    }
    add_by_key(room.weights, n, room.d_outs, wide_dv, rows, low, end, room.d_values);
    add_by_key(room.d_scores, n, room.queries, wide_d, rows, low, end, room.d_keys);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        pack_panel<TILE_ROWS>(FLOAT32, room.d_scores + r * n + low, n, rows - r, end - low, room.panel);
        for (int64_t k = low; k < end; k += GRADIENT_DEPTH) {
            const int64_t depth = smaller(GRADIENT_DEPTH, end - k);
            const float* const left = room.panel + (k - low) * TILE_ROWS;
            for (int64_t c = 0; c < wide_d; c += TILE_COLUMNS) {
                const float* const right = room.keys + k * wide_d + c;
                float* const to = room.d_queries + r * wide_d + c;
                if (k == low)
                    outer_products<TILE_ROWS, false>(left, TILE_ROWS, right, wide_d, depth, to, wide_d);
                else
                    outer_products<TILE_ROWS, true>(left, TILE_ROWS, right, wide_d, depth, to, wide_d);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = first + begin + r / group, one = head * group + r % group;
        memcpy(p.d_query + (token * p.h + one) * p.d, room.d_queries + r * wide_d, p.d * sizeof(float));
    }
}

static void differentiate_segment(const GradientProblem& p, const GradientRoom& room, int64_t segment, int64_t head) {
    const int64_t first = p.starts[segment], count = p.starts[segment + 1] - first;
    const int64_t wide_d = p.wide_d(), wide_dv = p.wide_dv();
    for (int64_t k = 0; k < rounded_up(count, TILE_COLUMNS); k += TILE_COLUMNS) {
        pack_panel<TILE_COLUMNS>(
            FLOAT32, p.key.at(first + k, head), p.key.token_stride, count - k, p.d, room.key_panels + k * p.d);
        pack_panel<TILE_COLUMNS>(
            FLOAT32, p.value.at(first + k, head), p.value.token_stride, count - k, p.dv, room.value_panels + k * p.dv);
    }
    for (int64_t k = 0; k < count; ++k) copy_row(p.key.at(first + k, head), p.d, wide_d, room.keys + k * wide_d);
    const int64_t padded = rounded_up(count, KEYS_MULTIPLE);
    memset(room.d_keys, 0, padded * wide_d * sizeof(float)), memset(room.d_values, 0, padded * wide_dv * sizeof(float));
    for (int64_t begin = 0; begin < count; begin += p.tokens_of_block())
        differentiate_block(p, room, first, head, begin, smaller(begin + p.tokens_of_block(), count));
    for (int64_t k = 0; k < count; ++k) {
        const int64_t at = (first + k) * p.hk + head;
        memcpy(p.d_key + at * p.d, room.d_keys + k * wide_d, p.d * sizeof(float));
        memcpy(p.d_value + at * p.dv, room.d_values + k * wide_dv, p.dv * sizeof(float));
    }
}

static int64_t longest_segment(const int64_t* starts, int64_t segments) {
    int64_t longest = 0;
    for (int64_t s = 0; s < segments; ++s) longest = larger(longest, starts[s + 1] - starts[s]);
    return longest;
}

}  // namespace
