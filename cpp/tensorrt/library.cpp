// What TensorRT finds in the library: the creator of the plugin, and how it is told where to log.
#include <atomic>
#include <cstdio>
#include <cstring>

#include "error.h"
#include "tensorrt/plugin.h"

namespace qswin {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

const nvinfer1::PluginField* find_bundle(const nvinfer1::PluginFieldCollection* fields) {
  for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    const bool bytes = field.type == nvinfer1::PluginFieldType::kINT8 && field.length > 0;
    if (bytes && std::strcmp(field.name, BUNDLE_FIELD) == 0) return &field;
  }
  throw Error(QSWIN_BAD_ARGUMENT, "needs a field named bundle of type INT8, the bundle's bytes");
}

class BundleCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return PLUGIN_NAME; }
  const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  nvinfer1::IPluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    return guarded(
        [&] {
          const nvinfer1::PluginField* bundle = find_bundle(fields);
          return make(bundle->data, size_t(bundle->length));
        },
        static_cast<nvinfer1::IPluginV2*>(nullptr));
  }
  nvinfer1::IPluginV2* deserializePlugin(const char*, const void* data, size_t size) noexcept override {
    return guarded([&] { return make(data, size); }, static_cast<nvinfer1::IPluginV2*>(nullptr));
  }

  void setPluginNamespace(const char* space) noexcept override {
    guarded([&] { namespace_ = space ? space : ""; });
  }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  nvinfer1::IPluginV2* make(const void* data, size_t size) const {
    return new BundlePlugin(std::make_shared<Model>(data, size), namespace_);
  }

  std::string namespace_;
  nvinfer1::PluginField field_{BUNDLE_FIELD, nullptr, nvinfer1::PluginFieldType::kINT8, 0};
  nvinfer1::PluginFieldCollection fields_{1, &field_};
};

}  // namespace

void report(const char* what) noexcept {
  char line[1024];
  std::snprintf(line, sizeof line, "%s: %s", PLUGIN_NAME, what);
  nvinfer1::ILoggerFinder* finder = logger_finder;
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line);
  } else {
    std::fprintf(stderr, "%s\n", line);
  }
}

}  // namespace qswin

extern "C" {

// 806 of 8.6: whose headers the library was compiled with. Another TensorRT would call other virtual functions.
QSWIN_API int qswin_tensorrt_version() { return NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR; }

// TensorRT asks for the others by name when it loads the library (IPluginRegistry::loadLibrary).
#if NV_TENSORRT_MAJOR >= 10
QSWIN_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using Creator = nvinfer1::IPluginCreatorInterface;
#else
QSWIN_API nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  using Creator = nvinfer1::IPluginCreator;
#endif
  static qswin::BundleCreator creator;
  static Creator* const creators[] = {&creator};
  count = 1;
  return creators;
}

QSWIN_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { qswin::logger_finder = finder; }

}  // extern "C"
