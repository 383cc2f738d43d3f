// facility_location on a CPU: similarities of ROWS candidates and one panel of points at a time, reduced while in cache.
//
// Points lie across the lanes and candidates follow one another. Candidates are packed once for a whole run
// ([panel][d][TILE_ROWS]); points are packed block by block ([panel][d][TILE_COLUMNS]). One task is ROWS candidates x
// one block of BLOCK points: its candidates (147 KB at d = 384) stay in the thread's second-level cache, the points are
// read from the last level once per task, the tile of similarities (12 KB) stays in the first level.
//
// Each task leaves one float64 sum for each of its candidates in a place of its own; the places are added in the order
// of the points, so that no number of threads changes a bit. Where the points are the candidates, s(i, v) = s(v, i)
// serves both: only panels right of a task's own candidates are multiplied, and a task leaves a sum for each point too.
//
// Candidates may be packed in bytes instead, at a scale of their own: four multiply-adds an instruction, and similarities
// with an error of about 6e-4 (rows of length 1, d = 384) that is the same for a pair in every call and both ways.
// Terms are rounded in float32 and added in float64 from two (points) or TILE_ROWS (candidates) terms on.

#include <math.h>
#include <omp.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 96;           // a multiple of every TILE_ROWS and TILE_COLUMNS
constexpr int64_t BLOCK = 5 * ROWS;    // points
constexpr int64_t DEPTH_BLOCK = 256;   // terms of one chain of multiply-adds; longer sums are added block by block
constexpr int64_t PLACES_BYTES = 8 << 20;
constexpr int64_t MOST_BLOCKS = 8;     // packed at a time: 5.9 MB at d = 384
constexpr float NEVER = 3e38f;         // best and raised of the points that fill up a block: no similarity exceeds it
static_assert(ROWS % TILE_ROWS == 0 && ROWS % TILE_COLUMNS == 0, "a group of candidates is whole panels, both ways");

typedef double Doubles __attribute__((vector_size(LANES * 8)));

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline Doubles widened(Floats x) { return __builtin_convertvector(x, Doubles); }

static inline double sum_of(const Doubles& x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

enum Similarity : int32_t { DOT = 0, RBF = 1, EXP_DISTANCE = 2 };

struct Matrix {
    const void* rows;
    int64_t stride, count;
    ElementType type;

    const void* row(int64_t i) const { return static_cast<const char*>(rows) + i * stride * (type == FLOAT32 ? 4 : 2); }
};

// Packed candidates: panels of floats with squared lengths behind them, or panels of bytes with, for each candidate, its
// scale and -128 times the sum of its bytes.
struct Packed {
    const float *panels, *lengths;
    const int8_t* bytes;
    const float* scales;
    const int32_t* offsets;

    Packed(const void* base, bool in_bytes, int64_t padded, int64_t d) {
        panels = static_cast<const float*>(base), lengths = panels + padded * d;
        const int64_t quads = (d + 3) / 4;
        bytes = in_bytes ? static_cast<const int8_t*>(base) : nullptr;
        scales = reinterpret_cast<const float*>(static_cast<const int8_t*>(base) + padded * quads * 4);
        offsets = reinterpret_cast<const int32_t*>(scales + padded);
    }
};

struct Problem {
    Matrix points;
    const float *best, *raised, *weights;  // raised and weights may be null
    int64_t n, d;
    Similarity similarity;
    float gamma;
    bool itself;  // the points are the candidates, and raised is null
};

// What is known of each point, or of each candidate as a point: max(s, best) - base is max(s - best, 0), and s itself
// where best is -inf.
struct Known {
    float *best, *base, *raised, *weight, *length;
};

static inline Floats square_root(Floats x) {
    Floats root;
    for (int lane = 0; lane < LANES; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
    return root;
}

// The squared lengths of the WIDTH rows of a panel.
template <int WIDTH>
static void lengths_of_panel(const float* panel, int64_t d, float* lengths) {
    double sums[WIDTH] = {};
    for (int64_t k = 0; k < d; ++k)
        for (int r = 0; r < WIDTH; ++r) sums[r] += static_cast<double>(panel[k * WIDTH + r]) * panel[k * WIDTH + r];
    for (int r = 0; r < WIDTH; ++r) lengths[r] = static_cast<float>(sums[r]);
}

// tile[r][column] = candidate r . point column for ROWS candidates and one panel of points.
static void multiply_group(const float* candidates, const float* points, int64_t d, int64_t count, float* tile) {
    for (int64_t k = 0; k < d; k += DEPTH_BLOCK) {
        const int64_t depth = smaller(DEPTH_BLOCK, d - k);
        for (int64_t r = 0; r < count; r += TILE_ROWS) {
            const float* left = candidates + r * d + k * TILE_ROWS;
            const float* right = points + k * TILE_COLUMNS;
            if (k == 0)
                multiply_tile<false>(left, right, depth, tile + r * TILE_COLUMNS, TILE_COLUMNS);
            else
                multiply_tile<true>(left, right, depth, tile + r * TILE_COLUMNS, TILE_COLUMNS);
        }
    }
}

// bytes[k / 4][WIDTH][4] of the rows of a panel as x = scale * byte, `zero` added to each byte; rows from `count` on, and
// columns up to a multiple of 4, are zeros. `row` is room for one row.
template <int WIDTH>
static void pack_bytes(
    ElementType type, const Matrix& matrix, int64_t first, int64_t count, int64_t d, int zero, float* row, uint8_t* bytes,
    float* scales, int32_t* offsets) {
    const int64_t quads = (d + 3) / 4;
    for (int r = 0; r < WIDTH; ++r) {
        float largest = 0;
        if (r < count) {
            pack_panel<1>(type, matrix.row(first + r), matrix.stride, 1, d, row);
            for (int64_t k = 0; k < d; ++k) largest = fabsf(row[k]) > largest ? fabsf(row[k]) : largest;
        }
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int64_t k = 0; k < 4 * quads; ++k) {
            const float scaled = largest > 0 && k < d ? row[k] * inverse : 0.0f;
            const int32_t byte = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
            sum += byte;
            bytes[(k / 4 * WIDTH + r) * 4 + k % 4] = static_cast<uint8_t>(byte + zero);
        }
        scales[r] = largest / 127.0f;
        if (offsets) offsets[r] = -128 * sum;
    }
}

#if defined(__AVX512VNNI__)
// sums[lane] += the four products of unsigned by signed bytes. The intrinsic makes GCC 12 keep sums on the stack.
static inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// As multiply_group, from bytes: points are stored plus 128, which each candidate's offset takes away again.
static void multiply_bytes(
    const int8_t* candidates, const float* scales, const int32_t* offsets, const uint8_t* points, const float* point_scales,
    int64_t quads, int64_t count, float* tile) {
    const Floats point_scale[2] = {load(point_scales), load(point_scales + LANES)};
    for (int64_t r = 0; r < count; r += TILE_ROWS) {
        const int8_t* left = candidates + r * quads * 4;
        __m512i low[TILE_ROWS], high[TILE_ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i) low[i] = high[i] = _mm512_set1_epi32(offsets[r + i]);
        for (int64_t k = 0; k < quads; ++k) {
            const __m512i right_low = _mm512_loadu_si512(points + k * TILE_COLUMNS * 4);
            const __m512i right_high = _mm512_loadu_si512(points + k * TILE_COLUMNS * 4 + 64);
#pragma GCC unroll 12
            for (int i = 0; i < TILE_ROWS; ++i) {
                int32_t four;
                memcpy(&four, left + (k * TILE_ROWS + i) * 4, 4);
                const __m512i one = _mm512_set1_epi32(four);
                add_products(low[i], right_low, one);
                add_products(high[i], right_high, one);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i) {
            float* const to = tile + (r + i) * TILE_COLUMNS;
            const Ints sums[2] = {reinterpret_cast<Ints>(low[i]), reinterpret_cast<Ints>(high[i])};
            for (int half = 0; half < 2; ++half)
                store(to + half * LANES, __builtin_convertvector(sums[half], Floats) * (scales[r + i] * point_scale[half]));
        }
    }
}
#endif

// Dot products to similarities that fall with the distance.
static void bend_group(const Problem& p, const float* lengths, const float* point_lengths, int64_t count, float* tile) {
    for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            float* const at = tile + r * TILE_COLUMNS + c;
            const Floats squared = greater(lengths[r] + load(point_lengths + c) - 2.0f * load(at), Floats{});
            store(at, exponential(-p.gamma * (p.similarity == RBF ? squared : square_root(squared))));
        }
}

// Adds each candidate's terms over one panel of points to its sum.
template <bool RAISED>
static void reduce_rows(const float* tile, int64_t count, const Known& points, int64_t column, Doubles* sums) {
    Floats best[2], base[2], raised[2], weight[2];
    for (int half = 0; half < 2; ++half) {
        const int64_t at = column + half * LANES;
        best[half] = load(points.best + at), base[half] = load(points.base + at), weight[half] = load(points.weight + at);
        if (RAISED) raised[half] = load(points.raised + at);
    }
    for (int64_t r = 0; r < count; ++r) {
        Floats terms[2];
        for (int half = 0; half < 2; ++half) {
            const Floats s = load(tile + r * TILE_COLUMNS + half * LANES);
            terms[half] = greater(s, best[half]) - base[half];
            if (RAISED) terms[half] = terms[half] - greater(s - raised[half], Floats{});
            terms[half] = terms[half] * weight[half];
        }
        sums[r] += widened(terms[0] + terms[1]);
    }
}

// Adds each point's terms over a group of candidates, which are points too, to its sum as a candidate.
static void reduce_columns(const float* tile, int64_t count, const Known& rows, int64_t first_row, double* sums) {
    for (int c = 0; c < TILE_COLUMNS; c += LANES) {
        Doubles sum = Doubles{};
        for (int64_t start = 0; start < count; start += TILE_ROWS) {
            Floats some = Floats{};
            for (int64_t r = start; r < smaller(start + TILE_ROWS, count); ++r) {
                const int64_t i = first_row + r;
                const Floats s = load(tile + r * TILE_COLUMNS + c);
                some += (greater(s, splat(rows.best[i])) - rows.base[i]) * rows.weight[i];
            }
            sum += widened(some);
        }
        for (int lane = 0; lane < LANES; ++lane) sums[c + lane] += sum[lane];
    }
}

struct Layout {
    int64_t groups, blocks, together;  // of ROWS candidates, of BLOCK points, blocks packed at a time
    int64_t padded;                    // points
    int64_t packed_floats, known_floats, place_doubles;

    Layout(int64_t n, int64_t m, int64_t d, bool itself) {
        groups = divided_up(n, ROWS), blocks = divided_up(m, BLOCK), padded = blocks * BLOCK;
        place_doubles = itself ? ROWS + BLOCK : ROWS;
        const int64_t fitting = PLACES_BYTES / 8 / (place_doubles * (groups ? groups : 1));
        together = smaller(smaller(fitting > 1 ? fitting : 1, MOST_BLOCKS), blocks ? blocks : 1);
        packed_floats = together * BLOCK * ((d + 3) / 4 * 4);
        known_floats = 5 * padded;
    }
    int64_t floats(int64_t d, int64_t threads) const {
        return packed_floats + known_floats + 2 * together * groups * place_doubles + threads * d + 32;
    }
};

static Known known_of(float* base, int64_t padded) {
    return {base, base + padded, base + 2 * padded, base + 3 * padded, base + 4 * padded};
}

static void learn(const Problem& p, int64_t v, const Known& known) {
    const bool is_point = v < p.points.count;
    const float best = is_point ? p.best[v] : NEVER;
    known.best[v] = best;
    known.base[v] = best == -INFINITY ? 0.0f : best;
    known.raised[v] = is_point && p.raised ? p.raised[v] : NEVER;
    known.weight[v] = !is_point ? 0.0f : p.weights ? p.weights[v] : 1.0f;
}

// One group of candidates x one block of points; `place` receives ROWS sums, and BLOCK more where the points are the
// candidates.
template <bool RAISED>
static void run_task(
    const Problem& p, int64_t group, int64_t block, const Packed& candidates, const float* packed, const Known& known,
    double* place) {
    alignas(64) float tile[ROWS * TILE_COLUMNS];
    alignas(64) Doubles sums[ROWS];
    const int64_t first_row = group * ROWS, count = smaller(ROWS, p.n - first_row);
    double* const column_sums = place + ROWS;
    for (int64_t r = 0; r < ROWS; ++r) sums[r] = Doubles{};
    if (p.itself) memset(column_sums, 0, BLOCK * sizeof(double));
    for (int64_t c = 0; c < BLOCK; c += TILE_COLUMNS) {
        const int64_t column = block * BLOCK + c;
        if (column >= p.points.count || (p.itself && column < first_row)) continue;
        if (candidates.bytes) {
#if defined(__AVX512VNNI__)
            const int64_t quads = (p.d + 3) / 4;
            multiply_bytes(
                candidates.bytes + first_row * quads * 4, candidates.scales + first_row, candidates.offsets + first_row,
                reinterpret_cast<const uint8_t*>(packed) + c * quads * 4, known.length + column, quads, count, tile);
#endif
        } else {
            multiply_group(candidates.panels + first_row * p.d, packed + c * p.d, p.d, count, tile);
        }
        if (p.similarity != DOT) bend_group(p, candidates.lengths + first_row, known.length + column, count, tile);
        reduce_rows<RAISED>(tile, count, known, column, sums);
        if (p.itself && column >= first_row + ROWS) reduce_columns(tile, count, known, first_row, column_sums + c);
    }
    for (int64_t r = 0; r < ROWS; ++r) place[r] = sum_of(sums[r]);
}

template <bool RAISED>
static void run(const Problem& p, const Packed& candidates, int threads, float* workspace, double* gains) {
    const int64_t m = p.points.count;
    const Layout layout(p.n, m, p.d, p.itself);
    float* const packed = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
    const Known known = known_of(packed + layout.packed_floats, layout.padded);
    double* const places = reinterpret_cast<double*>(packed + layout.packed_floats + layout.known_floats);
    float* const rows = reinterpret_cast<float*>(places + layout.together * layout.groups * layout.place_doubles);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t v = 0; v < layout.padded; ++v) learn(p, v, known);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.n; ++i) gains[i] = 0;
        for (int64_t first_block = 0; first_block < layout.blocks; first_block += layout.together) {
            const int64_t blocks = smaller(layout.together, layout.blocks - first_block);
            const int64_t first = first_block * BLOCK;
#pragma omp for schedule(static)
            for (int64_t c = 0; c < blocks * BLOCK; c += TILE_COLUMNS) {
                if (first + c >= m) continue;
                if (candidates.bytes) {
                    const int64_t quads = (p.d + 3) / 4, thread = omp_get_thread_num();
                    pack_bytes<TILE_COLUMNS>(
                        p.points.type, p.points, first + c, m - first - c, p.d, 128, rows + thread * p.d,
                        reinterpret_cast<uint8_t*>(packed) + c * quads * 4, known.length + first + c, nullptr);
                    continue;
                }
                float* const panel = packed + c * p.d;
                pack_panel<TILE_COLUMNS>(
                    p.points.type, p.points.row(first + c), p.points.stride, m - first - c, p.d, panel);
                if (p.similarity != DOT) lengths_of_panel<TILE_COLUMNS>(panel, p.d, known.length + first + c);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < blocks * layout.groups; ++task) {
                const int64_t b = task % blocks, group = task / blocks;  // a thread keeps its candidates for a while
                if (p.itself && (first_block + b + 1) * BLOCK <= group * ROWS) continue;
                run_task<RAISED>(
                    p, group, first_block + b, candidates,
                    packed + b * BLOCK * (candidates.bytes ? (p.d + 3) / 4 : p.d), known,
                    places + (b * layout.groups + group) * layout.place_doubles);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p.n; ++i) {
                const int64_t group = i / ROWS, own_block = i / BLOCK;
                for (int64_t b = 0; b < blocks; ++b) {
                    const double* const place = places + (b * layout.groups + group) * layout.place_doubles;
                    if (!p.itself || (first_block + b + 1) * BLOCK > group * ROWS) gains[i] += place[i - group * ROWS];
                    if (!p.itself || own_block != first_block + b) continue;
                    for (int64_t g = 0; g < group; ++g)
                        gains[i] += places[(b * layout.groups + g) * layout.place_doubles + ROWS + i - own_block * BLOCK];
                }
            }
        }
    }
}

// One row in float64, filled up to padded_d with zeros. One loop a type, each a vector conversion.
static void widen_row(const void* points, int64_t type, int64_t offset, int64_t d, int64_t padded_d, double* row) {
    const float* const floats = static_cast<const float*>(points) + offset;
    if (type == FLOAT32)
        for (int64_t k = 0; k < d; ++k) row[k] = floats[k];
    else if (type == 3)
        memcpy(row, static_cast<const double*>(points) + offset, d * sizeof(double));
    else
        for (int64_t k = 0; k < d; ++k)
            row[k] = type == BFLOAT16 ? load_one<BFLOAT16>(points, offset + k) : load_one<FLOAT16>(points, offset + k);
    for (int64_t k = d; k < padded_d; ++k) row[k] = 0;
}

typedef double ExactAnywhere __attribute__((vector_size(LANES * 4), aligned(8), may_alias));
typedef double Exact __attribute__((vector_size(LANES * 4)));
constexpr int EXACT_LANES = LANES / 2;
constexpr int EXACT_POINTS = 4, EXACT_ROWS = LANES == 16 ? 4 : 2;

// out[q][p] = row q . point p, or their squared distance; each is one chain a lane, wherever it lies in the tile.
template <bool DISTANCE>
static void exact_tile(const double* rows, const double* points, int64_t padded_d, double out[][EXACT_POINTS]) {
    Exact sums[EXACT_ROWS][EXACT_POINTS] = {};
    for (int64_t k = 0; k < padded_d; k += EXACT_LANES) {
        Exact point[EXACT_POINTS];
        for (int p = 0; p < EXACT_POINTS; ++p) point[p] = *reinterpret_cast<const ExactAnywhere*>(points + p * padded_d + k);
        for (int q = 0; q < EXACT_ROWS; ++q) {
            const Exact row = *reinterpret_cast<const ExactAnywhere*>(rows + q * padded_d + k);
            for (int p = 0; p < EXACT_POINTS; ++p) {
                if (DISTANCE) {
                    const Exact difference = row - point[p];
                    sums[q][p] += difference * difference;
                } else {
                    sums[q][p] += row * point[p];
                }
            }
        }
    }
    for (int q = 0; q < EXACT_ROWS; ++q)
        for (int p = 0; p < EXACT_POINTS; ++p) {
            out[q][p] = 0;
            for (int lane = 0; lane < EXACT_LANES; ++lane) out[q][p] += sums[q][p][lane];
        }
}

}  // namespace

// Float64 similarities [b, m] of rows to all points. rows: float64, padded with zeros to a multiple of 4 rows and of 16
// columns (padded_d). points [m, d] of `type` as below, or 3 float64. lengths: what dot products are divided by, or null.
// workspace: 4 * padded_d doubles a thread.
FASTSEL_EXPORT(facility_location_rows)(
    const double* rows, int64_t b, int64_t padded_d, const void* points, int64_t stride, int32_t type, int64_t m,
    int64_t d, const double* lengths, int32_t similarity, double gamma, int32_t threads, double* workspace,
    double* out) {
#pragma omp parallel num_threads(threads)
    {
        double* const widened_points = workspace + omp_get_thread_num() * EXACT_POINTS * padded_d;
        double tile[EXACT_ROWS][EXACT_POINTS];
#pragma omp for schedule(static)
        for (int64_t v = 0; v < m; v += EXACT_POINTS) {
            const int64_t count = smaller(EXACT_POINTS, m - v);
            for (int64_t p = 0; p < EXACT_POINTS; ++p)
                widen_row(points, type, (v + smaller(p, count - 1)) * stride, d, padded_d, widened_points + p * padded_d);
            for (int64_t q = 0; q < b; q += EXACT_ROWS) {
                if (similarity == DOT)
                    exact_tile<false>(rows + q * padded_d, widened_points, padded_d, tile);
                else
                    exact_tile<true>(rows + q * padded_d, widened_points, padded_d, tile);
                for (int64_t r = 0; r < smaller(EXACT_ROWS, b - q); ++r)
                    for (int64_t p = 0; p < count; ++p) {
                        double s = tile[r][p];
                        if (similarity == DOT && lengths) s = lengths[v + p] > 0 ? s / lengths[v + p] : 0;
                        if (similarity == RBF) s = exp(-gamma * s);
                        if (similarity == EXP_DISTANCE) s = exp(-gamma * sqrt(s));
                        out[(q + r) * m + v + p] = s;
                    }
            }
        }
    }
}

// How many floats of room n packed candidates take, in floats or in bytes.
FASTSEL_EXPORT(facility_location_packed)(int64_t n, int64_t d, int32_t in_bytes, int64_t* floats) {
    const int64_t padded = divided_up(n, ROWS) * ROWS;
    *floats = in_bytes ? padded * ((d + 3) / 4) + 2 * padded : padded * d + padded;
}

// How many floats of workspace facility_location needs.
FASTSEL_EXPORT(facility_location_workspace)(
    int64_t n, int64_t m, int64_t d, int32_t itself, int32_t threads, int64_t* floats) {
    *floats = Layout(n, m, d, itself != 0).floats(d, threads);
}

// Packs candidates [n, d] of `type` (0 float32, 1 bfloat16, 2 float16); stride is elements from row to row. In bytes,
// workspace is d floats a thread.
FASTSEL_EXPORT(facility_location_pack)(
    const void* candidates, int64_t stride, int32_t type, int64_t n, int64_t d, int32_t in_bytes, int32_t threads,
    float* workspace, float* panels) {
    const Matrix matrix{candidates, stride, n, static_cast<ElementType>(type)};
    const int64_t padded = divided_up(n, ROWS) * ROWS, quads = (d + 3) / 4;
    if (in_bytes) {
        uint8_t* const bytes = reinterpret_cast<uint8_t*>(panels);
        float* const scales = panels + padded * quads;
        int32_t* const offsets = reinterpret_cast<int32_t*>(scales + padded);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < padded; i += TILE_ROWS)
            pack_bytes<TILE_ROWS>(
                matrix.type, matrix, i, n - i, d, 0, workspace + omp_get_thread_num() * d, bytes + i * quads * 4,
                scales + i, offsets + i);
        return;
    }
    float* const lengths = panels + padded * d;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < padded; i += TILE_ROWS) {
        if (i < n)
            pack_panel<TILE_ROWS>(matrix.type, matrix.row(i), stride, n - i, d, panels + i * d);
        else
            memset(panels + i * d, 0, TILE_ROWS * d * sizeof(float));
        lengths_of_panel<TILE_ROWS>(panels + i * d, d, lengths + i);
    }
}

// panels holds n packed candidates (in_bytes takes dot products of AVX-512 VNNI only); points [m, d] as above. raised and weights may be null; similarity is 0 dot,
// 1 rbf, 2 exp_distance; itself: the points are the candidates and raised is null. gains receives n sums.
FASTSEL_EXPORT(facility_location)(
    const float* panels, int32_t in_bytes, int64_t n, int64_t d, const void* points, int64_t stride, int32_t type, int64_t m,
    const float* best, const float* raised, const float* weights, int32_t similarity, float gamma, int32_t itself,
    int32_t threads, float* workspace, double* gains) {
    const Problem problem{
        {points, stride, m, static_cast<ElementType>(type)}, best, raised, weights, n, d,
        static_cast<Similarity>(similarity), gamma, itself != 0};
    const Packed candidates(panels, in_bytes != 0, divided_up(n, ROWS) * ROWS, d);
    if (raised)
        run<true>(problem, candidates, threads, workspace, gains);
    else
        run<false>(problem, candidates, threads, workspace, gains);
}
