// Listed rows of an index that lies on disk are read all at once, not page by page as each is
// scored. Where they are in memory this costs a glance at each: less than 1 µs for 200 rows that
// are about to be scored anyway.
#pragma once

#include <vector>

#include "cpu/search/scan.h"

namespace mrl {

// Whether this thread had to wait for pages from disk since it last asked. Takes 0.3 µs; false
// where the system does not tell.
bool has_waited();

// Touches the places, in order, until one had to be read from disk; then asks the system for
// `bytes` from each on. Whether there was one; false where the system does not tell.
bool read_ahead(const std::vector<RowColumns>& places, size_t bytes);

// The same for columns [from, to) of the suffixes of `count` rows; row_at(i) is one's number.
template <class RowAt>
bool read_ahead(const Rows& rows, int64_t count, int64_t from, int64_t to, const RowAt& row_at) {
    std::vector<RowColumns> places(count);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = row_at(i);
        const Span& span = span_of(rows, row);
        places[i] = suffix_at(rows, span, row - span.first, from);
    }
    return read_ahead(places, size_t(to - from) * element_size(rows.dtype));
}

}  // namespace mrl
