// Gains of all candidates: similarities of ROWS candidates and one panel of points at a time, reduced while in cache.
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

#pragma once

#include <omp.h>

#include "products.h"
#include "shortlists.h"

namespace {

constexpr int64_t BLOCK = 5 * ROWS;    // points
constexpr int64_t PLACES_BYTES = 8 << 20;
constexpr int64_t MOST_BLOCKS = 8;     // packed at a time: 5.9 MB at d = 384
constexpr float NEVER = 3e38f;         // best and raised of the points that fill up a block: no similarity exceeds it

typedef double Doubles __attribute__((vector_size(LANES * 8)));

static inline Doubles widened(Floats x) { return __builtin_convertvector(x, Doubles); }

static inline double sum_of(const Doubles& x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

enum Similarity : int32_t { DOT = 0, RBF = 1, EXP_DISTANCE = 2 };

struct Problem {
    Matrix points;
    const float *best, *raised, *weights;  // raised and weights may be null
    int64_t n, d;
    Similarity similarity;
    float gamma;
    bool itself;  // the points are the candidates, and raised is null
    const Shortlists* lists;  // null: none are wanted
};

// What is known of each point, or of each candidate as a point: max(s, best) - base is max(s - best, 0), and s itself
// where best is -inf. scale: of its bytes; of floats the squared length.
struct Known {
    float *best, *base, *raised, *weight, *scale;
};

static inline Floats square_root(Floats x) {
    Floats root;
    for (int lane = 0; lane < LANES; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
    return root;
}

// Dot products to similarities that fall with the distance.
static void bend_group(const Problem& p, const float* squares, const float* point_squares, int64_t count, float* tile) {
    for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            float* const at = tile + r * TILE_COLUMNS + c;
            const Floats squared = greater(squares[r] + load(point_squares + c) - 2.0f * load(at), Floats{});
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
        const Panel panel{packed + c * (candidates.bytes ? (p.d + 3) / 4 : p.d), known.scale + column};
        multiply(candidates, first_row, count, panel, p.d, tile);
        if (p.similarity != DOT) bend_group(p, candidates.squares + first_row, known.scale + column, count, tile);
        reduce_rows<RAISED>(tile, count, known, column, sums);
        if (RAISED && p.lists) p.lists->note(tile, count, known.raised + column, group, column);
        if (p.itself && column >= first_row + ROWS) reduce_columns(tile, count, known, first_row, column_sums + c);
    }
    for (int64_t r = 0; r < ROWS; ++r) place[r] = sum_of(sums[r]);
}

template <bool RAISED>
static void run(const Problem& p, const Packed& candidates, int threads, float* workspace, double* gains) {
    const int64_t m = p.points.count;
    const Layout layout(p.n, m, p.d, p.itself);
    float* const packed = aligned(workspace);
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
                        p.points, first + c, m - first - c, p.d, 128, rows + thread * p.d,
                        reinterpret_cast<uint8_t*>(packed) + c * quads * 4, known.scale + first + c, nullptr, nullptr,
                        nullptr);
                    continue;
                }
                float* const panel = packed + c * p.d;
                pack_panel<TILE_COLUMNS>(
                    p.points.type, p.points.row(first + c), p.points.stride, m - first - c, p.d, panel);
                if (p.similarity != DOT) lengths_of_panel<TILE_COLUMNS>(panel, p.d, nullptr, known.scale + first + c);
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

}  // namespace
