// Behind PyTorch's CPU tensors while a streamed pass runs: blocks are kept when they are freed, counted by pass, and
// refused past a cap before the kernel is asked.
//
// All blocks lie in one range of address space, reserved once and without access, so an address tells whose it is. The
// range is tiled by extents: *used* ones are tensors, *free* ones are kept, *bare* ones have no memory. Bare pages are
// made writable when they are handed out, which is when RLIMIT_DATA counts them, and mapped anew without access when
// they go back. A request takes the smallest free extent that is large enough. Where there is none it takes the place
// with the fewest bare pages in it, and other free extents go back as far as the pass has no room for both: holes cost
// page faults, and never a refusal.
//
// A thread is in the pass that it entered last. What it allocates there counts for that pass and for those around it
// until it is freed, on whatever thread. In no pass, and for small blocks, PyTorch's own allocator is asked. This one
// stays in front of it from the first pass on: oneDNN frees through the allocator that is registered by then.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr size_t kLeast = size_t(1) << 16;  // bytes of the smallest block that is kept
constexpr size_t kUnlimited = SIZE_MAX / 2;  // no sum of it and a number of bytes overflows

struct Pass {
  const size_t cap;   // bytes in use at most
  const size_t keep;  // bytes in use and free at most
  Pass* outer = nullptr;
  size_t in_use = 0, most_in_use = 0, peak = 0;  // peak: in use and free
  int references = 1;
  bool is_over = false;

  size_t room_beside(size_t used) const { return keep - std::min(keep, used); }
};

void release(Pass* pass) {
  while (pass && --pass->references == 0) delete std::exchange(pass, pass->outer);
}

Pass* hold(Pass* pass) {
  if (pass) pass->references++;
  return pass;
}

struct Extent {
  enum State { kBare, kFree, kUsed } state = kBare;
  size_t nbytes = 0;
  Pass* owner = nullptr;                   // of a used one
  uint64_t freed = 0;                      // when: a number that grows
  Extent *newer = nullptr, *older = nullptr;  // free ones of a size
  uintptr_t start = 0;
};

// Free extents, in a list for every power of two, the last one that was freed in front. Nothing here allocates.
class FreeLists {
 public:
  size_t nbytes() const { return nbytes_; }

  void add(Extent& extent) {
    Extent*& first = newest_[index(extent.nbytes)];
    extent.state = Extent::kFree, extent.newer = nullptr, extent.older = first;
    if (first) first->newer = &extent;
    first = &extent;
    if (!extent.older) oldest_[index(extent.nbytes)] = &extent;
    nbytes_ += extent.nbytes;
  }

  void remove(Extent& extent) {
    size_t at = index(extent.nbytes);
    (extent.newer ? extent.newer->older : newest_[at]) = extent.older;
    (extent.older ? extent.older->newer : oldest_[at]) = extent.newer;
    nbytes_ -= extent.nbytes;
  }

  Extent* smallest(size_t nbytes) const {
    for (size_t at = index(nbytes); at < newest_.size(); at++) {
      Extent* best = nullptr;
      for (Extent* each = newest_[at]; each; each = each->older)
        if (each->nbytes >= nbytes && (!best || each->nbytes < best->nbytes)) best = each;
      if (best) return best;
    }
    return nullptr;
  }

  Extent* longest_free() const {
    Extent* found = nullptr;
    for (Extent* each : oldest_)
      if (each && (!found || each->freed < found->freed)) found = each;
    return found;
  }

 private:
  static size_t index(size_t nbytes) { return std::bit_width(nbytes); }

  std::array<Extent*, 65> newest_{}, oldest_{};
  size_t nbytes_ = 0;
};

// The range and its extents. No two neighbours are both free or both bare.
class Space {
 public:
  bool reserve() {
    page_ = size_t(sysconf(_SC_PAGESIZE));
    for (size_t nbytes = size_t(1) << 40; nbytes >= size_t(1) << 36; nbytes /= 2) {
      void* start = mmap(nullptr, nbytes, PROT_NONE, kMapping, -1, 0);
      if (start == MAP_FAILED) continue;
      start_ = uintptr_t(start), end_ = start_ + nbytes;
      put(start_, nbytes);
      return true;
    }
    return false;
  }

  bool owns(const void* data) const { return uintptr_t(data) >= start_ && uintptr_t(data) < end_; }
  size_t free_bytes() const { return free_.nbytes(); }
  const std::map<uintptr_t, Extent>& extents() const { return extents_; }
  size_t rounded(size_t nbytes) const { return (nbytes + page_ - 1) / page_ * page_; }

  // A block of whole pages for a pass; null if the pass or the kernel has no room for it.
  void* take(size_t nbytes, Pass* pass) {
    size_t most_free = kUnlimited;
    for (Pass* each = pass; each; each = each->outer) {
      if (each->in_use + nbytes > each->cap) return nullptr;
      most_free = std::min(most_free, each->room_beside(each->in_use + nbytes));
    }
    Extent* found = free_.smallest(nbytes);
    uintptr_t start = found ? found->start : with_fewest_bare_pages(nbytes);
    if (!start) return nullptr;
    Extent& block = cut_out(start, nbytes);
    give_back(most_free);
    if (!found && !commit(block)) {
      bare(block);
      return nullptr;
    }
    block.owner = hold(pass);
    for (Pass* each = pass; each; each = each->outer) {
      each->in_use += nbytes;
      each->most_in_use = std::max(each->most_in_use, each->in_use);
      each->peak = std::max(each->peak, each->in_use + free_.nbytes());
    }
    return reinterpret_cast<void*>(start);
  }

  // Take back a block, and keep it if there is room.
  void give(void* data, size_t most_free) {
    Extent& block = extents_.find(uintptr_t(data))->second;
    for (Pass* each = block.owner; each; each = each->outer) {
      each->in_use -= block.nbytes;
      if (!each->is_over) most_free = std::min(most_free, each->room_beside(each->in_use));
    }
    release(std::exchange(block.owner, nullptr));
    block.freed = ++time_;
    merge(block, Extent::kFree);
    give_back(most_free, true);
  }

  // Give memory back until no more than so many bytes are free, those first that have been free the longest. Only
  // whole extents leave nothing to be allocated here.
  void give_back(size_t most, bool whole = false) {
    while (free_.nbytes() > most) {
      Extent* extent = free_.longest_free();
      size_t surplus = rounded(free_.nbytes() - most);
      if (surplus < extent->nbytes && !whole) extent = &split(*extent, extent->nbytes - surplus);
      free_.remove(*extent);
      bare(*extent);
    }
  }

 private:
  static constexpr int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  Extent& put(uintptr_t start, size_t nbytes) {
    Extent& extent = extents_[start];
    extent.start = start, extent.nbytes = nbytes;
    return extent;
  }

  // Leave `nbytes` to a free or bare extent, and make another one of the rest.
  Extent& split(Extent& extent, size_t nbytes) {
    // First, since it may throw.
    Extent& rest = put(extent.start + nbytes, extent.nbytes - nbytes);
    rest.state = extent.state, rest.freed = extent.freed;
    if (extent.state == Extent::kFree) free_.remove(extent);
    extent.nbytes = nbytes;
    if (extent.state == Extent::kFree) free_.add(extent), free_.add(rest);
    return rest;
  }

  // Where among free and bare extents so many bytes have the fewest bare ones; null if the range is full.
  uintptr_t with_fewest_bare_pages(size_t nbytes) const {
    uintptr_t best = 0;
    size_t most = 0;
    for (auto first = extents_.begin(); first != extents_.end();) {
      auto last = first;
      size_t gap = 0;
      for (; last != extents_.end() && last->second.state != Extent::kUsed; ++last) gap += last->second.nbytes;
      if (gap >= nbytes) {
        uintptr_t end = first->first + gap;
        for (auto each = first; each != last; ++each) {
          uintptr_t start = std::min(each->first, end - nbytes);
          size_t writable = free_within(first, last, start, start + nbytes);
          if (!best || writable > most) best = start, most = writable;
        }
      }
      first = last == extents_.end() ? last : std::next(last);
    }
    return best;
  }

  using Position = std::map<uintptr_t, Extent>::const_iterator;

  static size_t free_within(Position first, Position last, uintptr_t start, uintptr_t end) {
    size_t nbytes = 0;
    for (; first != last && first->first < end; ++first) {
      uintptr_t from = std::max(start, first->first), to = std::min(end, first->first + first->second.nbytes);
      if (first->second.state == Extent::kFree && to > from) nbytes += to - from;
    }
    return nbytes;
  }

  // One used extent of the free and bare ones in so many bytes; what is cut off on either side stays as it was.
  Extent& cut_out(uintptr_t start, size_t nbytes) {
    for (uintptr_t at : {start, start + nbytes}) {
      Extent& around = std::prev(extents_.upper_bound(at))->second;
      if (around.start < at && at < around.start + around.nbytes) split(around, at - around.start);
    }
    auto first = extents_.find(start), last = extents_.lower_bound(start + nbytes);
    for (auto each = first; each != last; ++each)
      if (each->second.state == Extent::kFree) free_.remove(each->second);
    extents_.erase(std::next(first), last);
    first->second.nbytes = nbytes;
    first->second.state = Extent::kUsed;
    return first->second;
  }

  // Make an extent in no list one of free or bare memory, together with its neighbours that are that too.
  void merge(Extent& extent, Extent::State state) {
    auto at = extents_.find(extent.start), after = std::next(at);
    auto join = [&](Extent& into, Extent& gone) {
      into.nbytes += gone.nbytes, into.freed = std::max(into.freed, gone.freed);
    };
    if (after != extents_.end() && after->second.state == state) {
      if (state == Extent::kFree) free_.remove(after->second);
      join(at->second, after->second);
      extents_.erase(after);
    }
    if (at != extents_.begin() && std::prev(at)->second.state == state) {
      auto before = std::prev(at);
      if (state == Extent::kFree) free_.remove(before->second);
      join(before->second, at->second);
      extents_.erase(at);
      at = before;
    }
    at->second.state = state;
    if (state == Extent::kFree) free_.add(at->second);
  }

  // Have the kernel give memory for a whole extent, if need be for all that is free; whether it did.
  bool commit(const Extent& extent) {
    auto grant = [&] { return mprotect(address(extent), extent.nbytes, PROT_READ | PROT_WRITE) == 0; };
    if (!grant()) {
      give_back(0);
      if (!grant()) return false;
    }
    // A first touch of 16 MiB takes 2 ms instead of 9. Where there are no large pages, none are used.
    madvise(address(extent), extent.nbytes, MADV_HUGEPAGE);
    return true;
  }

  // Give an extent's memory back to the kernel.
  void bare(Extent& extent) {
    TORCH_INTERNAL_ASSERT(
        mmap(address(extent), extent.nbytes, PROT_NONE, kMapping | MAP_FIXED, -1, 0) != MAP_FAILED);
    merge(extent, Extent::kBare);
  }

  static void* address(const Extent& extent) { return reinterpret_cast<void*>(extent.start); }

  std::map<uintptr_t, Extent> extents_;
  FreeLists free_;
  uintptr_t start_ = 0, end_ = 0;
  size_t page_ = 0;
  uint64_t time_ = 0;
};

// Never destroyed: tensors may be freed while the process ends.
std::mutex& mutex = *new std::mutex;
Space& space = *new Space;
c10::Allocator* before = nullptr;
thread_local Pass* entered = nullptr;
size_t most_free = 0;  // what may be kept while nothing is allocated: the last pass's

Pass* present() {
  while (entered && entered->is_over) release(std::exchange(entered, hold(entered->outer)));
  return entered;
}

[[noreturn]] void refuse(size_t nbytes, size_t in_use, size_t cap) {
  c10::profiledCPUMemoryReporter().OutOfMemory(nbytes);
  C10_THROW_ERROR(
      Error,
      c10::str("DefaultCPUAllocator: can't allocate memory: you tried to allocate ", nbytes, " bytes; ", in_use,
               " are in use", cap < kUnlimited ? c10::str(" of the ", cap, " that the pass may take") : ""));
}

void give(void* data) {
  if (!space.owns(data)) return before->raw_deallocate(data);
  c10::profiledCPUMemoryReporter().Delete(data);
  std::lock_guard<std::mutex> guard(mutex);
  space.give(data, most_free);
}

struct KeptBlocks final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nbytes < kLeast || !entered ? nullptr : take(nbytes);
    if (!data) data = before->raw_allocate(nbytes);
    return {data, data, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { default_copy_data(to, from, nbytes); }

  // Null if this thread is in no pass any more.
  static void* take(size_t nbytes) {
    std::unique_lock<std::mutex> guard(mutex);
    Pass* pass = present();
    if (!pass) return nullptr;
    void* data = nbytes < kUnlimited ? space.take(space.rounded(nbytes), pass) : nullptr;
    if (!data) {
      size_t in_use = pass->in_use, cap = pass->cap;
      guard.unlock();
      refuse(nbytes, in_use, cap);
    }
    guard.unlock();
    c10::profiledCPUMemoryReporter().New(data, nbytes);
    return data;
  }
} kept_blocks;

}  // namespace

extern "C" {

// Reserve the range and stand in front of PyTorch's allocator; 0 if that cannot be done.
int kept_blocks_install() {
  static const bool is_installed = [] {
    before = c10::GetCPUAllocator();
    if (!before || !before->raw_deleter() || !space.reserve()) return false;
    c10::SetCPUAllocator(&kept_blocks);
    // In a forked child the lock is free, and the thread in no pass.
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { entered = nullptr, mutex.unlock(); });
    return c10::GetCPUAllocator() == &kept_blocks;
  }();
  return is_installed;
}

Pass* kept_blocks_pass(size_t cap, size_t keep) {
  return new Pass{.cap = std::min(cap, kUnlimited), .keep = std::min(keep, kUnlimited)};
}

void kept_blocks_enter(Pass* pass) {
  std::lock_guard<std::mutex> guard(mutex);
  if (pass->is_over || present() == pass) return;
  pass->outer = std::exchange(entered, hold(pass));
  most_free = pass->keep;
  space.give_back(most_free);
}

void kept_blocks_leave(Pass* pass) {
  std::lock_guard<std::mutex> guard(mutex);
  pass->is_over = true;
  present();
}

void kept_blocks_forget(Pass* pass) {
  std::lock_guard<std::mutex> guard(mutex);
  release(pass);
}

// In use now, most in use, most in use and free.
void kept_blocks_count(const Pass* pass, size_t* counts) {
  std::lock_guard<std::mutex> guard(mutex);
  counts[0] = pass->in_use, counts[1] = pass->most_in_use, counts[2] = pass->peak;
}

size_t kept_blocks_free() {
  std::lock_guard<std::mutex> guard(mutex);
  return space.free_bytes();
}

// Free bytes that are resident.
size_t kept_blocks_resident() {
  std::lock_guard<std::mutex> guard(mutex);
  size_t page = space.rounded(1), nbytes = 0;
  std::vector<unsigned char> pages;
  for (auto& [start, extent] : space.extents()) {
    if (extent.state != Extent::kFree) continue;
    pages.resize(extent.nbytes / page);
    if (mincore(reinterpret_cast<void*>(start), extent.nbytes, pages.data()) == 0)
      nbytes += page * size_t(std::count_if(pages.begin(), pages.end(), [](unsigned char each) { return each & 1; }));
  }
  return nbytes;
}

void kept_blocks_give_back(size_t most) {
  std::lock_guard<std::mutex> guard(mutex);
  space.give_back(most);
}

// Start, bytes and state (0 bare, 1 free, 2 used) of the first extents; how many there are.
size_t kept_blocks_extents(size_t* found, size_t room) {
  std::lock_guard<std::mutex> guard(mutex);
  size_t count = 0;
  for (auto& [start, extent] : space.extents()) {
    if (count++ >= room) continue;
    *found++ = start, *found++ = extent.nbytes, *found++ = extent.state;
  }
  return count;
}
}
