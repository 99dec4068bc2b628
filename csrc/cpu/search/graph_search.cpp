// A search's first stage by a graph.
#include <algorithm>
#include <cmath>

#include "cpu/search/graph.h"
#include "cpu/threads.h"

namespace mrl {

MaskBits::MaskBits(const Rows& rows) : rows_(rows), starts_{0} {
    for (const Span& span : rows.spans) starts_.push_back(starts_.back() + span.tiles());
}

std::pair<int64_t, int> MaskBits::place(int64_t row) const {
    const Span& span = span_of(rows_, row);
    const int64_t local = row - span.first;
    return {starts_[&span - rows_.spans.data()] + local / TILE, int(local % TILE)};
}

namespace {

// A longer beam where few of the rows that a walk comes by may be found.
int64_t wider(const Rows& rows, int64_t beam) {
    const double share = double(rows.count()) / double(std::max<int64_t>(1, rows.eligible()));
    return int64_t(std::ceil(double(beam) * std::sqrt(share)));
}

class Finder {
  public:
    Finder(const Kernels& kernels, const Rows& rows, Metric metric, const Graph& graph, Stage stage)
        : kernels_(kernels),
          mask_(rows),
          terms_(terms_of(metric)),
          graph_(graph),
          beam_(wider(rows, stage.dim)),
          keep_(stage.keep),
          beside_(graph.width),
          codes_(query_bytes(graph.width)) {}

    // Writes the shortlist; returns how many.
    int64_t find(Walk& walk, const float* query, Entry* out) {
        centred(query, graph_.centre, graph_.width, beside_.data());
        const double middle = terms_.normalized && graph_.centre
                                  ? kernels_.dot64(beside_.data(), graph_.centre, graph_.width)
                                  : 0.0;
        const NodeQuery coded =
            code_query(beside_.data(), graph_, float(terms_.product * middle), codes_.data());
        walk.run(kernels_, graph_, coded, beam_);
        nodes_.clear();
        for (int64_t i = 0; i < walk.count(); ++i)
            if (mask_.has(walk.found()[i].row)) nodes_.push_back(walk.found()[i].row);
        scores_.assign(nodes_.size(), 0.0f);
        if (int64_t(nodes_.size()) > keep_)
            score_nodes(kernels_, graph_, coded, nodes_.data(), nodes_.size(), scores_.data());
        entries_.clear();
        for (size_t i = 0; i < nodes_.size(); ++i)
            entries_.push_back(
                {make_key(scores_[i] == scores_[i] ? scores_[i] : -INFINITY, nodes_[i]), 0.0f,
                 0.0f});
        cut(entries_, keep_);
        std::copy(entries_.begin(), entries_.end(), out);
        return entries_.size();
    }

  private:
    const Kernels& kernels_;
    const MaskBits mask_;
    const MetricTerms& terms_;
    const Graph& graph_;
    const int64_t beam_, keep_;
    std::vector<float> beside_, scores_;
    std::vector<int8_t> codes_;
    std::vector<uint32_t> nodes_;
    std::vector<Entry> entries_;
};

// The bits of the rows that came after the graph.
std::vector<uint64_t> later_rows(const Rows& rows, const Graph& graph) {
    const MaskBits mask(rows);
    std::vector<uint64_t> words(mask.words(), 0);
    for (int64_t row = graph.rows; row < rows.count(); ++row) {
        const auto [word, bit] = mask.place(row);
        words[word] |= uint64_t(mask.has(row)) << bit;
    }
    return words;
}

}  // namespace

Status graph_shortlist(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                       const Graph& graph, Stage stage, Entry* out, int64_t* counts) {
    const int64_t keep = stage.keep;
    Ranges ranges(queries.n, 1);
    parallel(int(std::min<int64_t>(run.threads, std::max<int64_t>(queries.n, 1))), [&](int) {
        static thread_local Walk walk;  // whose marks, a bit a row, would take as long to make
        Finder finder(run.kernels, rows, metric, graph, stage);
        for (int64_t q, end; ranges.next(&q, &end);)
            counts[q] = finder.find(walk, queries.data + q * queries.stride, out + q * 2 * keep);
    });
    if (rows.count() <= graph.rows) return Status::OK;
    const std::vector<uint64_t> mask = later_rows(rows, graph);
    const Rows later = rows.restricted(mask.data());
    if (later.eligible() == 0) return Status::OK;
    const bool coded = !later.ladder.dims.empty() && later.gathered_rows.empty();
    std::vector<Entry> entries(queries.n * keep);
    std::vector<int64_t> found(queries.n);
    const Status status = scan_all(run, later, queries,
                                   {metric, coded ? Source::SIGNS : terms_of(metric).source,
                                    graph.width, std::min(keep, later.eligible()), 1},
                                   entries.data(), found.data());
    const int64_t most = std::min(keep, later.eligible());
    for (int64_t q = 0; q < queries.n; ++q) {
        std::copy_n(entries.begin() + q * most, found[q], out + q * 2 * keep + counts[q]);
        counts[q] += found[q];
    }
    return status;
}

}  // namespace mrl
