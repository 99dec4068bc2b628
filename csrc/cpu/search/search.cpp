// The funnel and rerank.
#include "cpu/search/search.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/search/scan.h"
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

}  // namespace

Status search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& all_stages, const Results& results) {
    rows.check();
    // A stage that would keep every row chooses nothing.
    auto begins = all_stages.begin();
    while (begins + 1 != all_stages.end() && begins->keep >= rows.eligible()) ++begins;
    const std::vector<Stage> stages(begins, all_stages.end());
    const Stage first = stages.front();
    if (!finite(queries, stages.back().dim)) return Status::QUERY_NOT_FINITE;
    // Codes choose a shortlist only: scores that are returned come from the columns, and so do
    // those of gathered rows.
    const bool bits = first.bits > 0 || first.dim == rows.code_dim,
               coded = bits && stages.size() > 1 && rows.gathered_rows.empty();
    const Source source = !coded            ? terms_of(metric).source
                          : first.bits == 1 ? Source::SIGNS
                          : first.bits == 4 ? Source::NIBBLES
                                            : Source::CODES;
    const int64_t keep = std::min(first.keep, rows.eligible());
    const int64_t per_query = sizeof(Entry) * (run.threads + 1) * 2 * std::max<int64_t>(keep, 32);
    const int64_t pass =
        std::max<int64_t>(1, std::min(std::max<int64_t>(96, PANEL_BYTES / (4 * first.dim)),
                                      CANDIDATE_BYTES / per_query));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t n = std::min(pass, queries.n - begin);
        std::unique_ptr<Entry[]> entries(new Entry[n * keep + 1]);
        std::vector<int64_t> counts(n);
        const Queries part = {queries.data + begin * queries.stride, n, queries.stride};
        Status status = scan_all(run, rows, part, {metric, source, first.dim, keep, 1},
                                 entries.get(), counts.data());
        if (status != Status::OK) return status;
        const double multiplies =
            stages.size() > 1 ? double(n) * keep * (stages[1].dim - first.dim) : 0.0;
        const auto later_stages = [&](int64_t q, std::vector<Entry>& candidates) {
            const float* query = part.data + q * part.stride;
            candidates.assign(entries.get() + q * keep, entries.get() + q * keep + counts[q]);
            if (coded)
                for (Entry& entry : candidates) entry.partial = entry.sqnorm = 0.0f;
            for (size_t s = 1; s < stages.size(); ++s) {
                const int64_t from = coded && s == 1 ? 0 : stages[s - 1].dim;
                const Status mine =
                    advance_all(run.kernels, rows, query,
                                {metric, from, stages[s].dim, stages[s].keep}, candidates);
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
