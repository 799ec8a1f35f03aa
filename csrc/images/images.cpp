// The Python module pixfuse._images: from a list of Python's images to pointers and strides, and on
// to crop_mirror_normalize, channel_histogram and image_moments without the GIL. Nothing is copied
// that can be read in place, nothing is ever written, and an ImageList holds what keeps the memory
// alive. What each kind of image is read as stands in image_reader.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "channel_histogram/channel_histogram.h"
#include "crop_mirror_normalize/crop_mirror_normalize_args.h"
#include "image_moments/image_moments.h"
#include "images/image_reader.h"
#include "images/normalize_small.h"

namespace pixfuse {
namespace {

namespace py = pybind11;

// Rows and pixels in the order in which they lie: for what may visit them in any.
template <class Args>
Args forward(const ImageSource& image) {
  Args args{};
  const int64_t sizes[4] = {1, image.channels, image.height, image.width};
  const int64_t strides[4] = {0, image.channel_stride, image.row_stride, image.pixel_stride};
  args.images = image.pixels;
  for (int d = 0; d < 4; ++d) {
    args.sizes[d] = sizes[d];
    args.strides[d] = strides[d];
    if (d < 2 || strides[d] >= 0) continue;
    args.images += (sizes[d] - 1) * strides[d];
    args.strides[d] = -strides[d];
  }
  return args;
}

class ImageList {
 public:
  ImageList(std::vector<ImageSource> sources, std::vector<Holder> holders)
      : sources_(std::move(sources)), holders_(std::move(holders)) {}
  ImageList(ImageList&&) = default;
  ImageList(const ImageList&) = delete;

  size_t size() const { return sources_.size(); }

  // (N, 3): height, width, channels.
  py::array_t<int64_t> sizes() const {
    py::array_t<int64_t> sizes({static_cast<py::ssize_t>(sources_.size()), py::ssize_t{3}});
    int64_t* to = sizes.mutable_data();
    for (const ImageSource& image : sources_) {
      *to++ = image.height;
      *to++ = image.width;
      *to++ = image.channels;
    }
    return sizes;
  }

  // (height, width, channels) of every image; None where they differ.
  py::object common() const {
    const auto as_first = [&](const ImageSource& image) {
      const ImageSource& first = sources_.front();
      return image.height == first.height && image.width == first.width &&
             image.channels == first.channels;
    };
    if (sources_.empty() || !std::all_of(sources_.begin(), sources_.end(), as_first)) {
      return py::none();
    }
    return py::make_tuple(sources_[0].height, sources_[0].width, sources_[0].channels);
  }

  // Addresses come from tensors that the caller keeps alive: `output` has N * C * H * W elements of
  // `dtype` at `output_strides`, `mask` N * H * W bytes, or is 0.
  void crop_mirror_normalize(const py::array_t<int64_t, py::array::c_style>& placements,
                             int64_t channels, int64_t height, int64_t width,
                             const std::vector<double>& mean, const std::vector<double>& std,
                             int64_t rounding, const std::vector<double>& fill, bool fill_is_output,
                             int64_t dtype, uintptr_t output,
                             const std::array<int64_t, 4>& output_strides, uintptr_t mask) const {
    check(placements.ndim() == 2 && placements.shape(1) == 4 &&
              placements.shape(0) == static_cast<py::ssize_t>(size()),
          kCropMirrorNormalize, "placements to be an int64 array of shape (", size(), ", 4)");
    check(dtype >= 0 && dtype <= 3, kCropMirrorNormalize, "dtype from 0 to 3, got ", dtype);
    const auto* rows = reinterpret_cast<const Placement*>(placements.data());
    CropMirrorNormalizeCall call(sources_, rows, channels, height, width, mean, std, rounding, fill,
                                 fill_is_output);
    call.set_dtype(static_cast<ElementType>(dtype));
    call.set_output(reinterpret_cast<void*>(output), output_strides.data(),
                    reinterpret_cast<uint8_t*>(mask));
    int32_t error = 0;
    {
      const py::gil_scoped_release released;
      error = pixfuse_crop_mirror_normalize(&call.args);
    }
    check(error == 0, kCropMirrorNormalize, "torch's threads to run the loop");
  }

  // (C, 256) of all images, or with `each` (N, C, 256). All have as many channels, 1 or more.
  py::array_t<int64_t> channel_histogram(bool each) const {
    constexpr const char* kName = "channel_histogram";
    const int64_t per_image = common_channels(kName) * kByteValues;
    py::array_t<int64_t> counts =
        each ? zeros({static_cast<py::ssize_t>(size()), per_image / kByteValues, kByteValues})
             : zeros({per_image / kByteValues, kByteValues});
    int64_t* to = counts.mutable_data();
    int32_t error = 0;
    {
      const py::gil_scoped_release released;
      for (const ImageSource& image : sources_) {
        auto args = forward<ChannelHistogramArgs>(image);
        args.counts = to;
        error = error != 0 ? error : pixfuse_channel_histogram(&args);
        if (each) to += per_image;
      }
    }
    check(error == 0, kName, "torch's threads to run the loop");
    return counts;
  }

  // (2, N, C): sums, and sums of squares. All images have as many channels.
  py::array_t<int64_t> image_moments() const {
    constexpr const char* kName = "image_moments";
    const auto channels = static_cast<py::ssize_t>(common_channels(kName));
    const auto count = static_cast<py::ssize_t>(size());
    py::array_t<int64_t> moments = zeros({2, count, channels});
    int64_t *sums = moments.mutable_data(), *squares = sums + count * channels;
    int32_t error = 0;
    {
      const py::gil_scoped_release released;
      for (const ImageSource& image : sources_) {
        auto args = forward<ImageMomentsArgs>(image);
        args.sums = sums;
        args.squares = squares;
        error = error != 0 ? error : pixfuse_image_moments(&args);
        sums += channels;
        squares += channels;
      }
    }
    check(error == 0, kName, "torch's threads to run the loop");
    return moments;
  }

 private:
  static py::array_t<int64_t> zeros(const std::vector<py::ssize_t>& shape) {
    py::array_t<int64_t> array(shape);
    std::memset(array.mutable_data(), 0, static_cast<size_t>(array.nbytes()));
    return array;
  }

  int64_t common_channels(const char* function) const {
    check(!sources_.empty(), function, "images to have at least 1 image, got none");
    for (const ImageSource& image : sources_) {
      check(image.channels == sources_[0].channels, function, "images of one channel count");
    }
    return sources_[0].channels;
  }

  std::vector<ImageSource> sources_;
  std::vector<Holder> holders_;
};

// Counts images one by one, for whoever has them one by one: a list of one image costs more than to
// count a small one.
class ImageCounter {
 public:
  explicit ImageCounter(bool arrow) : reader_(arrow, kName) {}
  ImageCounter(const ImageCounter&) = delete;

  void add(const py::object& image) {
    Holder holder;
    const ImageSource source = reader_.read(image.ptr(), 0, holder);
    const auto channels = static_cast<size_t>(source.channels);
    check(pixels_.empty() || channels * kByteValues == counts_.size(), kName,
          "images of one channel count");
    std::vector<int64_t> found(channels * kByteValues);
    auto args = forward<ChannelHistogramArgs>(source);
    args.counts = found.data();
    int32_t error = 0;
    {
      const py::gil_scoped_release released;
      error = pixfuse_channel_histogram(&args);
    }
    check(error == 0, kName, "torch's threads to run the loop");
    counts_.resize(found.size());
    for (size_t c = 0; c < channels; ++c) {
      int64_t sum = 0, square = 0;
      for (size_t value = 0; value < kByteValues; ++value) {
        const int64_t count = found[c * kByteValues + value];
        const auto x = static_cast<int64_t>(value);
        counts_[c * kByteValues + value] += count;
        sum += x * count;
        square += x * x * count;
      }
      sums_.push_back(sum);
      squares_.push_back(square);
    }
    pixels_.push_back(source.height * source.width);
  }

  // (N,)
  py::array_t<int64_t> pixels() const { return array(pixels_, {count()}); }
  // (N, C)
  py::array_t<int64_t> sums() const { return array(sums_, {count(), channels()}); }
  py::array_t<int64_t> squares() const { return array(squares_, {count(), channels()}); }
  // (C, 256), of all images.
  py::array_t<int64_t> counts() const { return array(counts_, {channels(), kByteValues}); }

 private:
  static constexpr const char* kName = "channel_histogram";

  static py::array_t<int64_t> array(const std::vector<int64_t>& values,
                                    const std::vector<py::ssize_t>& shape) {
    return py::array_t<int64_t>(shape, values.data());  // a copy
  }
  py::ssize_t count() const { return static_cast<py::ssize_t>(pixels_.size()); }
  py::ssize_t channels() const { return static_cast<py::ssize_t>(counts_.size()) / kByteValues; }

  ImageReader reader_;
  std::vector<int64_t> pixels_, sums_, squares_, counts_;
};

ImageList read(const py::object& images, bool arrow, const std::string& function) {
  // A tuple of our own: another thread may change a list meanwhile.
  const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(images.ptr()));
  if (!items) throw py::error_already_set();
  const auto count = PyTuple_GET_SIZE(items.ptr());
  ImageReader reader(arrow, function);
  std::vector<ImageSource> sources;
  std::vector<Holder> holders;
  sources.reserve(static_cast<size_t>(count));
  holders.reserve(static_cast<size_t>(count));
  for (py::ssize_t i = 0; i < count; ++i) {
    holders.emplace_back();
    sources.push_back(reader.read(PyTuple_GET_ITEM(items.ptr(), i), i, holders.back()));
  }
  return ImageList(std::move(sources), std::move(holders));
}

}  // namespace
}  // namespace pixfuse

PYBIND11_MODULE(_images, m) {
  namespace py = pybind11;
  using pixfuse::ImageCounter;
  using pixfuse::ImageList;
  m.doc() = "Python's images as memory: see pixfuse.crop_mirror_normalize and channel_histogram.";
  m.def("read", &pixfuse::read, py::arg("images"), py::arg("arrow"),
        py::arg("function") = pixfuse::kCropMirrorNormalize);
  m.def("normalize_small", &pixfuse::normalize_small);
  py::class_<ImageList>(m, "ImageList")
      .def("__len__", &ImageList::size)
      .def_property_readonly("sizes", &ImageList::sizes)
      .def_property_readonly("common", &ImageList::common)
      .def("crop_mirror_normalize", &ImageList::crop_mirror_normalize, py::arg("placements"),
           py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("mean"),
           py::arg("std"), py::arg("rounding"), py::arg("fill"), py::arg("fill_is_output"),
           py::arg("dtype"), py::arg("output"), py::arg("output_strides"), py::arg("mask"))
      .def("channel_histogram", &ImageList::channel_histogram, py::arg("each"))
      .def("image_moments", &ImageList::image_moments);
  py::class_<ImageCounter>(m, "ImageCounter")
      .def(py::init<bool>(), py::arg("arrow"))
      .def("add", &ImageCounter::add)
      .def_property_readonly("pixels", &ImageCounter::pixels)
      .def_property_readonly("sums", &ImageCounter::sums)
      .def_property_readonly("squares", &ImageCounter::squares)
      .def_property_readonly("counts", &ImageCounter::counts);
}
