// qswin_run BUNDLE BATCH < IMAGES > LOGITS: raw float32 of one batch in, (N, C, H, W), raw float32 out, (N, classes).
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "driver.h"

namespace {

void check(qswin_status status) {
  if (status != QSWIN_OK) throw qswin::Error(status, qswin_error());
}

void run(const char* path, uint32_t batch) {
  qswin_bundle* opened = nullptr;
  check(qswin_open_file(path, 0, &opened));
  const std::unique_ptr<qswin_bundle, decltype(&qswin_close)> bundle(opened, qswin_close);
  qswin_info info;
  check(qswin_get_info(opened, &info));
  qswin_context* created = nullptr;
  check(qswin_create_context(opened, batch, &created));
  const std::unique_ptr<qswin_context, decltype(&qswin_destroy_context)> context(created, qswin_destroy_context);

  std::vector<float> images(size_t(batch) * info.channels * info.height * info.width),
      logits(size_t(batch) * info.classes);
  if (std::fread(images.data(), sizeof(float), images.size(), stdin) != images.size()) {
    throw qswin::Error(QSWIN_BAD_ARGUMENT,
                       "standard input has fewer than " + std::to_string(images.size()) + " float32");
  }
  const qswin::Driver& driver = qswin::driver();
  const qswin::Device device(0);
  const qswin::Current current(device.context());
  const qswin::Memory input(images.size() * sizeof(float), "images"), output(logits.size() * sizeof(float), "logits");
  qswin::check_cuda(driver.cuMemcpyHtoD_(input.address(), images.data(), images.size() * sizeof(float)),
                    "copying images");
  check(qswin_enqueue(created, nullptr, reinterpret_cast<void*>(input.address()),
                      reinterpret_cast<void*>(output.address())));
  qswin::check_cuda(driver.cuStreamSynchronize_(nullptr), "running the bundle");
  qswin::check_cuda(driver.cuMemcpyDtoH_(logits.data(), output.address(), logits.size() * sizeof(float)),
                    "copying logits");
  if (std::fwrite(logits.data(), sizeof(float), logits.size(), stdout) != logits.size() || std::fflush(stdout)) {
    throw qswin::Error(QSWIN_BAD_ARGUMENT, "the logits cannot be written to standard output");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const long batch = count == 3 ? std::strtol(arguments[2], nullptr, 10) : 0;
  if (batch < 1 || batch > 65536) {
    std::fprintf(stderr, "usage: qswin_run BUNDLE BATCH < IMAGES > LOGITS (raw float32)\n");
    return 2;
  }
  try {
    run(arguments[1], uint32_t(batch));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qswin_run: error: %s\n", error.what());
    return 2;
  }
}
