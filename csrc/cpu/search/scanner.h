// Scans tiles for all queries and keeps each one's best.
#pragma once

#include <algorithm>
#include <functional>

#include "cpu/search/scan.h"

namespace mrl {

// What a scan saw of the rows.
struct Seen {
    bool finite = true;
    Range squares;  // Σ x² of rows, where columns are left row-major
};

class Scanner {
  public:
    Scanner(const Run& run, const Rows& rows, const Queries& queries, const FirstStage& stage,
            Reading reading)
        : run_(run),
          rows_(rows),
          queries_(queries),
          stage_(stage),
          reading_(reading),
          coded_(code_all(run.kernels, rows.ladder, queries, stage)),
          panel_(of_codes(stage.source)
                     ? Panel(coded_)
                     : Panel(queries, reading == Reading::PACKED
                                          ? stage.dim
                                          : std::min(stage.dim, rows.packed_dim))) {}

    // Appends to best[q] at least the `keep` best rows of tiles tile_at(0), ..., tile_at(tiles − 1)
    // that beat the query's gate. tile_at ascends. A sample keeps fewer rows than the stage does.
    Seen run(int64_t tiles, const std::function<int64_t(int64_t)>& tile_at, int64_t keep,
             const std::vector<float>& gates, std::vector<std::vector<Entry>>* best) const;

  private:
    static std::vector<CodedQuery> code_all(const Kernels& kernels, const Ladder& ladder,
                                            const Queries& queries, const FirstStage& stage);
    const Run run_;
    const Rows& rows_;
    const Queries queries_;
    const FirstStage stage_;
    const Reading reading_;
    const std::vector<CodedQuery> coded_;
    const Panel panel_;
};

}  // namespace mrl
