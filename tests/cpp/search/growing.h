// A database that grows in place while it is searched, as mrl_fast.search.index does it: one thread
// appends and removes rows, others search the states it leaves.
#pragma once

#include <memory>
#include <mutex>

#include "vectors.h"

// One state: the first rows of a table, some of them removed. Nothing it points to changes.
struct State {
    struct Block {
        Block(const Rows& of, int64_t rows, int64_t row_bytes)
            : capacity(rows),
              suffix(rows * row_bytes),
              ids(rows, -7),
              stats((TAIL_NORM + of.levels.size()) * rows, NAN),
              packed(rows * of.packed_dim, NAN),
              codes(rows * ((of.code_dim + 3) / 4) * 4, 0xab) {}
        const int64_t capacity;
        std::vector<char> suffix;
        std::vector<int64_t> ids;
        std::vector<float> stats, packed;
        std::vector<uint8_t> codes;
    };
    std::vector<std::shared_ptr<Block>> blocks;
    std::shared_ptr<const std::vector<uint64_t>> live;
    std::vector<float> packed;  // copies of the tile that the next rows go to
    std::vector<uint8_t> codes;
    Rows rows = {};
    bool is_live(int64_t row) const { return (*live)[row / TILE] >> row % TILE & 1; }
};

class Growing {
  public:
    static int64_t id_of(int64_t row) { return 3 * row + (1ll << 40); }

    Growing(const Table& table, Layout layout, const Kernels& kernels)
        : table_(table),
          kernels_(kernels),
          empty_({{},
                  layout.coded ? 0 : layout.prefix,
                  layout.coded ? layout.prefix : 0,
                  table.dtype,
                  {}}),
          row_bytes_((table.width - empty_.packed_dim) * (table.dtype == DType::F32 ? 4 : 2)),
          from_(table.row(0), table.n, table.width, 0, table.width, table.width, table.dtype) {
        for (int64_t level = layout.prefix; level < table.width; level *= 2)
            empty_.levels.push_back(level);
        clear();
    }

    std::shared_ptr<const State> state() const {
        const std::lock_guard<std::mutex> lock(publishing_);
        return state_;
    }

    // Called by one thread. Appends some of the table's next rows and removes a few of those that
    // are there; starts anew at the table's end.
    void step(std::mt19937& random) {
        if (count_ == table_.n) return clear();
        for (int64_t left = std::min<int64_t>(1 + random() % 90, table_.n - count_); left > 0;) {
            if (filled_ == (blocks_.empty() ? 0 : blocks_.back()->capacity)) {
                const int64_t capacity = TILE * (1 + random() % 6);
                blocks_.push_back(std::make_shared<State::Block>(empty_, capacity, row_bytes_));
                filled_ = 0;
            }
            const int64_t n = std::min(left, blocks_.back()->capacity - filled_);
            append(*blocks_.back(), n);
            filled_ += n;
            count_ += n;
            left -= n;
        }
        live_.resize((count_ + TILE - 1) / TILE);
        for (; marked_ < count_; ++marked_) live_[marked_ / TILE] |= uint64_t(1) << marked_ % TILE;
        for (int64_t i = random() % 8; i > 0; --i) {
            const int64_t row = random() % count_;
            live_[row / TILE] &= ~(uint64_t(1) << row % TILE);
        }
        publish();
    }

  private:
    void clear() {
        blocks_.clear();
        live_.clear();
        filled_ = count_ = marked_ = 0;
        publish();
    }

    void append(State::Block& to, int64_t n) {
        for (int64_t i = 0; i < n; ++i) to.ids[filled_ + i] = id_of(count_ + i);
        CHECK(store({kernels_, 1}, empty_,
                    {from_.row(count_), table_.dtype, from_.stride, n, table_.width}, filled_,
                    {empty_.packed_dim ? to.packed.data() : nullptr,
                     empty_.code_dim ? to.codes.data() : nullptr, to.stats.data(), to.capacity,
                     to.suffix.data(), table_.width - empty_.packed_dim}) == Status::OK);
    }

    void publish() {
        const auto next = std::make_shared<State>();
        next->blocks = blocks_;
        next->live = std::make_shared<std::vector<uint64_t>>(live_);
        next->rows = empty_;
        int64_t first = 0;
        for (const auto& block : blocks_) {
            const int64_t n = block == blocks_.back() ? filled_ : block->capacity;
            add_spans(*next, *block, first, n);
            first += n;
        }
        next->rows = next->rows.restricted(next->live->data());
        const std::lock_guard<std::mutex> lock(publishing_);
        state_ = next;
    }

    // Whole tiles in place; the tile of the last rows is a copy, as its other lanes will be
    // written.
    void add_spans(State& to, const State::Block& block, int64_t first, int64_t n) const {
        const int64_t whole = n - n % TILE, packed = empty_.packed_dim * TILE,
                      codes = (empty_.code_dim + 3) / 4 * TILE * 4;
        const auto add = [&](int64_t begin, int64_t rows, const float* tiles,
                             const uint8_t* code_tiles) {
            if (rows == 0) return;
            to.rows.spans.push_back({first + begin, rows, tiles, code_tiles,
                                     block.suffix.data() + begin * row_bytes_,
                                     table_.width - empty_.packed_dim, block.stats.data() + begin,
                                     block.capacity, block.ids.data() + begin});
        };
        add(0, whole, block.packed.data(), block.codes.data());
        if (whole == n) return;
        const float* tile = block.packed.data() + whole / TILE * packed;
        const uint8_t* code_tile = block.codes.data() + whole / TILE * codes;
        to.packed.assign(tile, tile + packed);
        to.codes.assign(code_tile, code_tile + codes);
        add(whole, n - whole, to.packed.data(), to.codes.data());
    }

    const Table& table_;
    const Kernels& kernels_;
    Rows empty_;
    const int64_t row_bytes_;  // of the columns that lie row-major
    const Elements from_;
    std::vector<std::shared_ptr<State::Block>> blocks_;
    std::vector<uint64_t> live_;
    int64_t filled_ = 0, count_ = 0, marked_ = 0;  // rows in the last block, in all, in `live_`
    mutable std::mutex publishing_;
    std::shared_ptr<const State> state_;
};
