// What the programs of this folder share: their arguments, what is planted, which instruction sets
// they run, how a call is split, the layouts of a batch and what they are filled with.
//
//   threads             the parts of each call run at the same time
//   planted=NAME        a fault that must be noticed: see `Planted`
//
// The environment variable NATIVE_ISAS: only the instruction sets with these numbers, each followed
// by a comma.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "common/element_type.h"
#include "common/isa.h"

// Each program plants those that its memory and its results can have.
enum class Planted {
  none,
  short_input,   // the input ends one byte early
  early_input,   // the input begins one element late
  short_output,  // the output ends one byte early
  short_weight,  // so do the weights, by one weight
  misaligned,    // the output lies between two elements
  wrong_value,   // one expected value is another
  wrong_count,   // one count is one more
  race,          // two threads write to the same memory
};
constexpr const char* kPlantedNames[] = {"none",         "short_input",  "early_input",
                                         "short_output", "short_weight", "misaligned",
                                         "wrong_value",  "wrong_count",  "race"};
inline Planted planted = Planted::none;
inline bool use_threads = false;

// Parts of different lengths, the last one first; each of them `copies` times.
inline int32_t run_parts(int64_t begin, int64_t end, int copies,
                         void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  const int64_t part = (end - begin) / 3 + 1;
  for (int64_t last = end; last > begin; last -= part) {
    const int64_t first = std::max(begin, last - part);
    for (int copy = 0; copy < copies; ++copy) {
      if (use_threads) {
        threads.emplace_back(body, first, last, context);
      } else {
        body(first, last, context);
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// A race is two threads that do the same work.
inline int32_t parallel_for(int64_t begin, int64_t end, int64_t,
                            void (*body)(int64_t, int64_t, void*), void* context) {
  return run_parts(begin, end, planted == Planted::race ? 2 : 1, body, context);
}

// Random numbers of 24 bits, the same in each run.
inline uint32_t next_number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
inline uint8_t next_byte() { return static_cast<uint8_t>(next_number() >> 16); }

// The value of an element, from the definition of its format.
inline double stored_value(pixfuse::ElementType dtype, const uint8_t* element) {
  if (dtype == pixfuse::ElementType::uint8) return *element;
  if (dtype == pixfuse::ElementType::float32) {
    float value;
    std::memcpy(&value, element, sizeof value);
    return static_cast<double>(value);
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof bits);
  const int fraction_bits = dtype == pixfuse::ElementType::float16 ? 10 : 7;
  const int exponents = 1 << (15 - fraction_bits), bias = exponents / 2 - 1;
  const int exponent = bits >> fraction_bits & (exponents - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double value = fraction == 0 ? HUGE_VAL : std::nan("");
  if (exponent < exponents - 1) {
    const int whole = exponent == 0 ? 0 : 1 << fraction_bits;
    value = std::ldexp(whole + fraction, std::max(exponent, 1) - bias - fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

enum class Layout {
  planar,
  pixels,
  pixels_and_one,
  padded_rows,
  spread,
  same_image,
  batch_last,
  count
};

inline void set_strides(int64_t (&strides)[4], const int64_t (&sizes)[4], Layout layout) {
  const int64_t n = sizes[0], c = sizes[1], h = sizes[2], w = sizes[3];
  const auto set = [&](int64_t sn, int64_t sc, int64_t sh, int64_t sw) {
    const int64_t values[4] = {sn, sc, sh, sw};
    std::memcpy(strides, values, sizeof values);
  };
  switch (layout) {
    case Layout::planar:
    case Layout::count:
      return set(c * h * w, h * w, w, 1);
    case Layout::pixels:
      return set(c * h * w, 1, c * w, c);
    case Layout::pixels_and_one:
      return set((c + 1) * h * w, 1, (c + 1) * w, c + 1);
    case Layout::padded_rows:
      return set(c * h * (w + 3), h * (w + 3), w + 3, 1);
    case Layout::spread:
      return set(2 * c * h * w, 2 * h * w, 2 * w, 2);
    case Layout::same_image:
      return set(0, h * w, w, 1);
    case Layout::batch_last:
      return set(1, h * w * n, w * n, n);
  }
}

inline bool is_wanted(pixfuse::Isa isa) {
  const char* const numbers = std::getenv("NATIVE_ISAS");
  const std::string number = std::to_string(static_cast<int>(isa)) + ",";
  return isa_available(isa) &&
         (numbers == nullptr ||
          ("," + std::string(numbers)).find("," + number) != std::string::npos);
}

// The instruction sets that all operators have loops for. What has them for more says so.
constexpr pixfuse::Isa kIsas[] = {pixfuse::Isa::portable, pixfuse::Isa::avx2, pixfuse::Isa::avx512,
                                  pixfuse::Isa::neon};

// An argument of one program.
struct Flag {
  const char* name;
  bool* value;
};

// The `main` of a program: run_all(isa, cases) is false when a case failed, and has said so.
template <class RunAll>
int run_program(int argc, char** argv, const RunAll& run_all,
                std::initializer_list<pixfuse::Isa> more_isas = {},
                std::initializer_list<Flag> flags = {}) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    bool known = argument == "threads";
    use_threads = use_threads || known;
    for (const Flag& flag : flags) {
      if (argument != flag.name) continue;
      *flag.value = known = true;
    }
    for (size_t k = 0; k < std::size(kPlantedNames); ++k) {
      if (argument != std::string("planted=") + kPlantedNames[k]) continue;
      planted = static_cast<Planted>(k);
      known = true;
    }
    if (!known) {
      std::printf("unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  std::vector<pixfuse::Isa> isas(std::begin(kIsas), std::end(kIsas));
  isas.insert(isas.end(), more_isas);
  for (const pixfuse::Isa isa : isas) {
    if (!is_wanted(isa)) continue;
    pixfuse::set_active_isa(isa);
    int64_t cases = 0;
    if (!run_all(isa, cases)) return 1;
    std::printf("isa %d: %ld cases\n", static_cast<int>(isa), static_cast<long>(cases));
    std::fflush(stdout);
  }
  return 0;
}
