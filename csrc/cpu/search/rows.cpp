// The rows that a search may find, and their tiles in order.
#include <algorithm>
#include <cstring>

#include "cpu/search/scan.h"

namespace mrl {
namespace {

// Where fewer than one row in FEW may be found, gathering them costs less than scanning tiles.
constexpr int64_t FEW = 64;

int64_t tiles_of(const Rows& rows) {
    int64_t tiles = 0;
    for (const Span& span : rows.spans) tiles += span.tiles();
    return tiles;
}

}  // namespace

void pack_flags(const uint8_t* flags, int64_t count, uint64_t* words) {
    for (int64_t first = 0; first < count; first += 64, ++words) {
        const int64_t n = std::min<int64_t>(64, count - first);
        uint64_t word = 0;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            uint64_t eight;
            std::memcpy(&eight, flags + first + i, 8);
            eight = (eight | eight >> 4) & 0x0f0f0f0f0f0f0f0fu;
            eight = (eight | eight >> 2) & 0x0303030303030303u;
            eight = (eight | eight >> 1) & 0x0101010101010101u;
            // The product gathers the bytes' bits in its highest byte.
            word |= (eight * 0x0102040810204080u) >> 56 << i;
        }
        for (; i < n; ++i) word |= uint64_t(flags[first + i] != 0) << i;
        *words = word;
    }
}

Rows Rows::restricted(const uint64_t* to) const {
    Rows result = {spans, packed_dim, code_dim, dtype, levels, ladder, width};
    const int64_t all = tiles_of(*this);
    result.mask = to;
    result.tiles.reserve(all);
    for (int64_t tile = 0; tile < all; ++tile) {
        result.masked += __builtin_popcountll(to[tile]);
        if (to[tile]) result.tiles.push_back(tile);
    }
    if (result.masked * FEW < count()) result.gather();
    return result;
}

Rows Rows::numbered() const {
    Rows result = *this;
    for (Span& span : result.spans) span.ids = nullptr;
    return result;
}

void Rows::gather() {
    if (!gathered_rows.empty()) return;
    gathered_rows.reserve(masked);
    int64_t before = 0;
    auto tile = tiles.begin();
    for (const Span& span : spans) {
        for (; tile != tiles.end() && *tile < before + span.tiles(); ++tile)
            for (uint64_t bits = mask[*tile]; bits; bits &= bits - 1)
                gathered_rows.push_back(span.first + (*tile - before) * TILE +
                                        __builtin_ctzll(bits));
        before += span.tiles();
    }
}

TileReader::TileReader(const Kernels& kernels, const Rows& rows, Source source, int64_t dim,
                       int64_t groups, Reading reading)
    : kernels_(kernels),
      rows_(rows),
      source_(source),
      dim_(dim),
      groups_(std::max<int64_t>(groups, 1)),
      reading_(reading),
      head_(std::min(dim, rows.packed_dim)),
      suffix_(of_codes(source) ? 0 : dim - head_),
      code_bytes_(code_tile_bytes(source, source == Source::CODES || !of_codes(source)
                                              ? rows.code_dim
                                              : rows.ladder.dims.back())),
      count_(count(rows, source)),
      unpacked_((gathers(rows, source) ? dim
                 : row_major_columns() ? 0
                                       : suffix_) *
                TILE) {
    int64_t tiles = 0;
    for (const Span& span : rows.spans) {
        starts_.push_back(tiles);
        tiles += span.tiles();
    }
    starts_.push_back(tiles);
}

int64_t TileReader::count(const Rows& rows, Source source) {
    if (gathers(rows, source)) return (int64_t(rows.gathered_rows.size()) + TILE - 1) / TILE;
    return rows.mask ? rows.tiles.size() : tiles_of(rows);
}

TileReader::Place TileReader::place(int64_t i) {
    const int64_t number = rows_.mask ? rows_.tiles[i] : i;
    if (number < starts_[at_] || number >= starts_[at_ + 1])
        at_ = std::upper_bound(starts_.begin(), starts_.end() - 1, number) - starts_.begin() - 1;
    return {&rows_.spans[at_], number - starts_[at_], number};
}

const uint8_t* TileReader::codes(const Place& at) const {
    const Span& span = *at.span;
    const uint8_t* tiles = source_ == Source::SIGNS     ? span.signs
                           : source_ == Source::NIBBLES ? span.nibbles
                                                        : span.codes;
    return tiles + at.tile * code_bytes_;
}

// Spreads the prefetching of a tile over the scans of all groups. What few groups read is a stream,
// which processors prefetch better themselves.
void TileReader::ahead(Scan* scan, const void* tile, int64_t steps, int64_t bytes) const {
    const char* begin = static_cast<const char*>(tile);
    constexpr int64_t FEW_GROUPS = 2;
    if (groups_ <= FEW_GROUPS) {
        scan->ahead = {};
        return;
    }
    scan->ahead = {begin, begin + steps * bytes,
                   std::max<int64_t>(1, (bytes / 64 + groups_ - 1) / groups_)};
}

bool TileReader::read(int64_t tile, Scan* scan) {
    if (gathers(rows_, source_)) return gather(tile, scan);
    const Place here = place(tile);
    span_ = here.span;
    local_ = here.tile;
    const int64_t first = local_ * TILE;
    scan->first_row = span_->first + first;
    scan->rows = int(std::min<int64_t>(TILE, span_->rows - first));
    scan->wanted = ~uint64_t(0) >> (TILE - scan->rows);
    if (rows_.mask) scan->wanted &= rows_.mask[here.number];
    // The tile this many bytes ahead is prefetched: far enough for memory to answer in time.
    constexpr int64_t FAR = 16 << 10;
    const int64_t steps = code_steps(source_, dim_), step_bytes = source_ == Source::SIGNS ? 1 : 4,
                  bytes = TILE *
                          (of_codes(source_) ? steps * step_bytes : head_ * int64_t(sizeof(float))),
                  distance = std::max<int64_t>(1, FAR / std::max<int64_t>(bytes, 1));
    const Place later = place(std::min(tile + distance, count_ - 1));
    if (of_codes(source_)) {
        scan->steps = steps;
        scan->codes = codes(here);
        // A step of signs is one cache line, and a scan reads two steps at once.
        ahead(scan, codes(later), source_ == Source::SIGNS ? steps / 2 : steps,
              TILE * std::max<int64_t>(step_bytes, 2));
        return true;
    }
    const auto packed = [&](const Place& at) {
        return at.span->packed + at.tile * rows_.packed_dim * TILE;
    };
    scan->segments[0] = {packed(here), head_};
    ahead(scan, packed(later), head_, TILE * sizeof(float));
    if (suffix_ > 0) {
        const Place next = place(std::min(tile + 1, count_ - 1));
        point(*span_, local_, pointers_);
        point(*next.span, next.tile, pointers_ + TILE);
    }
    return pack(scan, unpacked_.data());
}

// Points to the suffixes of a tile's rows.
void TileReader::point(const Span& span, int64_t tile, RowColumns* pointers) const {
    const RowColumns first = suffix_at(rows_, span, tile * TILE, rows_.packed_dim);
    const char *at = static_cast<const char*>(first.at),
               *scale = static_cast<const char*>(first.scale);
    const int64_t bytes = span.stride * element_size(rows_.dtype);
    for (int r = 0; r < TILE; ++r) pointers[r] = {at + r * bytes, scale + r * bytes};
}

bool TileReader::pack(Scan* scan, float* tile) {
    const int64_t cols = reading_ == Reading::PACKED ? suffix_ : 0;
    scan->segments[1] = {tile, cols};
    return cols == 0 ||
           kernels_.pack(pointers_, pointers_ + TILE, rows_.dtype, scan->rows, cols, tile);
}

bool TileReader::gather(int64_t tile, Scan* scan) {
    const int64_t first = tile * TILE, last = int64_t(rows_.gathered_rows.size()) - 1;
    scan->first_row = first;
    scan->rows = int(std::min<int64_t>(TILE, last + 1 - first));
    scan->wanted = ~uint64_t(0) >> (TILE - scan->rows);
    float* columns = unpacked_.data();
    for (int r = 0; r < TILE; ++r) {
        const int64_t row = rows_.gathered_rows[std::min(first + r, last)];
        const Span& span = span_of(rows_, row);
        const int64_t local = row - span.first;
        pointers_[r] = suffix_at(rows_, span, local, rows_.packed_dim);
        const int64_t lane = local / TILE * rows_.packed_dim * TILE + local % TILE;
        for (int64_t c = 0; c < head_; ++c) columns[c * TILE + r] = span.packed[lane + c * TILE];
        const int64_t later = rows_.gathered_rows[std::min(first + TILE + r, last)];
        const Span& other = span_of(rows_, later);
        pointers_[TILE + r] = suffix_at(rows_, other, later - other.first, rows_.packed_dim);
    }
    scan->segments[0] = {columns, head_};
    scan->ahead = {};
    return pack(scan, columns + head_ * TILE);
}

}  // namespace mrl
