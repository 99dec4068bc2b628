// Rows in the order of their sums with two fixed vectors: equal rows lie together, and rows that
// are nearly so lie close.
#pragma once

#include "cpu/search/bounds.h"
#include "cpu/threads.h"

namespace mrl {

struct Projected {
    float sum, other;  // 0 where a sum is beyond fp32
    int64_t row, bit;  // the row's number, and its bit in a mask of all rows
    bool same_sums(const Projected& as) const { return sum == as.sum && other == as.other; }
};

// The sums of each row's first `dim` columns with two vectors of signs, ascending; no rows may be
// gathered.
std::vector<Projected> project(const Run& run, const Rows& rows, int64_t dim);

// Calls `see(scan, number)` with each tile of the rows and its number among all, on several threads
// at once.
template <class See>
void each_tile(const Run& run, const Rows& rows, int64_t dim, const See& see) {
    const int64_t tiles = TileReader::count(rows, Source::PRODUCT);
    Ranges ranges(tiles, 8);
    parallel(threads_for(double(tiles) * TILE * dim * 4, run.threads), [&](int) {
        TileReader reader(run.kernels, rows, Source::PRODUCT, dim, 1);
        Scan scan = {};
        for (int64_t at, last; ranges.next(&at, &last);)
            for (; at < last; ++at) {
                poll();
                reader.read(at, &scan);
                see(scan, rows.mask ? rows.tiles[at] : at);
            }
    });
}

// The number of words of a mask of all rows.
inline int64_t words_of(const Rows& rows) {
    int64_t words = 0;
    for (const Span& span : rows.spans) words += span.tiles();
    return words;
}

}  // namespace mrl
