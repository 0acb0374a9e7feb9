// A GPU that is host memory: tensors on "cuda:0" in a build of PyTorch without CUDA.
//
// Every operator computes by its CPU kernel, at once. What a GPU does later than the host asks for it is done
// as late as its order allows: copies on streams that do not compute, and copies to and from pinned memory.
// Memory that is freed is overwritten. So code that reads too early, or lets go too early, gives wrong values
// here every time.

#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto kCard = c10::DeviceType::CUDA;
const c10::Device card{kCard, 0};

// What follows is never destroyed: tensors may be freed when the process ends.

// A lock that work under it may take again. Nothing waits for Python's own lock while it is held.
auto& mutex = *new std::recursive_mutex;
using Guard = std::lock_guard<std::recursive_mutex>;

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

// --- streams ------------------------------------------------------------------------------------------------

struct Task {
  std::function<void()> run;
  // The memory that it reads and writes.
  const char* source = nullptr;
  size_t source_bytes = 0;
  char* target = nullptr;
  size_t target_bytes = 0;
};

struct Queue {
  std::deque<Task> tasks;
  int64_t done = 0;
  int64_t asked() const { return done + static_cast<int64_t>(tasks.size()); }
};

auto& queues = *new std::map<int64_t, Queue>;
thread_local int64_t current_stream = 0;
int64_t num_streams = 1;
std::atomic<int64_t> num_waits{0}, num_operators{0};
thread_local int depth = 0;  // of operators that compute: their own copies are none of the program's

void (*on_wait)() = nullptr;
void (*on_operator)(const char*) = nullptr;

void count_wait() {
  if (depth) return;
  ++num_waits;
  if (on_wait) on_wait();
}

struct Computing {
  Computing() { ++depth; }
  ~Computing() { --depth; }
};

void reach(int64_t stream, int64_t mark) {
  Guard guard(mutex);
  auto& queue = queues[stream];
  while (queue.done < mark && !queue.tasks.empty()) {
    Task task = std::move(queue.tasks.front());
    queue.tasks.pop_front();
    ++queue.done;
    task.run();
  }
}

void finish(int64_t stream) { reach(stream, INT64_MAX); }

void finish_all() {
  Guard guard(mutex);
  for (int64_t stream = 0; stream < num_streams; ++stream) finish(stream);
}

struct Mark {
  int64_t stream;
  int64_t count;
};

Mark marked(int64_t stream) {
  Guard guard(mutex);
  return {stream, queues[stream].asked()};
}

void wait_on_stream(int64_t stream, Mark mark) {
  Guard guard(mutex);
  if (mark.stream == stream) return;
  queues[stream].tasks.push_back({[mark] { reach(mark.stream, mark.count); }});
}

bool is_in_use(const char* place, size_t nbytes) {
  for (auto& [_, queue] : queues)
    for (auto& task : queue.tasks)
      if (overlap(place, nbytes, task.source, task.source_bytes) ||
          overlap(place, nbytes, task.target, task.target_bytes))
        return true;
  return false;
}

// --- memory of the card -------------------------------------------------------------------------------------

// PyTorch's allocator with segments that grow: a range of addresses for small blocks and one for large ones,
// of which pages are taken as they are needed.
struct Pool {
  size_t page;
  size_t capacity;
  char* base = nullptr;
  std::map<size_t, size_t> gaps;     // offset to bytes, of what no tensor uses
  std::set<size_t> pages;            // those taken
};

constexpr size_t kGranule = 512, kSmall = size_t{1} << 20;
auto& pools = *new std::array<Pool, 2>{{{size_t{2} << 20, size_t{4} << 30}, {size_t{20} << 20, size_t{64} << 30}}};

struct Block {
  int pool;
  size_t offset, nbytes;
  int64_t stream;
};
auto& blocks = *new std::unordered_map<void*, Block>;

struct Statistics {
  int64_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0, num_retries = 0, num_refusals = 0;
} statistics;
double fraction = 1.0;
int64_t total_bytes = int64_t{16} << 30;
int64_t beside_bytes = 0;  // what the context and other processes hold

void open(Pool& pool) {
  if (pool.base) return;
  void* base = mmap(nullptr, pool.capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(base != MAP_FAILED, "the emulated card has no addresses");
  pool.base = static_cast<char*>(base);
  pool.gaps[0] = pool.capacity;
}

std::vector<size_t> missing(const Pool& pool, size_t offset, size_t nbytes) {
  std::vector<size_t> found;
  for (size_t p = offset / pool.page; p <= (offset + nbytes - 1) / pool.page; ++p)
    if (!pool.pages.count(p)) found.push_back(p);
  return found;
}

void give_back_pages() {
  for (auto& pool : pools)
    for (auto& [offset, nbytes] : pool.gaps) {
      size_t first = (offset + pool.page - 1) / pool.page, last = (offset + nbytes) / pool.page;
      for (auto it = pool.pages.lower_bound(first); it != pool.pages.end() && *it < last;) {
        madvise(pool.base + *it * pool.page, pool.page, MADV_DONTNEED);
        statistics.reserved -= static_cast<int64_t>(pool.page);
        it = pool.pages.erase(it);
      }
    }
}

void* taken(size_t asked) {
  Guard guard(mutex);
  size_t nbytes = std::max(kGranule, (asked + kGranule - 1) / kGranule * kGranule);
  int which = nbytes <= kSmall ? 0 : 1;
  Pool& pool = pools[which];
  open(pool);
  // The smallest gap whose pages are there, or else the first that is large enough.
  size_t best = SIZE_MAX, offset = SIZE_MAX;
  for (auto& [start, length] : pool.gaps)
    if (length >= nbytes && length < best && missing(pool, start, nbytes).empty()) best = length, offset = start;
  if (offset == SIZE_MAX)
    for (auto& [start, length] : pool.gaps)
      if (length >= nbytes) {
        offset = start;
        break;
      }
  TORCH_CHECK(offset != SIZE_MAX, "the emulated card has no gap of ", nbytes, " bytes");
  auto fresh = missing(pool, offset, nbytes);
  auto most = std::min(static_cast<int64_t>(fraction * static_cast<double>(total_bytes)), total_bytes - beside_bytes);
  for (int attempt = 0; statistics.reserved + static_cast<int64_t>(fresh.size() * pool.page) > most; ++attempt) {
    if (attempt == 1) {
      ++statistics.num_refusals;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", asked,
                       " bytes on the emulated card: ", statistics.reserved, " of ", most, " are reserved and ",
                       statistics.allocated, " in use");
    }
    ++statistics.num_retries;
    give_back_pages();
    fresh = missing(pool, offset, nbytes);
  }
  for (size_t page : fresh) {
    pool.pages.insert(page);
    statistics.reserved += static_cast<int64_t>(pool.page);
  }
  size_t length = pool.gaps[offset];
  pool.gaps.erase(offset);
  if (length > nbytes) pool.gaps[offset + nbytes] = length - nbytes;
  statistics.allocated += static_cast<int64_t>(nbytes);
  statistics.allocated_peak = std::max(statistics.allocated_peak, statistics.allocated);
  statistics.reserved_peak = std::max(statistics.reserved_peak, statistics.reserved);
  char* place = pool.base + offset;
  std::memset(place, 0xFF, asked);
  blocks[place] = {which, offset, nbytes, current_stream};
  return place;
}

void given_back(void* place) {
  if (!place) return;
  Guard guard(mutex);
  auto it = blocks.find(place);
  Block block = it->second;
  blocks.erase(it);
  // Its own stream is done with it before it serves anything else.
  finish(block.stream);
  std::memset(place, 0xFF, block.nbytes);
  statistics.allocated -= static_cast<int64_t>(block.nbytes);
  auto& gaps = pools[block.pool].gaps;
  auto [gap, _] = gaps.emplace(block.offset, block.nbytes);
  auto next = std::next(gap);
  if (next != gaps.end() && gap->first + gap->second == next->first) {
    gap->second += next->second;
    gaps.erase(next);
  }
  if (gap != gaps.begin()) {
    auto before = std::prev(gap);
    if (before->first + before->second == gap->first) {
      before->second += gap->second;
      gaps.erase(gap);
    }
  }
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* place = nbytes ? taken(nbytes) : nullptr;
    return {place, place, given_back, card};
  }
  c10::DeleterFnPtr raw_deleter() const override { return given_back; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    std::memcpy(target, source, nbytes);
  }
};
auto& card_allocator = *new CardAllocator;

// --- pinned memory ------------------------------------------------------------------------------------------

auto& pinned = *new std::map<char*, size_t>;
struct {
  int64_t current = 0, peak = 0;
} active;

std::map<char*, size_t>::iterator pinned_around(const void* data) {
  auto place = static_cast<char*>(const_cast<void*>(data));
  auto it = pinned.upper_bound(place);
  if (it == pinned.begin()) return pinned.end();
  --it;
  return place < it->first + it->second ? it : pinned.end();
}

void unpinned(void* data) {
  if (!data) return;
  Guard guard(mutex);
  auto place = static_cast<char*>(data);
  auto it = pinned.find(place);
  size_t nbytes = it->second;
  active.current -= static_cast<int64_t>(nbytes);
  pinned.erase(it);
  // PyTorch's own waits for copies that still use a block; here it is not used again.
  if (is_in_use(place, nbytes)) return;
  std::memset(place, 0xFF, nbytes);
  std::free(place);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Guard guard(mutex);
    if (!nbytes) return {nullptr, nullptr, unpinned, c10::Device(c10::kCPU)};
    // PyTorch's rounds to powers of two.
    size_t rounded = 1;
    while (rounded < nbytes) rounded *= 2;
    void* place = std::aligned_alloc(64, std::max<size_t>(rounded, 64));
    std::memset(place, 0xFF, rounded);
    pinned[static_cast<char*>(place)] = rounded;
    active.current += static_cast<int64_t>(rounded);
    active.peak = std::max(active.peak, active.current);
    return {place, place, unpinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return unpinned; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    std::memcpy(target, source, nbytes);
  }
};
auto& pinned_allocator = *new PinnedAllocator;

auto& registered = *new std::map<char*, size_t>;

bool is_pinned(const void* data) {
  Guard guard(mutex);
  if (pinned_around(data) != pinned.end()) return true;
  auto place = static_cast<const char*>(data);
  for (auto& [start, nbytes] : registered)
    if (place >= start && place < start + nbytes) return true;
  return false;
}

// --- PyTorch's hooks ----------------------------------------------------------------------------------------

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCard; }
  c10::Device exchangeDevice(c10::Device) const override { return card; }
  c10::Device getDevice() const override { return card; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = current_stream;
    current_stream = next.id();
    return stream(before);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Mark;
    *static_cast<Mark*>(*event) = marked(on.id());
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event) wait_on_stream(on.id(), *static_cast<Mark*>(event));
  }
  bool queryEvent(void* event) const override {
    Guard guard(mutex);
    auto mark = static_cast<Mark*>(event);
    return !mark || queues[mark->stream].done >= mark->count;
  }
  void synchronizeEvent(void* event) const override {
    if (auto mark = static_cast<Mark*>(event)) reach(mark->stream, mark->count);
  }
  void synchronizeStream(const c10::Stream& on) const override { finish(on.id()); }
  void synchronizeDevice(const c10::DeviceIndex) const override { finish_all(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, card, id); }
};
C10_REGISTER_GUARD_IMPL(CUDA, CardGuard)

// PyTorch asks for it by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  long versionCuDNN() const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &card_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return card; }
  void deviceSynchronize(c10::DeviceIndex) const override { finish_all(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace

namespace at::accelerator {
// Takes the place of PyTorch's own, which is fixed when PyTorch is built, for all that is loaded after this library.
std::optional<c10::DeviceType> getAccelerator(bool) { return kCard; }
}  // namespace at::accelerator

namespace {

// --- operators ----------------------------------------------------------------------------------------------

// A tensor of the host in the same memory, which it does not keep alive.
at::Tensor beneath(const at::Tensor& x) {
  if (!x.is_cuda()) return x.detach();
  auto plain = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(c10::kCPU));
  if (x.is_conj()) plain = plain.conj();
  if (x.is_neg()) plain = at::_neg_view(plain);
  return plain;
}

std::pair<char*, size_t> extent(const at::Tensor& x) {
  if (!x.numel()) return {nullptr, 0};
  size_t last = 0;
  for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
  return {static_cast<char*>(x.data_ptr()), (last + 1) * x.element_size()};
}

at::Tensor& copy_(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  c10::InferenceMode inference;
  auto from = beneath(source).expand(target.sizes()), into = beneath(target);
  if (!target.numel()) return target;
  auto stream = current_stream;
  bool crosses = target.is_cuda() != source.is_cuda();
  bool is_late = crosses && non_blocking && is_pinned(target.is_cuda() ? source.data_ptr() : target.data_ptr());
  if (crosses && !is_late) count_wait();
  Guard guard(mutex);
  if (!is_late) {
    finish(stream);
    into.copy_(from);
    return target;
  }
  Task task;
  std::tie(task.target, task.target_bytes) = extent(target);
  std::tie(task.source, task.source_bytes) = extent(source);
  if (source.is_cuda() && stream == 0) {
    // The stream that computes may reuse the memory, and is then done with it.
    finish(stream);
    from = from.clone();
    task.source = nullptr, task.source_bytes = 0;
  }
  if (!is_in_use(task.target, task.target_bytes)) {
    if (into.is_non_overlapping_and_dense())
      std::memset(task.target, 0xFF, task.target_bytes);
  }
  task.run = [into, from]() mutable {
    c10::InferenceMode mode;
    into.copy_(from);
  };
  queues[stream].tasks.push_back(std::move(task));
  return target;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  auto into = target;
  return copy_(into, source, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  auto into = target;
  if (into.sizes() != source.sizes()) into.resize_(source.sizes());
  finish(current_stream);
  c10::InferenceMode inference;
  beneath(into).copy_(beneath(source));
  return target;
}

// Operators that read what is on the host, or that the host waits for.
const std::set<std::string> kMixes = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
                                      "aten::_unsafe_index", "aten::_copy_from", "aten::set_"};
const std::set<std::string> kWaits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                                      "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};

at::Tensor on_card(const at::Tensor& x) {
  if (!x.defined() || x.is_cuda()) return x;
  auto found = at::empty_strided(x.sizes(), x.strides(), x.options().device(card));
  beneath(found).copy_(x);
  return found;
}

// Compute by the CPU's kernel in the same memory, so that what a schema does not say to be changed is changed too.
void in_place(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  size_t num = op.schema().arguments().size(), first = stack->size() - num;
  std::vector<c10::IValue> given(stack->begin() + static_cast<int64_t>(first), stack->end());
  for (size_t i = 0; i < num; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      if (value.toTensor().defined() && value.toTensor().is_cuda()) value = beneath(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> plain;
      for (const at::Tensor& x : value.toTensorList()) plain.push_back(x.defined() ? beneath(x) : x);
      value = plain;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> plain;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
        plain.push_back(x && x->defined() ? std::optional<at::Tensor>(beneath(*x)) : x);
      value = plain;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto& returns = op.schema().returns();
  size_t start = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    c10::IValue& value = (*stack)[start + i];
    const auto* alias = returns[i].alias_info();
    if (value.isTensorList()) {
      c10::List<at::Tensor> moved;
      for (const at::Tensor& x : value.toTensorList()) moved.push_back(on_card(x));
      value = moved;
    } else if (value.isTensor()) {
      bool is_given = false;
      if (alias && alias->isWrite())
        for (size_t j = 0; j < num; ++j) {
          const auto* other = op.schema().arguments()[j].alias_info();
          if (other && *other == *alias) value = given[j], is_given = true;
        }
      if (!is_given) value = on_card(value.toTensor());
    }
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  size_t num = op.schema().arguments().size();
  bool here = false, there = false;
  auto look = [&](const at::Tensor& x) {
    if (!x.defined()) return;
    if (x.is_cuda()) there = true;
    else if (x.dim() > 0) here = true;
  };
  for (size_t i = stack->size() - num; i < stack->size(); ++i) {
    const auto& value = (*stack)[i];
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const at::Tensor& x : value.toTensorList()) look(x);
    else if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList()) if (x) look(*x);
  }
  TORCH_CHECK(!(here && there) || kMixes.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name,
              ")");
  if (kWaits.count(name)) count_wait();
  if (depth == 0) {
    ++num_operators;
    if (on_operator) on_operator(name.c_str());
  }
  Computing computing;
  finish(current_stream);
  const auto& arguments = op.schema().arguments();
  bool resizes = std::any_of(arguments.begin(), arguments.end(), [](const auto& each) { return each.is_out(); });
  if (resizes) {
    at::native::cpu_fallback(op, stack);
  } else {
    in_place(op, stack);
  }
}

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &card_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           &card_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_whole(at::Tensor& self, at::Storage storage) {
  auto length = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {length}, {});
}

at::Tensor& set_(at::Tensor& self) { return at::native::set_cpu_(self); }

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resize_);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_", set_);
  // What PyTorch would otherwise divide among kernels that are a card's, or compute into a result of another shape.
  for (auto name : {"mse_loss", "smooth_l1_loss", "huber_loss", "convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

struct Loaded {
  Loaded() { c10::SetAllocator(kCard, &card_allocator); }
} loaded;

}  // namespace

// --- what Python asks ---------------------------------------------------------------------------------------

extern "C" {

void card_statistics(int64_t* out) {
  Guard guard(mutex);
  int64_t found[] = {statistics.allocated, statistics.allocated_peak, statistics.reserved, statistics.reserved_peak,
                     statistics.num_retries, statistics.num_refusals, active.current, active.peak, num_waits.load(),
                     num_operators.load()};
  std::memcpy(out, found, sizeof found);
}

void card_reset_peaks() {
  Guard guard(mutex);
  statistics.allocated_peak = statistics.allocated;
  statistics.reserved_peak = statistics.reserved;
}

void card_reset_host_peaks() {
  Guard guard(mutex);
  active.peak = active.current;
}

void card_set_fraction(double value) {
  Guard guard(mutex);
  fraction = value;
}

void card_set_total(int64_t nbytes) {
  Guard guard(mutex);
  total_bytes = nbytes;
}

void card_set_beside(int64_t nbytes) {
  Guard guard(mutex);
  beside_bytes = nbytes;
}

void card_empty_cache() {
  Guard guard(mutex);
  finish_all();
  give_back_pages();
}

int64_t card_new_stream() {
  Guard guard(mutex);
  return num_streams++;
}

int64_t card_current_stream() { return current_stream; }
void card_set_stream(int64_t stream) { current_stream = stream; }
int64_t card_mark(int64_t stream) { return marked(stream).count; }
void card_wait(int64_t stream, int64_t other, int64_t mark) { wait_on_stream(stream, {other, mark}); }

// A function to call whenever the host waits for the card, or null.
void card_on_wait(void (*function)()) { on_wait = function; }

// A function to call with the name of every operator, or null.
void card_on_operator(void (*function)(const char*)) { on_operator = function; }

void card_reach(int64_t stream, int64_t mark) {
  count_wait();
  reach(stream, mark);
}

int card_is_reached(int64_t stream, int64_t mark) {
  Guard guard(mutex);
  return queues[stream].done >= mark;
}

void card_finish(int64_t stream) {
  count_wait();
  finish(stream);
}

void card_finish_all() {
  count_wait();
  finish_all();
}

int card_register(int64_t place, int64_t nbytes) {
  Guard guard(mutex);
  registered[reinterpret_cast<char*>(place)] = static_cast<size_t>(nbytes);
  return 0;
}

int card_unregister(int64_t place) {
  Guard guard(mutex);
  return registered.erase(reinterpret_cast<char*>(place)) ? 0 : 713;
}
}
