// The search of points among themselves: a tile of products serves the queries in its columns and those in its rows, so
// that half of all products are made. The same contenders as those of the search that does not know of it.
//
// Blocks of rows meet in rounds, as teams in a tournament: within a round no block is in two pairs, so that its heaps are
// one thread's. Which of a pair lies across the lanes changes no bit: a product is one chain of multiply-adds whichever
// factor comes first, and |p|^2 / 2 is taken from one table. Points come in any order here: what equals a query's
// threshold is looked at too, as its number may be the lower one.
//
// Who holds what: as in cpu_native.cpp, but that a thread packs both blocks of a pair, and 4 n bytes for |p|^2 / 2.
#pragma once

#include "contenders.h"

namespace {

constexpr int64_t BLOCKS_PER_THREAD = 4;
static_assert(POINTS % TILE_COLUMNS == 0, "a block is whole groups and whole tiles");

struct SelfLayout {
    int64_t block, blocks, rows, thread_floats, final_floats;

    SelfLayout(int64_t n, int64_t d, int64_t kept, int64_t threads) {
        const int64_t groups = divided_up(n, POINTS), most = larger(1, BLOCK_BYTES / (4 * POINTS * d));
        block = larger(1, smaller(most, groups / (BLOCKS_PER_THREAD * threads))) * POINTS;
        blocks = divided_up(n, block);
        rows = blocks * block;
        thread_floats = block * d + POINTS * d + POINTS * TILE_COLUMNS;
        final_floats = kept * 4 + 4;
    }
    int64_t floats(int64_t kept, int64_t threads) const {
        return threads * (thread_floats + final_floats) + 4 * rows + rows * kept * 2;
    }
};

// Offers LANES points, of which `live` are there, from first_point on, to the one query `place` of a state.
static void offer(const float* similarities, const float* offsets, int64_t first_point, int64_t live, int64_t kept,
                  State state, int64_t place) {
    Floats s = load(similarities);
    if (offsets) s -= load(offsets);
    if (!any_lane(s >= splat(state.threshold[place]))) return;
    float values[LANES];
    store(values, s);
    Contender<float>* const heap = state.heaps + place * kept;
    for (int64_t lane = 0; lane < live; ++lane) {
        if (!(values[lane] >= state.threshold[place] && values[lane] > -INFINITY)) continue;
        keep(heap, kept, state.count + place, {values[lane], static_cast<int32_t>(first_point + lane)});
        if (state.count[place] == kept) state.threshold[place] = heap[0].value;
    }
}

// The products of blocks `a` (across the lanes) and `b`, for the queries of both; of one block with itself for its own.
static void meet(const Problem& p, const SelfLayout& layout, int64_t a, int64_t b, const float* half_squares_n,
                 float* scratch, State all) {
    float* const packed_a = scratch;
    float* const packed_b = packed_a + layout.block * p.d;
    float* const similarities = packed_b + POINTS * p.d;
    const int64_t first_a = a * layout.block, rows_a = smaller(layout.block, p.n - first_a);
    const int64_t first_b = b * layout.block, last_b = smaller(p.n, first_b + layout.block);
    const float* const offsets = p.centre ? half_squares_n : nullptr;
    pack_block<TILE_COLUMNS>(p.points, p.point_stride, p, first_a, rows_a, packed_a);
    for (int64_t point = first_b; point < last_b; point += POINTS) {
        const int64_t count = smaller(POINTS, last_b - point);
        pack_block<TILE_ROWS>(p.points, p.point_stride, p, point, count, packed_b);
        for (int64_t q = 0; q < rows_a; q += TILE_COLUMNS) {
            multiply_group(packed_b, packed_a + q * p.d, p.d, count, similarities);
            for (int64_t c = 0; c < TILE_COLUMNS && q + c < rows_a; c += LANES) {
                const int64_t query = first_a + q + c, live = smaller(LANES, rows_a - q - c);
                if (a != b)
                    for (int64_t i = 0; i < count; ++i)
                        offer(similarities + i * TILE_COLUMNS + c, offsets ? offsets + query : nullptr, query, live,
                              p.kept, all, point + i);
                take_group<true>(similarities + c, offsets ? offsets + point : nullptr, point, count, p.kept, all, query, live);
            }
        }
    }
}

// Pair `i` of a round: the last team stays, the others go round. With an odd number of blocks its partner has none.
static void pair_of(int64_t round, int64_t i, int64_t teams, int64_t* a, int64_t* b) {
    *a = i == 0 ? teams - 1 : (round + i) % (teams - 1);
    *b = (round + teams - 1 - i) % (teams - 1);
}

// Inside a parallel region: every query's contenders.
static void search_itself(const Problem& p, const SelfLayout& layout, float* half_squares_n, float* scratch, State all) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < layout.rows; row += POINTS) {
        for (int64_t i = row; i < row + POINTS; ++i) {
            all.threshold[i] = -INFINITY, all.lowest[i] = INFINITY, all.count[i] = 0, half_squares_n[i] = 0;
        }
        const int64_t count = smaller(POINTS, p.n - row);
        if (!p.centre || count <= 0) continue;
        pack_block<TILE_ROWS>(p.points, p.point_stride, p, row, count, scratch);
        for (int64_t i = 0; i < count; i += TILE_ROWS) half_squares(scratch + i * p.d, p.d, half_squares_n + row + i);
    }
    const int64_t teams = layout.blocks + layout.blocks % 2;
    for (int64_t round = 0; round < teams - 1; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < teams / 2; ++i) {
            int64_t a, b;
            pair_of(round, i, teams, &a, &b);
            if (a < layout.blocks) meet(p, layout, a, b, half_squares_n, scratch, all);
        }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < layout.blocks; ++block) meet(p, layout, block, block, half_squares_n, scratch, all);
}

}  // namespace
