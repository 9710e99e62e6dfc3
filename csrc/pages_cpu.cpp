// Memory that the system has not handed out yet is mapped page by page at the first write, which for a large result takes
// longer than the work on it.
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace timerome {

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory), from = (start + kPage - 1) / kPage * kPage,
                  to = (start + uintptr_t(bytes)) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: it may fail
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace timerome
