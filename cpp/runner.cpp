// The functions of qswin.h.
#include <cstring>
#include <fstream>
#include <memory>
#include <new>

#include "bundle.h"
#include "driver.h"

using namespace qswin;

namespace {

thread_local std::string last_error;

// A cubin on the device.
class Kernel {
 public:
  Kernel(const Cubin& cubin, int most_shared);
  ~Kernel() { driver().cuModuleUnload_(module_); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  void launch(const std::array<uint32_t, 3>& grid, CUstream stream, void** parameters) const {
    const CUresult result = driver().cuLaunchKernel_(function_, grid[0], grid[1], grid[2], threads_, 1, 1, shared_,
                                                     stream, parameters, nullptr);
    if (result != CUDA_SUCCESS) check_cuda(result, "launching " + name_);
  }

 private:
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
  uint32_t shared_, threads_;
  std::string name_;
};

Kernel::Kernel(const Cubin& cubin, int most_shared)
    : shared_(cubin.shared), threads_(cubin.threads), name_(cubin.function) {
  if (shared_ > uint32_t(most_shared)) {
    throw Error(QSWIN_UNSUPPORTED, name_ + " needs more shared memory than this GPU has");
  }
  const CUresult loaded = driver().cuModuleLoadData_(&module_, cubin.code);
  if (loaded != CUDA_SUCCESS) {
    int version = 0;
    driver().cuDriverGetVersion_(&version);
    const std::string known = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    check_cuda(loaded, "loading " + name_ + " with a driver for CUDA " + known + ", which may be too old");
  }
  try {
    check_cuda(driver().cuModuleGetFunction_(&function_, module_, name_.c_str()), "finding " + name_);
    const CUfunction_attribute largest = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    check_cuda(driver().cuFuncSetAttribute_(function_, largest, int(shared_)),
               "giving " + name_ + " its shared memory");
  } catch (...) {
    driver().cuModuleUnload_(module_);
    throw;
  }
}

// Code and weights on a device.
class Loaded {
 public:
  Loaded(Bytes file, int ordinal);
  ~Loaded();
  Loaded(const Loaded&) = delete;
  Loaded& operator=(const Loaded&) = delete;

  void enqueue(const Batch& batch, CUdeviceptr workspace, CUstream stream, CUdeviceptr input, CUdeviceptr output) const;

  Bundle plan;  // its pointers into the file are not used once it is loaded
  std::vector<uint32_t> batch_sizes;
  uint32_t architecture = 0;
  std::unique_ptr<Device> device;

 private:
  const Code& choose() const;

  std::unique_ptr<Memory> constants_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
};

Loaded::Loaded(Bytes file, int ordinal) : plan(read_bundle(file)) {
  for (const Batch& each : plan.batches) batch_sizes.push_back(each.size);
  device = std::make_unique<Device>(ordinal);
  const Code& code = choose();
  architecture = code.architecture;
  const std::vector<Cubin> cubins = read_code(plan, code);
  const int most_shared = device->attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  const Current current(device->context());
  try {
    constants_ = std::make_unique<Memory>(plan.constants.size, "the bundle's weights");
    if (plan.constants.size) {
      const CUresult copied = driver().cuMemcpyHtoD_(constants_->address(), plan.constants.data, plan.constants.size);
      check_cuda(copied, "copying the bundle's weights");
    }
    for (const Cubin& cubin : cubins) kernels_.push_back(std::make_unique<Kernel>(cubin, most_shared));
  } catch (...) {  // free while the context is current
    kernels_.clear();
    constants_.reset();
    throw;
  }
}

Loaded::~Loaded() {
  try {
    const Current current(device->context());
    kernels_.clear();
    constants_.reset();
  } catch (const Error&) {  // the device is lost, and its memory with it
  }
}

// The newest code that the device runs: within a generation older code runs too, up to 8.9.
const Code& Loaded::choose() const {
  const int major = device->attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  const int minor = device->attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  const uint32_t here = uint32_t(10 * major + minor);
  const Code* found = nullptr;
  std::string held;
  for (const Code& code : plan.code) {
    const bool runs = code.architecture == here || (major < 9 && code.architecture / 10 == here / 10);
    if (runs && code.architecture <= here) found = &code;
    held += (held.empty() ? "" : ", ") + std::to_string(code.architecture);
  }
  if (found) return *found;
  throw Error(QSWIN_UNSUPPORTED, "the bundle holds code for " + held + ", and this GPU is " + std::to_string(here) +
                                     "; build it with another --arch");
}

void Loaded::enqueue(const Batch& batch, CUdeviceptr workspace, CUstream stream, CUdeviceptr input,
                     CUdeviceptr output) const {
  const CUdeviceptr spaces[4] = {workspace, constants_->address(), input, output};
  const Current current(device->context());
  for (const Launch& launch : batch.launches) {
    uint64_t values[MOST_ARGUMENTS_OF_A_KERNEL];
    void* parameters[MOST_ARGUMENTS_OF_A_KERNEL];
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
      const Argument& argument = launch.arguments[i];
      values[i] = argument.value + (argument.kind <= OUTPUT ? spaces[argument.kind] : 0);
      parameters[i] = &values[i];  // a number of four bytes is the first four: GPUs' hosts are little-endian
    }
    kernels_[launch.kernel]->launch(launch.grid, stream, parameters);
  }
}

// What is thrown becomes a status and a line of text.
template <typename Work>
qswin_status guarded(Work work) {
  try {
    work();
    return QSWIN_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return error.status;
  } catch (const std::bad_alloc&) {
    last_error = "the host has no memory left";
    return QSWIN_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return QSWIN_CUDA_ERROR;
  }
}

void require(bool holds, const char* what) {
  if (!holds) throw Error(QSWIN_BAD_ARGUMENT, what);
}

CUdeviceptr aligned_address(const void* address) {
  const auto number = reinterpret_cast<CUdeviceptr>(address);
  require(number % 16 == 0, "an address that is not a multiple of 16");
  return number;
}

std::vector<uint8_t> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file.tellg();
  std::vector<uint8_t> data(size > 0 && size < std::streamoff(1) << 40 ? size_t(size) : 0);
  file.seekg(0).read(reinterpret_cast<char*>(data.data()), std::streamsize(data.size()));
  if (!file || data.empty()) throw Error(QSWIN_BAD_FILE, std::string(path) + ": cannot be read");
  return data;
}

}  // namespace

struct qswin_bundle {
  std::shared_ptr<const Loaded> loaded;
};

struct qswin_context {
  qswin_context(std::shared_ptr<const Loaded> bundle, uint32_t size)
      : loaded(std::move(bundle)), batch(find_batch(loaded->plan, size)) {
    const Current current(loaded->device->context());
    workspace = std::make_unique<Memory>(batch.workspace, "the workspace");
  }
  ~qswin_context() {
    try {
      const Current current(loaded->device->context());
      workspace.reset();
    } catch (const Error&) {
    }
  }

  std::shared_ptr<const Loaded> loaded;
  const Batch& batch;
  std::unique_ptr<Memory> workspace;
};

const char* qswin_error(void) { return last_error.c_str(); }

qswin_status qswin_check(const void* data, size_t size) {
  return guarded([&] {
    require(data, "the data is NULL");
    const Bundle bundle = read_bundle({static_cast<const uint8_t*>(data), size});
    for (const Code& code : bundle.code) read_code(bundle, code);
  });
}

qswin_status qswin_open(const void* data, size_t size, int device, qswin_bundle** bundle) {
  return guarded([&] {
    require(data && bundle, "the data, or where the bundle is to go, is NULL");
    const Bytes file{static_cast<const uint8_t*>(data), size};
    *bundle = new qswin_bundle{std::make_shared<const Loaded>(file, device)};
  });
}

qswin_status qswin_open_file(const char* path, int device, qswin_bundle** bundle) {
  std::vector<uint8_t> data;
  const qswin_status status = guarded([&] {
    require(path && bundle, "the path, or where the bundle is to go, is NULL");
    data = read_file(path);
  });
  return status == QSWIN_OK ? qswin_open(data.data(), data.size(), device, bundle) : status;
}

qswin_status qswin_get_info(const qswin_bundle* bundle, qswin_info* info) {
  return guarded([&] {
    require(bundle && info, "the bundle, or where the information is to go, is NULL");
    const Loaded& loaded = *bundle->loaded;
    const auto& [channels, height, width] = loaded.plan.image;
    *info = {channels,
             height,
             width,
             loaded.plan.classes,
             loaded.architecture,
             uint32_t(loaded.batch_sizes.size()),
             loaded.batch_sizes.data()};
  });
}

qswin_status qswin_create_context(qswin_bundle* bundle, uint32_t batch, qswin_context** context) {
  return guarded([&] {
    require(bundle && context, "the bundle, or where the context is to go, is NULL");
    *context = new qswin_context(bundle->loaded, batch);
  });
}

qswin_status qswin_enqueue(const qswin_context* context, void* stream, const void* input, void* output) {
  return guarded([&] {
    require(context && input && output, "the context, the input or the output is NULL");
    context->loaded->enqueue(context->batch, context->workspace->address(), static_cast<CUstream>(stream),
                             aligned_address(input), aligned_address(output));
  });
}

qswin_status qswin_workspace_size(const qswin_bundle* bundle, uint32_t batch, size_t* size) {
  return guarded([&] {
    require(bundle && size, "the bundle, or where the size is to go, is NULL");
    *size = find_batch(bundle->loaded->plan, batch).workspace;
  });
}

qswin_status qswin_enqueue_in(const qswin_bundle* bundle, uint32_t batch, void* workspace, void* stream,
                              const void* input, void* output) {
  return guarded([&] {
    require(bundle && input && output, "the bundle, the input or the output is NULL");
    const Batch& found = find_batch(bundle->loaded->plan, batch);
    require(workspace || found.workspace == 0, "the workspace is NULL");
    bundle->loaded->enqueue(found, aligned_address(workspace), static_cast<CUstream>(stream), aligned_address(input),
                            aligned_address(output));
  });
}

void qswin_destroy_context(qswin_context* context) { delete context; }

void qswin_close(qswin_bundle* bundle) { delete bundle; }
