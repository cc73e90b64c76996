// Reads changed bundles: none may be read out of bounds, whether its checksums are right or not.
//
//   qswin_fuzz BUNDLE ROUNDS     with a generator of its own, prints how many were read and refused
//
// With clang, -fsanitize=fuzzer and -DQSWIN_LIBFUZZER it is a target of libFuzzer, whose corpus is bundles.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "qswin.h"
#include "sha256.h"

namespace {

constexpr size_t HEADER = 64, SECTION = 64;

uint64_t number(const std::vector<uint8_t>& data, size_t at, size_t size) {
  uint64_t value = 0;
  for (size_t i = size; i-- > 0;) value = value << 8 | data[at + i];
  return value;
}

// Makes the checksums of header and sections right, as far as the table lies in the file.
void seal(std::vector<uint8_t>& data) {
  if (data.size() < HEADER) return;
  const size_t table = HEADER + SECTION * size_t(number(data, 12, 4));
  if (table > data.size()) return;
  for (size_t entry = HEADER; entry < table; entry += SECTION) {
    const uint64_t offset = number(data, entry + 8, 8), size = number(data, entry + 16, 8);
    if (offset > data.size() || size > data.size() - offset) continue;
    const auto digest = qswin::sha256({{data.data() + offset, size_t(size)}});
    std::memcpy(data.data() + entry + 32, digest.data(), digest.size());
  }
  const auto digest = qswin::sha256({{data.data(), 32}, {data.data() + HEADER, table - HEADER}});
  std::memcpy(data.data() + 32, digest.data(), digest.size());
}

qswin_status check(const std::vector<uint8_t>& data) {
  // A copy of its exact size, so that AddressSanitizer sees the end.
  const std::vector<uint8_t> exact(data.begin(), data.end());
  const qswin_status status = qswin_check(exact.data(), exact.size());
  if (status != QSWIN_OK && (status != QSWIN_BAD_FILE || !*qswin_error() || std::strchr(qswin_error(), '\n'))) {
    std::fprintf(stderr, "status %d: %s\n", status, qswin_error());
    std::abort();
  }
  return status;
}

}  // namespace

#ifdef QSWIN_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> changed(data, data + size);
  if (changed.empty()) return 0;
  check(changed);
  seal(changed);
  check(changed);
  return 0;
}
#else
int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: qswin_fuzz BUNDLE ROUNDS\n"), 2;
  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<uint8_t> good{std::istreambuf_iterator<char>(file), {}};
  if (good.empty() || check(good) != QSWIN_OK) return std::fprintf(stderr, "%s: %s\n", arguments[1], qswin_error()), 2;
  const size_t plan = size_t(number(good, HEADER + SECTION + 8, 8)),
               length = size_t(number(good, HEADER + SECTION + 16, 8));
  std::mt19937 random(0);
  const auto below = [&](size_t bound) { return size_t(random() % bound); };
  const uint8_t values[] = {0, 1, 4, 16, 0x7f, 0x80, 0xff};
  int read = 0, refused = 0;
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    std::vector<uint8_t> data = good;
    const bool sealed = below(4) != 0;
    for (size_t changes = 1 + below(3); changes > 0; --changes) {
      // Most changes are in the tables: elsewhere there is little to parse.
      const size_t where = below(8);
      size_t at = where == 0 ? below(data.size()) : where == 1 ? below(HEADER + 5 * SECTION) : plan + below(length);
      if (below(2)) at -= at % 8;
      const uint8_t value = below(2) ? values[below(sizeof(values))] : uint8_t(random());
      for (size_t run = below(2) ? 1 : 1 + below(8); run > 0 && at < data.size(); --run) data[at++] = value;
    }
    if (below(8) == 0) data.resize(below(data.size()) + 1);
    if (sealed) seal(data);
    ++(check(data) == QSWIN_OK ? read : refused);
  }
  std::printf("%d read, %d refused\n", read, refused);
  return 0;
}
#endif
