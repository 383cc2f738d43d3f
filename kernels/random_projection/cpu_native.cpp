// random_projection on a CPU: SJLT scatters, Rademacher looks sums of signs up; neither stores a row number or a sign.
//
// SJLT. Up to WIDEST rows of x go side by side: a coordinate is one vector, added to one line of a table [k][width]. A
// chunk of coordinates, cut at fixed multiples, is summed from zero by one thread; chunks are then added in their order,
// so that neither the number of threads nor a cut between chunks changes a bit. Reads: x once, row numbers and signs
// from the hash (about 3 instructions a coordinate for all rows). A table of 8192 x 8 is 256 KB: the second-level cache.
//
// Rademacher. The sum of +-x over BITS coordinates takes one of LANES values, which one register holds: a shuffle looks
// up LANES columns at once, their words being the indices. 4 coordinates x 16 columns cost one shuffle and one addition
// on AVX-512 (3 x 8 on AVX2). Tables of TILE_WORDS words of coordinates serve SLICE columns; threads share the columns,
// so a column's bits depend on that column alone. A chunk is summed from zero here too.

#include <math.h>
#include <omp.h>

#include "counter_hash.h"
#include "export.h"
#include "matrix_tile.h"
#include "vectors.h"

namespace {

constexpr int WIDEST = 8;             // rows of x that SJLT and Rademacher take together
constexpr int64_t SJLT_TILE = 512;    // coordinates whose rows and signs are known at a time
constexpr int64_t MIN_CHUNK_BITS = 16;  // of coordinates that are summed from zero
constexpr int BITS = LANES == 16 ? 4 : LANES == 8 ? 3 : 2;  // coordinates of one table
constexpr int TABLES = (COORDINATES_OF_WORD + BITS - 1) / BITS;
constexpr int TILE_WORDS = 2;
constexpr int64_t RADEMACHER_TILE = TILE_WORDS * COORDINATES_OF_WORD;
constexpr int64_t SLICE = 2048;  // columns that share tables; a multiple of LANES

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
    const void* x;
    int64_t stride;
    ElementType type;
    int64_t b, p, k;
    uint64_t first;
    float* out;
    int64_t out_stride;

    const char* at(int64_t row, int64_t column) const {
        return static_cast<const char*>(x) + (row * stride + column) * (type == FLOAT32 ? 4 : 2);
    }
    // Chunks begin at multiples of 2^bits in the numbering of all coordinates; chunk 0 holds the first of ours.
    int64_t chunks(int64_t bits) const {
        return p ? static_cast<int64_t>(((first + p - 1) >> bits) - (first >> bits)) + 1 : 0;
    }
    int64_t chunk_start(int64_t chunk, int64_t bits) const {
        return chunk ? static_cast<int64_t>((((first >> bits) + chunk) << bits) - first) : 0;
    }
};

template <int WIDTH>
struct Group;
template <>
struct Group<8> {
    typedef float Type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Group<4> {
    typedef float Type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Group<1> {
    typedef float Type;
};

static inline int group_width(int64_t rows) { return rows > 4 ? 8 : rows > 1 ? 4 : 1; }

// ------------------------------------------------------------------------------------------------------------- SJLT

// Sums from zero must outweigh the table that they are summed in.
static inline int64_t sjlt_chunk_bits(int64_t k) {
    int64_t bits = MIN_CHUNK_BITS + 1;
    while ((int64_t{1} << bits) < 16 * k) ++bits;
    return bits;
}

static inline int64_t sjlt_thread_floats() { return SJLT_TILE * (WIDEST + 2); }
static inline int64_t sjlt_floats(int64_t b, int64_t k, int64_t threads) {
    return (threads + 1) * k * group_width(b) + threads * sjlt_thread_floats();
}

// table[row][lane] += sign x, for columns start to stop of x and `count` of its rows from `row` on.
template <int WIDTH>
static void scatter(
    const Problem& p, const Sjlt& sjlt, int64_t row, int64_t count, int64_t start, int64_t stop, float* scratch,
    float* table) {
    typedef typename Group<WIDTH>::Type Values;
    float* const panel = scratch;
    uint32_t* const rows = reinterpret_cast<uint32_t*>(panel + SJLT_TILE * WIDEST);
    uint32_t* const signs = rows + SJLT_TILE;
    for (int64_t column = start; column < stop; column += SJLT_TILE) {
        const int64_t n = smaller(SJLT_TILE, stop - column);
        pack_panel<WIDTH>(p.type, p.at(row, column), p.stride, count, n, panel);
        for (int64_t j = 0; j < sjlt.sparsity; ++j) {
            sjlt_rows(sjlt, j, p.first + column, n, rows);
            sjlt_signs(sjlt, j, p.first + column, n, signs);
            for (int64_t i = 0; i < n; ++i) signs[i] |= 0x3f800000;  // as floats: 1 or -1
            const float* const factors = reinterpret_cast<const float*>(signs);
            for (int64_t i = 0; i < n; ++i) {
                Values* const to = reinterpret_cast<Values*>(table + int64_t{rows[i]} * WIDTH);
                *to = *to + *reinterpret_cast<const Values*>(panel + i * WIDTH) * factors[i];
            }
        }
    }
}

template <int WIDTH>
static void sjlt_group(
    const Problem& p, const Sjlt& sjlt, int64_t row, int64_t count, int threads, float* workspace) {
    typedef typename Group<WIDTH>::Type Values;
    const int64_t k = p.k, bits = sjlt_chunk_bits(k), chunks = p.chunks(bits);
    const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(sjlt.sparsity)));
    float* const total = workspace;
    float* const tables = total + k * WIDTH;
    const int thread = omp_get_thread_num();
    float* const own = tables + thread * k * WIDTH;
    float* const scratch = tables + threads * k * WIDTH + thread * sjlt_thread_floats();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < k; ++r)
        for (int lane = 0; lane < WIDTH; ++lane)
            total[r * WIDTH + lane] = lane < count ? p.out[(row + lane) * p.out_stride + r] : 0.0f;
    for (int64_t round = 0; round < chunks; round += threads) {
        const int64_t chunk = round + thread;
        if (chunk < chunks) {
            memset(own, 0, sizeof(float) * k * WIDTH);
            const int64_t stop = smaller(p.p, p.chunk_start(chunk + 1, bits));
            scatter<WIDTH>(p, sjlt, row, count, p.chunk_start(chunk, bits), stop, scratch, own);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < k; ++r) {
            Values* const to = reinterpret_cast<Values*>(total + r * WIDTH);
            Values sum = *to;
            for (int64_t t = 0; t < smaller(threads, chunks - round); ++t)
                sum = sum + *reinterpret_cast<const Values*>(tables + (t * k + r) * WIDTH) * scale;
            *to = sum;
        }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < k; ++r)
        for (int lane = 0; lane < count; ++lane) p.out[(row + lane) * p.out_stride + r] = total[r * WIDTH + lane];
}

// ------------------------------------------------------------------------------------------------------- Rademacher

// found[lane] = table[index[lane] modulo LANES]
static inline Floats lookup(Floats table, Uints index) {
#if defined(__clang__)
    Floats found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = table[index[lane] & (LANES - 1)];
    return found;
#else
    return __builtin_shuffle(table, reinterpret_cast<Ints>(index));  // one instruction on AVX2 and AVX-512
#endif
}

static inline int64_t table_floats() { return TILE_WORDS * TABLES * WIDEST * LANES; }
static inline int64_t rademacher_thread_floats() {
    return table_floats() + SLICE * (WIDEST + 2) + RADEMACHER_TILE * WIDEST;
}

// Columns start to start + RADEMACHER_TILE of some rows of x; 0 for those before `low` and from `high` on.
template <int WIDTH, int TYPE>
static void widen_as(
    const Problem& p, int64_t row, int64_t count, int64_t start, int64_t low, int64_t high, float* values) {
    memset(values, 0, sizeof(float) * WIDTH * RADEMACHER_TILE);
    const int64_t from = start < low ? low - start : 0, to = smaller(RADEMACHER_TILE, high - start);
    for (int64_t lane = 0; lane < count; ++lane) {
        const void* const source = p.at(row + lane, start + from);
        float* const target = values + lane * RADEMACHER_TILE + from;
        int64_t i = 0;
        for (; i + 4 <= to - from; i += 4) store_quad(target + i, load_quad<TYPE>(source, i));
        for (; i < to - from; ++i) target[i] = load_one<TYPE>(source, i);
    }
}

template <int WIDTH>
static void widen(
    const Problem& p, int64_t row, int64_t count, int64_t start, int64_t low, int64_t high, float* values) {
    if (p.type == FLOAT32) widen_as<WIDTH, FLOAT32>(p, row, count, start, low, high, values);
    if (p.type == BFLOAT16) widen_as<WIDTH, BFLOAT16>(p, row, count, start, low, high, values);
    if (p.type == FLOAT16) widen_as<WIDTH, FLOAT16>(p, row, count, start, low, high, values);
}

// tables[word][table][row][lane] = sum over the coordinates of the table of x, negative where lane has their bit set.
template <int WIDTH>
static void make_tables(const float* values, float* tables) {
    Floats signs[BITS];
    for (int bit = 0; bit < BITS; ++bit)
        for (int lane = 0; lane < LANES; ++lane) signs[bit][lane] = (lane >> bit) & 1 ? -1.0f : 1.0f;
    for (int word = 0; word < TILE_WORDS; ++word)
        for (int table = 0; table < TABLES; ++table)
            for (int row = 0; row < WIDTH; ++row) {
                const float* const x = values + row * RADEMACHER_TILE + word * COORDINATES_OF_WORD + table * BITS;
                Floats sum = signs[0] * x[0];
                for (int bit = 1; bit < BITS && table * BITS + bit < COORDINATES_OF_WORD; ++bit)
                    sum = sum + signs[bit] * x[bit];
                store(tables + ((word * TABLES + table) * WIDTH + row) * LANES, sum);
            }
}

// sums[vector][row][lane] += what the words of LANES columns pick from the tables.
template <int WIDTH>
static void add_looked_up(
    const float* tables, const uint32_t* inner, const uint32_t* outer, uint64_t counter, int64_t columns, float* sums) {
    for (int64_t column = 0; column < columns; column += LANES) {
        Floats sum[WIDTH];
        for (int row = 0; row < WIDTH; ++row) sum[row] = load(sums + column * WIDTH + row * LANES);
        for (int word = 0; word < TILE_WORDS; ++word) {
            Uints index = counter_word(load(inner + column), load(outer + column), counter + word);
            for (int table = 0; table < TABLES; ++table) {
                const float* const from = tables + (word * TABLES + table) * WIDTH * LANES;
#pragma GCC unroll 8
                for (int row = 0; row < WIDTH; ++row) sum[row] += lookup(load(from + row * LANES), index);
                index >>= BITS;
            }
        }
        for (int row = 0; row < WIDTH; ++row) store(sums + column * WIDTH + row * LANES, sum[row]);
    }
}

template <int WIDTH>
static void rademacher_slice(
    const Problem& p, HashKey hash, int64_t row, int64_t count, int64_t first_column, int64_t width, float* scratch) {
    float* const tables = scratch;
    float* const sums = tables + table_floats();
    float* const values = sums + SLICE * WIDEST;
    uint32_t* const inner = reinterpret_cast<uint32_t*>(values + RADEMACHER_TILE * WIDEST);
    uint32_t* const outer = inner + SLICE;
    const int64_t columns = divided_up(width, LANES) * LANES;
    for (int64_t c = 0; c < columns; ++c) {
        const StreamKey key = stream_key(hash, static_cast<uint32_t>(first_column + c));
        inner[c] = key.inner, outer[c] = key.outer;
    }
    for (int64_t chunk = 0; chunk < p.chunks(MIN_CHUNK_BITS); ++chunk) {
        memset(sums, 0, sizeof(float) * columns * WIDTH);
        const int64_t low = p.chunk_start(chunk, MIN_CHUNK_BITS);
        const int64_t high = smaller(p.p, p.chunk_start(chunk + 1, MIN_CHUNK_BITS));
        // The first word may begin before x does.
        const int64_t before = static_cast<int64_t>((p.first + low) % COORDINATES_OF_WORD);
        for (int64_t start = low - before; start < high; start += RADEMACHER_TILE) {
            widen<WIDTH>(p, row, count, start, low, high, values);
            make_tables<WIDTH>(values, tables);
            add_looked_up<WIDTH>(tables, inner, outer, (p.first + start) / COORDINATES_OF_WORD, columns, sums);
        }
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < width; ++c)
                p.out[(row + r) * p.out_stride + first_column + c] +=
                    sums[c / LANES * LANES * WIDTH + r * LANES + c % LANES];
    }
}

}  // namespace

// How many floats of workspace each of the two needs.
FASTSEL_EXPORT(random_projection_workspace)(int64_t b, int64_t k, int32_t threads, int64_t* sjlt, int64_t* rademacher) {
    *sjlt = sjlt_floats(b, k, threads);
    *rademacher = threads * rademacher_thread_floats();
}

// x [b, p] holds elements of `type` (0 float32, 1 bfloat16, 2 float16), `stride` elements from row to row; out [b, k] is
// added to. Column 0 is coordinate `first`. Nothing may overlap.
FASTSEL_EXPORT(random_projection_sjlt)(
    const void* x, int64_t stride, int32_t type, int64_t b, int64_t p, int64_t k, int64_t sparsity, uint64_t seed,
    uint64_t first, int32_t threads, float* workspace, float* out, int64_t out_stride) {
    const Problem problem{x, stride, static_cast<ElementType>(type), b, p, k, first, out, out_stride};
    const Sjlt sjlt = make_sjlt(seed, k, sparsity);
#pragma omp parallel num_threads(threads)
    for (int64_t row = 0; row < b; row += WIDEST) {
        const int64_t count = smaller(WIDEST, b - row);
        // Fewer threads than asked for may have come.
        if (group_width(count) == 8) sjlt_group<8>(problem, sjlt, row, count, omp_get_num_threads(), workspace);
        if (group_width(count) == 4) sjlt_group<4>(problem, sjlt, row, count, omp_get_num_threads(), workspace);
        if (group_width(count) == 1) sjlt_group<1>(problem, sjlt, row, count, omp_get_num_threads(), workspace);
    }
}

// As above.
FASTSEL_EXPORT(random_projection_rademacher)(
    const void* x, int64_t stride, int32_t type, int64_t b, int64_t p, int64_t k, uint64_t seed, uint64_t first,
    int32_t threads, float* workspace, float* out, int64_t out_stride) {
    const Problem problem{x, stride, static_cast<ElementType>(type), b, p, k, first, out, out_stride};
    const HashKey hash = hash_key(seed, HASH_RADEMACHER);
#pragma omp parallel num_threads(threads)
    {
        float* const scratch = workspace + omp_get_thread_num() * rademacher_thread_floats();
        const int64_t width = smaller(SLICE, divided_up(divided_up(k, omp_get_num_threads()), LANES) * LANES);
        for (int64_t row = 0; row < b; row += WIDEST) {
            const int64_t count = smaller(WIDEST, b - row);
#pragma omp for schedule(dynamic)
            for (int64_t column = 0; column < k; column += width) {
                const int64_t taken = smaller(width, k - column);
                if (group_width(count) == 8) rademacher_slice<8>(problem, hash, row, count, column, taken, scratch);
                if (group_width(count) == 4) rademacher_slice<4>(problem, hash, row, count, column, taken, scratch);
                if (group_width(count) == 1) rademacher_slice<1>(problem, hash, row, count, column, taken, scratch);
            }
        }
    }
}
