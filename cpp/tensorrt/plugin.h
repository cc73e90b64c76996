// A bundle as a layer of a TensorRT network: (N, channels, height, width) float32 in, (N, classes) float32 out, N being
// one of the bundle's batch sizes. Compiles against the headers of TensorRT 8.6, 10 and 11.
#pragma once
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // IPluginV2DynamicExt, since 10: 8.6 has no newer one
#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "tensorrt/model.h"

namespace qswin {

constexpr char PLUGIN_NAME[] = "QswinBundle", PLUGIN_VERSION[] = "1", BUNDLE_FIELD[] = "bundle";

// Logs an error to the logger of TensorRT, or, where the library was not given one, to standard error.
void report(const char* what) noexcept;

// What work() gives; where it throws, that is reported, and it is `failed`.
template <typename Work, typename Result>
Result guarded(Work work, Result failed) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report(error.what());
    return failed;
  }
}

template <typename Work>
void guarded(Work work) noexcept {
  guarded(
      [&] {
        work();
        return true;
      },
      false);
}

class BundlePlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  BundlePlugin(std::shared_ptr<Model> model, std::string space)
      : model_(std::move(model)), namespace_(std::move(space)) {}

  const char* getPluginType() const noexcept override { return PLUGIN_NAME; }
  const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType*, int32_t) const noexcept override {
    return nvinfer1::DataType::kFLOAT;
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t count,
                                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t at, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return model_->workspace(inputs[0].dims.d[0]);
  }
  int32_t initialize() noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* from,
                  void* const* to, void* workspace, cudaStream_t stream) noexcept override;
  void terminate() noexcept override {}  // clones go on; the last of them frees what they share

  size_t getSerializationSize() const noexcept override { return model_->bytes().size(); }
  void serialize(void* buffer) const noexcept override;
  IPluginV2DynamicExt* clone() const noexcept override;
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const char* space) noexcept override;
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  std::shared_ptr<Model> model_;
  std::string namespace_;
  bool fits_ = true;  // whether the bundle takes the images, and holds the batch sizes, that it was configured for
};

}  // namespace qswin
