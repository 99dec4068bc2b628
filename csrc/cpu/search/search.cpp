// The funnel and rerank.
#include "cpu/search/search.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/search/graph.h"
#include "cpu/search/listed_codes.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t PANEL_BYTES = 512 << 10;  // queries of one pass: their panel stays in L2
constexpr int64_t CANDIDATE_BYTES = int64_t(256) << 20;  // kept rows of one pass, all threads

// One query's entries, best first, to its part of the results.
void write(const Rows& rows, const std::vector<Entry>& entries, int64_t q, int64_t k,
           const Results& results) {
    float* scores = results.scores + q * k;
    int64_t* ids = results.ids + q * k;
    const int64_t count = entries.size();
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = score_of(entries[i].key);
        ids[i] = id_of(rows, row_of(entries[i].key));
    }
    std::fill(scores + count, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + count, ids + k, -1);
}

// Runs fn(query, candidates) -> Status for every query, the latter each thread's scratch, on as
// many threads as `multiplies` are worth.
template <class Fn>
Status each_query(int64_t count, double multiplies, int threads, const Fn& fn) {
    std::atomic<Status> status{Status::OK};
    Ranges ranges(count, 1);
    threads = int(std::min<int64_t>(threads_for(multiplies, threads), std::max<int64_t>(count, 1)));
    parallel(threads, [&](int) {
        std::vector<Entry> candidates;
        for (int64_t q, last; ranges.next(&q, &last);) {
            const Status mine = fn(q, candidates);
            if (mine != Status::OK) status = mine;
        }
    });
    return status;
}

// The stages that choose among the rows. One that would keep every row is none, unless the next
// ranks what it keeps by codes. Codes choose a shortlist only: scores that are returned come from
// the columns, and so do all those of gathered rows.
std::vector<Stage> needed(const Rows& rows, const std::vector<Stage>& all) {
    auto begin = all.begin();
    const bool gathered = !rows.gathered_rows.empty();
    for (auto s = begin; s + 1 != all.end() &&
                         (s->keep >= rows.eligible() || (gathered && s->bits == Stage::GRAPH));
         ++s)
        if (s[1].bits == 0) begin = s + 1;
    if (gathered && begin->bits == Stage::GRAPH) ++begin;  // the next is by codes
    std::vector<Stage> stages(begin, all.end());
    const bool coded = stages.size() > 1 && !gathered;
    if (coded && stages[0].bits == 0 && stages[0].dim == rows.code_dim) stages[0].bits = 8;
    for (Stage& stage : stages)
        if (!coded) stage.bits = 0;
    return stages;
}

// How many columns the stage before has summed of those of this one.
int64_t summed_before(const std::vector<Stage>& stages, size_t s) {
    const Stage& before = stages[s - 1];
    return before.bits != 0 || before.dim > stages[s].dim ? 0 : before.dim;
}

}  // namespace

Status search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& all_stages, const Results& results, const Graph* graph) {
    rows.check();
    if (all_stages.front().bits == Stage::GRAPH && !graph)
        throw std::invalid_argument("stages: a graph's without a graph");
    const std::vector<Stage> stages = needed(rows, all_stages);
    const Stage first = stages.front();
    int64_t widest = 0;
    for (const Stage& stage : all_stages)
        widest = std::max(widest, stage.bits == Stage::GRAPH ? graph->width : stage.dim);
    if (!finite(queries, widest)) return Status::QUERY_NOT_FINITE;
    const Source source = first.bits == 1   ? Source::SIGNS
                          : first.bits == 4 ? Source::NIBBLES
                          : first.bits == 8 ? Source::CODES
                                            : terms_of(metric).source;
    // Of a graph's stage, as many rows more may have come after it.
    const bool walks = first.bits == Stage::GRAPH;
    const int64_t keep = std::min(first.keep, rows.eligible()) * (walks ? 2 : 1);
    const int64_t per_query = sizeof(Entry) * (run.threads + 1) * 2 * std::max<int64_t>(keep, 32);
    const int64_t pass = std::max<int64_t>(
        1, std::min(std::max<int64_t>(96, PANEL_BYTES / (4 * (walks ? graph->width : first.dim))),
                    CANDIDATE_BYTES / per_query));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t n = std::min(pass, queries.n - begin);
        std::unique_ptr<Entry[]> entries(new Entry[n * keep + 1]);
        std::vector<int64_t> counts(n);
        const Queries part = {queries.data + begin * queries.stride, n, queries.stride};
        Status status = walks ? graph_shortlist(run, rows, part, metric, *graph,
                                                {first.dim, keep / 2}, entries.get(), counts.data())
                              : scan_all(run, rows, part, {metric, source, first.dim, keep, 1},
                                         entries.get(), counts.data());
        if (status != Status::OK) return status;
        double multiplies = 0.0;
        for (size_t s = 1; s < stages.size(); ++s)
            multiplies += double(n) * std::min(keep, stages[s - 1].keep) *
                          double(stages[s].dim - summed_before(stages, s));
        const auto later_stages = [&](int64_t q, std::vector<Entry>& candidates) {
            const float* query = part.data + q * part.stride;
            candidates.assign(entries.get() + q * keep, entries.get() + q * keep + counts[q]);
            std::unique_ptr<CodeRanker> ranker;
            for (size_t s = 1; s < stages.size(); ++s) {
                const Stage& stage = stages[s];
                const int64_t from = summed_before(stages, s);
                Status mine;
                if (stage.bits > 0) {
                    if (!ranker) ranker.reset(new CodeRanker(run.kernels, rows, query, metric));
                    mine = ranker->rank(stages[s - 1].bits, stage.bits, stage.keep, candidates);
                } else {
                    if (from == 0)
                        for (Entry& entry : candidates) entry.partial = entry.sqnorm = 0.0f;
                    mine = advance_all(run.kernels, rows, query,
                                       {metric, from, stage.dim, stage.keep}, candidates);
                }
                if (mine != Status::OK) return mine;
            }
            write(rows, candidates, begin + q, stages.back().keep, results);
            return Status::OK;
        };
        status = each_query(n, multiplies, run.threads, later_stages);
        if (status != Status::OK) return status;
    }
    return Status::OK;
}

Status rerank(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
              const Candidates& candidates, Stage stage, const Results& results) {
    rows.check();
    if (rows.packed_dim != 0) throw std::invalid_argument("rerank reads row-major vectors only");
    if (!finite(queries, stage.dim)) return Status::QUERY_NOT_FINITE;
    const int64_t count = candidates.count;
    return each_query(queries.n, double(queries.n) * count * stage.dim, run.threads,
                      [&](int64_t q, std::vector<Entry>& mine) {
                          mine.clear();
                          for (const int64_t* row = candidates.rows + q * count;
                               row < candidates.rows + (q + 1) * count; ++row)
                              if (*row >= 0) mine.push_back({make_key(0.0f, *row), 0.0f, 0.0f});
                          const Status status =
                              advance_all(run.kernels, rows, queries.data + q * queries.stride,
                                          {metric, 0, stage.dim, stage.keep}, mine);
                          if (status == Status::OK) write(rows, mine, q, stage.keep, results);
                          return status;
                      });
}

}  // namespace mrl
