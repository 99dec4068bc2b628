// The fp32 scores that a search ranks by, computed one row at a time: it returns them to the bit.
#pragma once

#include <map>

#include "cpu/search/scan.h"
#include "vectors.h"

// Whether a product is added without rounding it first.
inline bool fuses(const Kernels& kernels) {
    std::vector<float> tile(TILE, 1.0f + 0x1p-12f), sums(TILE, -1.0f - 0x1p-11f);
    kernels.advance(Source::PRODUCT, {tile.data(), 1}, tile.data(), sums.data());
    return sums[0] != 0.0f;
}

class Chains {
  public:
    Chains(const Kernels& kernels, const Table& table, const QueryRows& queries, Metric metric)
        : fused_(fuses(kernels)), table_(table), queries_(queries), terms_(terms_of(metric)) {}

    // Scores by the first columns: [queries, n].
    const std::vector<float>& columns(int64_t dim) {
        std::vector<float>& scores = columns_[dim];
        if (!scores.empty()) return scores;
        for (int64_t q = 0; q < queries_.queries.n; ++q)
            for (int64_t row = 0; row < table_.n; ++row)
                scores.push_back(column_score(q, row, dim));
        return scores;
    }

    // Scores by the rows' int8 codes: [queries, n].
    const std::vector<float>& codes(const Rows& rows) {
        if (!codes_.empty()) return codes_;
        for (int64_t q = 0; q < queries_.queries.n; ++q) {
            const Codes query = encode(queries_.row(q), rows.code_dim);
            float scale = query.scale;
            if (terms_.normalized) scale *= query_scale(queries_.row(q), rows.code_dim);
            scale *= terms_.product;
            for (const Span& span : rows.spans)
                for (int64_t row = 0; row < span.rows; ++row)
                    codes_.push_back(code_score(query, scale, span, row));
        }
        return codes_;
    }

    // The rows of `among` that the stages leave; the first stage ranks by the codes of `coded`,
    // where it is given.
    Found best(const std::vector<int64_t>& among, const std::vector<Stage>& stages,
               const Rows* coded) {
        const int64_t n = table_.n, count = queries_.queries.n, k = stages.back().keep;
        Found found = none(count, k);
        for (int64_t q = 0; q < count; ++q) {
            std::vector<int64_t> rows = among;
            const float* scores = nullptr;
            for (size_t s = 0; s < stages.size(); ++s) {
                const bool by_codes = coded && s == 0;
                scores = (by_codes ? codes(*coded) : columns(stages[s].dim)).data() + q * n;
                keep_best(&rows, stages[s].keep, [&](int64_t row) { return scores[row]; });
            }
            for (size_t i = 0; i < rows.size(); ++i) {
                found.ids[q * k + i] = rows[i];
                found.scores[q * k + i] = scores[rows[i]];
            }
        }
        return found;
    }

  private:
    UNWATCHED float step(float x, float y, float sum) const {
        if (fused_) return std::fma(x, y, sum);
        const volatile float product = x * y;
        return sum + product;
    }
    UNWATCHED float column_score(int64_t q, int64_t row, int64_t dim) const {
        const float *query = queries_.row(q), *x = table_.row(row);
        float sum = 0.0f, square = 0.0f;
        for (int64_t c = 0; c < dim; ++c) {
            const float difference = query[c] - x[c];
            sum = terms_.source == Source::DIFFERENCE ? step(-difference, difference, sum)
                                                      : step(query[c], x[c], sum);
            square = step(x[c], x[c], square);
        }
        float scale = terms_.normalized ? query_scale(query, dim) : 1.0f;
        scale *= terms_.factor(terms_.source);
        if (terms_.normalized) scale *= inverse_norm(square);
        return sum * scale + 0.0f;
    }
    UNWATCHED float code_score(const Codes& query, float query_scale, const Span& span,
                               int64_t row) const {
        const int64_t dim = query.codes.size(), quads = dim / 4;
        int32_t sum = 0;
        for (int64_t c = 0; c < dim; ++c) {
            const int64_t quad = (row / TILE * quads + c / 4) * TILE + row % TILE;
            sum += query.codes[c] * (span.codes[quad * 4 + c % 4] - 128);
        }
        const float *stats = span.stats + row, norm = stats[PREFIX_NORM * span.stats_stride];
        float scale = stats[CODE_SCALE * span.stats_stride];
        if (terms_.normalized) scale = norm > 0.0f ? scale / norm : 0.0f;
        const float score = float(sum) * (scale * query_scale);
        const volatile float square = norm * norm;
        return score - terms_.squares * square + 0.0f;
    }

    const bool fused_;
    const Table& table_;
    const QueryRows& queries_;
    const MetricTerms terms_;
    std::map<int64_t, std::vector<float>> columns_;
    std::vector<float> codes_;
};
