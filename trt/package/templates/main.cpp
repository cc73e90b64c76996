// classify BUNDLE PIXELS LABELS: the most likely classes of images, on a GPU, by a bundle of qswin.
//
// PIXELS is raw float32, (N, channels, height, width), as client.py --raw writes it. Written by qswin package.
#include <cuda.h>
#include <qswin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr size_t kTop = 5;

void check(qswin_status status) {
  if (status != QSWIN_OK) throw std::runtime_error(qswin_error());
}

void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + " failed, error " + std::to_string(result));
}

std::vector<float> read_pixels(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(path) + ": cannot be read");
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<float> pixels(bytes.size() / sizeof(float));
  std::copy_n(bytes.data(), pixels.size() * sizeof(float), reinterpret_cast<char*>(pixels.data()));
  return pixels;
}

std::vector<std::string> read_labels(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(std::string(path) + ": cannot be read");
  std::vector<std::string> labels;
  for (std::string line; std::getline(file, line);) labels.push_back(line);
  return labels;
}

// Memory on the GPU.
class Buffer {
 public:
  explicit Buffer(size_t size) { check(cuMemAlloc(&address_, size), "allocating memory"); }
  ~Buffer() { cuMemFree(address_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  CUdeviceptr address() const { return address_; }
  void* pointer() const { return reinterpret_cast<void*>(address_); }

 private:
  CUdeviceptr address_ = 0;
};

// The device's primary context, which the library uses, current while this lives.
class Current {
 public:
  Current() {
    check(cuInit(0), "starting the driver");
    check(cuDeviceGet(&device_, 0), "finding a GPU");
    check(cuDevicePrimaryCtxRetain(&context_, device_), "opening the GPU");
    check(cuCtxPushCurrent(context_), "opening the GPU");
  }
  ~Current() {
    cuCtxPopCurrent(&context_);
    cuDevicePrimaryCtxRelease(device_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

void print_top(const float* logits, const std::vector<std::string>& labels) {
  std::vector<size_t> order(labels.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (size_t index : order) sum += std::exp(double(logits[index]) - double(logits[order[0]]));
  for (size_t at = 0; at < std::min(kTop, order.size()); ++at) {
    const double share = std::exp(double(logits[order[at]]) - double(logits[order[0]])) / sum;
    std::printf("%8.4f  %s\n", share, labels[order[at]].c_str());
  }
}

// The smallest batch size that holds what is left, or the largest.
uint32_t choose_batch(const qswin_info& info, size_t left) {
  const uint32_t* end = info.batches + info.batch_count;
  const uint32_t* found = std::find_if(info.batches, end, [&](uint32_t batch) { return batch >= left; });
  return found == end ? end[-1] : *found;
}

void run(const char* path, const std::vector<float>& pixels, const std::vector<std::string>& labels) {
  const Current current;
  qswin_bundle* opened = nullptr;
  check(qswin_open_file(path, 0, &opened));
  const std::unique_ptr<qswin_bundle, decltype(&qswin_close)> bundle(opened, qswin_close);
  qswin_info info;
  check(qswin_get_info(opened, &info));
  const size_t image = size_t(info.channels) * info.height * info.width;
  if (pixels.empty() || pixels.size() % image != 0) {
    throw std::runtime_error("the pixels are not whole images of " + std::to_string(image) + " float32");
  }
  if (labels.size() != info.classes) {
    throw std::runtime_error("the bundle has " + std::to_string(info.classes) + " classes, the labels " +
                             std::to_string(labels.size()));
  }
  for (size_t first = 0, count = pixels.size() / image; first < count;) {
    const uint32_t batch = choose_batch(info, count - first);
    const size_t held = std::min(size_t(batch), count - first);
    qswin_context* created = nullptr;
    check(qswin_create_context(opened, batch, &created));
    const std::unique_ptr<qswin_context, decltype(&qswin_destroy_context)> context(created, qswin_destroy_context);
    std::vector<float> logits(size_t(batch) * info.classes), filled(size_t(batch) * image);
    std::copy_n(pixels.begin() + ptrdiff_t(first * image), held * image, filled.begin());
    const Buffer input(filled.size() * sizeof(float)), output(logits.size() * sizeof(float));
    check(cuMemcpyHtoD(input.address(), filled.data(), filled.size() * sizeof(float)), "copying images");
    check(qswin_enqueue(created, nullptr, input.pointer(), output.pointer()));
    check(cuStreamSynchronize(nullptr), "running the bundle");
    check(cuMemcpyDtoH(logits.data(), output.address(), logits.size() * sizeof(float)), "copying logits");
    for (size_t index = 0; index < held; ++index) {
      std::printf("image %zu\n", first + index);
      print_top(logits.data() + index * info.classes, labels);
    }
    first += held;
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: classify BUNDLE PIXELS LABELS\n");
    return 2;
  }
  try {
    run(arguments[1], read_pixels(arguments[2]), read_labels(arguments[3]));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: error: %s\n", error.what());
    return 2;
  }
}
