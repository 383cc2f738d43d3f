// linear_token_stats on a CPU: the logits of WORDS words and TILE_COLUMNS rows at a time, reduced while in cache.
//
// Rows (hidden states) lie across the lanes and words follow one another, so that a row's maximum, sums and second
// maximum stay in its own lane: no reduction across lanes, no padding words to mask, and the state is a few floats a
// row. One task is TASK_WORDS consecutive words; threads take tasks as they come, each keeps its result apart, and the
// results are merged in the order of the words: the bits of a row depend neither on the threads nor on the other rows.
//
// Who holds what: hidden states are packed once ([tile][d][TILE_COLUMNS], read from the last-level cache once per WORDS
// words); each thread packs WORDS words ([panel][d][TILE_ROWS], 4 * 96 * d bytes: 221 KB at d = 576) into its own L2
// cache, and one tile of logits (12 KB) stays in its L1 cache. Weights are read from memory once per block of rows.

#include <math.h>
#include <omp.h>

#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int WORDS = 96;  // a multiple of every TILE_ROWS
constexpr int64_t TASK_WORDS = 4 * WORDS;
constexpr int64_t DEPTH_BLOCK = 256;  // terms of one chain of multiply-adds; longer sums are added block by block
constexpr int64_t PARTIALS_BYTES = 8 << 20;
static_assert(WORDS % TILE_ROWS == 0, "a group of words is whole panels");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a row carries over the words seen so far; arrays over rows. Relative to the running maximum m:
// sum = sum e^(z-m), weighted = sum e^(z-m) (z-m), second = the second largest logit, argmax = first index of m.
struct State {
    float *maximum, *sum, *weighted, *second;
    int32_t* argmax;
};

// The state of task number `task`: FIELDS arrays of `rows` elements in one block.
constexpr int64_t FIELDS = 5;
static inline State state_of(float* partials, int64_t task, int64_t rows) {
    float* base = partials + task * FIELDS * rows;
    return {base, base + rows, base + 2 * rows, base + 3 * rows, reinterpret_cast<int32_t*>(base + 4 * rows)};
}

struct Problem {
    const void *hidden, *weight;
    int64_t hidden_stride, weight_stride;
    ElementType type;
    const int64_t* targets;
    const float* bias;
    float scale, softcap;  // softcap 0 = none
    int64_t t, d, v;
};

struct Outputs {  // a null pointer is an output not asked for
    float *nll, *lse, *entropy, *top1_logprob, *top2_logprob;
    int64_t* argmax;
};

// logits[w][column] for `count` words and one tile of rows; words beyond count, up to a whole panel, are not read.
static void multiply_group(const float* words, const float* rows, int64_t d, int64_t count, float* logits) {
    for (int64_t k = 0; k < d; k += DEPTH_BLOCK) {
        const int64_t depth = smaller(DEPTH_BLOCK, d - k);
        for (int64_t w = 0; w < count; w += TILE_ROWS) {
            const float* left = words + w * d + k * TILE_ROWS;
            const float* right = rows + k * TILE_COLUMNS;
            if (k == 0)
                multiply_tile<false>(left, right, depth, logits + w * TILE_COLUMNS, TILE_COLUMNS);
            else
                multiply_tile<true>(left, right, depth, logits + w * TILE_COLUMNS, TILE_COLUMNS);
        }
    }
}

static void adjust_group(const Problem& p, int64_t first_word, int64_t count, float* logits) {
    const Floats cap = splat(p.softcap);
    for (int64_t w = 0; w < count; ++w) {
        const float bias = p.bias ? p.bias[first_word + w] : 0.0f;
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            Floats z = p.scale * (load(logits + w * TILE_COLUMNS + c) + bias);
            if (p.softcap > 0) z = cap * hyperbolic_tangent(z / cap);
            store(logits + w * TILE_COLUMNS + c, z);
        }
    }
}

// Takes `count` words, numbered from first_word, into the state of LANES rows starting at `row`.
template <bool ENTROPY, bool TOP>
static void reduce_group(const float* logits, int64_t first_word, int64_t count, State state, int64_t row) {
    const Floats old_maximum = load(state.maximum + row);
    Floats maximum = old_maximum, second;
    Ints argmax;
    if (TOP) second = load(state.second + row), argmax = load(state.argmax + row);
    for (int64_t w = 0; w < count; ++w) {
        const Floats z = load(logits + w * TILE_COLUMNS);
        if (TOP) {
            second = greater(second, lesser(maximum, z));
            argmax = z > maximum ? Ints{} + static_cast<int32_t>(first_word + w) : argmax;
        }
        maximum = greater(z, maximum);  // a NaN leaves it as it is and reaches the sum
    }
    // Bounded, because the difference may overflow to -inf, and 0 * inf is NaN.
    const Floats shift = greater(splat(-87.0f), old_maximum - maximum), decay = exponential(shift);
    const Floats old_sum = load(state.sum + row);
    Floats sum = Floats{}, weighted = Floats{};
    for (int64_t w = 0; w < count; ++w) {
        const Floats distance = greater(splat(-87.0f), load(logits + w * TILE_COLUMNS) - maximum);
        const Floats power = exponential(distance);
        sum += power;
        if (ENTROPY) weighted += power * distance;
    }
    store(state.maximum + row, maximum);
    store(state.sum + row, decay * old_sum + sum);
    if (ENTROPY) store(state.weighted + row, decay * (load(state.weighted + row) + old_sum * shift) + weighted);
    if (TOP) store(state.second + row, second), store(state.argmax + row, argmax);
}

// One task's words for all tiles of rows.
template <bool ENTROPY, bool TOP>
static void run_task(
    const Problem& p, int64_t task, const float* packed_hidden, int64_t first_row, int64_t rows, float* packed_words,
    float* logits, State state, float* target_logits) {
    const int64_t padded = divided_up(rows, TILE_COLUMNS) * TILE_COLUMNS;
    for (int64_t r = 0; r < padded; r += LANES) {
        store(state.maximum + r, splat(LOWEST_FLOAT)), store(state.sum + r, Floats{});
        if (ENTROPY) store(state.weighted + r, Floats{});
        if (TOP) store(state.second + r, splat(LOWEST_FLOAT)), store(state.argmax + r, Ints{});
    }
    const int64_t stop = smaller(p.v, (task + 1) * TASK_WORDS);
    const int64_t element = p.type == FLOAT32 ? 4 : 2;
    for (int64_t word = task * TASK_WORDS; word < stop; word += WORDS) {
        const int64_t count = smaller(WORDS, stop - word);
        for (int64_t w = 0; w < count; w += TILE_ROWS) {
            const char* from = static_cast<const char*>(p.weight) + (word + w) * p.weight_stride * element;
            pack_panel<TILE_ROWS>(p.type, from, p.weight_stride, count - w, p.d, packed_words + w * p.d);
        }
        for (int64_t r = 0; r < padded; r += TILE_COLUMNS) {
            multiply_group(packed_words, packed_hidden + r * p.d, p.d, count, logits);
            if (p.bias || p.scale != 1.0f || p.softcap > 0) adjust_group(p, word, count, logits);
            for (int64_t i = r; i < smaller(r + TILE_COLUMNS, rows); ++i) {
                const int64_t target = p.targets[first_row + i];
                if (target >= word && target < word + count)
                    target_logits[i] = logits[(target - word) * TILE_COLUMNS + i - r];
            }
            for (int c = 0; c < TILE_COLUMNS; c += LANES)
                reduce_group<ENTROPY, TOP>(logits + c, word, count, state, r + c);
        }
    }
}

// Folds the later task's state into the earlier one's, for LANES rows.
template <bool ENTROPY, bool TOP>
static void merge(State into, State later, int64_t row) {
    const Floats a = load(into.maximum + row), b = load(later.maximum + row), maximum = greater(b, a);
    const Floats shift_a = greater(splat(-87.0f), a - maximum), shift_b = greater(splat(-87.0f), b - maximum);
    const Floats decay_a = exponential(shift_a), decay_b = exponential(shift_b);
    const Floats sum_a = load(into.sum + row), sum_b = load(later.sum + row);
    store(into.maximum + row, maximum);
    store(into.sum + row, decay_a * sum_a + decay_b * sum_b);
    if (ENTROPY) {
        const Floats weighted_a = load(into.weighted + row), weighted_b = load(later.weighted + row);
        store(into.weighted + row, decay_a * (weighted_a + sum_a * shift_a) + decay_b * (weighted_b + sum_b * shift_b));
    }
    if (TOP) {
        const Floats second = greater(load(into.second + row), load(later.second + row));
        store(into.second + row, greater(second, lesser(a, b)));
        store(into.argmax + row, b > a ? load(later.argmax + row) : load(into.argmax + row));
    }
}

static void finish_row(const Problem& p, State state, const float* target_logits, int64_t i, int64_t row, Outputs out) {
    const float maximum = state.maximum[i], sum = state.sum[i];
    // All logits were -inf where the maximum never moved; the sum is NaN where one was NaN or +inf.
    const float log_sum = maximum > LOWEST_FLOAT ? logf(sum) : NAN;
    if (out.nll) out.nll[row] = p.targets[row] < 0 ? 0.0f : log_sum + (maximum - target_logits[i]);
    if (out.lse) out.lse[row] = maximum + log_sum;
    if (out.entropy) out.entropy[row] = log_sum - state.weighted[i] / sum;
    if (out.top1_logprob) out.top1_logprob[row] = -log_sum;
    if (out.top2_logprob) {
        const float second = state.second[i] > LOWEST_FLOAT ? state.second[i] : -INFINITY;
        out.top2_logprob[row] = (second - maximum) - log_sum;
    }
    if (out.argmax) out.argmax[row] = log_sum == log_sum ? state.argmax[i] : -1;
}

struct Layout {
    int64_t tasks, rows;  // rows of one block, a multiple of TILE_COLUMNS
    int64_t packed_floats, partial_floats, thread_floats;

    Layout(int64_t t, int64_t d, int64_t v) {
        tasks = divided_up(v, TASK_WORDS);
        const int64_t tiles = divided_up(t, TILE_COLUMNS), fields_of_tile = tasks * FIELDS * TILE_COLUMNS;
        const int64_t most_tiles = PARTIALS_BYTES / 4 / fields_of_tile;
        const int64_t blocks = divided_up(tiles, most_tiles > 1 ? most_tiles : 1);
        rows = blocks ? divided_up(tiles, blocks) * TILE_COLUMNS : 0;
        packed_floats = rows * d;
        partial_floats = tasks * FIELDS * rows;
        thread_floats = WORDS * d + WORDS * TILE_COLUMNS;
    }
    int64_t floats(int64_t threads) const { return packed_floats + partial_floats + rows + threads * thread_floats; }
};

template <bool ENTROPY, bool TOP>
static void run(const Problem& p, const Outputs& out, int threads, float* workspace) {
    const Layout layout(p.t, p.d, p.v);
    float* const packed_hidden = workspace;
    float* const partials = packed_hidden + layout.packed_floats;
    float* const scratch = partials + layout.partial_floats;
    float* const target_logits = scratch + threads * layout.thread_floats;
    const int64_t element = p.type == FLOAT32 ? 4 : 2;
#pragma omp parallel num_threads(threads)
    {
        float* const packed_words = scratch + omp_get_thread_num() * layout.thread_floats;
        float* const logits = packed_words + WORDS * p.d;
        for (int64_t first_row = 0; first_row < p.t; first_row += layout.rows) {
            const int64_t rows = smaller(layout.rows, p.t - first_row);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r += TILE_COLUMNS) {
                const char* from = static_cast<const char*>(p.hidden) + (first_row + r) * p.hidden_stride * element;
                pack_panel<TILE_COLUMNS>(p.type, from, p.hidden_stride, rows - r, p.d, packed_hidden + r * p.d);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < layout.tasks; ++task)
                run_task<ENTROPY, TOP>(
                    p, task, packed_hidden, first_row, rows, packed_words, logits,
                    state_of(partials, task, layout.rows), target_logits);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r += LANES) {
                const State state = state_of(partials, 0, layout.rows);
                for (int64_t task = 1; task < layout.tasks; ++task)
                    merge<ENTROPY, TOP>(state, state_of(partials, task, layout.rows), r);
                for (int64_t i = r; i < smaller(r + LANES, rows); ++i)
                    finish_row(p, state, target_logits, i, first_row + i, out);
            }
        }
    }
}

}  // namespace

// How many floats of workspace linear_token_stats needs.
FASTSEL_EXPORT(linear_token_stats_workspace)(int64_t t, int64_t d, int64_t v, int32_t threads, int64_t* floats) {
    *floats = Layout(t, d, v).floats(threads);
}

// hidden [t, d] and weight [v, d] hold elements of `type` (0 float32, 1 bfloat16, 2 float16); strides are elements from
// row to row. bias may be null, softcap 0 means none, an output that is null is not computed. Nothing may overlap.
FASTSEL_EXPORT(linear_token_stats)(
    const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride, int32_t type,
    const int64_t* targets, const float* bias, float softcap, float scale, int64_t t, int64_t d, int64_t v,
    int32_t threads, float* workspace, float* nll, float* lse, float* entropy, float* top1_logprob,
    float* top2_logprob, int64_t* argmax) {
    const Problem problem{
        hidden, weight, hidden_stride, weight_stride, static_cast<ElementType>(type), targets, bias, scale, softcap,
        t, d, v};
    const Outputs out{nll, lse, entropy, top1_logprob, top2_logprob, argmax};
    const bool top = top2_logprob || argmax;
    if (entropy && top) run<true, true>(problem, out, threads, workspace);
    if (entropy && !top) run<true, false>(problem, out, threads, workspace);
    if (!entropy && top) run<false, true>(problem, out, threads, workspace);
    if (!entropy && !top) run<false, false>(problem, out, threads, workspace);
}
