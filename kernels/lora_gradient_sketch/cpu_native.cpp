// lora_gradient_sketch on a CPU: tiles of gradients are formed, stepped and reduced while they are in cache.
//
// A and B have one shape: gradient[j][c] = sum_t left[t][j] right[t][c], with left = scale delta B and right = x for A,
// left = scale x A^T and right = delta for B; both products [t][r] are made first. Columns lie across the lanes, so that
// x and delta are read as they lie in memory; ranks are broadcast. A tile of A is RANKS ranks of at most TILE_WIDTH
// columns: as many runs of coordinates. A tile of B is some outputs with all their ranks: one run of coordinates,
// formed with ranks first and turned.
//
// Threads take examples, whose tokens they read CHUNK at a time, once from memory: both products, then every tile of the
// group while the chunk is in the second-level cache. Then they take (tile, COLUMNS targets) for the dot products of all
// examples, then examples again, each of which adds its tiles' results in order and scatters its gradients into its own
// row of the sketch: no number of threads changes a bit, nor do other examples. BLOCK examples and about BUFFER floats of
// gradients are in flight; a module with more is made in groups of tiles, each of which reads the tokens again.

#include <math.h>
#include <omp.h>

#include "counter_hash.h"
#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int RANKS = LANES == 16 ? 8 : 4;  // of a tile in registers, which has TILE_COLUMNS columns
constexpr int ROWS = 3, COLUMNS = LANES == 16 ? 8 : 4;  // of a tile of dot products in registers
constexpr int64_t TILE_WIDTH = 256, BLOCK = 64, BUFFER = 1 << 20;
constexpr int64_t CHUNK = 128;  // tokens, and terms of one chain of multiply-adds: chains' sums are added one by one
static_assert(TILE_WIDTH % TILE_COLUMNS == 0, "a tile is whole tiles of registers");

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

enum StepKind : int64_t { AS_IT_IS = 0, ADAM = 1, SIGN = 2 };

// Every field has 8 bytes; cpu_native.py lists the same ones.
struct Problem {
    const void *x, *delta;  // [t, d_in], [t, d_out]
    int64_t x_stride, delta_stride, type;
    const float *lora_a, *lora_b_turned;  // [r_padded, d_in], [r_padded, d_out]: whole RANKS, the rest 0
    const int64_t* offsets;               // [n + 1]
    int64_t n, d_in, d_out, r;
    double scale;
    int64_t step;
    const float *exp_avg, *exp_avg_sq;  // [p]; exp_avg may be null
    double of_m, of_g, of_v, of_gg, eps;
    int64_t eps_inside;
    const void* targets;  // [s, p]
    int64_t targets_stride, targets_type, s;
    int64_t k, sparsity, seed, first;  // no sketch when k is 0
    int64_t threads;
    float* workspace;
    double *dots, *sqnorms;  // [n, s], [n]
    float* sketch;           // [n, k], added to
};

// Consecutive coordinates from `start` on: `runs` runs of `length`, `stride` apart; in a buffer `room` apart.
struct Tile {
    bool of_a;
    int64_t rank, column, width;
    int64_t start, runs, length, stride, room;
};

struct Layout {
    int64_t r_padded, t, width_a, width_b, tiles_a, tiles, tile_floats, n_block, group;
    int64_t product_floats, partials, thread_floats;

    explicit Layout(const Problem& p) {
        r_padded = rounded_up(p.r, RANKS);
        t = p.offsets[p.n] - p.offsets[0];
        width_a = width_of(p.d_in, TILE_WIDTH);
        width_b = width_of(p.d_out, larger(TILE_COLUMNS, smaller(TILE_WIDTH, RANKS * TILE_WIDTH / p.r)));
        tiles_a = divided_up(p.d_in, width_a) * (r_padded / RANKS);
        tiles = tiles_a + divided_up(p.d_out, width_b);
        tile_floats = larger(RANKS * width_a, r_padded * width_b);
        n_block = smaller(p.n, BLOCK);
        group = smaller(tiles, larger(1, BUFFER / (tile_floats * larger(1, n_block))));
        product_floats = rounded_up(t * r_padded, LANES);
        partials = group * n_block * (p.s + 1);
        // One at a time: a panel, a tile to turn, widened rows, widened targets.
        const int64_t rows = ROWS * larger(p.d_in, p.d_out);
        thread_floats = larger(larger(CHUNK * TILE_COLUMNS, rows), COLUMNS * tile_floats);
    }
    static int64_t width_of(int64_t d, int64_t most) {
        return rounded_up(divided_up(d, divided_up(d, most)), TILE_COLUMNS);
    }
    int64_t map_words(const Problem& p) const { return p.k ? group * p.sparsity * tile_floats : 0; }
    int64_t floats(const Problem& p) const {
        return 2 * product_floats + group * n_block * tile_floats + 2 * partials + map_words(p) + p.threads * thread_floats;
    }
    Tile tile(const Problem& p, int64_t number) const {
        if (number < tiles_a) {
            const int64_t across = divided_up(p.d_in, width_a);
            const int64_t rank = number / across * RANKS, column = number % across * width_a;
            const int64_t width = smaller(width_a, p.d_in - column);
            return {true, rank, column, width, rank * p.d_in + column, smaller(RANKS, p.r - rank), width, p.d_in, width_a};
        }
        const int64_t column = (number - tiles_a) * width_b, width = smaller(width_b, p.d_out - column);
        return {false, 0, column, width, (p.d_in + column) * p.r, 1, width * p.r, 0, 0};
    }
};

static inline Floats load_some(const float* from, int64_t count) {
    Floats x = {};
    memcpy(&x, from, 4 * count);
    return x;
}

static inline float sum_of(Floats x) {
    Quad quads[LANES / 4];
    memcpy(quads, &x, sizeof x);
    for (int width = LANES / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) quads[i] += quads[i + width];
    return (quads[0][0] + quads[0][2]) + (quads[0][1] + quads[0][3]);
}

// sums[r][c] += rows[r] columns[c] for one vector, or its first `count` elements.
template <bool WHOLE>
static inline void dot_step(const float* const* rows, const float* const* columns, int64_t row_at, int64_t column_at,
                            int64_t count, Floats (&sums)[ROWS][COLUMNS]) {
    Floats ones[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) ones[r] = WHOLE ? load(rows[r] + row_at) : load_some(rows[r] + row_at, count);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
        const Floats other = WHOLE ? load(columns[c] + column_at) : load_some(columns[c] + column_at, count);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r][c] += ones[r] * other;
    }
}

// out[r][c] = sum over runs and their elements of rows[r] columns[c]; runs lie row_step and column_step apart.
static inline void dot_tile(const float* const* rows, int64_t row_step, const float* const* columns, int64_t column_step,
                            int64_t runs, int64_t length, float (*out)[COLUMNS]) {
    Floats sums[ROWS][COLUMNS] = {};
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t row_at = run * row_step, column_at = run * column_step;
        int64_t k = 0;
        for (; k + LANES <= length; k += LANES) dot_step<true>(rows, columns, row_at + k, column_at + k, LANES, sums);
        if (k < length) dot_step<false>(rows, columns, row_at + k, column_at + k, length - k, sums);
    }
    // Unrolled, or the sums would be kept in memory all along for the sake of an index.
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) out[r][c] = sum_of(sums[r][c]);
}

static void widen(const void* from, int64_t index, ElementType type, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = type == BFLOAT16 ? load_one<BFLOAT16>(from, index + i) : load_one<FLOAT16>(from, index + i);
}

// products[t][j] = scale * row `token + t` of the matrix . row j of the weight, for t < depth.
static void multiply_rows(const Problem& p, const void* matrix, int64_t stride, const float* weight, int64_t d,
                          int64_t token, int64_t depth, const Layout& layout, float* wide, float* products) {
    const int64_t element = p.type == FLOAT32 ? 4 : 2;
    for (int64_t t = 0; t < depth; t += ROWS) {
        const int64_t count = smaller(ROWS, depth - t);
        const float* rows[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (token + t + smaller(r, count - 1)) * stride;
            rows[r] = static_cast<const float*>(matrix) + at;
            if (p.type == FLOAT32) continue;
            rows[r] = wide + r * d;
            widen(matrix, at, static_cast<ElementType>(p.type), d, wide + r * d);
        }
        // Rows are too short for the processor to foresee the next ones.
        const char* const next = static_cast<const char*>(matrix) + (token + t + count) * stride * element;
        for (int64_t r = 0; r < smaller(ROWS, depth - t - count); ++r)
            for (int64_t byte = 0; byte < d * element; byte += 64) __builtin_prefetch(next + r * stride * element + byte);
        for (int64_t j = 0; j < layout.r_padded; j += COLUMNS) {
            const float* columns[COLUMNS];
            float values[ROWS][COLUMNS];
            for (int c = 0; c < COLUMNS; ++c) columns[c] = weight + (j + c) * d;
            dot_tile(rows, 0, columns, 0, 1, d, values);
            for (int64_t r = 0; r < count; ++r)
                for (int c = 0; c < COLUMNS; ++c)
                    products[(t + r) * layout.r_padded + j + c] = static_cast<float>(p.scale) * values[r][c];
        }
    }
}

// out[j][c] = or += the sum over `depth` tokens from `token` on, for `ranks` ranks of a tile and its columns; columns past
// the end hold nothing of use.
static void form(const void* right, int64_t stride, ElementType type, const float* left, int64_t left_stride,
                 const Tile& tile, int64_t ranks, int64_t token, int64_t depth, bool is_first, float* panel, float* out,
                 int64_t out_stride) {
    for (int64_t c = 0; c < tile.width; c += TILE_COLUMNS) {
        const int64_t count = smaller(TILE_COLUMNS, tile.width - c), at = token * stride + tile.column + c;
        const float* from = static_cast<const float*>(right) + at;
        int64_t from_stride = stride;
        if (type != FLOAT32 || count < TILE_COLUMNS) {
            for (int64_t t = 0; t < depth; ++t) {
                float* const to = panel + t * TILE_COLUMNS;
                if (type == FLOAT32)
                    memcpy(to, from + t * stride, 4 * count);
                else
                    widen(right, at + t * stride, type, count, to);
                for (int64_t rest = count; rest < TILE_COLUMNS; ++rest) to[rest] = 0;
            }
            from = panel, from_stride = TILE_COLUMNS;
        }
        for (int64_t j = 0; j < ranks; j += RANKS) {
            float* const to = out + j * out_stride + c;
            if (is_first)
                outer_products<RANKS, false>(left + tile.rank + j, left_stride, from, from_stride, depth, to, out_stride);
            else
                outer_products<RANKS, true>(left + tile.rank + j, left_stride, from, from_stride, depth, to, out_stride);
        }
    }
}

static void take_step(const Problem& p, int64_t start, int64_t count, float* __restrict g) {
    if (p.step == SIGN)
        for (int64_t i = 0; i < count; ++i) g[i] /= g[i] == 0 ? INFINITY : fabsf(g[i]);
    if (p.step != ADAM) return;
    const float* __restrict const m = p.exp_avg + start;
    const float* __restrict const v = p.exp_avg_sq + start;
    const float of_m = p.of_m, of_g = p.of_g, of_v = p.of_v, of_gg = p.of_gg;
    const float inside = p.eps_inside ? p.eps : 0, outside = p.eps_inside ? 0 : p.eps;
    float numerators[TILE_WIDTH];
    for (int64_t done = 0; done < count; done += TILE_WIDTH) {
        const int64_t stop = smaller(TILE_WIDTH, count - done);
        float* __restrict const here = g + done;
        if (p.exp_avg)
            for (int64_t i = 0; i < stop; ++i) numerators[i] = of_m * m[done + i] + of_g * here[i];
        else
            for (int64_t i = 0; i < stop; ++i) numerators[i] = of_g * here[i];
        for (int64_t i = 0; i < stop; ++i) {
            const float root = sqrtf(of_v * v[done + i] + of_gg * here[i] * here[i] + inside) + outside;
            here[i] = numerators[i] / (root == 0 ? INFINITY : root);
        }
    }
}

static float sum_of_squares(const float* x, int64_t count) {
    Floats sum = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(x + i);
    const Floats rest = load_some(x + i, count - i);
    return sum_of(sum + rest * rest);
}

// gradients of an example's tiles `base` to `base + group`, one after another, those of B with ranks first.
static void form_tiles(const Problem& p, const Layout& layout, int64_t base, int64_t group, int64_t example, float* left_a,
                       float* left_b, float* scratch, float* gradients) {
    const int64_t first = p.offsets[example], stop = p.offsets[example + 1];
    const ElementType type = static_cast<ElementType>(p.type);
    int64_t token = first;
    do {  // once for an example without tokens, whose gradient is 0
        const int64_t depth = smaller(CHUNK, stop - token), at = (token - p.offsets[0]) * layout.r_padded;
        if (base == 0) {
            multiply_rows(p, p.delta, p.delta_stride, p.lora_b_turned, p.d_out, token, depth, layout, scratch, left_a + at);
            multiply_rows(p, p.x, p.x_stride, p.lora_a, p.d_in, token, depth, layout, scratch, left_b + at);
        }
        for (int64_t i = 0; i < group; ++i) {
            const Tile tile = layout.tile(p, base + i);
            float* const out = gradients + i * layout.tile_floats;
            if (tile.of_a)
                form(p.x, p.x_stride, type, left_a + at, layout.r_padded, tile, RANKS, token, depth, token == first, scratch,
                     out, layout.width_a);
            else
                form(p.delta, p.delta_stride, type, left_b + at, layout.r_padded, tile, layout.r_padded, token, depth,
                     token == first, scratch, out, layout.width_b);
        }
        token += CHUNK;
    } while (token < stop);
}

// The step of one tile and example in place, as runs of coordinates; its squared norm.
static double finish_tile(const Problem& p, const Layout& layout, const Tile& tile, float* turned, float* gamma) {
    if (!tile.of_a) {
        memcpy(turned, gamma, 4 * p.r * layout.width_b);
        for (int64_t j = 0; j < p.r; ++j)
            for (int64_t c = 0; c < tile.width; ++c) gamma[c * p.r + j] = turned[j * layout.width_b + c];
    }
    double sqnorm = 0;
    for (int64_t run = 0; run < tile.runs; ++run) {
        take_step(p, tile.start + run * tile.stride, tile.length, gamma + run * tile.room);
        sqnorm += sum_of_squares(gamma + run * tile.room, tile.length);
    }
    return sqnorm;
}

// partials[example][target] of one tile, COLUMNS targets from `target` on.
static void multiply_targets(const Problem& p, const Layout& layout, const Tile& tile, int64_t n, int64_t target,
                             const float* gammas, int64_t gamma_stride, float* scratch, double* partials) {
    const int64_t count = smaller(COLUMNS, p.s - target);
    const bool is_wide = p.targets_type == FLOAT32;
    const float* columns[COLUMNS];
    for (int64_t c = 0; c < COLUMNS; ++c) {
        const int64_t at = (target + smaller(c, count - 1)) * p.targets_stride + tile.start;
        columns[c] = is_wide ? static_cast<const float*>(p.targets) + at : scratch + c * layout.tile_floats;
        for (int64_t run = 0; !is_wide && run < tile.runs; ++run)
            widen(p.targets, at + run * tile.stride, static_cast<ElementType>(p.targets_type), tile.length,
                  scratch + c * layout.tile_floats + run * tile.room);
    }
    for (int64_t i = 0; i < n; i += ROWS) {
        const float* rows[ROWS];
        float values[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; ++r) rows[r] = gammas + smaller(i + r, n - 1) * gamma_stride;
        dot_tile(rows, tile.room, columns, is_wide ? tile.stride : tile.room, tile.runs, tile.length, values);
        for (int64_t r = 0; r < smaller(ROWS, n - i); ++r)
            for (int64_t c = 0; c < count; ++c) partials[(i + r) * p.s + target + c] = values[r][c];
    }
}

// map[j][c] = the row of nonzero j of the tile's coordinate c, bit 31 its sign.
static void map_tile(const Problem& p, const Layout& layout, const Sjlt& sjlt, const Tile& tile, uint32_t* map) {
    uint32_t signs[TILE_WIDTH];
    for (int64_t j = 0; j < p.sparsity; ++j)
        for (int64_t run = 0; run < tile.runs; ++run)
            for (int64_t c = 0; c < tile.length; c += TILE_WIDTH) {
                const int64_t count = smaller(TILE_WIDTH, tile.length - c);
                const uint64_t coordinate = p.first + tile.start + run * tile.stride + c;
                uint32_t* const rows = map + j * layout.tile_floats + run * tile.room + c;
                sjlt_rows(sjlt, j, coordinate, count, rows);
                sjlt_signs(sjlt, j, coordinate, count, signs);
                for (int64_t i = 0; i < count; ++i) rows[i] |= signs[i];
            }
}

static void scatter_tile(const Problem& p, const Layout& layout, const Tile& tile, const uint32_t* map, const float* gamma,
                         float* sketch) {
    const float weight = 1 / sqrtf(static_cast<float>(p.sparsity));
    for (int64_t j = 0; j < p.sparsity; ++j)
        for (int64_t run = 0; run < tile.runs; ++run) {
            const uint32_t* const words = map + j * layout.tile_floats + run * tile.room;
            const float* const values = gamma + run * tile.room;
            for (int64_t c = 0; c < tile.length; ++c) {
                uint32_t bits;
                float value = values[c] * weight;
                memcpy(&bits, &value, sizeof bits);
                bits ^= words[c] & 0x80000000u;
                memcpy(&value, &bits, sizeof bits);
                sketch[words[c] & 0x7fffffffu] += value;
            }
        }
}

static void run(const Problem& p) {
    const Layout layout(p);
    const Sjlt sjlt = p.k ? make_sjlt(p.seed, p.k, p.sparsity) : Sjlt{};
    double* const partials = reinterpret_cast<double*>(p.workspace);
    double* const norms = partials + layout.group * layout.n_block * p.s;
    float* const left_a = p.workspace + 2 * layout.partials;
    float* const left_b = left_a + layout.product_floats;
    float* const gammas = left_b + layout.product_floats;
    uint32_t* const map = reinterpret_cast<uint32_t*>(gammas + layout.group * layout.n_block * layout.tile_floats);
    float* const scratch = reinterpret_cast<float*>(map) + layout.map_words(p);
    const int64_t map_stride = p.sparsity * layout.tile_floats;
    const int64_t target_groups = divided_up(p.s, COLUMNS), gamma_stride = layout.group * layout.tile_floats;
#pragma omp parallel num_threads(static_cast<int>(p.threads))
    {
        float* const own = scratch + omp_get_thread_num() * layout.thread_floats;
        for (int64_t block = 0; block < p.n; block += BLOCK) {
            const int64_t n = smaller(BLOCK, p.n - block);
            for (int64_t base = 0; base < layout.tiles; base += layout.group) {
                const int64_t group = smaller(layout.group, layout.tiles - base);
                if (p.k) {
#pragma omp for schedule(static) nowait
                    for (int64_t i = 0; i < group; ++i)
                        map_tile(p, layout, sjlt, layout.tile(p, base + i), map + i * map_stride);
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t example = 0; example < n; ++example) {
                    float* const own_gammas = gammas + example * gamma_stride;
                    form_tiles(p, layout, base, group, block + example, left_a, left_b, own, own_gammas);
                    for (int64_t i = 0; i < group; ++i)
                        norms[i * layout.n_block + example] = finish_tile(
                            p, layout, layout.tile(p, base + i), own, own_gammas + i * layout.tile_floats);
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t job = 0; job < group * target_groups; ++job) {
                    const int64_t i = job / target_groups, target = job % target_groups * COLUMNS;
                    multiply_targets(p, layout, layout.tile(p, base + i), n, target, gammas + i * layout.tile_floats,
                                     gamma_stride, own, partials + i * layout.n_block * p.s);
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t example = 0; example < n; ++example)
                    for (int64_t i = 0; i < group; ++i) {
                        const int64_t at = i * layout.n_block + example;
                        p.sqnorms[block + example] += norms[at];
                        for (int64_t j = 0; j < p.s; ++j) p.dots[(block + example) * p.s + j] += partials[at * p.s + j];
                        if (p.k)
                            scatter_tile(p, layout, layout.tile(p, base + i), map + i * map_stride,
                                         gammas + example * gamma_stride + i * layout.tile_floats,
                                         p.sketch + (block + example) * p.k);
                    }
            }
        }
    }
}

}  // namespace

// How many floats of workspace the problem needs.
FASTSEL_EXPORT(lora_gradient_sketch_workspace)(const Problem* problem, int64_t* floats) {
    *floats = Layout(*problem).floats(*problem);
}

// dots, sqnorms and sketch are added to. Nothing may overlap.
FASTSEL_EXPORT(lora_gradient_sketch)(const Problem* problem) { run(*problem); }
