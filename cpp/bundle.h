// A bundle's file, read with every offset, size and count checked. docs/bundle.md describes it; qat/bundle/reader.py
// has the same checks. The manifest, which is for people and for Python, is not read here.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sha256.h"

namespace qswin {

enum Kind : uint32_t { WORKSPACE, CONSTANTS, INPUT, OUTPUT, INT, FLOAT, NOTHING };  // of an argument
constexpr size_t MOST_ARGUMENTS_OF_A_KERNEL = 63;

struct Argument {
  Kind kind;
  uint64_t value;  // the offset of a pointer, or the bits of a number
};

struct Launch {
  uint32_t kernel;
  std::array<uint32_t, 3> grid;
  std::vector<Argument> arguments;
};

struct Batch {
  uint32_t size;
  uint64_t workspace;  // bytes
  std::vector<Launch> launches;
};

struct Cubin {
  const uint8_t* code;
  std::string function;
  uint32_t shared, threads;
};

struct Code {
  uint32_t architecture;
  Bytes content;
  Bytes digest;
};

// What a file holds. Pointers are into the file's bytes.
struct Bundle {
  std::array<uint32_t, 3> image;  // channels, height, width
  uint32_t classes;
  std::vector<std::string> signatures;  // of each kernel: p, i or f for each argument
  std::vector<Batch> batches;
  Bytes constants;
  std::vector<Code> code;  // in ascending order of architectures
};

// Reads and checks all but the code. Throws Error.
Bundle read_bundle(Bytes file);

// What is run for a batch size. Throws Error, with those that there are, where the bundle does not hold it.
const Batch& find_batch(const Bundle& bundle, uint32_t size);

// Reads and checks an architecture's cubins, one for each kernel. Throws Error.
std::vector<Cubin> read_code(const Bundle& bundle, const Code& code);

}  // namespace qswin
