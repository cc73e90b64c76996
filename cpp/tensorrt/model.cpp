#include "tensorrt/model.h"

#include <algorithm>

#include "driver.h"
#include "error.h"

namespace qswin {
namespace {

std::vector<uint8_t> copied(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  return data ? std::vector<uint8_t>(bytes, bytes + size) : std::vector<uint8_t>();
}

void check(qswin_status status) {
  if (status != QSWIN_OK) throw Error(status, qswin_error());
}

int current_device() {
  CUdevice device = 0;
  check_cuda(driver().cuCtxGetDevice_(&device), "finding the thread's device");
  return device;
}

}  // namespace

Model::Model(const void* data, size_t size)
    : bytes_(copied(data, size)), plan_(read_bundle({bytes_.data(), bytes_.size()})) {
  for (const Code& code : plan_.code) read_code(plan_, code);
}

size_t Model::workspace(int64_t most) const {
  size_t largest = 0;
  for (const Batch& batch : plan_.batches) {
    if (batch.size <= most) largest = std::max(largest, size_t(batch.workspace));
  }
  return largest;
}

void Model::open() {
  const std::lock_guard<std::mutex> lock(opening_);
  if (bundle_) return;
  qswin_bundle* opened = nullptr;
  check(qswin_open(bytes_.data(), bytes_.size(), current_device(), &opened));
  bundle_.reset(opened);
  opened_ = opened;
}

void Model::enqueue(uint32_t batch, void* workspace, void* stream, const void* images, void* logits) const {
  check(qswin_enqueue_in(opened_, batch, workspace, stream, images, logits));
}

}  // namespace qswin
