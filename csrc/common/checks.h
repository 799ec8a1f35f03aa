// Assertions of the operators. Python checks and words every error first; these hold for callers
// of torch.ops too. (STD_TORCH_CHECK would put the build machine's paths into the message.)
#pragma once
#include <sstream>
#include <stdexcept>

namespace pixfuse {

// Throws std::invalid_argument: "<function>: expected <the parts of expectation>".
template <class... Parts>
inline void check(bool holds, const char* function, const Parts&... expectation) {
  if (__builtin_expect(holds, true)) return;
  std::ostringstream message;
  message << function << ": expected ";
  (message << ... << expectation);
  throw std::invalid_argument(message.str());
}

}  // namespace pixfuse
