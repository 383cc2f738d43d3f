// The candidates that may still improve a point: noted while the point is passed anyway, so that it never is again.
//
// A point whose best similarity has risen to `raised` can only ever be improved by candidates above that, and these
// are few once some picks are made. While a tile of similarities is at hand they are noted, group by group of candidates.
#pragma once

#include "products.h"

namespace {

constexpr int64_t NOTED = 24;  // of the ROWS candidates of a group, for one point

// Attributes: for each group of candidates and point (of m, filled up to whole panels) how many were noted; room for
// NOTED rows within the group, and their similarities. overflows: points for which a group had no room; once that is
// known, other groups leave them out too.
struct Shortlists {
    uint8_t *counts, *rows, *overflows;
    float* similarities;
    int64_t m;

    int64_t at(int64_t group, int64_t v) const { return group * divided_up(m, TILE_COLUMNS) * TILE_COLUMNS + v; }

    // Notes who of `count` candidates exceeds raised, for the panel of points from `column` on. Each once a group.
    void note(const float* tile, int64_t count, const float* raised, int64_t group, int64_t column) const {
        const int64_t first = at(group, column);
        uint8_t noted[TILE_COLUMNS] = {};
        for (int c = 0; c < TILE_COLUMNS; c += LANES) {
            const Floats above = load(raised + c);
            uint32_t wanted = 0;
            for (int lane = 0; lane < LANES; ++lane)
                wanted |= static_cast<uint32_t>(!__atomic_load_n(overflows + column + c + lane, __ATOMIC_RELAXED)) << lane;
            for (int64_t r = 0; r < count && wanted; ++r) {
                const float* const from = tile + r * TILE_COLUMNS + c;
                for (uint32_t bits = bits_of(load(from) > above) & wanted; bits; bits &= bits - 1) {
                    const int lane = __builtin_ctz(bits);
                    if (noted[c + lane] == NOTED) {
                        __atomic_store_n(overflows + column + c + lane, uint8_t{1}, __ATOMIC_RELAXED);
                        wanted &= ~(uint32_t{1} << lane);
                        continue;
                    }
                    const int64_t to = (first + c + lane) * NOTED + noted[c + lane]++;
                    rows[to] = static_cast<uint8_t>(r), similarities[to] = from[lane];
                }
            }
        }
        memcpy(counts + first, noted, TILE_COLUMNS);
    }

    int64_t size(int64_t v, int64_t groups) const {
        if (overflows[v]) return -1;
        int64_t sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += counts[at(group, v)];
        return sum;
    }

    void copy(int64_t v, int64_t groups, int32_t* to_candidates, float* to_similarities) const {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t from = at(group, v);
            for (int64_t i = 0; i < counts[from]; ++i) {
                *to_candidates++ = static_cast<int32_t>(group * ROWS + rows[from * NOTED + i]);
                *to_similarities++ = similarities[from * NOTED + i];
            }
        }
    }
};

}  // namespace
