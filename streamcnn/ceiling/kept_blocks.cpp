// Behind PyTorch's CPU tensors while a streamed pass runs: blocks are kept when they are freed, counted by pass, and
// refused past a cap before the kernel is asked.
//
// A thread is in the pass that it entered last. What it allocates there counts for that pass and for those around it
// until it is freed, on whatever thread. In no pass, and for small blocks, PyTorch's own allocator is asked. This one
// stays in front of it from the first pass on: oneDNN frees through the allocator that is registered by then.

#include "extents.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>

namespace {

constexpr size_t kLeast = size_t(1) << 16;   // bytes of the smallest block that is kept
constexpr size_t kUnlimited = SIZE_MAX / 2;  // no sum of it and a number of bytes overflows

struct Pass {
  const size_t cap;   // bytes in use at most
  size_t keep;        // bytes in use and free at most
  Pass* outer = nullptr;
  size_t in_use = 0, most_in_use = 0, peak = 0;  // peak: in use and free
  int references = 1;
  bool is_over = false;

  size_t may_be_free(size_t used) const { return keep - std::min(keep, used); }
};

void release(Pass* pass) {
  while (pass && --pass->references == 0) delete std::exchange(pass, pass->outer);
}

Pass* hold(Pass* pass) {
  if (pass) pass->references++;
  return pass;
}

// Never destroyed: tensors may be freed while the process ends.
std::mutex& mutex = *new std::mutex;
Range& range = *new Range;
c10::Allocator* before = nullptr;
thread_local Pass* entered = nullptr;
size_t last_keep = 0;  // of the pass that was entered last

Pass* present() {
  while (entered && entered->is_over) release(std::exchange(entered, hold(entered->outer)));
  return entered;
}

// Count bytes of a block for a pass and those around it.
void count(Pass* pass, size_t nbytes) {
  for (Pass* each = pass; each; each = each->outer) {
    each->in_use += nbytes;
    each->most_in_use = std::max(each->most_in_use, each->in_use);
    each->peak = std::max(each->peak, each->in_use + range.free_bytes());
  }
}

// A block for a pass and those around it; null if one of them or the kernel has no room for it.
void* take(size_t nbytes, Pass* pass) {
  if (nbytes >= kUnlimited) return nullptr;
  nbytes = range.rounded(nbytes);
  size_t most_free = kUnlimited;
  for (Pass* each = pass; each; each = each->outer) {
    if (each->in_use + nbytes > each->cap) return nullptr;
    most_free = std::min(most_free, each->may_be_free(each->in_use + nbytes));
  }
  Extent* block = range.take(nbytes, most_free);
  if (!block) return nullptr;
  block->owner = hold(pass);
  count(pass, nbytes);
  return block->address();
}

// Take a block back, and keep it if there is room.
void give(Extent& block) {
  Pass* owner = static_cast<Pass*>(std::exchange(block.owner, nullptr));
  size_t most_free = last_keep;
  for (Pass* each = owner; each; each = each->outer) {
    each->in_use -= block.nbytes;
    if (!each->is_over) most_free = std::min(most_free, each->may_be_free(each->in_use));
  }
  release(owner);
  range.free(block);
  range.give_back(most_free);
}

[[noreturn]] void refuse(size_t nbytes, size_t in_use, size_t cap) {
  c10::profiledCPUMemoryReporter().OutOfMemory(nbytes);
  C10_THROW_ERROR(
      Error,
      c10::str("DefaultCPUAllocator: can't allocate memory: you tried to allocate ", nbytes, " bytes; ", in_use,
               " are in use", cap < kUnlimited ? c10::str(" of the ", cap, " that the pass may take") : ""));
}

void delete_block(void* data) {
  if (!range.has(data)) return before->raw_deallocate(data);
  c10::profiledCPUMemoryReporter().Delete(data);
  std::lock_guard<std::mutex> guard(mutex);
  give(range.at(data));
}

struct KeptBlocks final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nbytes < kLeast || !entered ? nullptr : allocate_in_pass(nbytes);
    if (!data) data = before->raw_allocate(nbytes);
    return {data, data, &delete_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &delete_block; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { default_copy_data(to, from, nbytes); }

  // Null if this thread is in no pass any more.
  static void* allocate_in_pass(size_t nbytes) {
    std::unique_lock<std::mutex> guard(mutex);
    Pass* pass = present();
    if (!pass) return nullptr;
    void* data = take(nbytes, pass);
    size_t in_use = pass->in_use, cap = pass->cap;
    guard.unlock();
    if (!data) refuse(nbytes, in_use, cap);
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
    if (!before || !before->raw_deleter() || !range.reserve()) return false;
    c10::SetCPUAllocator(&kept_blocks);
    // In a forked child the lock is free, and the thread in no pass.
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { entered = nullptr, mutex.unlock(); });
    return c10::GetCPUAllocator() == &kept_blocks;
  }();
  return is_installed;
}

// A pass that no thread has entered; null if there is no memory for it.
Pass* kept_blocks_pass(size_t cap, size_t keep) {
  return new (std::nothrow) Pass{.cap = std::min(cap, kUnlimited), .keep = std::min(keep, kUnlimited)};
}

void kept_blocks_enter(Pass* pass) {
  std::lock_guard<std::mutex> guard(mutex);
  if (pass->is_over || present() == pass) return;
  pass->outer = std::exchange(entered, hold(pass));
  // What it has inherited will be taken off the passes around it when it is freed.
  count(pass->outer, pass->in_use);
  last_keep = pass->keep;
  range.give_back(pass->may_be_free(pass->in_use));
}

void kept_blocks_keep(Pass* pass, size_t nbytes) {
  std::lock_guard<std::mutex> guard(mutex);
  last_keep = pass->keep = std::min(nbytes, kUnlimited);
  range.give_back(pass->may_be_free(pass->in_use));
}

// Have the blocks of a pass count for another one from now on.
void kept_blocks_inherit(Pass* heir, Pass* from) {
  std::lock_guard<std::mutex> guard(mutex);
  for (auto& [start, extent] : range.extents()) {
    if (extent.owner != from) continue;
    for (Pass* each = from; each; each = each->outer) each->in_use -= extent.nbytes;
    count(heir, extent.nbytes);
    extent.owner = hold(heir);
    release(from);
  }
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
  return range.free_bytes();
}

// Free bytes that are resident.
size_t kept_blocks_resident() {
  std::lock_guard<std::mutex> guard(mutex);
  unsigned char pages[4096];
  size_t page = range.page(), step = sizeof(pages) * page, count = 0;
  for (auto& [start, extent] : range.extents()) {
    if (extent.state != Extent::kFree) continue;
    for (size_t done = 0; done < extent.nbytes; done += step) {
      size_t nbytes = std::min(step, extent.nbytes - done);
      if (mincore(reinterpret_cast<void*>(start + done), nbytes, pages) != 0) continue;
      count += size_t(std::count_if(pages, pages + nbytes / page, [](unsigned char each) { return each & 1; }));
    }
  }
  return count * page;
}

void kept_blocks_give_back(size_t most) {
  std::lock_guard<std::mutex> guard(mutex);
  range.give_back(most);
}

// Start, bytes and state (0 bare, 1 free, 2 used) of the first extents; how many there are.
size_t kept_blocks_extents(size_t* found, size_t room) {
  std::lock_guard<std::mutex> guard(mutex);
  size_t count = 0;
  for (auto& [start, extent] : range.extents()) {
    if (count++ >= room) continue;
    *found++ = start, *found++ = extent.nbytes, *found++ = extent.state;
  }
  return count;
}
}
