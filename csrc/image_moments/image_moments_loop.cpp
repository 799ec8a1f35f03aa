// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
//
// gcc's vector types instead of plain loops: it does not keep the sums of interleaved channels in
// registers by itself.
#include "image_moments/image_moments_loop.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 2;
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// Sums of what lies side by side, the channels in turn: lane after lane of `kVectors` vectors holds
// the sums of channel 0, 1, ..., 0, 1, ... So a run must start with channel 0, and the channel
// count divide the lanes.
template <int kVectors>
class Sums {
 public:
  static constexpr int kPeriod = kVectors * kLanes;

  void add_run(const uint8_t* in, int64_t count) {
    int64_t i = 0;
    while (i + kPeriod <= count) {
      int64_t steps = (count - i) / kPeriod;
      if (steps > kMaxSteps - steps_) steps = kMaxSteps - steps_;
      i += add_steps(in + i, steps);
    }
    if (i == count) return;
    alignas(64) uint8_t rest[kPeriod] = {};  // zeros change no sum
    __builtin_memcpy(rest, in + i, count - i);
    add_steps(rest, 1);
  }

  // Adds to the sums of `channels` channels, whose bytes are `step` apart, atomically, and starts
  // anew.
  void add_to(int64_t* sums, int64_t* squares, int64_t channels, int64_t step) {
    flush();
    for (int64_t c = 0; c < channels; ++c) {
      int64_t sum = 0, square = 0;
      for (int64_t lane = c; lane < kPeriod; lane += step) {
        sum += sums_[lane];
        square += squares_[lane];
      }
      __atomic_fetch_add(sums + c, sum, __ATOMIC_RELAXED);
      __atomic_fetch_add(squares + c, square, __ATOMIC_RELAXED);
    }
    __builtin_memset(sums_, 0, sizeof sums_);
    __builtin_memset(squares_, 0, sizeof squares_);
  }

 private:
  static constexpr int64_t kMaxSteps = 256;  // 256 * 255 fits 16 bits

  int64_t add_steps(const uint8_t* in, int64_t steps) {
    // Locals: in registers while the loop runs.
    Halves sum[kVectors];
    Words even[kVectors], odd[kVectors];
    for (int k = 0; k < kVectors; ++k) sum[k] = sum16_[k], even[k] = even_[k], odd[k] = odd_[k];
    for (int64_t step = 0; step < steps; ++step) {
      for (int k = 0; k < kVectors; ++k) {
        Bytes bytes;
        __builtin_memcpy(&bytes, in + (step * kVectors + k) * kLanes, sizeof bytes);
        const Halves x = __builtin_convertvector(bytes, Halves);
        const Words square = reinterpret_cast<Words>(x * x);  // of two lanes: 255 * 255 fits
        sum[k] += x;
        even[k] += square & 0xffffu;
        odd[k] += square >> 16;
      }
    }
    for (int k = 0; k < kVectors; ++k) sum16_[k] = sum[k], even_[k] = even[k], odd_[k] = odd[k];
    steps_ += steps;
    if (steps_ == kMaxSteps) flush();
    return steps * kPeriod;
  }

  void flush() {
    constexpr int kPairs = kLanes / 2;
    for (int k = 0; k < kVectors; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) sums_[k * kLanes + lane] += sum16_[k][lane];
      for (int pair = 0; pair < kPairs; ++pair) {
        const int lane = k * kLanes + 2 * pair;
        const bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
        squares_[lane + (little_endian ? 0 : 1)] += even_[k][pair];
        squares_[lane + (little_endian ? 1 : 0)] += odd_[k][pair];
      }
      sum16_[k] = Halves{};
      even_[k] = odd_[k] = Words{};
    }
    steps_ = 0;
  }

  Halves sum16_[kVectors] = {};
  Words even_[kVectors] = {}, odd_[kVectors] = {};
  int64_t steps_ = 0;
  int64_t sums_[kPeriod] = {}, squares_[kPeriod] = {};
};

// Bytes that do not lie side by side are brought together first.
constexpr int64_t kGathered = 1024;

// Blocks of one image, of channel `c` alone.
void sum_channel(const ImageMomentsArgs& args, const uint8_t* image, int64_t c, int64_t first,
                 int64_t last, int64_t* sums, int64_t* squares) {
  Sums<1> total;
  const int64_t per_row = blocks_per_row(args), width = args.sizes[3], step = args.strides[3];
  for (int64_t block = first; block < last; ++block) {
    const int64_t w = (block % per_row) * kMomentsBlockPixels;
    const int64_t count = width - w < kMomentsBlockPixels ? width - w : kMomentsBlockPixels;
    const uint8_t* in = image + c * args.strides[1] + block / per_row * args.strides[2] + w * step;
    if (step == 1) {
      total.add_run(in, count);
      continue;
    }
    for (int64_t i = 0; i < count; i += kGathered) {
      const int64_t length = count - i < kGathered ? count - i : kGathered;
      alignas(64) uint8_t run[kGathered];
      for (int64_t k = 0; k < length; ++k) run[k] = in[(i + k) * step];
      total.add_run(run, length);
    }
  }
  total.add_to(sums + c, squares + c, 1, 1);
}

// Blocks of one image whose pixels have all their channels side by side, and nothing else or a byte
// that does not count between them.
template <int kVectors>
void sum_pixels(const ImageMomentsArgs& args, const uint8_t* image, int64_t first, int64_t last,
                int64_t* sums, int64_t* squares) {
  Sums<kVectors> total;
  const int64_t per_row = blocks_per_row(args), width = args.sizes[3], channels = args.sizes[1];
  const int64_t step = args.strides[3];
  for (int64_t block = first; block < last; ++block) {
    const int64_t w = (block % per_row) * kMomentsBlockPixels;
    const int64_t count = width - w < kMomentsBlockPixels ? width - w : kMomentsBlockPixels;
    // What follows the last channel of the last pixel may not be there.
    total.add_run(image + block / per_row * args.strides[2] + w * step,
                  (count - 1) * step + channels);
  }
  total.add_to(sums, squares, channels, step);
}

}  // namespace

void image_moments_loop(const ImageMomentsArgs& args, int64_t first, int64_t last) {
  const int64_t channels = args.sizes[1];
  const int64_t per_image = args.sizes[2] * blocks_per_row(args);
  const int64_t step = args.strides[3];
  const bool pixels =
      channels > 1 && args.strides[1] == 1 && (step == channels || (step == 4 && channels == 3));
  while (first < last) {
    const int64_t n = first / per_image, begin = first % per_image;
    const int64_t left = last - n * per_image, end = left < per_image ? left : per_image;
    const uint8_t* image = args.images + n * args.strides[0];
    int64_t *sums = args.sums + n * channels, *squares = args.squares + n * channels;
    if (pixels && Sums<1>::kPeriod % step == 0) {
      sum_pixels<1>(args, image, begin, end, sums, squares);
    } else if (pixels && Sums<3>::kPeriod % step == 0) {
      sum_pixels<3>(args, image, begin, end, sums, squares);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        sum_channel(args, image, c, begin, end, sums, squares);
      }
    }
    first += end - begin;
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
