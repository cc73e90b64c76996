#include "tensorrt/plugin.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace qswin {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::TensorFormat;

// Throws Error unless images of these dimensions are the model's. A dimension that is not known yet is negative.
void check_images(const Model& model, const Dims& dims) {
  const auto& [channels, height, width] = model.plan().image;
  const uint32_t image[] = {channels, height, width};
  bool same = dims.nbDims == 4;
  for (int i = 0; same && i < 3; ++i) same = dims.d[i + 1] < 0 || dims.d[i + 1] == int64_t(image[i]);
  if (same) return;
  const std::string taken = std::to_string(channels) + " x " + std::to_string(height) + " x " + std::to_string(width);
  throw Error(QSWIN_BAD_ARGUMENT, "gets other images than those of its bundle, N x " + taken);
}

// Throws Error unless the model holds a batch size. One that is not known yet is negative.
uint32_t check_batch(const Model& model, int64_t batch) {
  if (batch >= 0) find_batch(model.plan(), uint32_t(std::min<int64_t>(batch, UINT32_MAX)));
  return uint32_t(batch);
}

}  // namespace

nvinfer1::DimsExprs BundlePlugin::getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t count,
                                                      nvinfer1::IExprBuilder& builder) noexcept {
  nvinfer1::DimsExprs logits{};
  if (count != 1 || inputs[0].nbDims != 4) {
    report("needs one input, (N, channels, height, width)");
    logits.nbDims = -1;
    return logits;
  }
  logits.nbDims = 2;
  logits.d[0] = inputs[0].d[0];
  logits.d[1] = builder.constant(int32_t(model_->plan().classes));
  return logits;
}

// Float32 alone: TensorRT converts where a neighbour computes in FP16.
bool BundlePlugin::supportsFormatCombination(int32_t at, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                             int32_t outputs) noexcept {
  return inputs == 1 && outputs == 1 && tensors[at].type == DataType::kFLOAT &&
         tensors[at].format == TensorFormat::kLINEAR;
}

void BundlePlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                   const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept {
  const nvinfer1::DynamicPluginTensorDesc& images = inputs[0];
  fits_ = guarded(
      [&] {
        check_images(*model_, images.desc.dims);
        if (images.desc.dims.d[0] < 0) {  // a profile, of which 8.6 says the smallest and the largest batch
          check_batch(*model_, images.min.d[0]);
          check_batch(*model_, images.max.d[0]);
        }
        check_batch(*model_, images.desc.dims.d[0]);
        return true;
      },
      false);
}

int32_t BundlePlugin::initialize() noexcept {
  if (!fits_) return 1;  // said when it was configured
  return guarded(
      [&] {
        model_->open();
        return 0;
      },
      1);
}

int32_t BundlePlugin::enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                              const void* const* from, void* const* to, void* workspace, cudaStream_t stream) noexcept {
  return guarded(
      [&] {
        const Dims& dims = inputs[0].dims;
        check_images(*model_, dims);
        model_->enqueue(check_batch(*model_, dims.d[0]), workspace, stream, from[0], to[0]);
        return 0;
      },
      1);
}

void BundlePlugin::serialize(void* buffer) const noexcept {
  std::memcpy(buffer, model_->bytes().data(), model_->bytes().size());
}

nvinfer1::IPluginV2DynamicExt* BundlePlugin::clone() const noexcept {
  return guarded([&]() -> BundlePlugin* { return new BundlePlugin(*this); }, static_cast<BundlePlugin*>(nullptr));
}

void BundlePlugin::setPluginNamespace(const char* space) noexcept {
  guarded([&] { namespace_ = space ? space : ""; });
}

}  // namespace qswin
