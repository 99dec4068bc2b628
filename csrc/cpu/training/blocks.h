// What forward and backward share: packed chunks of x and w, and the product of a block's scores.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/threads.h"
#include "cpu/training/nested.h"

namespace mrl {

constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Memory without initial values; in huge pages where it is large.
struct Buffer {
    explicit Buffer(int64_t size);
    float* get() const { return data.get(); }
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> data;
};

// As many threads as a chunk is worth.
int threads_for(const Scores& scores, int threads);

// Runs fn(unit) for every unit, the next one on the first thread that is free.
template <class Fn>
void for_each(int threads, int64_t units, const Fn& fn) {
    Ranges ranges(units, 1);
    parallel(int(std::min<int64_t>(threads, std::max<int64_t>(units, 1))), [&](int) {
        for (int64_t unit, last; ranges.next(&unit, &last);)
            for (; unit < last; ++unit) fn(unit);
    });
}

// Rows [begin, end) of a matrix as [blocks of TILE columns][end − begin][TILE], padded with 0;
// blocks `apart` apart.
void pack_blocks(Matrix m, int64_t begin, int64_t end, int64_t cols, float* out, int64_t apart);

// TILE rows of w, which are columns of scores, as a vertical tile [depth, TILE].
void pack_tile(const Kernels& kernels, const Scores& s, int64_t tile, float* out);

// A range of x's and w's columns that crosses neither a block of columns nor a slab's end.
struct Step {
    int64_t begin, end;
    int prefix;
};
std::vector<Step> steps_of(const std::vector<int64_t>& dims);

// A chunk's column scale [G, tiles · TILE] and bias [tiles · TILE], padded.
struct Columns {
    Columns(const Scores& s, int64_t tiles);
    int64_t apart;
    std::vector<float> scale, bias;
};

// The scores of a block of rows and a tile of columns, and how a loss reads them.
ScoreBlock block_of(const Scores& s, const Columns& columns, const float* scores, int64_t row,
                    int rows, int64_t tile);

// Makes the score blocks of all prefixes in one walk over the columns of x and w.
// x: [blocks][rows, TILE] `x_apart` apart; w: a vertical tile; scores: [G, ROWS, TILE].
void make_scores(const Kernels& kernels, const std::vector<Step>& steps, const float* x,
                 int64_t x_apart, int rows, const float* w, float* scores);

}  // namespace mrl
