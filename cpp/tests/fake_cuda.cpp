// A libcuda.so.1 that runs nothing, for tests of the runner where there is no GPU. It writes what it is asked to a
// file.
//
// A "cubin" of the tests has its kernel's signature (p, i, f) after the 64 bytes of an ELF header. The environment
// says:
//   FAKE_CUDA_LOG         the file
//   FAKE_CUDA_CAPABILITY  of the GPU, "90"
//   FAKE_CUDA_NO_CONTEXT  that no context is current in the thread
//   FAKE_CUDA_FAIL        the call that fails, by its number among those that allocate or load
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

std::map<CUdeviceptr, size_t> allocated;
int modules = 0, contexts = 0, current = 0, resources = 0;

FILE* log_file() {
  static FILE* file = std::getenv("FAKE_CUDA_LOG") ? std::fopen(std::getenv("FAKE_CUDA_LOG"), "w") : nullptr;
  return file ? file : stderr;
}

bool fails() {
  const char* which = std::getenv("FAKE_CUDA_FAIL");
  return ++resources == (which ? std::atoi(which) : 0);
}

CUresult needs_context(CUresult result = CUDA_SUCCESS) { return current > 0 ? result : CUDA_ERROR_INVALID_CONTEXT; }

struct AtExit {
  ~AtExit() {
    std::fprintf(log_file(), "left %zu allocations %d modules %d contexts\n", allocated.size(), modules, contexts);
    std::fflush(log_file());
  }
} at_exit;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

CUresult cuInit(unsigned) { return std::getenv("FAKE_CUDA_NO_GPU") ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 12040, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error of the fake driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  const char* text = std::getenv("FAKE_CUDA_CAPABILITY");
  const int capability = text ? std::atoi(text) : 90;
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
                                                                   : 227 << 10;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  ++contexts;
  return *context = reinterpret_cast<CUcontext>(&contexts), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return --contexts, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext) { return ++current, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = nullptr;
  return --current, CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return *device = 0, std::getenv("FAKE_CUDA_NO_CONTEXT") ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (fails()) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  ++modules;
  *module = reinterpret_cast<CUmodule>(new std::string(static_cast<const char*>(image) + 64));
  return needs_context();
}
CUresult cuModuleUnload(CUmodule module) {
  --modules;
  delete reinterpret_cast<std::string*>(module);
  return needs_context();
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char*) {
  return *function = reinterpret_cast<CUfunction>(module), needs_context();
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return needs_context(); }

CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
  if (fails()) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = reinterpret_cast<CUdeviceptr>(std::calloc(1, size));
  allocated[*address] = size;
  std::fprintf(log_file(), "allocate %llu %zu\n", *address, size);
  return needs_context();
}
CUresult cuMemFree(CUdeviceptr address) {
  allocated.erase(address);
  std::free(reinterpret_cast<void*>(address));
  return needs_context();
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t size) {
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return needs_context();
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t size) {
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return needs_context();
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                        unsigned shared, CUstream stream, void** parameters, void**) {
  std::fprintf(log_file(), "launch %u %u %u %u %u %llu", x, y, z, threads, shared, (unsigned long long)stream);
  for (const char letter : *reinterpret_cast<std::string*>(function)) {
    const void* parameter = *parameters++;
    if (letter == 'p') std::fprintf(log_file(), " %llu", *static_cast<const unsigned long long*>(parameter));
    if (letter == 'i') std::fprintf(log_file(), " %d", *static_cast<const int*>(parameter));
    if (letter == 'f') std::fprintf(log_file(), " %.9g", double(*static_cast<const float*>(parameter)));
  }
  std::fprintf(log_file(), "\n");
  return needs_context();
}

CUresult cuStreamSynchronize(CUstream) { return needs_context(); }

}  // extern "C"
#pragma GCC visibility pop
