// The functions of NVIDIA's driver, from libcuda.so.1: loaded when they are first needed, so that the library can be
// built, and reads bundles, where there is no driver.
#pragma once
#include <cuda.h>

#include <string>

#include "error.h"

namespace qswin {

#define QSWIN_DRIVER_FUNCTIONS(X)                                                                                     \
  X(cuInit)                                                                                                           \
  X(cuGetErrorString)                                                                                                 \
  X(cuDriverGetVersion) X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain)        \
      X(cuDevicePrimaryCtxRelease) X(cuCtxPushCurrent) X(cuCtxPopCurrent) X(cuCtxGetDevice) X(cuModuleLoadData)       \
          X(cuModuleUnload) X(cuModuleGetFunction) X(cuFuncSetAttribute) X(cuLaunchKernel) X(cuMemAlloc) X(cuMemFree) \
              X(cuMemcpyHtoD) X(cuMemcpyDtoH) X(cuStreamSynchronize)

struct Driver {
#define QSWIN_MEMBER(name) decltype(&::name) name##_;
  QSWIN_DRIVER_FUNCTIONS(QSWIN_MEMBER)
#undef QSWIN_MEMBER
};

// The driver, initialized. Throws Error where there is none.
const Driver& driver();

// Throws Error unless a function of the driver succeeded. `what` begins the message.
void check_cuda(CUresult result, const std::string& what);

// While it lives, a device's primary context is current in this thread.
class Current {
 public:
  explicit Current(CUcontext context) { check_cuda(driver().cuCtxPushCurrent_(context), "making the device current"); }
  ~Current() {
    CUcontext popped = nullptr;
    driver().cuCtxPopCurrent_(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// A device and its primary context, which is shared with the CUDA runtime of the process.
class Device {
 public:
  explicit Device(int ordinal);
  ~Device() { driver().cuDevicePrimaryCtxRelease_(device_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CUcontext context() const { return context_; }
  int attribute(CUdevice_attribute which) const;

 private:
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

// Memory of the device. The device's context is current where it is made.
class Memory {
 public:
  explicit Memory(size_t size, const char* what);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  CUdeviceptr address() const { return address_; }

 private:
  CUdeviceptr address_ = 0;
};

}  // namespace qswin
