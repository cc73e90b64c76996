// Does with the plugin what TensorRT does, and prints what it gets; the driver is the one of fake_cuda.cpp.
//
// qswin_plugin_test LIBRARY BUNDLE STEP...: each step prints a line.
//   create          from the bundle's bytes, as a network is made
//   deserialize     from what the plugin before serializes, which then is destroyed
//   cut, changed    deserialize it with a byte less, or another byte
//   clone           the plugin before, which then is destroyed
//   copy            the same, but it is kept
//   shape           of the output, and which types it takes
//   configure:A,B,C for a batch, -1 of any, from the smallest to the largest
//   initialize
//   enqueue:N       a batch, by each plugin that there is, on a stream of its own
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
using namespace nvinfer1;

namespace {

#if NV_TENSORRT_MAJOR >= 10
using Creators = IPluginCreatorInterface* const*(int32_t&);
constexpr char CREATORS[] = "getCreators";
#else
using Creators = IPluginCreator* const*(int32_t&);
constexpr char CREATORS[] = "getPluginCreators";
#endif

class Log final : public ILogger {
  void log(Severity severity, const char* what) noexcept override { std::printf("log %d %s\n", int(severity), what); }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() noexcept override { return &logger; }
} finder;

using Value = decltype(std::declval<apiv::VDimensionExpr>().getConstantValue());  // int32_t; int64_t since 10

class Number final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Number(Value value) : value_(value) { mImpl = this; }
  using IDimensionExpr::getConstantValue;

 private:
  bool isConstant() const override { return true; }
  Value getConstantValue() const override { return value_; }
#if NV_TENSORRT_MAJOR >= 10
  bool isSizeTensor() const override { return false; }
#endif

  Value value_;
};

class Numbers final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Numbers() { mImpl = this; }

 private:
  using Expression = const IDimensionExpr*;
  Expression constant(Value value) override { return (made_ = std::make_unique<Number>(value)).get(); }
  Expression operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
#if NV_TENSORRT_MAJOR >= 10
  Expression declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
#endif

  std::unique_ptr<Number> made_;
};

// What a test does: the creator, and the plugins that it has made.
class Test {
 public:
  Test(const char* library, const char* path);
  void run(const std::string& step);
  ~Test() {
    for (IPluginV2DynamicExt* plugin : plugins_) plugin->destroy();
  }

 private:
  IPluginV2DynamicExt* plugin() { return plugins_.back(); }
  void take(const char* step, IPluginV2* made);
  void replace(const char* step, IPluginV2* made);
  void create();
  void deserialize(const std::string& step);
  void shape();
  void configure(const std::string& batches);
  void enqueue(int batch);
  PluginTensorDesc images(int batch, DataType type = DataType::kFLOAT);

  IPluginCreator* creator_;
  std::vector<char> bundle_;
  std::vector<IPluginV2DynamicExt*> plugins_;
  std::vector<char> memory_ = std::vector<char>(1 << 24);
};

template <typename Function>
Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) std::exit(3);
  return reinterpret_cast<Function*>(found);
}

Test::Test(const char* library, const char* path) {
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) std::printf("%s\n", dlerror()), std::exit(3);
  if (std::getenv("QSWIN_TEST_LOGGER")) find<void(ILoggerFinder*)>(opened, "setLoggerFinder")(&finder);
  int32_t count = 0;
  creator_ = static_cast<IPluginCreator*>(find<Creators>(opened, CREATORS)(count)[0]);
  const PluginField& field = creator_->getFieldNames()->fields[0];
  std::printf("creator %d %s %s %s\n", count, creator_->getPluginName(), creator_->getPluginVersion(), field.name);
  std::ifstream file(path, std::ios::binary);
  bundle_.assign(std::istreambuf_iterator<char>(file), {});
}

void Test::take(const char* step, IPluginV2* made) {
  std::printf("%s %s\n", step, made ? made->getPluginType() : "nothing");
  if (made) plugins_.push_back(static_cast<IPluginV2DynamicExt*>(made));
}

void Test::replace(const char* step, IPluginV2* made) {
  IPluginV2DynamicExt* before = plugin();
  plugins_.pop_back();
  before->destroy();
  take(step, made);
}

void Test::create() {
  const PluginField field("bundle", bundle_.data(), PluginFieldType::kINT8, int32_t(bundle_.size()));
  const PluginFieldCollection fields{bundle_.empty() ? 0 : 1, &field};
  take("create", creator_->createPlugin("classifier", &fields));
}

void Test::deserialize(const std::string& step) {
  std::vector<char> data(plugin()->getSerializationSize());
  plugin()->serialize(data.data());
  const bool same = data == bundle_;
  if (step == "changed") data[data.size() - 1] = char(data.back() ^ 1);
  IPluginV2* made = creator_->deserializePlugin("classifier", data.data(), data.size() - (step == "cut"));
  if (step == "deserialize") {
    replace(same ? "deserialize the same" : "deserialize other bytes", made);
  } else {
    take(step.c_str(), made);
  }
}

PluginTensorDesc Test::images(int batch, DataType type) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = 4;
  const char* side = std::getenv("QSWIN_TEST_SIDE");
  const int sides[] = {batch, 3, side ? std::atoi(side) : 32, 32};
  for (int i = 0; i < 4; ++i) desc.dims.d[i] = sides[i];
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  return desc;
}

void Test::shape() {
  const auto value = [](const IDimensionExpr* number) { return int(number->getConstantValue()); };
  Numbers numbers;
  const Number batch(7), sides[] = {Number(3), Number(32), Number(32)};
  DimsExprs input{};
  input.nbDims = 4;
  input.d[0] = &batch;
  for (int i = 0; i < 3; ++i) input.d[i + 1] = &sides[i];
  const DimsExprs output = plugin()->getOutputDimensions(0, &input, 1, numbers);
  const PluginTensorDesc floats[] = {images(1), images(1)}, halves[] = {images(1, DataType::kHALF), images(1)};
  std::printf("shape %d %d %d float %d half %d type %d outputs %d\n", output.nbDims, value(output.d[0]),
              value(output.d[1]), plugin()->supportsFormatCombination(1, floats, 1, 1),
              plugin()->supportsFormatCombination(0, halves, 1, 1), int(plugin()->getOutputDataType(0, nullptr, 0)),
              plugin()->getNbOutputs());
}

void Test::configure(const std::string& batches) {
  int batch = 0, low = 0, high = 0;
  if (std::sscanf(batches.c_str(), "%d,%d,%d", &batch, &low, &high) != 3) std::exit(3);
  DynamicPluginTensorDesc in{};
  in.desc = images(batch);
  in.min = images(low).dims;
  in.max = images(high).dims;
  plugin()->configurePlugin(&in, 1, nullptr, 0);
  const PluginTensorDesc largest = images(high);
  std::printf("configure %zu\n", plugin()->getWorkspaceSize(&largest, 1, nullptr, 0));
}

void Test::enqueue(int batch) {
  const PluginTensorDesc desc = images(batch);
  const void* from[] = {&memory_[0]};
  for (size_t i = 0; i < plugins_.size(); ++i) {
    void *to[] = {&memory_[1 << 22]}, *workspace = &memory_[(2 + i) << 22];
    auto* stream = reinterpret_cast<cudaStream_t>(i + 1);
    std::printf("enqueue %d %p %p %p\n", plugins_[i]->enqueue(&desc, nullptr, from, to, workspace, stream), workspace,
                from[0], to[0]);
  }
}

void Test::run(const std::string& step) {
  const size_t colon = step.find(':');
  const std::string name = step.substr(0, colon), value = colon == std::string::npos ? "" : step.substr(colon + 1);
  if (name == "create") create();
  if (name == "deserialize" || name == "cut" || name == "changed") deserialize(name);
  if (name == "clone") replace("clone", plugin()->clone());
  if (name == "copy") take("copy", plugin()->clone());
  if (name == "shape") shape();
  if (name == "configure") configure(value);
  if (name == "initialize") std::printf("initialize %d\n", plugin()->initialize());
  if (name == "enqueue") enqueue(std::atoi(value.c_str()));
}

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Test test(arguments[1], arguments[2]);
  for (int i = 3; i < count; ++i) test.run(arguments[i]);
}
