// A range of address space, reserved once, and the blocks in it: which are used, which are free, which have no memory.
//
// The range is tiled by extents: *used* ones are blocks, *free* ones were blocks and keep their memory, *bare* ones have
// none. Bare pages are made writable when they are handed out, which is when RLIMIT_DATA counts them, and mapped anew
// without access when they go back. A request takes the smallest free extent that is large enough. Where there is none
// it takes the place with the fewest bare pages in it, and other free extents go back as far as there is no room for
// both: holes cost page faults, and never a refusal.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <new>

struct Extent {
  enum State { kBare, kFree, kUsed } state = kBare;
  uintptr_t start = 0;
  size_t nbytes = 0;
  void* owner = nullptr;                      // whose a used one is
  uint64_t freed = 0;                         // when one became free: a number that grows
  Extent *next = nullptr, *previous = nullptr;  // free ones of about that size

  void* address() const { return reinterpret_cast<void*>(start); }
};

// Free extents, in a list for every power of two. Nothing here allocates.
class FreeLists {
 public:
  size_t nbytes() const { return nbytes_; }

  void add(Extent& extent) {
    Extent*& first = lists_[index(extent.nbytes)];
    extent.previous = nullptr, extent.next = first;
    if (first) first->previous = &extent;
    first = &extent;
    nbytes_ += extent.nbytes;
  }

  void remove(Extent& extent) {
    (extent.previous ? extent.previous->next : lists_[index(extent.nbytes)]) = extent.next;
    if (extent.next) extent.next->previous = extent.previous;
    nbytes_ -= extent.nbytes;
  }

  // The smallest one of at least so many bytes; null if there is none.
  Extent* smallest(size_t nbytes) const {
    for (size_t at = index(nbytes); at < lists_.size(); at++) {
      Extent* best = nullptr;
      for (Extent* each = lists_[at]; each; each = each->next)
        if (each->nbytes >= nbytes && (!best || each->nbytes < best->nbytes)) best = each;
      if (best) return best;
    }
    return nullptr;
  }

  // The one that has been free the longest; null if there is none.
  Extent* oldest() const {
    Extent* found = nullptr;
    for (Extent* first : lists_)
      for (Extent* each = first; each; each = each->next)
        if (!found || each->freed < found->freed) found = each;
    return found;
  }

 private:
  static size_t index(size_t nbytes) { return size_t(std::bit_width(nbytes)); }

  std::array<Extent*, 65> lists_{};
  size_t nbytes_ = 0;
};

// No two neighbours are both free or both bare, but after an exception.
class Range {
 public:
  // Whether there is so much address space to be had: 1 TiB, or less under a limit.
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

  bool has(const void* data) const { return uintptr_t(data) >= start_ && uintptr_t(data) < end_; }
  size_t page() const { return page_; }
  size_t rounded(size_t nbytes) const { return (nbytes + page_ - 1) / page_ * page_; }
  size_t free_bytes() const { return free_.nbytes(); }
  std::map<uintptr_t, Extent>& extents() { return extents_; }
  Extent& at(const void* data) { return extents_.find(uintptr_t(data))->second; }

  // A used extent of whole pages, beside which no more than `most_free` bytes stay free; null if the kernel refuses it.
  Extent* take(size_t nbytes, size_t most_free) {
    Extent* found = free_.smallest(nbytes);
    uintptr_t start = found ? found->start : with_fewest_bare_pages(nbytes);
    if (!start) return nullptr;
    Extent& block = cut_out(start, nbytes);
    give_back(most_free);
    if (found || commit(block)) return &block;
    // A part of it may be writable by now.
    make_bare(block);
    return nullptr;
  }

  // Make a used extent a free one.
  void free(Extent& block) {
    block.freed = ++time_;
    merge(block, Extent::kFree);
  }

  // Give memory back to the kernel until no more than so many bytes are free, what has been free the longest first.
  void give_back(size_t most) {
    while (free_.nbytes() > most) {
      Extent* extent = free_.oldest();
      size_t surplus = rounded(free_.nbytes() - most);
      if (surplus < extent->nbytes) try {
          extent = &split(*extent, extent->nbytes - surplus);
        } catch (const std::bad_alloc&) {
          // Then all of it goes.
        }
      free_.remove(*extent);
      if (!make_bare(*extent)) return;
    }
  }

 private:
  using Position = std::map<uintptr_t, Extent>::const_iterator;

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
    for (auto first = extents_.begin(); first != extents_.end(); ++first) {
      auto last = first;
      while (last != extents_.end() && last->second.state != Extent::kUsed) ++last;
      if (last == first) continue;
      uintptr_t end = std::prev(last)->first + std::prev(last)->second.nbytes;
      if (end - first->first >= nbytes)
        for (auto each = first; each != last; ++each) {
          uintptr_t start = std::min(each->first, end - nbytes);
          size_t writable = free_within(first, last, start, start + nbytes);
          if (!best || writable > most) best = start, most = writable;
        }
      first = std::prev(last);
    }
    return best;
  }

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

  // Make an extent in no list a free or bare one, together with its neighbours that are that too.
  void merge(Extent& extent, Extent::State state) {
    auto at = extents_.find(extent.start);
    auto join_next = [&](auto into) {
      auto next = std::next(into);
      into->second.nbytes += next->second.nbytes;
      into->second.freed = std::max(into->second.freed, next->second.freed);
      extents_.erase(next);
    };
    if (auto next = std::next(at); next != extents_.end() && next->second.state == state) {
      if (state == Extent::kFree) free_.remove(next->second);
      join_next(at);
    }
    if (at != extents_.begin() && std::prev(at)->second.state == state) {
      --at;
      if (state == Extent::kFree) free_.remove(at->second);
      join_next(at);
    }
    at->second.state = state;
    if (state == Extent::kFree) free_.add(at->second);
  }

  // Have the kernel give memory for all of an extent, if need be for what is free; whether it did.
  bool commit(const Extent& extent) {
    auto grant = [&] { return mprotect(extent.address(), extent.nbytes, PROT_READ | PROT_WRITE) == 0; };
    if (!grant()) {
      give_back(0);
      if (!grant()) return false;
    }
    // A first touch of 16 MiB takes 2 ms instead of 9. Where there are no large pages, none are used.
    madvise(extent.address(), extent.nbytes, MADV_HUGEPAGE);
    return true;
  }

  // Give the memory of an extent in no list back. The kernel fails only where a process has too many mappings: then
  // the extent is free.
  bool make_bare(Extent& extent) {
    bool is_gone = mmap(extent.address(), extent.nbytes, PROT_NONE, kMapping | MAP_FIXED, -1, 0) != MAP_FAILED;
    merge(extent, is_gone ? Extent::kBare : Extent::kFree);
    return is_gone;
  }

  std::map<uintptr_t, Extent> extents_;
  FreeLists free_;
  uintptr_t start_ = 0, end_ = 0;
  size_t page_ = 0;
  uint64_t time_ = 0;
};
