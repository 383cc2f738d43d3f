// novelty on a CPU: the distances of a block of rows to all picks, then one sort and one weighted sum a row.
//
// Rows (contenders) lie across the lanes. Threads take groups of PICKS picks as they come, pack them into their own L2
// cache ([panel][d][TILE_ROWS]) and multiply them with every tile of the block's packed rows; the products stay where
// they are made, [tile][pick][TILE_COLUMNS], 4 bytes x t a row. Then threads take rows, CHUNK at a time, turn products
// into weighted distances, and sort them as whole numbers by their digits (256 buckets, 4 passes; 8 with the distance
// in front of the value): no comparisons, and equal numbers need no order. A row's bits depend on that row, on the
// picks and on the weights only.
//
// novelty_order, where nothing is sorted: one or two dot products a row and set of weights, at the speed of memory.

#include <math.h>
#include <omp.h>

#include "columns.h"
#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int PICKS = 96;  // a multiple of every TILE_ROWS
constexpr int CHUNK = 8;   // rows gathered from the products at a time: a vector of each line they share
constexpr int64_t BLOCK = 256;
constexpr int64_t DEPTH_BLOCK = 256;  // terms of one chain of multiply-adds; longer sums are added block by block
constexpr int64_t SHORT = 24;         // as few numbers are sorted by insertion
static_assert(PICKS % TILE_ROWS == 0, "a group of picks is whole panels");
static_assert(BLOCK % TILE_COLUMNS == 0 && TILE_COLUMNS % CHUNK == 0, "chunks do not reach across tiles");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Problem {
    const void *rows, *picks;
    int64_t rows_stride, picks_stride;
    ElementType type;
    const float *row_density, *pick_density;  // either may be null
    const double* weights;                    // [s][t]
    int64_t n, t, d, s;
    bool by_distance;
};

struct Layout {
    int64_t rows, tiles, t, packed_floats, product_floats, thread_floats;

    Layout(int64_t n, int64_t all_picks, int64_t d) {
        tiles = divided_up(smaller(n, BLOCK), TILE_COLUMNS);
        rows = tiles * TILE_COLUMNS;
        t = divided_up(all_picks, PICKS) * PICKS;
        packed_floats = rows * d;
        product_floats = rows * t;
        // PICKS packed picks, CHUNK gathered rows, and two arrays of 8-byte keys.
        thread_floats = PICKS * d + (CHUNK + 4) * t + 2;
    }
    int64_t floats(int64_t threads) const { return packed_floats + product_floats + threads * thread_floats; }
};

// Unsigned whole numbers in the order of the floats.
static inline uint32_t key_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

static inline float float_of(uint32_t key) {
    const uint32_t bits = key ^ (((key >> 31) - 1) | 0x80000000u);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Sorts `count` keys; the result is in `keys` or in `spare`: its address is returned.
template <typename Key>
static Key* sort_keys(Key* keys, Key* spare, int64_t count) {
    if (count <= SHORT) {
        for (int64_t i = 1; i < count; ++i) {
            const Key key = keys[i];
            int64_t j = i;
            for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
            keys[j] = key;
        }
        return keys;
    }
    constexpr int DIGITS = sizeof(Key);
    uint32_t counts[DIGITS][256] = {};
    for (int64_t i = 0; i < count; ++i)
        for (int digit = 0; digit < DIGITS; ++digit) ++counts[digit][(keys[i] >> (8 * digit)) & 255];
    for (int digit = 0; digit < DIGITS; ++digit) {
        uint32_t* const at = counts[digit];
        if (at[(keys[0] >> (8 * digit)) & 255] == static_cast<uint32_t>(count)) continue;  // all have the same digit
        uint32_t sum = 0;
        for (int bucket = 0; bucket < 256; ++bucket) {
            const uint32_t here = at[bucket];
            at[bucket] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; ++i) spare[at[(keys[i] >> (8 * digit)) & 255]++] = keys[i];
        Key* const sorted = spare;
        spare = keys;
        keys = sorted;
    }
    return keys;
}

// sum of weights[r] value(r): eight sums side by side, added in a fixed order.
template <typename Key>
static double weighted_sum(const double* weights, const Key* keys, int64_t count) {
    double sums[8] = {};
    int64_t r = 0;
    for (; r + 8 <= count; r += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += weights[r + lane] * float_of(static_cast<uint32_t>(keys[r + lane]));
    double rest = 0;
    for (; r < count; ++r) rest += weights[r] * float_of(static_cast<uint32_t>(keys[r]));
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;
}

static void multiply_picks(const Problem& p, const Layout& layout, int64_t first, const float* packed_rows,
                           float* packed_picks, float* products) {
    const int64_t count = smaller(PICKS, p.t - first), element = p.type == FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < count; j += TILE_ROWS) {
        const char* from = static_cast<const char*>(p.picks) + (first + j) * p.picks_stride * element;
        pack_panel<TILE_ROWS>(p.type, from, p.picks_stride, count - j, p.d, packed_picks + j * p.d);
    }
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
        const float* const rows = packed_rows + tile * TILE_COLUMNS * p.d;
        for (int64_t j = 0; j < count; j += TILE_ROWS) {
            float* const out = products + (tile * layout.t + first + j) * TILE_COLUMNS;
            for (int64_t k = 0; k < p.d; k += DEPTH_BLOCK) {
                const int64_t depth = smaller(DEPTH_BLOCK, p.d - k);
                const float* const left = packed_picks + j * p.d + k * TILE_ROWS;
                if (k == 0)
                    multiply_tile<false>(left, rows, depth, out, TILE_COLUMNS);
                else
                    multiply_tile<true>(left, rows + k * TILE_COLUMNS, depth, out, TILE_COLUMNS);
            }
        }
    }
}

static inline float factor_of(const Problem& p, float density, int64_t pick) {
    return p.pick_density ? density + p.pick_density[pick] : density;
}

// One row: its products to sorted values to one sum for each set of weights.
static void finish_row(const Problem& p, const float* products, int64_t row, void* keys, void* spare, float* out) {
    const float density = p.row_density ? p.row_density[row] : p.pick_density ? 0.0f : 1.0f;
    if (p.by_distance) {
        uint64_t* const pairs = static_cast<uint64_t*>(keys);
        for (int64_t j = 0; j < p.t; ++j) {
            const float distance = 1.0f - products[j];
            pairs[j] = static_cast<uint64_t>(key_of(distance)) << 32 | key_of(distance * factor_of(p, density, j));
        }
        const uint64_t* const sorted = sort_keys(pairs, static_cast<uint64_t*>(spare), p.t);
        for (int64_t s = 0; s < p.s; ++s) out[row * p.s + s] = weighted_sum(p.weights + s * p.t, sorted, p.t);
    } else {
        uint32_t* const values = static_cast<uint32_t*>(keys);
        for (int64_t j = 0; j < p.t; ++j) values[j] = key_of((1.0f - products[j]) * factor_of(p, density, j));
        const uint32_t* const sorted = sort_keys(values, static_cast<uint32_t*>(spare), p.t);
        for (int64_t s = 0; s < p.s; ++s) out[row * p.s + s] = weighted_sum(p.weights + s * p.t, sorted, p.t);
    }
}

static void finish_chunk(const Problem& p, const Layout& layout, int64_t block, int64_t first, const float* products,
                         float* scratch, float* out) {
    const float* const from = products + (first / TILE_COLUMNS * layout.t) * TILE_COLUMNS + first % TILE_COLUMNS;
    for (int64_t j = 0; j < p.t; ++j)
        for (int c = 0; c < CHUNK; ++c) scratch[c * layout.t + j] = from[j * TILE_COLUMNS + c];
    // Keys are 8 bytes wide: the address is rounded up to one.
    float* const keys = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch + CHUNK * layout.t) + 7) & ~uintptr_t{7});
    const int64_t count = smaller(CHUNK, p.n - block - first);
    for (int64_t c = 0; c < count; ++c)
        finish_row(p, scratch + c * layout.t, block + first + c, keys, keys + 2 * layout.t, out);
}

static void run(const Problem& p, int threads, float* workspace, float* out) {
    const Layout layout(p.n, p.t, p.d);
    float* const packed_rows = workspace;
    float* const products = packed_rows + layout.packed_floats;
    float* const scratch = products + layout.product_floats;
    const int64_t element = p.type == FLOAT32 ? 4 : 2;
#pragma omp parallel num_threads(threads)
    {
        float* const own = scratch + omp_get_thread_num() * layout.thread_floats;
        for (int64_t block = 0; block < p.n; block += layout.rows) {
            const int64_t rows = smaller(layout.rows, p.n - block);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < layout.rows; r += TILE_COLUMNS) {
                const char* from = static_cast<const char*>(p.rows) + (block + r) * p.rows_stride * element;
                const int64_t count = rows > r ? rows - r : 0;
                pack_panel<TILE_COLUMNS>(p.type, from, p.rows_stride, count, p.d, packed_rows + r * p.d);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < p.t; first += PICKS)
                multiply_picks(p, layout, first, packed_rows, own, products);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < rows; first += CHUNK)
                finish_chunk(p, layout, block, first, products, own + PICKS * p.d, out);
        }
    }
}

template <int TYPE>
static float dot(const void* row, const float* vector, int64_t d) {
    Quad sums[4] = {};
    int64_t k = 0;
    for (; k + 16 <= d; k += 16)
        for (int part = 0; part < 4; ++part)
            sums[part] += load_quad<TYPE>(row, k + 4 * part) * load_quad<FLOAT32>(vector, k + 4 * part);
    float rest = 0;
    for (; k < d; ++k) rest += load_one<TYPE>(row, k) * vector[k];
    const Quad sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]) + rest;
}

template <int TYPE>
static void run_order(
    const void* rows, int64_t stride, const float* row_density, const float* vectors, const double* sums, int64_t n,
    int64_t d, int64_t s, bool has_both, int threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const void* const row = static_cast<const char*>(rows) + i * stride * ELEMENT_BYTES<TYPE>;
        const double density = row_density ? row_density[i] : 1.0;
        for (int64_t set = 0; set < s; ++set) {
            double value = density * (sums[set] - dot<TYPE>(row, vectors + set * d, d));
            if (has_both) value += sums[s + set] - dot<TYPE>(row, vectors + (s + set) * d, d);
            out[i * s + set] = value;
        }
    }
}

}  // namespace

// How many floats of workspace novelty needs.
FASTSEL_EXPORT(novelty_workspace)(int64_t n, int64_t t, int64_t d, int32_t threads, int64_t* floats) {
    *floats = Layout(n, t, d).floats(threads);
}

// rows [n, d] and picks [t, d] hold elements of `type` (0 float32, 1 bfloat16, 2 float16); strides are elements from
// row to row. Densities may be null; weights [s, t]; out [n, s]. Nothing may overlap.
FASTSEL_EXPORT(novelty)(
    const void* rows, int64_t rows_stride, const void* picks, int64_t picks_stride, int32_t type,
    const float* row_density, const float* pick_density, const double* weights, int64_t n, int64_t t, int64_t d,
    int64_t s, int32_t by_distance, int32_t threads, float* workspace, float* out) {
    const Problem problem{rows, picks, rows_stride, picks_stride, static_cast<ElementType>(type), row_density,
                          pick_density, weights, n, t, d, s, by_distance != 0};
    run(problem, threads, workspace, out);
}

// out[i, s] = row_density[i] (sums[s] - row . vectors[s]), plus, with both densities, sums[S + s] - row . vectors[S + s].
FASTSEL_EXPORT(novelty_order)(
    const void* rows, int64_t stride, int32_t type, const float* row_density, const float* vectors, const double* sums,
    int64_t n, int64_t d, int64_t s, int32_t has_both, int32_t threads, float* out) {
    if (type == FLOAT32) run_order<FLOAT32>(rows, stride, row_density, vectors, sums, n, d, s, has_both, threads, out);
    if (type == BFLOAT16) run_order<BFLOAT16>(rows, stride, row_density, vectors, sums, n, d, s, has_both, threads, out);
    if (type == FLOAT16) run_order<FLOAT16>(rows, stride, row_density, vectors, sums, n, d, s, has_both, threads, out);
}

// out[c, n] = vectors [c, d] . rows [n, d], all float32; strides are elements from row to row.
FASTSEL_EXPORT(novelty_columns)(
    const float* rows, int64_t rows_stride, const float* vectors, int64_t vectors_stride, int64_t n, int64_t c,
    int64_t d, int32_t threads, float* out) {
    run_columns({rows, vectors, rows_stride, vectors_stride, n, c, d, out}, threads);
}
