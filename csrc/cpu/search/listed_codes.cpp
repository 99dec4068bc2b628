#include "cpu/search/listed_codes.h"

#include <algorithm>
#include <cstring>

#include "cpu/search/read_ahead.h"

namespace mrl {

constexpr int64_t STEP = 4;  // bytes of a row, for eight columns

ListedCodes::ListedCodes(const Kernels& kernels, const Rows& rows)
    : kernels_(kernels),
      rows_(rows),
      bytes_(rows.ladder.dims.empty() ? 0 : low_bytes(rows.ladder.dims.back())) {}

void ListedCodes::list(const Entry* entries, int64_t n) {
    count_ = n;
    for (int64_t e = 0; e < n; ++e) {
        const int64_t row = row_of(entries[e].key);
        const Span& span = span_of(rows_, row);
        spans_[e] = &span;
        locals_[e] = row - span.first;
        const uint8_t* lows = span.lows + locals_[e] * bytes_;
        for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(lows + byte);
        __builtin_prefetch(span.stats + LOW_ERROR * span.stats_stride + locals_[e]);
    }
}

void ListedCodes::sum(const uint8_t** rows, const int8_t* query, float shift, float* sums) const {
    std::fill(rows + count_, rows + (count_ + 3) / 4 * 4, rows[count_ - 1]);
    kernels_.dot_halves(rows, count_, query, bytes_, sums);
    for (int64_t e = 0; e < count_; ++e) sums[e] += shift;  // to a multiple of 1/2 below 2^23
}

void ListedCodes::sum_lows(const CodedQuery& query, float* sums) const {
    const uint8_t* rows[AT_ONCE];
    for (int64_t e = 0; e < count_; ++e) rows[e] = spans_[e]->lows + locals_[e] * bytes_;
    sum(rows, query.plain.data(), query.shift, sums);
}

void ListedCodes::sum_nibbles(const CodedQuery& query, const int8_t* by_step, float* sums) {
    nibbles_.resize(AT_ONCE * bytes_);
    const uint8_t* rows[AT_ONCE];
    for (int64_t e = 0; e < count_; ++e) {
        const int64_t tile = locals_[e] / TILE, lane = locals_[e] % TILE;
        const uint8_t* from = spans_[e]->nibbles + (tile * bytes_ * TILE + lane * STEP);
        uint8_t* to = nibbles_.data() + e * bytes_;
        for (int64_t byte = 0; byte < bytes_; byte += STEP)
            std::memcpy(to + byte, from + byte * TILE, STEP);
        rows[e] = to;
    }
    sum(rows, by_step, query.shift, sums);
}

CodeRanker::CodeRanker(const Kernels& kernels, const Rows& rows, const float* query, Metric metric)
    : rows_(rows), listed_(kernels, rows) {
    const MetricTerms& terms = terms_of(metric);
    const Ladder& ladder = rows.ladder;
    const int64_t width = ladder.dims.back();
    std::vector<float> less(width);
    centred(query, ladder.centre, width, less.data());
    rotate(ladder, width, less.data());
    query_ = code_query(kernels, Source::NIBBLES, less.data(), width);
    const int64_t bytes = low_bytes(width);
    by_step_.resize(2 * bytes);
    for (int64_t byte = 0; byte < bytes; ++byte) {
        const int64_t column = byte / STEP * 2 * STEP + byte % STEP;
        by_step_[byte] = query_.plain[column];
        by_step_[bytes + byte] = query_.plain[column + STEP];
    }
    const double size = terms.normalized ? query_scale(query, width) : 1.0,
                 unit = size * terms.product;
    unit_ = unit * query_.scale;
    has_terms_ = ladder.has_terms();
    has_inverse_ = has_terms_ && terms.normalized;
    own_ = terms.squares > 0.0f ? -double(terms.squares) : unit;
    inverse_ = has_inverse_ ? unit * (kernels.dot64(query, ladder.centre, width) -
                                      kernels.dot64(ladder.centre, ladder.centre, width))
                            : 0.0;
}

void CodeRanker::score(Entry* entries, int64_t n, int64_t from, int64_t bits) {
    const int64_t dims = rows_.ladder.dims.size(), own = SIGN_FACTOR + 2 * dims - 1;
    float nibbles[ListedCodes::AT_ONCE], lows[ListedCodes::AT_ONCE] = {};
    listed_.list(entries, n);
    if (from < 4) listed_.sum_nibbles(query_, by_step_.data(), nibbles);
    if (bits > 4) listed_.sum_lows(query_, lows);
    for (int64_t e = 0; e < n; ++e) {
        if (from < 4) entries[e].partial = nibbles[e];
        const double sum = entries[e].partial + double(lows[e]) / 16.0;
        double score = sum * unit_ * listed_.stat(e, CODE_SCALE);
        if (has_terms_) score += own_ * listed_.stat(e, own);
        if (has_inverse_) score += inverse_ * listed_.stat(e, own + dims);
        entries[e].key = make_key(float(score), row_of(entries[e].key));
    }
}

Status CodeRanker::rank(int64_t from, int64_t bits, int64_t keep, std::vector<Entry>& candidates) {
    constexpr int64_t AHEAD = 1024;  // rows that are read ahead at once
    const int64_t count = candidates.size(), width = rows_.ladder.dims.back();
    const size_t tile = code_tile_bytes(Source::NIBBLES, width), row = low_bytes(width);
    std::vector<RowColumns> places;
    // The place of the tile's first four bits, or of the row's last.
    const auto ahead = [&](int64_t first, bool of_tiles) {
        places.clear();
        for (int64_t i = first; i < std::min(first + AHEAD, count); ++i) {
            const int64_t number = row_of(candidates[i].key);
            const Span& span = span_of(rows_, number);
            const int64_t local = number - span.first;
            const uint8_t* place =
                of_tiles ? span.nibbles + local / TILE * tile : span.lows + local * row;
            places.push_back({place, nullptr});
        }
        read_ahead(places, of_tiles ? tile : row);
    };
    for (int64_t first = 0; first < count; first += ListedCodes::AT_ONCE) {
        if (first % AHEAD == 0) {
            if (from < 4) ahead(first, true);
            if (bits > 4) ahead(first, false);
        }
        score(candidates.data() + first, std::min(ListedCodes::AT_ONCE, count - first), from, bits);
    }
    cut(candidates, keep);
    return beyond_float(candidates) ? Status::OVERFLOW_ : Status::OK;
}

}  // namespace mrl
