// k_center on a CPU: the squared distances of a tile of points to TILE_ROWS centres at a time, reduced while in cache.
//
// Points lie across the lanes and centres follow one another, so that a point's minimum stays in its own lane: no
// reduction across lanes. One task is a block of FARTHEST_BLOCK points; threads take blocks as they come and write
// nothing that they share: a point's bits depend on that point and on each centre alone.
//
// Who holds what: centres are packed once ([panel][d][TILE_ROWS], 4 b d bytes, read once per tile of points: from the
// second-level cache while they fit it); each thread packs one tile of points ([d][TILE_COLUMNS], 4 * 32 * d bytes: 49
// KB at d = 384), and one tile of products (1.5 KB) stays in its L1 cache. Points are read from memory once.

#include <math.h>
#include <omp.h>

#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int64_t FARTHEST_BLOCK = 128;
constexpr int64_t DEPTH_BLOCK = 256;  // terms of one chain of multiply-adds; longer sums are added block by block
static_assert(FARTHEST_BLOCK % TILE_COLUMNS == 0, "a block is whole tiles");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Problem {
    const void *points, *centres;
    int64_t points_stride, centres_stride;
    ElementType type;
    const float* nearest;  // null: none yet
    const int64_t* rows;   // null: all
    const float *point_sqnorms, *centre_sqnorms;
    int64_t m, b, d;
    int64_t element() const { return type == FLOAT32 ? 4 : 2; }
};

// Room of one thread, in floats: a packed tile of points, the rows of one as they are, a tile of products.
static inline int64_t thread_floats(int64_t d) { return 2 * TILE_COLUMNS * d + TILE_ROWS * TILE_COLUMNS; }
static inline int64_t packed_floats(int64_t b, int64_t d) { return divided_up(b, TILE_ROWS) * TILE_ROWS * d; }

// panel[k][c] = feature k of point first + c; where rows are named they are brought together first.
static void pack_points(const Problem& p, int64_t first, int64_t count, float* together, float* panel) {
    const char* const points = static_cast<const char*>(p.points);
    const int64_t row_bytes = p.points_stride * p.element(), used_bytes = p.d * p.element();
    if (!p.rows) return pack_panel<TILE_COLUMNS>(p.type, points + first * row_bytes, p.points_stride, count, p.d, panel);
    char* const to = reinterpret_cast<char*>(together);
    const int64_t taken = smaller(count, TILE_COLUMNS);
    for (int64_t c = 0; c < taken; ++c) {
        // Named rows lie anywhere: the one after next is asked for while this one is copied.
        if (c + 2 < taken) {
            const char* const next = points + p.rows[first + c + 2] * row_bytes;
            for (int64_t byte = 0; byte < used_bytes; byte += 64) __builtin_prefetch(next + byte);
        }
        memcpy(to + c * used_bytes, points + p.rows[first + c] * row_bytes, used_bytes);
    }
    pack_panel<TILE_COLUMNS>(p.type, to, p.d, taken, p.d, panel);
}

// least[c] = min over all centres of centre_sqnorms[j] - 2 points[c] . centres[j], for one packed tile of points.
static void least_of_tile(const Problem& p, const float* centres, const float* points, float* products, float* least) {
    Floats low = splat(INFINITY), high = splat(INFINITY);
    for (int64_t j = 0; j < p.b; j += TILE_ROWS) {
        for (int64_t k = 0; k < p.d; k += DEPTH_BLOCK) {
            const int64_t depth = smaller(DEPTH_BLOCK, p.d - k);
            const float* left = centres + j * p.d + k * TILE_ROWS;
            const float* right = points + k * TILE_COLUMNS;
            if (k == 0)
                multiply_tile<false>(left, right, depth, products, TILE_COLUMNS);
            else
                multiply_tile<true>(left, right, depth, products, TILE_COLUMNS);
        }
        const int64_t count = smaller(TILE_ROWS, p.b - j);
        for (int64_t r = 0; r < count; ++r) {
            const Floats norm = splat(p.centre_sqnorms[j + r]);
            low = lesser(low, norm - 2.0f * load(products + r * TILE_COLUMNS));
            high = lesser(high, norm - 2.0f * load(products + r * TILE_COLUMNS + LANES));
        }
    }
    store(least, low), store(least + LANES, high);
}

static void run_block(
    const Problem& p, int64_t block, const float* centres, float* scratch, float* out, int64_t* farthest) {
    float* const panel = scratch;
    float* const together = panel + TILE_COLUMNS * p.d;
    float* const products = together + TILE_COLUMNS * p.d;
    const int64_t start = block * FARTHEST_BLOCK, stop = smaller(p.m, start + FARTHEST_BLOCK);
    int64_t best = start;
    for (int64_t first = start; first < stop; first += TILE_COLUMNS) {
        float least[TILE_COLUMNS];
        pack_points(p, first, stop - first, together, panel);
        least_of_tile(p, centres, panel, products, least);
        for (int64_t i = first; i < smaller(first + TILE_COLUMNS, stop); ++i) {
            const float square = p.point_sqnorms[p.rows ? p.rows[i] : i] + least[i - first];
            const float clamped = square > 0 ? square : 0;
            out[i] = p.nearest && p.nearest[i] < clamped ? p.nearest[i] : clamped;
            if (out[i] > out[best]) best = i;
        }
    }
    farthest[block] = best;
}

}  // namespace

// How many floats of workspace k_center needs.
FASTSEL_EXPORT(k_center_workspace)(int64_t b, int64_t d, int32_t threads, int64_t* floats) {
    *floats = packed_floats(b, d) + threads * thread_floats(d);
}

// points [n, d] and centres [b, d] hold elements of `type` (0 float32, 1 bfloat16, 2 float16); strides are elements from
// row to row. rows [m] names rows of points, or is null and m = n; nearest [m] may be null. Nothing may overlap.
FASTSEL_EXPORT(k_center)(
    const void* points, int64_t points_stride, const void* centres, int64_t centres_stride, int32_t type,
    const float* nearest, const int64_t* rows, const float* point_sqnorms, const float* centre_sqnorms, int64_t m,
    int64_t b, int64_t d, int32_t threads, float* workspace, float* out, int64_t* farthest) {
    const Problem p{points, centres, points_stride, centres_stride, static_cast<ElementType>(type), nearest, rows,
                    point_sqnorms, centre_sqnorms, m, b, d};
    float* const packed = workspace;
    float* const scratch = packed + packed_floats(b, d);
#pragma omp parallel num_threads(threads)
    {
        float* const own = scratch + omp_get_thread_num() * thread_floats(d);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < b; j += TILE_ROWS) {
            const char* const from = static_cast<const char*>(p.centres) + j * centres_stride * p.element();
            pack_panel<TILE_ROWS>(p.type, from, centres_stride, b - j, d, packed + j * d);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t block = 0; block < divided_up(m, FARTHEST_BLOCK); ++block)
            run_block(p, block, packed, own, out, farthest);
    }
}
