// tree_attention on a CPU: scores of KEYS keys and TILE_COLUMNS queries at a time, folded into a running softmax.
//
// Queries lie across the lanes and keys follow one another, so that a query's maximum, sum and results stay in its own
// lane. The columns of a tile are (query, head) pairs of the heads that share a key head: short segments then leave few
// lanes empty, and a key is used by the whole group. Both products are multiply_tile(): scores = keys x queries over d,
// and results = values x weights over the keys.
//
// Keys and values are packed once, segment by segment ([panel][d][TILE_ROWS] and [panel][key][TILE_ROWS]); a path is
// then a walk from the segment to its root, and what several segments share is not packed again. One task is a block of
// queries and one key head; it writes its own outputs only, so that the bits do not depend on the threads.
//
// Per pair (query, key it sees): d + dv multiply-adds and one exponential (about 15 operations).

#include <omp.h>

#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int KEYS = 96;  // a multiple of every TILE_ROWS; a tile of scores takes 12 KB of the L1 cache
constexpr int TRANSPOSED = 16;
static_assert(KEYS % TILE_ROWS == 0, "a block of keys is whole panels");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Rows {  // [t, heads, depth]: strides in elements, depth contiguous
    const float* data;
    int64_t token_stride, head_stride;
    const float* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

}  // namespace

#include "gradient.h"

namespace {

struct Problem {
    Rows query, key, value;
    int64_t t, h, hk, d, dv;
    const int64_t *starts, *parents, *first_positions;
    int64_t segments;
    const int64_t *block_rows, *block_segments;
    int64_t blocks, block_size;
    int64_t window;  // 0 = none
    float softcap;   // 0 = none
    float scale;
    float* out;  // [t, h, dv], contiguous
};

// Where packed keys and values lie. Segment s owns panels first_panel[s] : first_panel[s + 1] of every key head.
struct Packed {
    int64_t* first_panel;
    int64_t panels, value_panels, key_floats, value_floats;  // the last two: of one panel of keys
    float *keys, *values;

    float* key_panels(int64_t head, int64_t segment) const {
        return keys + (head * panels + first_panel[segment]) * key_floats;
    }
    float* value_panels_of(int64_t head, int64_t segment) const {
        return values + (head * panels + first_panel[segment]) * value_floats;
    }
};

static int64_t count_panels(const int64_t* starts, int64_t segments) {
    int64_t panels = 0;
    for (int64_t s = 0; s < segments; ++s) panels += divided_up(starts[s + 1] - starts[s], TILE_ROWS);
    return panels;
}

static inline int64_t value_rows(int64_t dv) {  // whole panels, and whole groups of the final transposition
    return larger(divided_up(dv, TILE_ROWS) * TILE_ROWS, divided_up(dv, TRANSPOSED) * TRANSPOSED);
}

static int64_t thread_floats(int64_t d, int64_t dv) {
    return 2 * TILE_COLUMNS * d + KEYS * TILE_COLUMNS + value_rows(dv) * TILE_COLUMNS + TILE_COLUMNS * TRANSPOSED;
}

static void pack_segment(const Problem& p, const Packed& packed, int64_t segment, int64_t head) {
    const int64_t first = p.starts[segment], count = p.starts[segment + 1] - first;
    float* key_panel = packed.key_panels(head, segment);
    for (int64_t k = 0; k < count; k += TILE_ROWS, key_panel += packed.key_floats)
        pack_panel<TILE_ROWS>(
            FLOAT32, p.key.at(first + k, head), p.key.token_stride, smaller(TILE_ROWS, count - k), p.d, key_panel);
    float* to = packed.value_panels_of(head, segment);
    for (int64_t panel = 0; panel < packed.value_panels; ++panel)
        for (int64_t k = 0; k < count; ++k, to += TILE_ROWS) {
            const float* from = p.value.at(first + k, head) + panel * TILE_ROWS;
            const int64_t width = smaller(TILE_ROWS, p.dv - panel * TILE_ROWS);
            for (int64_t r = 0; r < TILE_ROWS; ++r) to[r] = r < width ? from[r] : 0.0f;
        }
}

// One tile of (query, head) columns.
struct Tile {
    float *queries, *scores, *results;       // [d][TILE_COLUMNS], [KEYS][TILE_COLUMNS], [dv][TILE_COLUMNS]
    alignas(64) float maximum[TILE_COLUMNS], sum[TILE_COLUMNS];
    alignas(64) int32_t position[TILE_COLUMNS];
    int64_t first_position, last_position;   // of its queries
};

// Scores of keys at positions key_position + (0 : count) become weights; the results so far are scaled to match.
static void fold_scores(const Problem& p, Tile& tile, int64_t key_position, int64_t count) {
    const bool later = key_position + count - 1 > tile.first_position;
    const bool too_old = p.window && key_position <= tile.last_position - p.window;
    const Floats cap = splat(p.softcap);
    for (int c = 0; c < TILE_COLUMNS; c += LANES) {
        float* const scores = tile.scores + c;
        const Floats old_maximum = load(tile.maximum + c);
        Floats maximum = old_maximum;
        if (p.softcap > 0)  // the scale already holds 1 / softcap
            for (int64_t k = 0; k < count; ++k)
                store(scores + k * TILE_COLUMNS, cap * hyperbolic_tangent(load(scores + k * TILE_COLUMNS)));
        if (later || too_old) {
            const Ints newest = load(tile.position + c);
            const Ints oldest = too_old ? newest - static_cast<int32_t>(p.window) + 1 : Ints{};
            for (int64_t k = 0; k < count; ++k) {
                const Ints position = Ints{} + static_cast<int32_t>(key_position + k);
                Floats z = load(scores + k * TILE_COLUMNS);
                z = position > newest ? splat(LOWEST_FLOAT) : z;
                z = position < oldest ? splat(LOWEST_FLOAT) : z;
                store(scores + k * TILE_COLUMNS, z);
            }
        }
        for (int64_t k = 0; k < count; ++k) maximum = greater(load(scores + k * TILE_COLUMNS), maximum);
        // A query that has seen nothing yet sums garbage here; the first key it sees scales that by e^-87.
        const Floats decay = exponential(old_maximum - maximum);
        Floats sum = load(tile.sum + c) * decay;
        for (int64_t k = 0; k < count; ++k) {
            const Floats weight = exponential(load(scores + k * TILE_COLUMNS) - maximum);
            store(scores + k * TILE_COLUMNS, weight);
            sum += weight;
        }
        store(tile.maximum + c, maximum), store(tile.sum + c, sum);
        for (int64_t r = 0; r < p.dv; ++r)
            store(tile.results + r * TILE_COLUMNS + c, load(tile.results + r * TILE_COLUMNS + c) * decay);
    }
}

static void attend(const Problem& p, const Packed& packed, Tile& tile, int64_t segment, int64_t head) {
    for (int64_t i = 0; i < packed.value_panels * TILE_ROWS * TILE_COLUMNS; i += LANES) store(tile.results + i, Floats{});
    for (int c = 0; c < TILE_COLUMNS; c += LANES)
        store(tile.maximum + c, splat(LOWEST_FLOAT)), store(tile.sum + c, Floats{});
    const int64_t oldest = p.window ? larger(0, tile.first_position - p.window + 1) : 0;
    for (int64_t s = segment; s >= 0; s = p.parents[s]) {
        const int64_t first = p.first_positions[s], keys_of_segment = p.starts[s + 1] - p.starts[s];
        const int64_t end = smaller(keys_of_segment, tile.last_position - first + 1);
        if (first + end <= oldest) break;  // and so are its ancestors
        for (int64_t k = larger(0, oldest - first) / TILE_ROWS * TILE_ROWS; k < end; k += KEYS) {
            const int64_t count = smaller(KEYS, end - k);
            const float* keys = packed.key_panels(head, s) + k / TILE_ROWS * packed.key_floats;
            for (int64_t i = 0; i < count; i += TILE_ROWS, keys += packed.key_floats)
                multiply_tile<false>(keys, tile.queries, p.d, tile.scores + i * TILE_COLUMNS, TILE_COLUMNS);
            fold_scores(p, tile, first + k, count);
            const float* values = packed.value_panels_of(head, s) + k * TILE_ROWS;
            for (int64_t panel = 0; panel < packed.value_panels; ++panel, values += keys_of_segment * TILE_ROWS)
                multiply_tile<true>(
                    values, tile.scores, count, tile.results + panel * TILE_ROWS * TILE_COLUMNS, TILE_COLUMNS);
        }
    }
}

static void run_task(const Problem& p, const Packed& packed, int64_t block, int64_t head, float* scratch) {
    const int64_t segment = p.block_segments[block], first_row = p.block_rows[block], group = p.h / p.hk;
    const int64_t columns = group * smaller(p.block_size, p.starts[segment + 1] - first_row);
    const int64_t shift = p.first_positions[segment] - p.starts[segment];
    const float scale = p.softcap > 0 ? p.scale / p.softcap : p.scale;
    float* const gathered = scratch;
    Tile tile;
    tile.queries = gathered + TILE_COLUMNS * p.d;
    tile.scores = tile.queries + TILE_COLUMNS * p.d;
    tile.results = tile.scores + KEYS * TILE_COLUMNS;
    float* const transposed = tile.results + value_rows(p.dv) * TILE_COLUMNS;
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        const int64_t count = smaller(TILE_COLUMNS, columns - column);
        for (int64_t c = 0; c < TILE_COLUMNS; ++c) {
            const int64_t at = smaller(column + c, columns - 1), row = first_row + at / group;
            tile.position[c] = static_cast<int32_t>(row + shift);
            const float* from = p.query.at(row, head * group + at % group);
            if (c < count)
                for (int64_t k = 0; k < p.d; ++k) gathered[c * p.d + k] = scale * from[k];
        }
        tile.first_position = tile.position[0], tile.last_position = tile.position[count - 1];
        pack_panel<TILE_COLUMNS>(FLOAT32, gathered, p.d, count, p.d, tile.queries);
        attend(p, packed, tile, segment, head);
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            const Floats inverse = 1.0f / load(tile.sum + c);
            for (int64_t r = 0; r < p.dv; ++r)
                store(tile.results + r * TILE_COLUMNS + c, load(tile.results + r * TILE_COLUMNS + c) * inverse);
        }
        for (int64_t r = 0; r < p.dv; r += TRANSPOSED) {
            const int64_t width = smaller(TRANSPOSED, p.dv - r);
            pack_panel<TRANSPOSED>(FLOAT32, tile.results + r * TILE_COLUMNS, TILE_COLUMNS, width, count, transposed);
            for (int64_t c = 0; c < count; ++c) {
                const int64_t at = column + c, row = first_row + at / group;
                float* to = p.out + (row * p.h + head * group + at % group) * p.dv + r;
                for (int64_t i = 0; i < width; ++i) to[i] = transposed[c * TRANSPOSED + i];
            }
        }
    }
}

}  // namespace

// Bytes of workspace that tree_attention needs.
FASTSEL_EXPORT(tree_attention_workspace)(
    const int64_t* starts, int64_t segments, int64_t hk, int64_t d, int64_t dv, int32_t threads, int64_t* bytes) {
    const int64_t panel_floats = TILE_ROWS * (d + divided_up(dv, TILE_ROWS) * TILE_ROWS);
    *bytes = 8 * (segments + 1) + 4 * (hk * count_panels(starts, segments) * panel_floats + threads * thread_floats(d, dv));
}

// query [t, h, d], key [t, hk, d] and value [t, hk, dv] are float32 with strides in elements for tokens and heads; out
// is contiguous. Blocks of at most block_size queries never cross a segment. window 0 and softcap 0 mean none.
FASTSEL_EXPORT(tree_attention)(
    const float* query, int64_t query_token_stride, int64_t query_head_stride, const float* key,
    int64_t key_token_stride, int64_t key_head_stride, const float* value, int64_t value_token_stride,
    int64_t value_head_stride, int64_t t, int64_t h, int64_t hk, int64_t d, int64_t dv, const int64_t* starts,
    const int64_t* parents, const int64_t* first_positions, int64_t segments, const int64_t* block_rows,
    const int64_t* block_segments, int64_t blocks, int64_t block_size, int64_t window, float softcap, float scale,
    int32_t threads, void* workspace, float* out) {
    const Problem p{
        {query, query_token_stride, query_head_stride},
        {key, key_token_stride, key_head_stride},
        {value, value_token_stride, value_head_stride},
        t, h, hk, d, dv, starts, parents, first_positions, segments, block_rows, block_segments, blocks, block_size,
        window, softcap, scale, out};
    Packed packed;
    packed.first_panel = static_cast<int64_t*>(workspace);
    packed.first_panel[0] = 0;
    for (int64_t s = 0; s < segments; ++s)
        packed.first_panel[s + 1] = packed.first_panel[s] + divided_up(starts[s + 1] - starts[s], TILE_ROWS);
    packed.panels = packed.first_panel[segments];
    packed.value_panels = divided_up(dv, TILE_ROWS);
    packed.key_floats = TILE_ROWS * d;
    packed.value_floats = TILE_ROWS * packed.value_panels * TILE_ROWS;
    packed.keys = reinterpret_cast<float*>(packed.first_panel + segments + 1);
    packed.values = packed.keys + hk * packed.panels * packed.key_floats;
    float* const scratch = packed.values + hk * packed.panels * packed.value_floats;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < segments * hk; ++task) pack_segment(p, packed, task / hk, task % hk);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < blocks * hk; ++task)
            run_task(p, packed, task / hk, task % hk, scratch + omp_get_thread_num() * thread_floats(d, dv));
    }
}

// Floats of workspace that tree_attention_gradient needs.
FASTSEL_EXPORT(tree_attention_gradient_workspace)(
    int64_t h, int64_t hk, int64_t d, int64_t dv, const int64_t* starts, int64_t segments, int32_t threads,
    int64_t* floats) {
    GradientProblem p{};
    p.h = h, p.hk = hk, p.d = d, p.dv = dv;
    *floats = threads * GradientRoom(p, longest_segment(starts, segments), nullptr).floats;
}

// query and d_out [t, h, .], key and value [t, hk, .] are float32 with strides in elements for tokens and heads; the
// gradients are contiguous. No segment continues another. window 0 means none.
FASTSEL_EXPORT(tree_attention_gradient)(
    const float* query, int64_t query_token_stride, int64_t query_head_stride, const float* key,
    int64_t key_token_stride, int64_t key_head_stride, const float* value, int64_t value_token_stride,
    int64_t value_head_stride, const float* d_out, int64_t d_out_token_stride, int64_t d_out_head_stride, int64_t h,
    int64_t hk, int64_t d, int64_t dv, const int64_t* starts, int64_t segments, int64_t window, float scale,
    int32_t threads, float* workspace, float* d_query, float* d_key, float* d_value) {
    const GradientProblem p{
        {query, query_token_stride, query_head_stride},
        {key, key_token_stride, key_head_stride},
        {value, value_token_stride, value_head_stride},
        {d_out, d_out_token_stride, d_out_head_stride},
        h, hk, d, dv, starts, segments, window, scale, d_query, d_key, d_value};
    const int64_t longest = longest_segment(starts, segments);
    const int64_t floats = GradientRoom(p, longest, workspace).floats;
#pragma omp parallel num_threads(threads)
    {
        const GradientRoom room(p, longest, workspace + omp_get_thread_num() * floats);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < segments * hk; ++task) differentiate_segment(p, room, task / hk, task % hk);
    }
}
