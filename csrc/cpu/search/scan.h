// A pass over all rows, which the first stage of a search and certified exact search both make.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/search/codes.h"
#include "cpu/search/metric.h"
#include "cpu/search/search.h"

namespace mrl {

// Squared norms for which bounds and errors hold in fp32. A row beyond them is never dropped, and a
// query beyond them drops no row.
constexpr double SMALLEST = 1e-30, LARGEST = 1e30;
inline bool ordinary(double square) {
    return square == 0.0 || (square > SMALLEST && square < LARGEST);
}

// Room for the rounding of a sum of so many products, in any order, as a share of ‖q‖·‖x‖.
inline double rounding(int64_t dim) { return 1.01 * std::ldexp(double(dim + 64), -24); }

// A relative room: more than 8 roundings to fp32 of a norm or its square.
constexpr double SLACK = 1e-6;

// Room for what underflows of a score of so many products, whether denormals are kept or not.
inline double underflow(int64_t dim) { return LARGEST_PRODUCT * 2e-38 * double(dim + 4); }

// The range of values >= 0 that are not 0; NaN is the greatest. Their bits are in the same order,
// and compilers use vectors for integers only.
struct Range {
    float least = INFINITY, greatest = 0.0f;
    // `more` [count] is added to the values; null: nothing.
    void add(const float* values, const float* more, int64_t count) {
        int32_t low = bits(least), high = bits(greatest);
        for (int64_t i = 0; i < count; ++i) {
            const int32_t value = bits(values[i] + (more ? more[i] : 0.0f));
            high = std::max(high, value);
            low = std::min(low, value == 0 ? INT32_MAX : value);
        }
        std::memcpy(&least, &low, sizeof least);
        std::memcpy(&greatest, &high, sizeof greatest);
    }
    void add(const Range& other) {
        add(&other.greatest, nullptr, 1);
        add(&other.least, nullptr, 1);
    }

  private:
    static int32_t bits(float value) {
        int32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits & 0x7fffffff;
    }
};

inline float above(double x) { return std::nextafter(float(x), INFINITY); }
inline bool better(const Entry& a, const Entry& b) { return a.key > b.key; }
float score_of(uint64_t key);
inline int64_t row_of(uint64_t key) { return int64_t(0xffffffffu - uint32_t(key)); }
inline uint64_t with_row(uint64_t key, int64_t row) { return (key | 0xffffffffu) - uint64_t(row); }

// 0 for a norm of 0; NaN, which is reported, where the square overflowed.
inline float inverse_norm(float sqnorm) {
    if (std::isinf(sqnorm)) return std::numeric_limits<float>::quiet_NaN();
    return sqnorm > 0.0f ? 1.0f / std::sqrt(sqnorm) : 0.0f;
}
float query_scale(const float* query, int64_t dim);  // the inverse norm of its first columns

bool finite(const Queries& queries, int64_t dim);

inline const Span& span_of(const Rows& rows, int64_t row) {
    size_t low = 0, high = rows.spans.size();
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        (rows.spans[middle].first <= row ? low : high) = middle;
    }
    return rows.spans[low];
}
inline int64_t id_of(const Rows& rows, int64_t row) {
    const Span& span = span_of(rows, row);
    return span.ids ? span.ids[row - span.first] : row;
}
// The address of a column of the suffix; `row` counts from the span's first.
inline RowColumns suffix_at(const Rows& rows, const Span& span, int64_t row, int64_t column) {
    const int64_t size = element_size(rows.dtype);
    const char* begin = static_cast<const char*>(span.suffix) + row * span.stride * size;
    return {begin + row_header(rows.dtype) + (column - rows.packed_dim) * size, begin};
}

// Reads the first `dim` columns of a row, packed ones among them.
void columns_of(const Kernels& kernels, const Rows& rows, int64_t row, int64_t dim, float* x);

// As many threads as the work is worth.
int threads_for(double multiplies, int threads);

// Queries side by side in groups of up to MAX_GROUP, column by column, as a scan broadcasts them.
class Panel {
  public:
    struct Group {
        int64_t first, size;
        const void* data;
    };
    Panel(const Queries& queries, int64_t dim);
    // Codes instead of columns.
    explicit Panel(const std::vector<CodedQuery>& coded);

    const std::vector<Group>& groups() const { return groups_; }
    // Makes `scan` one of this group's queries.
    void put(const Group& group, Scan* scan) const {
        scan->panel = group.data;
        scan->offsets = offsets_.data() + group.first;
        scan->shifts = shifts_.data() + group.first;
    }

  private:
    template <class Fn>
    void group(int64_t count, int64_t bytes_a_query, const Fn& fill);
    std::unique_ptr<char[]> data_;
    std::vector<int32_t> offsets_;
    std::vector<float> shifts_;
    std::vector<Group> groups_;
};

// What becomes of columns that lie row-major: they are packed into tiles, or left.
enum class Reading { PACKED, ROW_MAJOR };

// Reads the tiles that hold rows to be found, one after the other. Where rows are listed in
// gathered_rows and no codes are read, these rows are gathered, TILE a tile; a scan's row numbers
// are then places in that list.
class TileReader {
  public:
    // `groups` is the number of groups of queries that scan each tile.
    TileReader(const Kernels& kernels, const Rows& rows, Source source, int64_t dim, int64_t groups,
               Reading reading = Reading::PACKED);
    static bool gathers(const Rows& rows, Source source) {
        return !of_codes(source) && !rows.gathered_rows.empty();
    }
    static int64_t count(const Rows& rows, Source source);
    // Fills the columns, first_row, rows and wanted; false if a value is not finite.
    bool read(int64_t tile, Scan* scan);
    // [2 * TILE]: where the columns of the last tile's rows lie that are not in it; then those of
    // rows to prefetch.
    const RowColumns* row_major() const { return pointers_; }
    int64_t row_major_columns() const { return reading_ == Reading::PACKED ? 0 : suffix_; }
    // [TILE]: a statistic of the rows of the last tile read, which was not gathered. Of a tile that
    // is not full they are copied to `copy`, as another thread may be writing those of the rest.
    const float* stat(int64_t which, float* copy) const {
        const float* values = span_->stats + which * span_->stats_stride + local_ * TILE;
        const int64_t rows = span_->rows - local_ * TILE;
        return rows >= TILE ? values : (std::copy_n(values, rows, copy), copy);
    }
    const float* tile_stats() const { return span_->tile_stats + local_ * TILE_STATS; }

  private:
    struct Place {
        const Span* span;
        int64_t tile;    // counted from the span's first
        int64_t number;  // counted over all spans
    };
    Place place(int64_t i);
    bool gather(int64_t tile, Scan* scan);
    void point(const Span& span, int64_t tile, RowColumns* pointers) const;
    bool pack(Scan* scan, float* tile);
    void ahead(Scan* scan, const void* tile, int64_t steps, int64_t bytes) const;
    const uint8_t* codes(const Place& at) const;

    const Kernels& kernels_;
    const Rows& rows_;
    const Source source_;
    const int64_t dim_, groups_;
    const Reading reading_;
    const int64_t head_, suffix_;  // columns read from tiles, and from the suffix
    const int64_t code_bytes_;     // of a tile of the source's codes
    const int64_t count_;          // of tiles to read
    std::vector<int64_t> starts_;  // [spans + 1]: tiles before each span
    size_t at_ = 0;                // the span of the last place
    std::vector<float> unpacked_;  // [columns, TILE]
    RowColumns pointers_[2 * TILE];
    const Span* span_ = nullptr;
    int64_t local_ = 0;  // the last tile read, counted from its span's first
};

// Some queries' vectors side by side in memory; vector_of(q) is one's address.
struct Gathered {
    template <class VectorOf>
    Gathered(const std::vector<int64_t>& which, int64_t dim, const VectorOf& vector_of) {
        for (int64_t q : which) data.insert(data.end(), vector_of(q), vector_of(q) + dim);
        queries = {data.data(), int64_t(which.size()), dim};
    }
    Gathered(const std::vector<int64_t>& which, int64_t dim, const Queries& all)
        : Gathered(which, dim, [&](int64_t q) { return all.data + q * all.stride; }) {}
    std::vector<float> data;
    Queries queries;
};

// Leaves the best `keep` entries, in order.
void cut(std::vector<Entry>& entries, int64_t keep);
// Whether the best or the worst of sorted entries has a score that is infinite or NaN.
bool beyond_float(const std::vector<Entry>& sorted);

// The entries that one thread keeps for each query, of at most `rows` rows.
struct Kept {
    Kept(const float* gates, int64_t queries, int64_t k, int64_t rows);
    std::unique_ptr<Entry[]> entries;
    std::vector<float> thresholds;
    std::vector<TopK> topks;
};

// Ranks the rows of every `step`-th tile by their first columns, or by codes of these.
struct FirstStage {
    Metric metric;
    Source source;
    int64_t dim, keep, step;
};

// Few queries' best rows, found by sums in no particular order of row-major columns, and
// then ranked as scan_all does. Writes those of the queries for which this provably finds what
// scan_all does, and returns the others.
std::vector<int64_t> scan_row_major(const Run& run, const Rows& rows, const Queries& queries,
                                    const FirstStage& stage, Entry* out, int64_t* counts);

// Leaves the best of one query's candidates, of rows that nothing is packed of, by sums in no
// particular order of columns, in order.
void rank_row_major(const Kernels& kernels, const Rows& rows, const float* query, Metric metric,
                    Stage stage, std::vector<Entry>* candidates);

// Scans for the `keep` best rows of each query. Writes counts[q] entries, best first, to
// out[q, :], of [n, keep].
Status scan_all(const Run& run, const Rows& rows, const Queries& queries, const FirstStage& stage,
                Entry* out, int64_t* counts);

// Ranks candidates whose sums are of columns [0, from) by columns [0, to).
struct LaterStage {
    Metric metric;
    int64_t from, to, keep;
};

// Continues sums and squares of listed rows with one query, in no particular order of columns.
// `pointers`, to the first of these, are as before afterwards.
void sum_listed(const Kernels& kernels, Source source, const float* query, DType dtype,
                int64_t cols, std::vector<RowColumns>* pointers, float* sums, float* squares);

// Continues one query's candidates and keeps the best, in order.
Status advance_all(const Kernels& kernels, const Rows& rows, const float* query,
                   const LaterStage& stage, std::vector<Entry>& candidates);

}  // namespace mrl
