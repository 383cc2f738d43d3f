// Random words that depend on nothing but (seed, purpose, counter, stream): the same on every device, in any order.
//
// The same function stands in kernels/_runtime/rng.py (torch) and triton_hash.py; docs/decisions/0015 says why this one.
// A counter numbers blocks of coordinates, a stream what a block needs several words for: the nonzeros of SJLT, the
// columns of Rademacher. Two keyed rounds of a 32-bit mixer, 18 instructions a word; everything works on one uint32_t
// and on Uints, LANES of them. What SJLT does with the words is told at sjlt_map() in rng.py.
#pragma once

#include "vectors.h"

namespace {

typedef uint32_t Uints __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t UintsAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
static inline Uints load(const uint32_t* from) { return *reinterpret_cast<const UintsAnywhere*>(from); }
static inline void store(uint32_t* to, Uints x) { *reinterpret_cast<UintsAnywhere*>(to) = x; }

enum HashPurpose : uint32_t { HASH_SJLT = 1, HASH_SJLT_SIGN = 2, HASH_RADEMACHER = 3 };

struct HashKey {
    uint32_t first, second;
};

// One for a call: SplitMix64's finaliser over seed and purpose.
static inline HashKey hash_key(uint64_t seed, HashPurpose purpose) {
    uint64_t z = seed + purpose * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z = z ^ (z >> 31);
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// A bijection of 32 bits in which every input bit turns every output bit with probability 1/2 (within 0.2 %).
template <typename T>
static inline T mixed(T h) {
    h = (h ^ (h >> 16)) * 0x21f0aaadu;
    h = (h ^ (h >> 15)) * 0xd35a2d97u;
    return h ^ (h >> 15);
}

struct StreamKey {
    uint32_t inner, outer;
};

static inline StreamKey stream_key(HashKey key, uint32_t stream) {
    return {mixed(stream ^ key.first), mixed(stream + key.second)};
}

// The word of one counter, from the halves of a stream's key: one, or with Uints those of LANES streams.
template <typename T>
static inline T counter_word(T inner, T outer, uint64_t counter) {
    const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
    return mixed(mixed(inner ^ low) ^ (outer + high * 0x9e3779b9u));
}
static inline uint32_t counter_word(StreamKey key, uint64_t counter) {
    return counter_word(key.inner, key.outer, counter);
}

constexpr int COORDINATES_OF_WORD = 32;  // bit i of a word of signs belongs to coordinate 32 counter + i; set: minus

struct Sjlt {
    int64_t k, sparsity;
    HashKey rows, signs;
    int bits;  // a block is 2^bits coordinates
};

static inline Sjlt make_sjlt(uint64_t seed, int64_t k, int64_t sparsity) {
    int bits = 0;
    while ((k / sparsity) >> (bits + 1)) ++bits;
    return {k, sparsity, hash_key(seed, HASH_SJLT), hash_key(seed, HASH_SJLT_SIGN), bits};
}

// rows[i] = the row of nonzero j of coordinate first + i.
static inline void sjlt_rows(const Sjlt& sjlt, int64_t j, uint64_t first, int64_t count, uint32_t* rows) {
    const int64_t low = j * sjlt.k / sjlt.sparsity;
    const uint32_t length = static_cast<uint32_t>((j + 1) * sjlt.k / sjlt.sparsity - low);
    const uint32_t mask = (1u << sjlt.bits) - 1;
    const int shift = sjlt.bits > 1 ? (sjlt.bits + 1) / 2 : 1;
    StreamKey streams[4];
    for (int i = 0; i < 4; ++i) streams[i] = stream_key(sjlt.rows, static_cast<uint32_t>(4 * j + i));
    for (int64_t done = 0; done < count;) {
        const uint64_t coordinate = first + done, block = coordinate >> sjlt.bits;
        const uint32_t start = static_cast<uint32_t>((uint64_t{counter_word(streams[0], block)} * length) >> 32);
        const uint32_t x = counter_word(streams[1], block);
        const uint32_t a = counter_word(streams[2], block) | 1, b = counter_word(streams[3], block) | 1;
        const uint32_t c = static_cast<uint32_t>(coordinate) & mask;
        const int64_t left = count - done, of_block = static_cast<int64_t>(mask - c) + 1;
        const int64_t stop = left < of_block ? left : of_block;
        for (int64_t i = 0; i < stop; ++i) {
            uint32_t h = (((c + static_cast<uint32_t>(i)) ^ x) * a) & mask;
            h = ((h ^ (h >> shift)) * b) & mask;
            const uint32_t row = start + (h ^ (h >> shift));
            rows[done + i] = static_cast<uint32_t>(low) + (row < length ? row : row - length);
        }
        done += stop;
    }
}

// signs[i] = 0x80000000 where nonzero j of coordinate first + i counts negative, else 0: what is xored into a float.
static inline void sjlt_signs(const Sjlt& sjlt, int64_t j, uint64_t first, int64_t count, uint32_t* signs) {
    const StreamKey stream = stream_key(sjlt.signs, static_cast<uint32_t>(j));
    for (int64_t done = 0; done < count;) {
        const uint64_t coordinate = first + done;
        const uint32_t word = counter_word(stream, coordinate / COORDINATES_OF_WORD);
        const uint32_t bit = coordinate % COORDINATES_OF_WORD;
        const int64_t left = count - done, of_word = COORDINATES_OF_WORD - bit;
        const int64_t stop = left < of_word ? left : of_word;
        for (int64_t i = 0; i < stop; ++i) signs[done + i] = ((word >> bit) >> i) << 31;
        done += stop;
    }
}

}  // namespace
