#include "cpu/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"

namespace mrl {
namespace {

constexpr int64_t PANEL_BYTES = 512 << 10;  // queries of one pass: their panel stays in L2
constexpr int64_t CANDIDATE_BYTES = int64_t(256) << 20;  // kept rows of one pass, all threads
constexpr int64_t COLUMN_BLOCK = 256;                    // columns a gathered tile advances by
constexpr double MULTIPLIES_A_THREAD =
    2e6;  // below this, starting a thread costs more than it brings

bool better(const Entry& a, const Entry& b) { return a.key > b.key; }

float score_of(uint64_t key) {
    const uint32_t ordered = uint32_t(key >> 32);
    const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}
int64_t row_of(uint64_t key) { return int64_t(0xffffffffu - uint32_t(key)); }

// Whether the best or the worst of sorted entries has a score that is infinite or NaN.
bool beyond_float(const Entry* sorted, int64_t count) {
    return count > 0 && !(std::isfinite(score_of(sorted[0].key)) &&
                          std::isfinite(score_of(sorted[count - 1].key)));
}

// 0 for a norm of 0; NaN, which is reported, where the square overflowed.
float inverse_norm(float sqnorm) {
    if (std::isinf(sqnorm)) return std::numeric_limits<float>::quiet_NaN();
    return sqnorm > 0.0f ? 1.0f / std::sqrt(sqnorm) : 0.0f;
}

int64_t element_size(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

void row_pointers(const Rows& rows, int64_t first, int n, int64_t column, const void** pointers) {
    const char* base = static_cast<const char*>(rows.tail);
    const int64_t size = element_size(rows.dtype);
    for (int r = 0; r < n; ++r)
        pointers[r] = base + ((first + r) * rows.stride + column - rows.packed_dim) * size;
}

int threads_for(double multiplies, int threads) {
    return int(std::max(1.0, std::min(double(threads), multiplies / MULTIPLIES_A_THREAD)));
}

// Queries side by side in groups of up to MAX_GROUP, column by column: what a scan broadcasts.
class Panel {
  public:
    struct Group {
        int64_t first, size;
        const float* data;  // [dim, size]
    };

    Panel(const Queries& queries, int64_t begin, int64_t end, int64_t dim, Metric metric)
        : data_((end - begin) * dim), scales_(end - begin, 1.0f) {
        const int64_t count = end - begin, groups = (count + MAX_GROUP - 1) / MAX_GROUP;
        int64_t first = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t size = count / groups + (g < count % groups);
            float* data = data_.data() + first * dim;
            for (int64_t q = 0; q < size; ++q) {
                const float* query = queries.data + (begin + first + q) * queries.stride;
                for (int64_t c = 0; c < dim; ++c) data[c * size + q] = query[c];
                if (metric == Metric::COSINE) scales_[first + q] = query_scale(query, dim);
            }
            groups_.push_back({first, size, data});
            first += size;
        }
    }
    static float query_scale(const float* query, int64_t dim) {
        float sum = 0.0f;
        for (int64_t c = 0; c < dim; ++c) sum += query[c] * query[c];
        return inverse_norm(sum);
    }
    const std::vector<Group>& groups() const { return groups_; }
    const float* scales() const { return scales_.data(); }

  private:
    std::vector<float> data_, scales_;
    std::vector<Group> groups_;
};

// Entries beyond k before a cut: as many again halve the cuts' cost, a few let the gate close soon.
int64_t spare(int64_t k) { return std::max<int64_t>(k, 32); }

// One thread's kept rows of each query.
struct Kept {
    Kept(int64_t queries, int64_t k, int64_t rows) : thresholds(queries, NAN), topks(queries) {
        const int64_t capacity = std::min(rows, std::min(k, rows) + spare(k)) + 1;
        entries.reset(new Entry[queries * capacity]);
        for (int64_t q = 0; q < queries; ++q)
            topks[q] = {entries.get() + q * capacity, 0, capacity, std::min(k, rows)};
    }
    std::unique_ptr<Entry[]> entries;
    std::vector<float> thresholds;  // NaN: nothing is below it
    std::vector<TopK> topks;
};

// The first stage: queries [begin, end) against every row, at most `keep` entries each, best first,
// into out [end - begin, keep] with their counts.
Status scan_all(const Kernels& kernels, const Rows& rows, const Queries& queries, int64_t begin,
                int64_t end, Metric metric, int64_t dim, int64_t keep, int threads, Entry* out,
                int64_t* counts) {
    const Panel panel(queries, begin, end, dim, metric);
    const int64_t tiles = (rows.n + TILE - 1) / TILE, tail = dim - rows.packed_dim;
    threads = threads_for(double(rows.n) * dim * (end - begin + 1), threads);
    // Many queries are shared out, each thread seeing every row: its gates close sooner than those
    // of two threads that see half the rows each. Few queries: the rows are shared out.
    const std::vector<Panel::Group>& groups = panel.groups();
    const int64_t parts = int64_t(groups.size()) >= 2 * threads ? threads : 1;
    auto first_group = [&](int64_t part) { return part * int64_t(groups.size()) / parts; };
    auto first_query = [&](int64_t part) {
        return part < parts ? groups[first_group(part)].first : end - begin;
    };
    std::vector<std::unique_ptr<Kept>> kept(threads);
    std::atomic<bool> finite{true};
    std::deque<Ranges> ranges;
    for (int64_t part = 0; part < parts; ++part)
        ranges.emplace_back(tiles, std::clamp<int64_t>(tiles / (threads * 8), 1, 64));
    parallel(threads, [&](int thread) {
        const int64_t part = thread % parts, offset = first_query(part);
        kept[thread].reset(new Kept(first_query(part + 1) - offset, keep, rows.n));
        Kept& mine = *kept[thread];
        std::vector<float> unpacked(tail * TILE);
        const void* pointers[TILE];
        float sqnorm[TILE], scale[TILE];
        Scan scan = {};
        scan.row_scale = scale;
        scan.row_sqnorm = sqnorm;
        for (int64_t tile, last; ranges[part].next(&tile, &last);) {
            for (; tile < last; ++tile) {
                scan.first_row = tile * TILE;
                scan.rows = int(std::min<int64_t>(TILE, rows.n - scan.first_row));
                scan.segments[0] = {rows.packed + tile * rows.packed_dim * TILE, rows.packed_dim};
                scan.segments[1] = {unpacked.data(), tail};
                if (tail > 0) {
                    row_pointers(rows, scan.first_row, scan.rows, rows.packed_dim, pointers);
                    if (!kernels.pack(pointers, rows.dtype, scan.rows, tail, unpacked.data()))
                        finite = false;
                }
                if (metric == Metric::COSINE) {
                    std::fill(sqnorm, sqnorm + TILE, 0.0f);
                    for (const Segment& segment : scan.segments) kernels.sqnorms(segment, sqnorm);
                    for (int r = 0; r < TILE; ++r) scale[r] = inverse_norm(sqnorm[r]);
                }
                for (int64_t g = first_group(part); g < first_group(part + 1); ++g) {
                    const Panel::Group& group = groups[g];
                    scan.panel = group.data;
                    scan.query_scale = panel.scales() + group.first;
                    scan.topk = mine.topks.data() + group.first - offset;
                    scan.thresholds = mine.thresholds.data() + group.first - offset;
                    kernels.scan[int(metric)][group.size - 1](scan);
                }
            }
        }
    });
    if (!finite) return Status::NOT_FINITE;

    std::atomic<bool> overflow{false};
    Ranges merges(end - begin, 8);
    auto merge = [&](int64_t q, std::vector<Entry>& all) {
        all.clear();
        for (int thread = 0; thread < threads; ++thread) {
            const int64_t part = thread % parts;
            if (q < first_query(part) || q >= first_query(part + 1)) continue;
            const TopK& topk = kept[thread]->topks[q - first_query(part)];
            all.insert(all.end(), topk.entries, topk.entries + topk.count);
        }
        counts[q] = std::min<int64_t>(keep, all.size());
        if (counts[q] < int64_t(all.size()))
            std::nth_element(all.begin(), all.begin() + counts[q], all.end(), better);
        std::sort(all.begin(), all.begin() + counts[q], better);
        std::copy(all.begin(), all.begin() + counts[q], out + q * keep);
        if (beyond_float(all.data(), counts[q])) overflow = true;
    };
    parallel(std::min<int64_t>(threads, end - begin), [&](int) {
        std::vector<Entry> all;
        for (int64_t q, last; merges.next(&q, &last);)
            for (; q < last; ++q) merge(q, all);
    });
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

// Carries one query's candidates from column `from` to column `to` and orders the best `keep` of
// them first.
Status advance_all(const Kernels& kernels, const Rows& rows, const float* query, Metric metric,
                   int64_t from, int64_t to, int64_t keep, std::vector<float>& tile,
                   std::vector<Entry>& candidates) {
    const void* pointers[TILE];
    float sums[TILE], sqnorm[TILE];
    const float scale = metric == Metric::COSINE ? Panel::query_scale(query, to) : 1.0f;
    const int64_t size = element_size(rows.dtype), count = candidates.size();
    for (int64_t first = 0; first < count; first += TILE) {
        const int n = int(std::min<int64_t>(TILE, count - first));
        Entry* group = candidates.data() + first;
        std::fill(sums, sums + TILE, 0.0f);
        std::fill(sqnorm, sqnorm + TILE, 0.0f);
        for (int r = 0; r < n; ++r) {
            sums[r] = group[r].partial;
            sqnorm[r] = group[r].sqnorm;
        }
        for (int64_t column = from; column < to; column += COLUMN_BLOCK) {
            const Segment segment = {tile.data(), std::min(COLUMN_BLOCK, to - column)};
            for (int r = 0; r < n; ++r)
                pointers[r] =
                    static_cast<const char*>(rows.tail) +
                    (row_of(group[r].key) * rows.stride + column - rows.packed_dim) * size;
            if (!kernels.pack(pointers, rows.dtype, n, segment.cols, tile.data()))
                return Status::NOT_FINITE;
            kernels.advance(metric, segment, query + column, sums);
            if (metric == Metric::COSINE) kernels.sqnorms(segment, sqnorm);
        }
        for (int r = 0; r < n; ++r) {
            const float score =
                metric == Metric::COSINE ? sums[r] * (inverse_norm(sqnorm[r]) * scale) : sums[r];
            group[r] = {make_key(score, row_of(group[r].key)), sums[r], sqnorm[r]};
        }
    }
    keep = std::min(keep, count);
    if (keep < count)
        std::nth_element(candidates.begin(), candidates.begin() + keep, candidates.end(), better);
    std::sort(candidates.begin(), candidates.begin() + keep, better);
    candidates.resize(keep);
    return beyond_float(candidates.data(), keep) ? Status::OVERFLOW_ : Status::OK;
}

void write(const Entry* entries, int64_t count, int64_t k, float* scores, int64_t* ids) {
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = score_of(entries[i].key);
        ids[i] = row_of(entries[i].key);
    }
    std::fill(scores + count, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + count, ids + k, -1);
}

void check_rows(const Rows& rows) {
    if (rows.n > 0xffffffffll) throw std::length_error("more than 2^32 - 1 rows");
}

// Runs fn(query, scratch) -> Status for every query on as many threads as `multiplies` are worth.
template <class Fn>
Status each_query(int64_t count, double multiplies, int threads, const Fn& fn) {
    std::atomic<Status> status{Status::OK};
    Ranges ranges(count, 1);
    threads = int(std::min<int64_t>(threads_for(multiplies, threads), std::max<int64_t>(count, 1)));
    parallel(threads, [&](int) {
        std::vector<float> tile(COLUMN_BLOCK * TILE);
        std::vector<Entry> candidates;
        for (int64_t q, last; ranges.next(&q, &last);) {
            const Status mine = fn(q, tile, candidates);
            if (mine != Status::OK) status = mine;
        }
    });
    return status;
}

}  // namespace

float shrink(TopK& topk) {
    Entry* kth = topk.entries + topk.k - 1;
    std::nth_element(topk.entries, kth, topk.entries + topk.count, better);
    topk.count = topk.k;
    return score_of(kth->key);
}

Status search(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& stages, int threads, float* scores, int64_t* ids) {
    check_rows(rows);
    const Stage first = stages.front();
    const int64_t k = stages.back().keep, keep = std::min(first.keep, rows.n);
    const int64_t per_query = sizeof(Entry) * (threads + 1) * (keep + spare(keep));
    const int64_t pass =
        std::max<int64_t>(1, std::min(std::max<int64_t>(96, PANEL_BYTES / (4 * first.dim)),
                                      CANDIDATE_BYTES / per_query));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t end = std::min(begin + pass, queries.n);
        std::unique_ptr<Entry[]> entries(new Entry[(end - begin) * keep + 1]);
        std::vector<int64_t> counts(end - begin);
        Status status = scan_all(kernels, rows, queries, begin, end, metric, first.dim, keep,
                                 threads, entries.get(), counts.data());
        if (status != Status::OK) return status;
        const double multiplies =
            stages.size() > 1 ? double(end - begin) * keep * (stages[1].dim - first.dim) : 0.0;
        status = each_query(
            end - begin, multiplies, threads,
            [&](int64_t q, std::vector<float>& tile, std::vector<Entry>& candidates) {
                const float* query = queries.data + (begin + q) * queries.stride;
                candidates.assign(entries.get() + q * keep, entries.get() + q * keep + counts[q]);
                for (size_t s = 1; s < stages.size(); ++s) {
                    const Status mine =
                        advance_all(kernels, rows, query, metric, stages[s - 1].dim, stages[s].dim,
                                    stages[s].keep, tile, candidates);
                    if (mine != Status::OK) return mine;
                }
                write(candidates.data(), candidates.size(), k, scores + (begin + q) * k,
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
    check_rows(rows);
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
                              write(mine.data(), mine.size(), k, scores + q * k, ids + q * k);
                          return status;
                      });
}

Status pack_rows(const Kernels& kernels, const void* data, DType dtype, int64_t stride, int64_t n,
                 int64_t cols, int threads, float* tiles) {
    const Rows rows = {nullptr, 0, data, dtype, stride, n};
    std::atomic<bool> finite{true};
    Ranges ranges((n + TILE - 1) / TILE, 64);
    parallel(threads_for(double(n) * cols, threads), [&](int) {
        const void* pointers[TILE];
        for (int64_t tile, last; ranges.next(&tile, &last);)
            for (; tile < last; ++tile) {
                const int count = int(std::min<int64_t>(TILE, n - tile * TILE));
                row_pointers(rows, tile * TILE, count, 0, pointers);
                if (!kernels.pack(pointers, dtype, count, cols, tiles + tile * cols * TILE))
                    finite = false;
            }
    });
    return finite ? Status::OK : Status::NOT_FINITE;
}

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available;  // best first
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f")) available.push_back(avx512_kernels());
    if (avx2) available.push_back(avx2_kernels());
#endif
    available.push_back(&portable_kernels());
    return available;
}

}  // namespace mrl
