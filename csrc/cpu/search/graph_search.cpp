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

std::vector<uint64_t> MaskBits::within(int64_t first, int64_t end) const {
    std::vector<uint64_t> words(starts_.back(), 0);
    for (size_t s = 0; s < rows_.spans.size(); ++s) {
        const Span& span = rows_.spans[s];
        // Rows of the span, counted from its first.
        const int64_t from = std::max<int64_t>(0, first - span.first),
                      to = std::min(span.rows, end - span.first);
        for (int64_t tile = from / TILE; tile * TILE < to; ++tile) {
            const int64_t low = std::max<int64_t>(0, from - tile * TILE), high = to - tile * TILE;
            uint64_t bits = ~uint64_t(0) << low;
            if (high < TILE) bits &= ~(~uint64_t(0) << high);
            if (rows_.mask) bits &= rows_.mask[starts_[s] + tile];
            words[starts_[s] + tile] = bits;
        }
    }
    return words;
}

namespace {

int64_t bits_of(const std::vector<uint64_t>& words) {
    int64_t count = 0;
    for (uint64_t word : words) count += __builtin_popcountll(word);
    return count;
}

// A longer beam where few of the rows that a walk comes by may be found.
int64_t wider(const Graph& graph, int64_t eligible, int64_t beam) {
    const double share = double(graph.rows) / double(std::max<int64_t>(1, eligible));
    return int64_t(std::ceil(double(std::min(beam, graph.rows)) * std::sqrt(share)));
}

class Finder {
  public:
    // `eligible`: how many of the graph's rows may be found.
    Finder(const Kernels& kernels, const Rows& rows, Metric metric, const Graph& graph, Stage stage,
           int64_t eligible)
        : kernels_(kernels),
          mask_(rows),
          terms_(terms_of(metric)),
          graph_(graph),
          beam_(wider(graph, eligible, stage.dim)),
          keep_(stage.keep),
          least_(std::min(stage.keep, eligible)),
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
        // Where too few of a query's near rows may be found, farther ones are.
        for (int64_t beam = beam_;; beam *= 2) {
            walk.run(kernels_, graph_, coded, beam);
            nodes_.clear();
            for (int64_t i = 0; i < walk.count(); ++i)
                if (mask_.has(walk.found()[i].row)) nodes_.push_back(walk.found()[i].row);
            if (int64_t(nodes_.size()) >= least_ || beam >= graph_.rows) break;
        }
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
    const int64_t beam_, keep_, least_;
    std::vector<float> beside_, scores_;
    std::vector<int8_t> codes_;
    std::vector<uint32_t> nodes_;
    std::vector<Entry> entries_;
};

}  // namespace

Status graph_shortlist(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                       const Graph& graph, Stage stage, Entry* out, int64_t* counts) {
    const int64_t keep = stage.keep;
    const MaskBits bits(rows);
    const int64_t eligible = rows.mask ? bits_of(bits.within(0, graph.rows)) : graph.rows;
    Ranges ranges(queries.n, 1);
    parallel(int(std::min<int64_t>(run.threads, std::max<int64_t>(queries.n, 1))), [&](int) {
        static thread_local Walk walk;  // whose marks, a bit a row, would take as long to make
        Finder finder(run.kernels, rows, metric, graph, stage, eligible);
        for (int64_t q, end; ranges.next(&q, &end);)
            counts[q] = finder.find(walk, queries.data + q * queries.stride, out + q * 2 * keep);
    });
    if (rows.count() <= graph.rows) return Status::OK;
    const std::vector<uint64_t> mask = bits.within(graph.rows, rows.count());
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
