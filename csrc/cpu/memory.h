// Memory for large arrays.
#pragma once

#include <cstddef>

namespace mrl {

constexpr size_t HUGE_PAGE = 2 << 20;

// Asks the system, which may refuse, for huge pages wherever a whole one fits between `begin` and
// the end: with small pages, page walks cost up to a fifth of a scan.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace mrl
