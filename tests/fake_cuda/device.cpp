// Two CUDA devices made of ordinary memory, for a torch that was built without CUDA.
//
// Tensors on them are CUDA tensors to everybody: they say so, they take CUDA's place in dispatch, and an operation that
// mixes them with tensors of the host or of the other device raises, as on a GPU. Their values lie in ordinary memory,
// and an operation on them runs torch's CPU kernel on that memory. So what a program does with CUDA tensors happens
// with real values, on a machine that has no GPU: copies, streams (which do everything at once), autograd's device
// threads, libraries' branches for CUDA. What it cannot show: kernels of CUDA itself, their rounding and their speed.
//
// It has to be loaded after libtorch_cpu.so and before `import torch`, whose first look decides whether CUDA is there.
// The functions of torch.cuda are another matter: see device.py.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Storage;
using c10::TensorImpl;

constexpr DeviceIndex kDevices = 2;
constexpr auto kCUDA = c10::DeviceType::CUDA;
const c10::DispatchKeySet kOnDevice(c10::DispatchKey::CUDA);
const c10::DispatchKeySet kOnHost(c10::DispatchKey::CPU);

thread_local DeviceIndex current = 0;

// ---------------------------------------------------------------------------------------------------------------------
// Devices, streams and events: one stream, on which everything has happened when it is asked for.

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  static Device at_index(DeviceIndex index) { return Device(kCUDA, index < 0 ? current : index); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return at_index(current); }
  void setDevice(Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override { current = at_index(device.index()).index(); }
  Device exchangeDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal ", int(device.index()));
    Device before = at_index(current);
    current = at_index(device.index()).index();
    return before;
  }
  c10::Stream getStream(Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, at_index(device.index()));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int = 0) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool = false) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);  // anything but null: recorded
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Memory, of the devices and pinned: counted, because tests ask for it.

std::atomic<int64_t> used[kDevices], peak[kDevices];

void account(DeviceIndex device, int64_t bytes) {
  int64_t now = used[device] += bytes, before = peak[device];
  while (now > before && !peak[device].compare_exchange_weak(before, now)) {
  }
}

// What keeps a device's memory alive: memory of the host, which a CPU kernel may have allocated.
struct Block {
  c10::DataPtr own;
  Storage borrowed;
  DeviceIndex device;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  account(block->device, -block->bytes);
  delete block;
}

c10::DataPtr as_device_memory(c10::DataPtr own, Storage borrowed, DeviceIndex device, int64_t bytes) {
  void* data = borrowed ? borrowed.mutable_data() : own.get();
  account(device, bytes);
  auto* block = new Block{std::move(own), std::move(borrowed), device, bytes};
  return {data, block, &release, Device(kCUDA, device)};
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return as_device_memory(c10::GetCPUAllocator()->allocate(bytes), Storage(), current, int64_t(bytes));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;

std::mutex pinned_lock;
std::map<const char*, size_t>& pinned_ranges() {
  static auto* ranges = new std::map<const char*, size_t>;  // outlives tensors that are freed at exit
  return *ranges;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> hold(pinned_lock);
    if (data) pinned_ranges()[static_cast<char*>(data)] = bytes;
    return {data, data, &unpin, Device(c10::DeviceType::CPU)};
  }
  static void unpin(void* data) {
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned_ranges().erase(static_cast<char*>(data));
    c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* data) {
  auto* at = static_cast<const char*>(data);
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto next = pinned_ranges().upper_bound(at);
  return next != pinned_ranges().begin() && (--next, at < next->first + next->second);
}

// ---------------------------------------------------------------------------------------------------------------------
// Operations: the arguments' memory is shown to the CPU kernel as the host's, and its results as the device's.

Tensor with_storage(Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  Tensor made = at::detail::make_tensor<TensorImpl>(std::move(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

class OnHost {
 public:
  explicit OnHost(std::string operation) : operation_(std::move(operation)) {}

  // The tensor as one of the host in the same memory. What shares memory, or is the same tensor, stays so.
  Tensor host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      host_tensors_ |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK(!device_ || *device_ == tensor.device(), "Expected all tensors to be on the same device, but ",
                operation_, " got tensors on ", *device_, " and ", tensor.device());
    device_ = tensor.device();
    for (auto& [original, alias] : tensors_)
      if (original.is_same(tensor)) return alias;
    Tensor alias = with_storage(host(tensor.storage()), kOnHost, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors_.emplace_back(tensor, alias);
    return alias;
  }

  // A result of the CPU kernel as the device's: an argument, a view of one, or new memory.
  Tensor device(const Tensor& result) {
    if (!result.defined() || !device_ || !result.device().is_cpu()) return result;
    for (auto& [original, alias] : tensors_)
      if (alias.is_same(result)) return original;
    return with_storage(device(result.storage()), kOnDevice, result);
  }

  // Arguments that the kernel gave another shape or other memory, as it does to `out` of the wrong size.
  void update() {
    for (auto& [original, alias] : storages_)
      if (alias.data() != original.data()) {
        auto bytes = int64_t(alias.nbytes());
        original.unsafeGetStorageImpl()->set_data_ptr_noswap(
            as_device_memory(c10::DataPtr(), alias, device_->index(), bytes));
        original.unsafeGetStorageImpl()->set_nbytes(bytes);
      }
    for (auto& [original, alias] : tensors_) {
      TensorImpl* impl = original.unsafeGetTensorImpl();
      Storage storage = device(alias.storage());
      if (storage.unsafeGetStorageImpl() != impl->storage().unsafeGetStorageImpl()) impl->set_storage_keep_dtype(storage);
      if (original.sizes() != alias.sizes() || original.strides() != alias.strides() ||
          original.storage_offset() != alias.storage_offset())
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

  void aim_at(Device device) {
    if (device.type() == kCUDA) device_ = Guard::at_index(device.index());
  }

  void check(bool may_mix) const {
    TORCH_CHECK(may_mix || !device_ || !host_tensors_, "Expected all tensors to be on the same device, but ",
                operation_, " got tensors on ", *device_, " and cpu");
  }

 private:
  Storage host(const Storage& storage) {
    for (auto& [original, alias] : storages_)
      if (original.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return alias;
    c10::DataPtr memory(storage.mutable_data(), Device(c10::DeviceType::CPU));  // the original keeps it alive
    Storage alias(Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
    storages_.emplace_back(storage, alias);
    return alias;
  }

  Storage device(const Storage& storage) {
    for (auto& [original, alias] : storages_)
      if (alias.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return original;
    auto bytes = int64_t(storage.nbytes());
    auto memory = as_device_memory(c10::DataPtr(), storage, device_->index(), bytes);
    Storage made(Storage::use_byte_size_t(), bytes, std::move(memory), &device_memory, true);
    storages_.emplace_back(made, storage);
    return made;
  }

  std::string operation_;
  std::optional<Device> device_;
  bool host_tensors_ = false;
  std::vector<std::pair<Tensor, Tensor>> tensors_;     // the device's, the host's
  std::vector<std::pair<Storage, Storage>> storages_;  // likewise
};

// Applies `change` to every tensor in a value of the interpreter's stack.
template <class Change>
void each_tensor(IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    value = changed;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    value = changed;
  }
}

// Every operation for which nothing below is registered, of torch's and of other libraries'.
void run_on_host(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const std::string& name = operation.schema().name();
  OnHost values(name);
  for (auto value = stack->end() - operation.schema().arguments().size(); value != stack->end(); ++value) {
    each_tensor(*value, [&](const Tensor& tensor) { return values.host(tensor); });
    if (value->isDevice()) {
      values.aim_at(value->toDevice());
      *value = Device(c10::DeviceType::CPU);
    }
  }
  // Indices in brackets may be on the host: CUDA's indexing copies them.
  values.check(name == "aten::index" || name.rfind("aten::index_put", 0) == 0 || name == "aten::_index_put_impl_");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    operation.callBoxed(stack);
  }
  values.update();
  for (auto value = stack->end() - operation.schema().returns().size(); value != stack->end(); ++value)
    each_tensor(*value, [&](const Tensor& tensor) { return values.device(tensor); });
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_memory, kOnDevice, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, kOnDevice, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  // Two maps, since a copy may go from one device to the other.
  OnHost to("copy_"), source("copy_");
  at::AutoDispatchBelowADInplaceOrView below;
  to.host(self).copy_(source.host(from));
  return self;
}

// Pinned memory and memory that a kernel allocated cannot grow where it lies.
const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  TensorImpl* impl = self.unsafeGetTensorImpl();
  int64_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * int64_t(self.itemsize());
  const Storage& storage = impl->storage();
  if (bytes > int64_t(storage.nbytes())) {
    c10::OptionalDeviceGuard guard(self.device());
    auto grown = device_memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(grown.mutable_get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage_at(Tensor& self, Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

Tensor& set_storage(Tensor& self, Storage source) {
  int64_t count = int64_t(source.nbytes() / self.itemsize());
  return set_storage_at(self, std::move(source), 0, {count}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_tensor(self, empty({0}, self.scalar_type(), std::nullopt, self.device(), std::nullopt, std::nullopt));
}

void record_stream(Tensor&, c10::Stream) {}

// The same memory as a tensor of the host, for collectives.
Tensor host(const Tensor& tensor) {
  const Storage& storage = tensor.storage();
  c10::DataPtr memory(storage.mutable_data(), new Storage(storage),
                      [](void* kept) { delete static_cast<Storage*>(kept); }, Device(c10::DeviceType::CPU));
  Storage alias(Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), nullptr, false);
  return with_storage(std::move(alias), kOnHost, tensor);
}

// Attention as CUDA has it where a mask is given: one kernel each way. (Without one it would be another: flash.)
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return int64_t(at::SDPBackend::efficient_attention);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& bias, bool, double p, bool causal,
                                                     std::optional<double> scale) {
  OnHost values("attention");
  auto q = values.host(query), k = values.host(key), v = values.host(value);
  auto mask = bias ? std::optional<Tensor>(values.host(*bias)) : std::nullopt;
  values.check(false);
  at::AutoDispatchBelowADInplaceOrView below;
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, p, causal, mask, scale);
  auto seed = at::zeros({}, at::kLong), offset = at::zeros({}, at::kLong);
  return {values.device(out), values.device(sums), values.device(seed), values.device(offset)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double p, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  OnHost values("attention's backward");
  auto g = values.host(grad), q = values.host(query), k = values.host(key), v = values.host(value);
  auto o = values.host(out), s = values.host(sums);
  auto mask = bias.defined() ? std::optional<Tensor>(values.host(bias)) : std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  auto [dq, dk, dv] =
      at::_scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, s, p, causal, mask, scale);
  return {values.device(dq), values.device(dk), values.device(dv), Tensor()};
}

TORCH_LIBRARY(fake_cuda, library) { library.def("host(Tensor tensor) -> Tensor"); }
TORCH_LIBRARY_IMPL(fake_cuda, CUDA, library) { library.impl("host", &host); }

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage_at);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_nothing);
  library.impl("record_stream", &record_stream);
  library.impl("_scaled_dot_product_efficient_attention", &attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", &attention_backward);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What torch asks of a CUDA library.

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex = -1) const override { return at::detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {
const bool installed = [] {
  static Guard guard;
  c10::impl::registerDeviceGuard(kCUDA, &guard);
  c10::SetAllocator(kCUDA, &device_memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  return true;
}();
}  // namespace

// For device.py.
extern "C" {
int fake_cuda_current() { return current; }
void fake_cuda_set(int device) { Guard().setDevice(Device(kCUDA, DeviceIndex(device))); }
int64_t fake_cuda_used(int device) { return used[device]; }
int64_t fake_cuda_peak(int device) { return peak[device]; }
void fake_cuda_reset_peak(int device) { peak[device] = used[device].load(); }
// Serves an operation by its CPU kernel although it has one in terms of other operations.
void fake_cuda_serve(const char* library, const char* operation) {
  auto* registration = new torch::Library(torch::Library::IMPL, library, c10::DispatchKey::CUDA, __FILE__, __LINE__);
  registration->impl(operation, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());  // as long as it lives
}
}
