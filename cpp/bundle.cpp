#include "bundle.h"

#include <cstring>

#include "error.h"

namespace qswin {
namespace {

constexpr uint8_t MAGIC[8] = {0x89, 'Q', 'S', 'B', '\r', '\n', 0x1a, '\n'};
constexpr uint32_t VERSION = 1;
constexpr uint64_t ALIGNMENT = 256, POINTER_ALIGNMENT = 16;
constexpr size_t HEADER = 64, SECTION = 64, PLAN = 32, SIGNATURE = 64, BATCH = 16, LAUNCH = 16, ARGUMENT = 24,
                 CUBIN = 128;
enum SectionKind : uint32_t { MANIFEST_SECTION = 1, PLAN_SECTION, CONSTANTS_SECTION, CODE_SECTION };

constexpr uint32_t MOST_SECTIONS = 19, MOST_KERNELS = 4096, MOST_BATCHES = 64, MOST_LAUNCHES = 1 << 16;
constexpr uint32_t MOST_ARGUMENTS = 1 << 20, LARGEST_SIDE = 1 << 16, LARGEST_CLASSES = 1 << 20, LARGEST_BATCH = 1 << 16;
constexpr uint64_t LARGEST_BUFFER = uint64_t(1) << 44, LARGEST_MANIFEST = 64 << 20;
constexpr uint32_t LARGEST_GRID[3] = {0x7fffffff, 0xffff, 0xffff}, LARGEST_SHARED = 227 << 10, LARGEST_PROGRAM = 1024;

[[noreturn]] void refuse(const std::string& what) {
  throw Error(QSWIN_BAD_FILE, what + "; build the bundle again with qswin build --target bundle");
}

void check(bool holds, const char* what) {
  if (!holds) refuse(what);
}

uint64_t aligned(uint64_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Reads numbers and fields one after the other. Every read is checked.
class Cursor {
 public:
  explicit Cursor(Bytes bytes) : bytes_(bytes) {}

  Bytes take(size_t size) {
    check(size <= bytes_.size - at_, "a part of the file is cut off");
    at_ += size;
    return {bytes_.data + at_ - size, size};
  }
  uint32_t u32() { return number<uint32_t>(); }
  uint64_t u64() { return number<uint64_t>(); }

 private:
  template <typename Number>
  Number number() {
    const Bytes bytes = take(sizeof(Number));
    Number value = 0;
    for (size_t i = sizeof(Number); i-- > 0;) value = Number(value << 8 | bytes.data[i]);
    return value;
  }

  Bytes bytes_;
  size_t at_ = 0;
};

void check_digest(Bytes content, Bytes digest) {
  const bool same = std::memcmp(sha256({content}).data(), digest.data, 32) == 0;
  check(same, "changed since it was built: a checksum does not hold");
}

// Printable ASCII, of `letters` where they are given, filled up with at least one zero behind.
std::string text(Bytes field, const char* letters) {
  size_t length = field.size;
  while (length > 0 && field.data[length - 1] == 0) --length;
  check(0 < length && length < field.size, "a name that is not one");
  for (size_t i = 0; i < length; ++i) {
    const uint8_t letter = field.data[i];
    check(33 <= letter && letter < 127 && (!letters || std::strchr(letters, letter)), "a name that is not one");
  }
  return {reinterpret_cast<const char*>(field.data), length};
}

struct Section {
  uint32_t kind, architecture;
  Bytes content, digest;
};

// The sections, whose own checksums are not checked yet.
std::vector<Section> sections_of(Bytes file) {
  check(file.size >= HEADER && std::memcmp(file.data, MAGIC, 8) == 0, "not a bundle");
  Cursor header({file.data + 8, HEADER - 8});
  const uint32_t version = header.u32(), count = header.u32();
  const uint64_t size = header.u64();
  header.u64();
  const Bytes digest = header.take(32);
  if (version != VERSION) refuse("of format " + std::to_string(version) + ", and this library reads format 1");
  check(size == file.size, "cut off, or changed: not of the size that it says");
  check(4 <= count && count <= MOST_SECTIONS && HEADER + SECTION * count <= file.size, "sections that cannot be");
  const Bytes table{file.data + HEADER, SECTION * count};
  const bool whole = std::memcmp(sha256({{file.data, 32}, table}).data(), digest.data, 32) == 0;
  check(whole, "its header was changed");
  std::vector<Section> sections;
  uint64_t end = HEADER + table.size;
  for (Cursor entry(table); sections.size() < count;) {
    Section section{entry.u32(), entry.u32(), {nullptr, 0}, {nullptr, 0}};
    const uint64_t offset = entry.u64(), length = entry.u64();
    entry.u64();
    section.digest = entry.take(32);
    const bool inside = offset == aligned(end) && offset <= file.size && length <= file.size - offset;
    check(inside, "a section lies outside of the file");
    section.content = {file.data + offset, size_t(length)};
    end = offset + length;
    sections.push_back(section);
  }
  check(end == file.size, "bytes that belong to no section");
  return sections;
}

// The records of a plan that are not read yet, and how many there are.
struct Records {
  Cursor batches, launches, arguments;
  uint64_t launches_left, arguments_left;
};

using Spaces = std::array<uint64_t, 4>;  // the bytes of each, by the kind of a pointer into it

Argument read_argument(Cursor& records, char letter, const Spaces& spaces) {
  const uint32_t kind = records.u32(), reserved = records.u32();
  const uint64_t value = records.u64(), size = records.u64();
  const char expected = kind == INT ? 'i' : kind == FLOAT ? 'f' : 'p';
  check(kind <= NOTHING && expected == letter && reserved == 0, "an argument that is not what its kernel takes");
  if (kind <= OUTPUT) {
    check(size >= 1 && value <= spaces[kind] && size <= spaces[kind] - value, "a buffer lies outside of its space");
    check(value % POINTER_ALIGNMENT == 0, "a buffer that is not aligned");
  } else {
    check(kind == NOTHING ? value == 0 && size == 8 : value <= 0xffffffff && size == 4, "an argument that is none");
  }
  return {Kind(kind), value};
}

Launch read_launch(Records& records, const Bundle& bundle, const Spaces& spaces) {
  Launch launch{records.launches.u32(), {}, {}};
  check(launch.kernel < bundle.signatures.size(), "a launch of a kernel that it lacks");
  for (size_t side = 0; side < 3; ++side) {
    launch.grid[side] = records.launches.u32();
    check(1 <= launch.grid[side] && launch.grid[side] <= LARGEST_GRID[side], "a grid that CUDA does not take");
  }
  const std::string& signature = bundle.signatures[launch.kernel];
  check(signature.size() <= records.arguments_left, "a launch without its arguments");
  records.arguments_left -= signature.size();
  for (const char letter : signature) launch.arguments.push_back(read_argument(records.arguments, letter, spaces));
  return launch;
}

Spaces spaces_of(const Bundle& bundle, const Batch& batch) {
  uint64_t input = uint64_t(4) * batch.size;
  for (const uint32_t side : bundle.image) {
    check(input <= LARGEST_BUFFER / side, "images that are too large");
    input *= side;
  }
  return {batch.workspace, bundle.constants.size, input, uint64_t(4) * batch.size * bundle.classes};
}

Batch read_batch(Records& records, const Bundle& bundle) {
  Batch batch{records.batches.u32(), 0, {}};
  const uint32_t count = records.batches.u32();
  batch.workspace = records.batches.u64();
  const bool ascends = batch.size >= 1 && (bundle.batches.empty() || batch.size > bundle.batches.back().size);
  check(ascends && batch.size <= LARGEST_BATCH, "batch sizes that cannot be");
  check(batch.workspace <= LARGEST_BUFFER, "a workspace that is too large");
  check(1 <= count && count <= records.launches_left, "a batch has other launches than there are");
  records.launches_left -= count;
  const Spaces spaces = spaces_of(bundle, batch);
  for (uint32_t i = 0; i < count; ++i) batch.launches.push_back(read_launch(records, bundle, spaces));
  return batch;
}

void read_plan(Bundle& bundle, Bytes plan) {
  Cursor head(plan);
  bundle.image = {head.u32(), head.u32(), head.u32()};
  bundle.classes = head.u32();
  const uint32_t kernels = head.u32(), batches = head.u32(), launches = head.u32(), arguments = head.u32();
  for (const uint32_t side : bundle.image) check(1 <= side && side <= LARGEST_SIDE, "an image that cannot be");
  check(1 <= bundle.classes && bundle.classes <= LARGEST_CLASSES, "classes that cannot be");
  const bool bounded = 1 <= kernels && kernels <= MOST_KERNELS && 1 <= batches && batches <= MOST_BATCHES &&
                       1 <= launches && launches <= MOST_LAUNCHES && arguments <= MOST_ARGUMENTS;
  check(bounded, "its plan asks for more than a bundle may");
  const size_t whole = PLAN + SIGNATURE * kernels + BATCH * batches + LAUNCH * launches + ARGUMENT * size_t(arguments);
  check(plan.size == whole, "its plan is not of the size that it says");
  for (uint32_t i = 0; i < kernels; ++i) bundle.signatures.push_back(text(head.take(SIGNATURE), "pif"));
  const Cursor batch_records(head.take(BATCH * batches)), launch_records(head.take(LAUNCH * launches));
  Records records{batch_records, launch_records, head, launches, arguments};
  for (uint32_t i = 0; i < batches; ++i) bundle.batches.push_back(read_batch(records, bundle));
  check(records.launches_left == 0 && records.arguments_left == 0, "launches that no batch has");
}

// Whether it begins as an ELF file of 64 bits does, whose table of sections lies inside of it.
bool is_elf(Bytes code) {
  if (code.size < 64 || std::memcmp(code.data,
                                    "\x7f"
                                    "ELF\2\1",
                                    6) != 0)
    return false;
  const uint64_t table = Cursor({code.data + 40, 8}).u64();
  const uint64_t entries = Cursor({code.data + 58, 4}).u32();
  const uint64_t size = (entries & 0xffff) * (entries >> 16);
  return table <= code.size && size <= code.size - table;
}

}  // namespace

Bundle read_bundle(Bytes file) {
  const std::vector<Section> sections = sections_of(file);
  Bundle bundle{};
  for (size_t i = 0; i < sections.size(); ++i) {
    const Section& section = sections[i];
    const bool in_order =
        section.kind == (i < 3 ? uint32_t(i) + MANIFEST_SECTION : uint32_t(CODE_SECTION)) &&
        (i < 3 ? section.architecture == 0 : i == 3 || section.architecture > sections[i - 1].architecture);
    check(in_order, "sections that do not belong together");
    if (i < 3) check_digest(section.content, section.digest);
    if (i >= 3) bundle.code.push_back({section.architecture, section.content, section.digest});
  }
  check(sections[0].content.size <= LARGEST_MANIFEST, "its manifest is too large");
  bundle.constants = sections[2].content;
  read_plan(bundle, sections[1].content);
  return bundle;
}

const Batch& find_batch(const Bundle& bundle, uint32_t size) {
  for (const Batch& each : bundle.batches) {
    if (each.size == size) return each;
  }
  std::string held;
  for (const Batch& each : bundle.batches) held += (held.empty() ? "" : ", ") + std::to_string(each.size);
  throw Error(QSWIN_BAD_ARGUMENT, "batch " + std::to_string(size) + ": the bundle holds " + held);
}

std::vector<Cubin> read_code(const Bundle& bundle, const Code& code) {
  check_digest(code.content, code.digest);
  const size_t start = CUBIN * bundle.signatures.size();
  Cursor records(code.content);
  std::vector<Cubin> cubins;
  for (size_t i = 0; i < bundle.signatures.size(); ++i) {
    const uint64_t offset = records.u64(), size = records.u64();
    const uint32_t shared = records.u32(), threads = records.u32();
    const bool inside = start <= offset && offset <= code.content.size && size <= code.content.size - offset;
    check(inside, "a cubin lies outside of its section");
    const bool runs = shared <= LARGEST_SHARED && 32 <= threads && threads <= LARGEST_PROGRAM && threads % 32 == 0;
    check(runs, "a kernel that no GPU can run");
    check(is_elf({code.content.data + offset, size_t(size)}), "a cubin that is not one");
    cubins.push_back({code.content.data + offset, text(records.take(104), nullptr), shared, threads});
  }
  return cubins;
}

}  // namespace qswin
