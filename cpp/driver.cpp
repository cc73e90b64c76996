#include "driver.h"

#include <dlfcn.h>

namespace qswin {
namespace {

#define QSWIN_TEXT(name) #name
#define QSWIN_SYMBOL(name) QSWIN_TEXT(name)  // cuda.h defines cuMemAlloc as cuMemAlloc_v2, which the library exports

template <typename Function>
void find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (!function) throw Error(QSWIN_NO_DRIVER, std::string("the NVIDIA driver is too old: it lacks ") + symbol);
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error(QSWIN_NO_DRIVER, "there is no NVIDIA driver here: libcuda.so.1 cannot be loaded");
  Driver found{};
#define QSWIN_FIND(name) find(library, QSWIN_SYMBOL(name), found.name##_);
  QSWIN_DRIVER_FUNCTIONS(QSWIN_FIND)
#undef QSWIN_FIND
  if (found.cuInit_(0) != CUDA_SUCCESS) throw Error(QSWIN_NO_DRIVER, "the NVIDIA driver finds no GPU that it can use");
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();  // tried again by the next call where it throws
  return loaded;
}

void check_cuda(CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().cuGetErrorString_(result, &text);
  const qswin_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? QSWIN_OUT_OF_MEMORY : QSWIN_CUDA_ERROR;
  throw Error(status, what + ": " + (text ? text : "unknown error") + " (CUDA error " + std::to_string(result) + ")");
}

Device::Device(int ordinal) {
  int count = 0;
  check_cuda(driver().cuDeviceGetCount_(&count), "counting devices");
  if (ordinal < 0 || ordinal >= count) {
    const std::string there = std::to_string(count) + (count == 1 ? " GPU" : " GPUs");
    throw Error(QSWIN_NO_DRIVER, "there is no device " + std::to_string(ordinal) + ": this machine has " + there);
  }
  check_cuda(driver().cuDeviceGet_(&device_, ordinal), "finding the device");
  check_cuda(driver().cuDevicePrimaryCtxRetain_(&context_, device_), "making the device's context");
}

int Device::attribute(CUdevice_attribute which) const {
  int value = 0;
  check_cuda(driver().cuDeviceGetAttribute_(&value, which, device_), "asking the device");
  return value;
}

Memory::Memory(size_t size, const char* what) {
  if (size == 0) return;
  check_cuda(driver().cuMemAlloc_(&address_, size), std::to_string(size) + " bytes of GPU memory for " + what);
}

Memory::~Memory() {
  if (address_) driver().cuMemFree_(address_);
}

}  // namespace qswin
