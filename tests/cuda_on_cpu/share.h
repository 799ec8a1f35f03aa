// A part of a program's cases: with CUDA_ON_CPU_SHARE=i/n in the environment, those of the share i
// of n. Each case is in one share; cases that follow each other are in any.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

struct Share {
  unsigned index = 0, count = 1;
  uint32_t state = 1;

  Share() {
    const char* text = std::getenv("CUDA_ON_CPU_SHARE");
    if (text == nullptr) return;
    if (std::sscanf(text, "%u/%u", &index, &count) != 2 || index >= count) {
      std::fprintf(stderr, "CUDA_ON_CPU_SHARE is a share and their number, such as 0/3\n");
      std::exit(2);
    }
  }
};

// Asked once for each case.
inline bool is_in_share() {
  static Share share;
  share.state = share.state * 1664525u + 1013904223u;
  return (share.state >> 16) % share.count == share.index;
}

}  // namespace
