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
//
// Where the queries are the points themselves, half of the products are enough: self_search.h.

#include <math.h>
#include <omp.h>

#include "contenders.h"
#include "export.h"
#include "matrix_tile.h"
#include "self_search.h"
#include "vectors.h"

namespace {

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
    pack_block<TILE_COLUMNS>(p.queries, p.query_stride, p, first_query, queries, packed_queries);
    for (int64_t point = first_point; point < last_point; point += POINTS) {
        const int64_t count = smaller(POINTS, last_point - point);
        pack_block<TILE_ROWS>(p.points, p.point_stride, p, point, count, packed_points);
        for (int64_t w = 0; p.centre && w < count; w += TILE_ROWS) half_squares(packed_points + w * p.d, p.d, offsets + w);
        for (int64_t q = 0; q < queries; q += TILE_COLUMNS) {
            multiply_group(packed_points, packed_queries + q * p.d, p.d, count, similarities);
            for (int64_t c = 0; c < TILE_COLUMNS && q + c < queries; c += LANES)
                take_group<false>(
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

// Decides one query's contenders, those of all ranges (of `stride` queries each), and writes its row of the results.
static void finish_query(
    const Problem& p, int64_t ranges, int64_t stride, State all, int64_t query, Contender<double>* decided, float* values,
    int64_t* indices, float* minimum) {
    Contender<float>* const heap = all.heaps + query * p.kept;
    int32_t* const count = all.count + query;
    float lowest = all.lowest[query];
    for (int64_t range = 1; range < ranges; ++range) {
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

// The room of one thread for a query's contenders in float64.
static Contender<double>* room_to_decide(float* all, int64_t floats) {
    float* const own = all + omp_get_thread_num() * floats;
    return reinterpret_cast<Contender<double>*>((reinterpret_cast<uintptr_t>(own) + 7) & ~uintptr_t{7});
}

// Arrays over `queries`, one after the other.
static State state_at(float* from, int64_t queries) {
    int32_t* const counts = reinterpret_cast<int32_t*>(from + 2 * queries);
    return {from, from + queries, counts, reinterpret_cast<Contender<float>*>(counts + queries)};
}

static void run(const Problem& p, int threads, float* workspace, float* values, int64_t* indices, float* minimum) {
    const Layout layout(p.b, p.n, p.d, p.kept, threads);
    float* const to_decide = workspace + threads * layout.thread_floats;
    const State all = state_at(to_decide + threads * layout.final_floats, layout.query_floats);
    const int64_t tasks = layout.blocks * layout.ranges;
#pragma omp parallel num_threads(threads)
    {
        float* const scratch = workspace + omp_get_thread_num() * layout.thread_floats;
        Contender<double>* const decided = room_to_decide(to_decide, layout.final_floats);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t block = task / layout.ranges, range = task % layout.ranges;
            const int64_t first = (range * layout.blocks + block) * layout.block_queries;
            const State state{all.threshold + first, all.lowest + first, all.count + first, all.heaps + first * p.kept};
            run_task(p, layout, block, range, scratch, state);
        }
        const int64_t stride = layout.blocks * layout.block_queries;
#pragma omp for schedule(static)
        for (int64_t query = 0; query < p.b; ++query)
            finish_query(p, layout.ranges, stride, all, query, decided, values, indices, minimum);
    }
}

static void run_itself(const Problem& p, int threads, float* workspace, float* values, int64_t* indices) {
    const SelfLayout layout(p.n, p.d, p.kept, threads);
    float* const to_decide = workspace + threads * layout.thread_floats;
    float* const half_squares_n = to_decide + threads * layout.final_floats;
    const State all = state_at(half_squares_n + layout.rows, layout.rows);
#pragma omp parallel num_threads(threads)
    {
        search_itself(p, layout, half_squares_n, workspace + omp_get_thread_num() * layout.thread_floats, all);
        Contender<double>* const decided = room_to_decide(to_decide, layout.final_floats);
#pragma omp for schedule(static)
        for (int64_t query = 0; query < p.n; ++query)
            finish_query(p, 1, layout.rows, all, query, decided, values, indices, nullptr);
    }
}

}  // namespace

// How many floats of workspace topk_similarity needs.
FASTSEL_EXPORT(topk_similarity_workspace)(
    int64_t b, int64_t n, int64_t d, int64_t kept, int32_t itself, int32_t threads, int64_t* floats) {
    *floats = itself ? SelfLayout(n, d, kept, threads).floats(kept, threads) : Layout(b, n, d, kept, threads).floats(threads);
}

// queries [b, d] and points [n, d] hold elements of `type` (0 float32, 1 bfloat16, 2 float16); strides are elements from
// row to row. centre [d] null means dot products, else squared distances; exclude [b] and minimum [b] may be null.
// kept >= k contenders a query. values and indices are [b, k]. Nothing may overlap but queries and points. itself: they
// are the same rows, and minimum is null.
FASTSEL_EXPORT(topk_similarity)(
    const void* queries, int64_t query_stride, const void* points, int64_t point_stride, int32_t type,
    const float* centre, const int64_t* exclude, int64_t b, int64_t n, int64_t d, int64_t k, int64_t kept,
    int32_t itself, int32_t threads, float* workspace, float* values, int64_t* indices, float* minimum) {
    const Problem problem{
        queries, points, query_stride, point_stride, static_cast<ElementType>(type), centre, exclude, b, n, d, k, kept};
    if (itself)
        run_itself(problem, threads, workspace, values, indices);
    else
        run(problem, threads, workspace, values, indices, minimum);
}
