// What all kernels share: work split among threads.

#pragma once

#include <atomic>
#include <cstdint>

namespace kernels {

// torch's own OpenMP threads, which wait for work without sleeping; cpu.py says where they are (`set_team`). Without
// them one thread does it all.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Team team;

// each(i) for i in [0, count): by as many threads, in any order.
template <typename F>
void parallel(int64_t count, int64_t threads, const F& each) {
  if (threads > count) threads = count;
  if (team == nullptr || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) each(i);
    return;
  }
  struct Work {
    const F& each;
    int64_t count;
    std::atomic<int64_t> next;
  } work{each, count, {0}};
  const auto member = [](void* data) {
    Work& mine = *static_cast<Work*>(data);
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) mine.each(i);
  };
  team(member, &work, static_cast<unsigned>(threads), 0);
}

inline int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

}  // namespace kernels
