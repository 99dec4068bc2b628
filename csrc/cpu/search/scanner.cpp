#include "cpu/search/scanner.h"

#include <algorithm>
#include <deque>
#include <mutex>

#include "cpu/threads.h"

namespace mrl {
namespace {

// The scales and terms that turn a tile's sums into a metric's scores.
class Scaling {
  public:
    Scaling(const Kernels& kernels, const Rows& rows, const Queries& queries,
            const FirstStage& stage, const std::vector<CodedQuery>& coded)
        : kernels_(kernels),
          ladder_(rows.ladder),
          metric_(terms_of(stage.metric)),
          source_(stage.source),
          place_(ladder_.place(stage.dim)),
          query_scale_(queries.n, 1.0f),
          factors_(queries.n * 2) {
        // Terms that depend on the query alone change no order and are left out.
        const float* centre = of_codes(source_) ? ladder_.centre : nullptr;
        const double square = centre ? kernels.dot64(centre, centre, stage.dim) : 0.0;
        for (int64_t q = 0; q < queries.n; ++q) {
            const float* query = queries.data + q * queries.stride;
            if (metric_.normalized) query_scale_[q] = query_scale(query, stage.dim);
            query_scale_[q] *= metric_.factor(source_);
            factors_[2 * q] = metric_.squares > 0.0f ? -metric_.squares : query_scale_[q];
            if (metric_.normalized && centre)
                factors_[2 * q + 1] =
                    float(query_scale_[q] * (kernels.dot64(query, centre, stage.dim) - square));
            if (of_codes(source_)) query_scale_[q] *= coded[q].scale;
        }
        std::fill(row_scale_, row_scale_ + TILE, 1.0f);
    }
    // Sets the scales and terms of the tile that was read last; `rest` [TILE] is Σ x² of columns
    // that are not in it.
    void prepare(const TileReader& tiles, const float* rest, Scan* scan) {
        if (source_ == Source::SIGNS || source_ == Source::NIBBLES) {
            const int64_t dims = ladder_.dims.size(), first = SIGN_FACTOR + place_;
            const bool of_signs = source_ == Source::SIGNS;
            scan->row_scale = tiles.stat(of_signs ? first : int64_t(CODE_SCALE), row_scale_);
            if (!ladder_.has_terms()) return;
            scan->term_values[0] = tiles.stat(first + dims, terms_[0]);
            scan->terms = 1;
            if (!metric_.normalized) return;
            scan->term_values[1] = tiles.stat(first + 2 * dims, terms_[1]);
            scan->terms = 2;
        } else if (source_ == Source::CODES) {
            const float *scale = tiles.stat(CODE_SCALE, row_scale_),
                        *norm = tiles.stat(PREFIX_NORM, terms_[0]);
            for (int r = 0; r < scan->rows; ++r) {
                row_scale_[r] = scale[r];
                if (metric_.normalized) row_scale_[r] = norm[r] > 0 ? scale[r] / norm[r] : 0;
                terms_[0][r] = norm[r] * norm[r];  // ‖q‖² changes no order
            }
            scan->row_scale = row_scale_;
            scan->term_values[0] = terms_[0];
            scan->terms = metric_.squares > 0.0f;
        } else if (metric_.normalized) {
            std::fill(sqnorm_, sqnorm_ + TILE, 0.0f);
            for (const Segment& segment : scan->segments) kernels_.sqnorms(segment, sqnorm_);
            for (int r = 0; r < TILE; ++r) row_scale_[r] = inverse_norm(sqnorm_[r] + rest[r]);
            scan->row_scale = row_scale_;
            scan->row_sqnorm = sqnorm_;
        } else if (metric_.factor(source_) != 1.0f) {
            scan->row_scale = row_scale_;  // ones
        }
    }
    void of_group(const Panel::Group& group, Scan* scan) {
        scan->query_scale = query_scale_.data() + group.first;
        scan->term_factors = of_group_;
        for (int64_t i = 0; i < group.size; ++i)
            for (int j = 0; j < 2; ++j)
                of_group_[j * group.size + i] = factors_[2 * (group.first + i) + j];
    }

  private:
    const Kernels& kernels_;
    const Ladder& ladder_;
    const MetricTerms metric_;
    const Source source_;
    const int64_t place_;                       // of the stage's dim among the ladder's
    std::vector<float> query_scale_, factors_;  // factors: [queries, 2], of the first two terms
    float row_scale_[TILE], sqnorm_[TILE], terms_[2][TILE] = {}, of_group_[2 * MAX_GROUP];
};

// The sums of columns that a reader leaves row-major.
class RowMajorSums {
  public:
    RowMajorSums(const Kernels& kernels, const Rows& rows, const Queries& queries,
                 const FirstStage& stage, Reading reading)
        : kernels_(kernels),
          dtype_(rows.dtype),
          first_(std::min(stage.dim, rows.packed_dim)),
          ahead_(rows_ahead((stage.dim - first_) * element_size(rows.dtype))),
          cached_(rows.eligible() * (stage.dim - first_) * element_size(rows.dtype) < CACHED),
          source_(stage.source),
          queries_(queries),
          sums_(reading == Reading::PACKED ? 0 : queries.n * TILE) {}

    // Sums those of the tile that was read last; `seen` learns of all its columns.
    void sum(const TileReader& tiles, const Scan& scan, Seen* seen) {
        const int64_t cols = tiles.row_major_columns();
        if (cols == 0) return;
        std::fill(sums_.begin(), sums_.end(), 0.0f);
        std::fill(squares_, squares_ + TILE, 0.0f);
        // The rows that one query reads are a stream, which processors prefetch better themselves.
        const bool stream = queries_.n == 1 && !cached_;
        const RowColumns* ahead = stream ? nullptr : tiles.row_major() + ahead_;
        kernels_.row_sums[int(source_)]({queries_.data + first_, queries_.stride, int(queries_.n),
                                         tiles.row_major(), ahead, scan.rows, cached_, dtype_, cols,
                                         sums_.data(), squares_});
        float whole[TILE];
        std::copy_n(squares_, TILE, whole);
        kernels_.sqnorms(scan.segments[0], whole);
        seen->squares.add(whole, nullptr, scan.rows);
    }
    const float* squares() const { return squares_; }
    const float* of(int64_t query) const {
        return sums_.empty() ? nullptr : sums_.data() + query * TILE;
    }

  private:
    // Far enough for memory to answer in time.
    static int64_t rows_ahead(int64_t row_bytes) {
        constexpr int64_t FAR = 8 << 10;
        return std::clamp<int64_t>(FAR / std::max<int64_t>(row_bytes, 1) / 4 * 4, 4, TILE);
    }
    const Kernels& kernels_;
    const DType dtype_;
    static constexpr int64_t CACHED = 12 << 20;  // bytes that last-level caches hold
    const int64_t first_, ahead_;  // the first of these columns; rows from one to that prefetched
    const bool cached_;
    const Source source_;
    const Queries queries_;
    std::vector<float> sums_;   // [queries, TILE]
    float squares_[TILE] = {};  // Σ x² of these columns
};

}  // namespace

std::vector<CodedQuery> Scanner::code_all(const Kernels& kernels, const Ladder& ladder,
                                          const Queries& queries, const FirstStage& stage) {
    std::vector<CodedQuery> coded;
    std::vector<float> less(stage.dim);
    const float* centre = stage.source == Source::CODES ? nullptr : ladder.centre;
    for (int64_t q = 0; q < queries.n && of_codes(stage.source); ++q) {
        centred(queries.data + q * queries.stride, centre, stage.dim, less.data());
        rotate(ladder, stage.dim, less.data());
        coded.push_back(code_query(kernels, stage.source, less.data(), stage.dim));
    }
    return coded;
}

Seen Scanner::run(int64_t tiles, const std::function<int64_t(int64_t)>& tile_at, int64_t keep,
                  const std::vector<float>& gates, std::vector<std::vector<Entry>>* best) const {
    // Choosing rows costs a query as much as some multiply-adds.
    constexpr double CHOOSING = 8192.0;
    const double multiplies =
        double(tiles) * TILE * stage_.dim * (queries_.n + 1) + CHOOSING * queries_.n;
    const int threads = threads_for(multiplies, run_.threads);
    // Many queries are divided among the threads, and each thread sees every row: its gates close
    // sooner than if it saw a part of them. With few queries, the rows are divided.
    const std::vector<Panel::Group>& groups = panel_.groups();
    const int64_t parts = int64_t(groups.size()) >= 2 * threads ? threads : 1;
    auto first_group = [&](int64_t part) { return part * int64_t(groups.size()) / parts; };
    auto first_query = [&](int64_t part) {
        return part < parts ? groups[first_group(part)].first : queries_.n;
    };
    Seen seen;
    std::mutex merging;
    std::deque<Ranges> ranges;
    for (int64_t part = 0; part < parts; ++part)
        ranges.emplace_back(tiles, std::clamp<int64_t>(tiles / (threads * 8), 1, 64));
    parallel(threads, [&](int thread) {
        const int64_t part = thread % parts, offset = first_query(part),
                      count = first_query(part + 1) - offset;
        Kept mine(gates.data() + offset, count, keep, rows_.count());
        TileReader reader(run_.kernels, rows_, stage_.source, stage_.dim,
                          first_group(part + 1) - first_group(part), reading_);
        Scaling scaling(run_.kernels, rows_, queries_, stage_, coded_);
        RowMajorSums rest(run_.kernels, rows_,
                          {queries_.data + offset * queries_.stride, count, queries_.stride},
                          stage_, reading_);
        Seen here;
        Scan scan = {};
        for (int64_t i, last; ranges[part].next(&i, &last);) {
            for (; i < last; ++i) {
                poll();
                here.finite &= reader.read(tile_at(i), &scan);
                rest.sum(reader, scan, &here);
                scaling.prepare(reader, rest.squares(), &scan);
                for (int64_t g = first_group(part); g < first_group(part + 1); ++g) {
                    const Panel::Group& group = groups[g];
                    panel_.put(group, &scan);
                    scaling.of_group(group, &scan);
                    scan.rest = rest.of(group.first - offset);
                    scan.topk = mine.topks.data() + group.first - offset;
                    scan.thresholds = mine.thresholds.data() + group.first - offset;
                    run_.kernels.scan[int(stage_.source)][group.size - 1](scan);
                }
            }
        }
        const std::lock_guard<std::mutex> lock(merging);
        seen.finite &= here.finite;
        seen.squares.add(here.squares);
        for (int64_t q = offset; q < first_query(part + 1); ++q) {
            const TopK& topk = mine.topks[q - offset];
            (*best)[q].insert((*best)[q].end(), topk.entries, topk.entries + topk.count);
        }
    });
    return seen;
}

}  // namespace mrl
