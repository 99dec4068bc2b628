#include "cpu/search/search.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/threads.h"
#include "cpu/search/scan.h"

namespace mrl {
namespace {

constexpr int64_t PANEL_BYTES = 512 << 10;  // queries of one pass: their panel stays in L2
constexpr int64_t CANDIDATE_BYTES = int64_t(256) << 20;  // kept rows of one pass, all threads

void write(const Rows& rows, const Entry* entries, int64_t count, int64_t k, float* scores,
           int64_t* ids) {
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = score_of(entries[i].key);
        ids[i] = id_of(rows, row_of(entries[i].key));
    }
    std::fill(scores + count, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + count, ids + k, -1);
}

// Runs fn(query, scratch) -> Status for every query on as many threads as `multiplies` are worth.
template <class Fn>
Status each_query(int64_t count, double multiplies, int threads, const Fn& fn) {
    std::atomic<Status> status{Status::OK};
    Ranges ranges(count, 1);
    threads = int(std::min<int64_t>(threads_for(multiplies, threads), std::max<int64_t>(count, 1)));
    parallel(threads, [&](int) {
        std::vector<float> tile;
        std::vector<Entry> candidates;
        for (int64_t q, last; ranges.next(&q, &last);) {
            const Status mine = fn(q, tile, candidates);
            if (mine != Status::OK) status = mine;
        }
    });
    return status;
}

}  // namespace

Status search(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& stages, int threads, float* scores, int64_t* ids) {
    rows.check();
    const Stage first = stages.front();
    if (!finite(queries, stages.back().dim)) return Status::QUERY_NOT_FINITE;
    // Codes choose a shortlist; scores that are returned come from the columns, as a gathered
    // row's.
    const bool coded = first.dim == rows.code_dim && stages.size() > 1 && rows.listed.empty();
    const Source source = coded                  ? Source::CODES
                          : metric == Metric::L2 ? Source::DIFFERENCE
                                                 : Source::PRODUCT;
    const int64_t k = stages.back().keep, keep = std::min(first.keep, rows.eligible());
    const int64_t per_query = sizeof(Entry) * (threads + 1) * 2 * std::max<int64_t>(keep, 32);
    const int64_t pass =
        std::max<int64_t>(1, std::min(std::max<int64_t>(96, PANEL_BYTES / (4 * first.dim)),
                                      CANDIDATE_BYTES / per_query));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t end = std::min(begin + pass, queries.n);
        std::unique_ptr<Entry[]> entries(new Entry[(end - begin) * keep + 1]);
        std::vector<int64_t> counts(end - begin);
        const Queries part = {queries.data + begin * queries.stride, end - begin, queries.stride};
        Status status = scan_all(kernels, rows, part, metric, source, first.dim, keep, 1, threads,
                                 entries.get(), counts.data());
        if (status != Status::OK) return status;
        const double multiplies =
            stages.size() > 1 ? double(end - begin) * keep * (stages[1].dim - first.dim) : 0.0;
        status = each_query(
            end - begin, multiplies, threads,
            [&](int64_t q, std::vector<float>& tile, std::vector<Entry>& candidates) {
                const float* query = queries.data + (begin + q) * queries.stride;
                candidates.assign(entries.get() + q * keep, entries.get() + q * keep + counts[q]);
                if (coded)
                    for (Entry& entry : candidates) entry.partial = entry.sqnorm = 0.0f;
                for (size_t s = 1; s < stages.size(); ++s) {
                    const int64_t from = coded && s == 1 ? 0 : stages[s - 1].dim;
                    const Status mine =
                        advance_all(kernels, rows, query, metric, from, stages[s].dim,
                                    stages[s].keep, tile, candidates);
                    if (mine != Status::OK) return mine;
                }
                write(rows, candidates.data(), candidates.size(), k, scores + (begin + q) * k,
                      ids + (begin + q) * k);
                return Status::OK;
            });
        if (status != Status::OK) return status;
    }
    return Status::OK;
}

Status rerank(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
              const int64_t* candidates, int64_t count, int64_t dim, int64_t k, int threads,
              float* scores, int64_t* ids) {
    rows.check();
    if (rows.packed_dim != 0) throw std::invalid_argument("rerank reads row-major vectors only");
    return each_query(queries.n, double(queries.n) * count * dim, threads,
                      [&](int64_t q, std::vector<float>& tile, std::vector<Entry>& mine) {
                          mine.clear();
                          for (const int64_t* row = candidates + q * count;
                               row < candidates + (q + 1) * count; ++row)
                              if (*row >= 0) mine.push_back({make_key(0.0f, *row), 0.0f, 0.0f});
                          const Status status =
                              advance_all(kernels, rows, queries.data + q * queries.stride, metric,
                                          0, dim, k, tile, mine);
                          if (status == Status::OK)
                              write(rows, mine.data(), mine.size(), k, scores + q * k, ids + q * k);
                          return status;
                      });
}

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available;  // best first
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) available.push_back(avx512vnni_kernels());
    if (avx512) available.push_back(avx512_kernels());
    if (avx2) available.push_back(avx2_kernels());
#elif defined(__aarch64__)
    available.push_back(neon_kernels());
#endif
    available.push_back(&portable_kernels());
    return available;
}

}  // namespace mrl
