// Random words that depend on nothing but (seed, purpose, counter, stream): the same on every device, in any order.
//
// The same function stands in kernels/_runtime/rng.py (torch) and triton_hash.py; docs/decisions/0015 says why this one.
// A counter numbers coordinates (SJLT) or blocks of 32 coordinates (Rademacher), a stream numbers what a coordinate
// needs several words for: the nonzeros of SJLT, the columns of Rademacher. Two keyed rounds of a 32-bit mixer, 18
// instructions a word; everything works on one uint32_t and on Uints, LANES of them.
#pragma once

#include "vectors.h"

namespace {

typedef uint32_t Uints __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t UintsAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
static inline Uints load(const uint32_t* from) { return *reinterpret_cast<const UintsAnywhere*>(from); }
static inline void store(uint32_t* to, Uints x) { *reinterpret_cast<UintsAnywhere*>(to) = x; }

enum HashPurpose : uint32_t { HASH_SJLT = 1, HASH_RADEMACHER = 2 };

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

// A bijection of 32 bits in which every input bit turns every output bit with probability 1/2 (within 0.1 %).
template <typename T>
static inline T mixed(T h) {
    h = (h ^ (h >> 16)) * 0x21f0aaadu;
    h = (h ^ (h >> 15)) * 0xd35a2d97u;
    return h ^ (h >> 15);
}

// T is uint32_t, or Uints where lanes are streams of their own.
template <typename T>
struct StreamKey {
    T inner, outer;
};

template <typename T>
static inline StreamKey<T> stream_key(HashKey key, T stream) {
    return {mixed(stream ^ key.first), mixed(stream + key.second)};
}

// The word of one counter; for Uints one word for each stream.
template <typename T>
static inline T counter_word(StreamKey<T> key, uint64_t counter) {
    const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
    return mixed(mixed(key.inner ^ low) ^ (key.outer + high * 0x9e3779b9u));
}

// The words of LANES consecutive counters of one stream.
static inline Uints counter_words(StreamKey<uint32_t> key, uint64_t counter) {
    Uints low;
    for (int lane = 0; lane < LANES; ++lane) low[lane] = static_cast<uint32_t>(counter) + lane;
    const Uints carry = reinterpret_cast<Uints>(low < static_cast<uint32_t>(counter)) & 1u;
    const Uints high = carry + static_cast<uint32_t>(counter >> 32);
    return mixed(mixed(low ^ key.inner) ^ (high * 0x9e3779b9u + key.outer));
}

// Nonzero number j of sparsity many falls into rows [sjlt_start(j), sjlt_start(j + 1)) of k.
static inline int64_t sjlt_start(int64_t j, int64_t k, int64_t sparsity) { return j * k / sparsity; }

// A row of 0 to size - 1, uniform to a relative size / 2^32; bit 0 of the word, nearly independent of it, is the sign.
static inline uint32_t sjlt_row(uint32_t word, uint32_t size) {
    return static_cast<uint32_t>((static_cast<uint64_t>(word) * size) >> 32);
}

// x or, when bit 0 of the word is set, -x.
static inline float with_sign(float x, uint32_t word) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits ^= word << 31;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

}  // namespace
