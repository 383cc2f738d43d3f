// topk_similarity on a CPU: similarities of POINTS points and TILE_COLUMNS queries at a time, compared while in cache.
//
// Queries lie across the lanes and points follow one another, so that a query's threshold and least similarity stay in
// its own lane: a vector of similarities costs a comparison and a minimum. What beats its query's threshold goes into
// that query's heap, whose root is the worst kept contender; a query meets about k (1 + ln(n / k)) of those.
//
// One task is one block of queries and one range of points; with many queries the range is all points. Threads take
// tasks as they come. Contenders are ordered by (similarity, point), a total order, and each similarity is one fixed
// chain of multiply-adds: neither ranges nor threads nor the other queries change a bit.
//
// Who holds what: a thread packs its block of queries ([tile][d][TILE_COLUMNS], up to BLOCK_BYTES: its L2 cache) once a
// task, and POINTS points ([panel][d][TILE_ROWS]) at a time; a tile of similarities (12 KB) stays in its L1 cache.
// Points are read from memory once per block of queries. For distances the tile holds q . p - |p|^2 / 2, of rows less a
// common centre. At last every query's contenders are computed anew in float64, from the rows as given, and sorted.

#include <math.h>
#include <omp.h>

#include "export.h"
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

// Takes `count` points, numbered from first_point, into the state of LANES queries starting at `query`.
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
            hits |= s > threshold;
        }
        if (!any_lane(hits)) continue;
        for (int64_t i = w; i < stop; ++i)
            for (int64_t lane = 0; lane < live; ++lane) {
                const float s = similarities[i * TILE_COLUMNS + lane];
                if (!(s > state.threshold[query + lane])) continue;
                Contender<float>* const heap = state.heaps + (query + lane) * kept;
                int32_t* const there = state.count + query + lane;
                keep(heap, kept, there, {s, static_cast<int32_t>(first_point + i)});
                if (*there == kept) state.threshold[query + lane] = heap[0].value;
            }
        threshold = load(state.threshold + query);
    }
    store(state.lowest + query, lowest);
}

struct Layout {
    int64_t block_queries, blocks, ranges, range_points;  // block_queries is a multiple of TILE_COLUMNS
    int64_t thread_floats, query_floats, heap_floats, final_floats;

    Layout(int64_t b, int64_t n, int64_t d, int64_t kept, int64_t threads) {
        const int64_t tiles = divided_up(b, TILE_COLUMNS);
        const int64_t most_tiles = larger(1, BLOCK_BYTES / (4 * TILE_COLUMNS * d));
        blocks = divided_up(tiles, most_tiles);
        // Enough blocks for every thread to have one, if there are so many queries.
        blocks = larger(blocks, smaller(tiles, threads));
        block_queries = blocks ? divided_up(tiles, blocks) * TILE_COLUMNS : TILE_COLUMNS;
        blocks = divided_up(b, block_queries);
        const int64_t groups = divided_up(n, POINTS), wanted = divided_up(TASKS_PER_THREAD * threads, larger(1, blocks));
        ranges = blocks >= 2 * threads ? 1 : larger(1, smaller(wanted, groups / 8));
        range_points = divided_up(groups, ranges) * POINTS;
        ranges = larger(1, range_points ? divided_up(n, range_points) : 1);
        thread_floats = block_queries * d + POINTS * d + POINTS * TILE_COLUMNS + POINTS;
        query_floats = ranges * blocks * block_queries;  // one array over queries and ranges
        heap_floats = query_floats * kept * 2;
        final_floats = kept * 4 + 4;  // one query's contenders in float64, aligned by hand
    }
    int64_t floats(int64_t threads) const {
        return threads * (thread_floats + final_floats) + 3 * query_floats + heap_floats;
    }
};

static void run_task(const Problem& p, const Layout& layout, int64_t block, int64_t range, float* scratch, State state) {
    float* const packed_queries = scratch;
    float* const packed_points = packed_queries + layout.block_queries * p.d;
    float* const similarities = packed_points + POINTS * p.d;
    float* const offsets = similarities + POINTS * TILE_COLUMNS;
    const int64_t first_query = block * layout.block_queries, queries = smaller(layout.block_queries, p.b - first_query);
    const int64_t first_point = range * layout.range_points;
    const int64_t last_point = smaller(p.n, first_point + layout.range_points);
    for (int64_t i = 0; i < layout.block_queries; ++i) {
        state.threshold[i] = -INFINITY, state.lowest[i] = INFINITY, state.count[i] = 0;
    }
    for (int64_t q = 0; q < queries; q += TILE_COLUMNS) {
        float* const panel = packed_queries + q * p.d;
        const void* from = row_of(p.queries, p.query_stride, p.type, first_query + q);
        pack_panel<TILE_COLUMNS>(p.type, from, p.query_stride, queries - q, p.d, panel);
        if (p.centre) subtract_centre<TILE_COLUMNS>(panel, p.centre, p.d);
    }
    for (int64_t point = first_point; point < last_point; point += POINTS) {
        const int64_t count = smaller(POINTS, last_point - point);
        for (int64_t w = 0; w < count; w += TILE_ROWS) {
            float* const panel = packed_points + w * p.d;
            const void* from = row_of(p.points, p.point_stride, p.type, point + w);
            pack_panel<TILE_ROWS>(p.type, from, p.point_stride, count - w, p.d, panel);
            if (p.centre) subtract_centre<TILE_ROWS>(panel, p.centre, p.d), half_squares(panel, p.d, offsets + w);
        }
        for (int64_t q = 0; q < queries; q += TILE_COLUMNS) {
            multiply_group(packed_points, packed_queries + q * p.d, p.d, count, similarities);
            for (int64_t c = 0; c < TILE_COLUMNS && q + c < queries; c += LANES)
                take_group(
                    similarities + c, p.centre ? offsets : nullptr, point, count, p.kept, state, q + c,
                    smaller(LANES, queries - q - c));
        }
    }
}

typedef double Doubles __attribute__((vector_size(32), may_alias));

// The exact similarity of two rows: a dot product, or minus the squared distance. The same order of sums for all rows.
template <int TYPE>
static double exact_similarity(const void* query, const void* point, int64_t d, bool squared) {
    Doubles sum = Doubles{}, other = Doubles{};
    int64_t k = 0;
    for (; k + 8 <= d; k += 8) {
        const Doubles q0 = __builtin_convertvector(load_quad<TYPE>(query, k), Doubles);
        const Doubles q1 = __builtin_convertvector(load_quad<TYPE>(query, k + 4), Doubles);
        const Doubles p0 = __builtin_convertvector(load_quad<TYPE>(point, k), Doubles);
        const Doubles p1 = __builtin_convertvector(load_quad<TYPE>(point, k + 4), Doubles);
        if (squared) {
            sum += (q0 - p0) * (q0 - p0);
            other += (q1 - p1) * (q1 - p1);
        } else {
            sum += q0 * p0;
            other += q1 * p1;
        }
    }
    sum += other;
    double total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (; k < d; ++k) {
        const double q = load_one<TYPE>(query, k), p = load_one<TYPE>(point, k);
        total += squared ? (q - p) * (q - p) : q * p;
    }
    return squared ? -total : total;
}

static double exact_similarity(const Problem& p, int64_t query, int64_t point) {
    const void* const q = row_of(p.queries, p.query_stride, p.type, query);
    const void* const x = row_of(p.points, p.point_stride, p.type, point);
    if (p.type == FLOAT32) return exact_similarity<FLOAT32>(q, x, p.d, p.centre);
    if (p.type == BFLOAT16) return exact_similarity<BFLOAT16>(q, x, p.d, p.centre);
    return exact_similarity<FLOAT16>(q, x, p.d, p.centre);
}

static float query_value(const Problem& p, const void* row, int64_t k) {
    if (p.type == FLOAT32) return load_one<FLOAT32>(row, k);
    if (p.type == BFLOAT16) return load_one<BFLOAT16>(row, k);
    return load_one<FLOAT16>(row, k);
}

// Decides one query's contenders, those of all ranges, and writes its row of the results.
static void finish_query(
    const Problem& p, const Layout& layout, State all, int64_t query, Contender<double>* decided, float* values,
    int64_t* indices, float* minimum) {
    const int64_t stride = layout.blocks * layout.block_queries;  // queries of one range
    Contender<float>* const heap = all.heaps + query * p.kept;
    int32_t* const count = all.count + query;
    float lowest = all.lowest[query];
    for (int64_t range = 1; range < layout.ranges; ++range) {
        const int64_t other = range * stride + query;
        for (int32_t i = 0; i < all.count[other]; ++i) keep(heap, p.kept, count, all.heaps[other * p.kept + i]);
        if (all.lowest[other] < lowest) lowest = all.lowest[other];
    }
    int32_t there = 0;
    for (int32_t i = 0; i < *count; ++i) {
        if (p.exclude && p.exclude[query] == heap[i].point) continue;
        const double similarity = exact_similarity(p, query, heap[i].point);
        if (similarity > -INFINITY) keep(decided, p.k, &there, {similarity, heap[i].point});
    }
    sort_heap(decided, there);
    for (int64_t i = 0; i < p.k; ++i) {
        const double similarity = i < there ? decided[i].value : -INFINITY;
        values[query * p.k + i] = static_cast<float>(p.centre ? -similarity : similarity);
        indices[query * p.k + i] = i < there ? decided[i].point : -1;
    }
    if (!minimum) return;
    if (p.centre) {
        double square = 0;
        const void* const row = row_of(p.queries, p.query_stride, p.type, query);
        for (int64_t k = 0; k < p.d; ++k) {
            const double x = query_value(p, row, k) - p.centre[k];
            square += x * x;
        }
        const double furthest = square - 2.0 * lowest;
        lowest = lowest < INFINITY ? static_cast<float>(furthest > 0 ? furthest : 0) : -INFINITY;
    }
    minimum[query] = lowest;
}

static void run(const Problem& p, int threads, float* workspace, float* values, int64_t* indices, float* minimum) {
    const Layout layout(p.b, p.n, p.d, p.kept, threads);
    float* const scratch = workspace;
    float* const final_scratch = scratch + threads * layout.thread_floats;
    float* const thresholds = final_scratch + threads * layout.final_floats;
    float* const lowests = thresholds + layout.query_floats;
    int32_t* const counts = reinterpret_cast<int32_t*>(lowests + layout.query_floats);
    Contender<float>* const heaps = reinterpret_cast<Contender<float>*>(counts + layout.query_floats);
    const int64_t tasks = layout.blocks * layout.ranges;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
        float* const own = final_scratch + thread * layout.final_floats;
        Contender<double>* const decided =
            reinterpret_cast<Contender<double>*>((reinterpret_cast<uintptr_t>(own) + 7) & ~uintptr_t{7});
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t block = task / layout.ranges, range = task % layout.ranges;
            const int64_t first = (range * layout.blocks + block) * layout.block_queries;
            const State state{thresholds + first, lowests + first, counts + first, heaps + first * p.kept};
            run_task(p, layout, block, range, scratch + thread * layout.thread_floats, state);
        }
        const State all{thresholds, lowests, counts, heaps};
#pragma omp for schedule(static)
        for (int64_t query = 0; query < p.b; ++query)
            finish_query(p, layout, all, query, decided, values, indices, minimum);
    }
}

}  // namespace

// How many floats of workspace topk_similarity needs.
FASTSEL_EXPORT(topk_similarity_workspace)(
    int64_t b, int64_t n, int64_t d, int64_t kept, int32_t threads, int64_t* floats) {
    *floats = Layout(b, n, d, kept, threads).floats(threads);
}

// queries [b, d] and points [n, d] hold elements of `type` (0 float32, 1 bfloat16, 2 float16); strides are elements from
// row to row. centre [d] null means dot products, else squared distances; exclude [b] and minimum [b] may be null.
// kept >= k contenders a query. values and indices are [b, k]. Nothing may overlap but queries and points.
FASTSEL_EXPORT(topk_similarity)(
    const void* queries, int64_t query_stride, const void* points, int64_t point_stride, int32_t type,
    const float* centre, const int64_t* exclude, int64_t b, int64_t n, int64_t d, int64_t k, int64_t kept,
    int32_t threads, float* workspace, float* values, int64_t* indices, float* minimum) {
    const Problem problem{
        queries, points, query_stride, point_stride, static_cast<ElementType>(type), centre, exclude, b, n, d, k, kept};
    run(problem, threads, workspace, values, indices, minimum);
}
