#include "cpu/search/equal_rows.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <tuple>

#include "cpu/threads.h"

namespace mrl {
namespace {

struct Hashed {
    uint64_t hash;
    int64_t row, bit;  // bit: the row's place in the mask
    bool operator<(const Hashed& other) const {
        return std::tie(hash, row) < std::tie(other.hash, other.row);
    }
};

// Hashes each row of a tile; equal rows have equal hashes.
void hash_tile(const Scan& scan, uint64_t* hashes) {
    std::fill(hashes, hashes + TILE, 0);
    for (const Segment& segment : scan.segments)
        for (int64_t c = 0; c < segment.cols; ++c)
            for (int r = 0; r < TILE; ++r) {
                uint32_t bits;
                std::memcpy(&bits, segment.tile + c * TILE + r, sizeof bits);
                hashes[r] = (hashes[r] ^ bits) * 0x9e3779b97f4a7c15u;
                hashes[r] ^= hashes[r] >> 29;
            }
}

bool equal(const Rows& rows, int64_t a, int64_t b, int64_t dim) {
    const Span *of_a = &span_of(rows, a), *of_b = &span_of(rows, b);
    a -= of_a->first, b -= of_b->first;
    const int64_t packed = std::min(rows.packed_dim, dim);
    if (dim > packed &&
        std::memcmp(suffix_at(rows, *of_a, a, packed), suffix_at(rows, *of_b, b, packed),
                    (dim - packed) * element_size(rows.dtype)) != 0)
        return false;
    const auto at = [&](const Span& span, int64_t row, int64_t c) {
        return span.packed + (row / TILE * rows.packed_dim + c) * TILE + row % TILE;
    };
    for (int64_t c = 0; c < packed; ++c)
        if (std::memcmp(at(*of_a, a, c), at(*of_b, b, c), sizeof(float)) != 0) return false;
    return true;
}

}  // namespace

EqualRows::EqualRows(const Kernels& kernels, const Rows& rows, int64_t dim, int threads) {
    const int64_t tiles = TileReader::count(rows, Source::PRODUCT);
    threads = threads_for(double(tiles) * TILE * dim * 4, threads);
    std::vector<Hashed> hashed;
    std::mutex merging;
    Ranges ranges(tiles, 8);
    parallel(threads, [&](int) {
        TileReader reader(kernels, rows, Source::PRODUCT, dim, 1);
        std::vector<Hashed> mine;
        uint64_t hashes[TILE];
        Scan scan = {};
        for (int64_t at, last; ranges.next(&at, &last);)
            for (; at < last; ++at) {
                reader.read(at, &scan);
                hash_tile(scan, hashes);
                const int64_t number = rows.mask ? rows.tiles[at] : at;
                for (uint64_t lanes = scan.wanted; lanes; lanes &= lanes - 1) {
                    const int r = __builtin_ctzll(lanes);
                    mine.push_back({hashes[r], scan.first_row + r, number * TILE + r});
                }
            }
        const std::lock_guard<std::mutex> lock(merging);
        hashed.insert(hashed.end(), mine.begin(), mine.end());
    });
    std::sort(hashed.begin(), hashed.end());
    std::vector<int64_t> first(hashed.size());  // index of the first row with the same hash
    for (size_t i = 0; i < hashed.size(); ++i)
        first[i] = i > 0 && hashed[i].hash == hashed[i - 1].hash ? first[i - 1] : int64_t(i);
    members_.resize(hashed.size());
    each(hashed.size(), threads, [&](int64_t i) {
        const int64_t row = hashed[i].row, other = hashed[first[i]].row;
        // A row whose hash equals another vector's by chance stands for itself.
        members_[i] = {row == other || !equal(rows, row, other, dim) ? row : other, row};
    });
    int64_t words = 0;
    for (const Span& span : rows.spans) words += span.tiles();
    mask_.assign(words, 0);
    for (size_t i = 0; i < hashed.size(); ++i)
        if (members_[i].first == hashed[i].row) {
            mask_[hashed[i].bit / TILE] |= uint64_t(1) << hashed[i].bit % TILE;
            ++distinct_;
        }
    std::sort(members_.begin(), members_.end());
}

std::vector<Final> EqualRows::expand(const std::vector<Final>& firsts, int64_t k) const {
    std::vector<Final> all;
    for (auto at = firsts.begin(); at != firsts.end() && int64_t(all.size()) < k;) {
        // Rows of one score are in ascending order, whichever vectors they have.
        const size_t begin = all.size();
        const double score = at->score;
        for (; at != firsts.end() && at->score == score; ++at) {
            auto member = std::lower_bound(members_.begin(), members_.end(),
                                           std::make_pair(at->row, at->row));
            for (int64_t i = 0; i < k && member != members_.end() && member->first == at->row;
                 ++i, ++member)
                all.push_back({score, member->second});
        }
        std::sort(all.begin() + begin, all.end());
    }
    return all;
}

}  // namespace mrl
