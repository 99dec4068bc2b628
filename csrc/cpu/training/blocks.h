// What forward and backward share: packed chunks, and the walk over the columns that makes a
// block's scores.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/training/nested.h"
#include "cpu/threads.h"

namespace mrl {

constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Memory that is written before it is read; large ones in huge pages, for they are walked by
// columns.
struct Buffer {
    explicit Buffer(int64_t size);
    float* get() const { return data.get(); }
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> data;
};

// Threads that a chunk is worth.
int threads_for(const Scores& scores, int threads);

// Runs fn(unit) for every unit; whoever is free takes the next.
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

// Columns of scores, rows of w, as a vertical tile [depth, TILE].
void pack_tile(const Kernels& kernels, const Scores& s, int64_t tile, float* out);

// A depth of a product that neither crosses a block of columns nor a slab's end.
struct Step {
    int64_t begin, end;
    int prefix;
};
std::vector<Step> steps_of(const std::vector<int64_t>& dims);

// The column vectors of a chunk, padded as blocks read them: [tiles · TILE], scale [G, the same].
struct Columns {
    Columns(const Scores& s, int64_t tiles);
    int64_t apart;
    std::vector<float> scale, bias;
};

// The part of a chunk in a block of rows and a tile of columns.
Block block_of(const Scores& s, const Columns& columns, const float* scores, int64_t row, int rows,
               int64_t tile);

// The blocks of all prefixes, from one walk over the columns of x and w.
// x: [blocks][rows, TILE] `x_apart` apart; w: a vertical tile; scores: [G, ROWS, TILE].
void make_scores(const Kernels& kernels, const std::vector<Step>& steps, const float* x,
                 int64_t x_apart, int rows, const float* w, float* scores);

}  // namespace mrl
