// What the clones of a plugin share: a bundle's bytes and plan, and, once it is opened, its code and weights on the
// GPU.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "bundle.h"
#include "qswin.h"

namespace qswin {

class Model {
 public:
  // Copies and checks the bytes of a bundle. Throws Error.
  Model(const void* data, size_t size);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const std::vector<uint8_t>& bytes() const { return bytes_; }
  const Bundle& plan() const { return plan_; }

  // Bytes of workspace for batches of at most so many images.
  size_t workspace(int64_t most) const;

  // Loads code and weights on the thread's device, once for all clones. Throws Error.
  void open();

  // Puts an inference on a stream; allocates nothing. Throws Error, also before it is opened.
  void enqueue(uint32_t batch, void* workspace, void* stream, const void* images, void* logits) const;

 private:
  struct Close {
    void operator()(qswin_bundle* bundle) const { qswin_close(bundle); }
  };

  const std::vector<uint8_t> bytes_;
  const Bundle plan_;
  std::mutex opening_;
  std::unique_ptr<qswin_bundle, Close> bundle_;
  std::atomic<const qswin_bundle*> opened_{nullptr};
};

}  // namespace qswin
