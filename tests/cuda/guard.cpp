// What a CPU build of torch lacks to run autograd over FakeTensors on "cuda": hooks that say that CUDA is there, a device
// guard that does nothing, pinned memory, and the timer that DistributedDataParallel asks for. For a process that has
// imported torch already. One device, number 0; torch.cuda itself is pretended in pretended.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <map>
#include <mutex>
#include <new>

namespace {
using namespace c10;
const Device device(DeviceType::CUDA, 0);

// Host memory that is known to be pinned by its address: where each piece begins, and its bytes.
std::mutex lock;
std::map<const char*, size_t> pinned;
void release(void* data) {
  std::lock_guard<std::mutex> held(lock);
  pinned.erase(static_cast<const char*>(data));
  GetDefaultCPUAllocator()->raw_deallocate(data);
}
struct Pinned final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = GetDefaultCPUAllocator()->raw_allocate(bytes ? bytes : 1);
    std::lock_guard<std::mutex> held(lock);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_memory;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> held(lock);
    auto after = pinned.upper_bound(static_cast<const char*>(data));
    return after != pinned.begin() && (--after)->first + after->second > data;
  }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "made in the memory of what torch holds already");

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// torch asks for its hooks once, at its import: what it holds is replaced where it is.
const auto* hooks = new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}  // namespace

namespace c10d {
namespace {
struct NoTimer final : Timer {
  explicit NoTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::DeviceType::CUDA, NoTimer);
}  // namespace
}  // namespace c10d
