// SHA-256 (FIPS 180-4).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace qswin {

struct Bytes {
  const uint8_t* data;
  size_t size;
};

// Of the parts, one after the other.
std::array<uint8_t, 32> sha256(std::initializer_list<Bytes> parts);

}  // namespace qswin
