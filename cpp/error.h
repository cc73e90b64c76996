// What goes wrong inside of the library, until the C functions turn it into a status and a line of text.
#pragma once
#include <stdexcept>
#include <string>

#include "qswin.h"

namespace qswin {

struct Error : std::runtime_error {
  Error(qswin_status code, const std::string& what) : std::runtime_error(what), status(code) {}
  qswin_status status;
};

}  // namespace qswin
