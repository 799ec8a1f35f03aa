// Which instruction sets a test program runs: all that there are, or those of them whose numbers
// are in the environment variable NATIVE_ISAS, each followed by a comma.
#pragma once
#include <cstdlib>
#include <string>

#include "common/isa.h"

inline bool is_wanted(pixfuse::Isa isa) {
  const char* const numbers = std::getenv("NATIVE_ISAS");
  const std::string number = std::to_string(static_cast<int>(isa)) + ",";
  return isa_available(isa) &&
         (numbers == nullptr ||
          ("," + std::string(numbers)).find("," + number) != std::string::npos);
}
