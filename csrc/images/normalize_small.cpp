#include "images/normalize_small.h"

#include "common/byte_span.h"
#include "common/layout.h"
#include "images/tensor_exchange.h"
#include "normalize/normalize_constants.h"

namespace pixfuse {
namespace {

namespace py = pybind11;

// Little enough for one thread, and for not releasing the GIL: at most about 10 us.
constexpr int64_t kMostElements = 32768;
constexpr int64_t kMostChannels = 4;

// Objects of Python that a call meets, looked up once.
struct Names {
  py::object torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor");
  py::object array = py::module_::import("numpy").attr("ndarray");
  py::object normalization = py::module_::import("pixfuse.normalization").attr("Normalization");
  TensorExchange exchange{tensor.ptr()};

  // In the order of ElementType, with the largest number that each can hold.
  py::object dtypes[3] = {torch.attr("float32"), torch.attr("float16"), torch.attr("bfloat16")};
  double largest_of[3] = {largest_of_dtype(0), largest_of_dtype(1), largest_of_dtype(2)};
  // In the order of MemoryFormat.
  py::object memory_formats[3] = {torch.attr("contiguous_format"), torch.attr("channels_last"),
                                  torch.attr("preserve_format")};

  // Whether somebody watches operators: each is to return 0, False or None.
  py::object watchers[4] = {torch.attr("_C").attr("_len_torch_dispatch_stack"),
                            torch.attr("_C").attr("_len_torch_function_stack"),
                            torch.attr("_C").attr("_get_tracing_state"),
                            torch.attr("autograd").attr("_profiler_enabled")};
  py::object increment_version = torch.attr("_C").attr("_increment_version");

  PyObject* mean = PyUnicode_InternFromString("mean");
  PyObject* std = PyUnicode_InternFromString("std");
  PyObject* rounding_code = PyUnicode_InternFromString("rounding_code");
  PyObject* largest = PyUnicode_InternFromString("largest");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_inference = PyUnicode_InternFromString("is_inference");

 private:
  double largest_of_dtype(int i) const {
    return torch.attr("finfo")(dtypes[i]).attr("max").cast<double>();
  }
};

// Null where this torch lacks one of them: then no call is a plain one.
const Names* names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<const Names*> storage;
  return storage
      .call_once_and_store_result([]() -> const Names* {
        try {
          // Never destroyed: nothing may be when the interpreter is gone.
          const auto* known = new Names();
          return known->exchange.available() ? known : nullptr;
        } catch (const py::error_already_set&) {
          return nullptr;
        }
      })
      .get_stored();
}

py::object owned(PyObject* reference) {
  if (reference == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(reference);
}

bool is_watched(const Names& known) {
  for (const py::object& watcher : known.watchers) {
    const py::object answer = owned(PyObject_CallNoArgs(watcher.ptr()));
    const int yes = PyObject_IsTrue(answer.ptr());
    if (yes < 0) throw py::error_already_set();
    if (yes != 0) return true;
  }
  return false;
}

// The place of `object` in a list of objects that exist once each, or -1.
int index_of(py::handle object, const py::object (&list)[3]) {
  for (int i = 0; i < 3; ++i) {
    if (list[i].is(object)) return i;
  }
  return -1;
}

// Pixels of a tensor, or of an array, whose buffer is to be released.
class Pixels : public TensorMemory {
 public:
  Pixels() : TensorMemory{} {}
  Pixels(const Pixels&) = delete;
  ~Pixels() {
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  }

  bool read(const Names& known, py::handle images) {
    const auto type = py::handle(reinterpret_cast<PyObject*>(Py_TYPE(images.ptr())));
    if (type.is(known.tensor)) return known.exchange.view(images.ptr(), *this);
    if (!type.is(known.array)) return false;
    if (PyObject_GetBuffer(images.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    if (buffer_.format == nullptr || buffer_.format[0] != 'B' || buffer_.format[1] != 0) {
      return false;
    }
    static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
    data = buffer_.buf;
    rank = buffer_.ndim;
    sizes = reinterpret_cast<const int64_t*>(buffer_.shape);
    strides = reinterpret_cast<const int64_t*>(buffer_.strides);
    dtype = ElementType::uint8;
    for (int64_t d = 0; d < rank; ++d) {
      if (strides[d] < 0) return false;
    }
    return true;
  }

 private:
  Py_buffer buffer_{};
};

// One call: its arguments for the loop, and the constants that those point to.
struct SmallCall {
  NormalizeArgs args{};
  ChannelConstants channels[kMostChannels];
  int64_t skip;  // dimensions of N, C, H, W that the images do not have

  bool set_images(const Pixels& pixels, bool nhwc) {
    if (pixels.dtype != ElementType::uint8 || (pixels.rank != 3 && pixels.rank != 4)) return false;
    constexpr int64_t kFromNchw[4] = {0, 1, 2, 3}, kFromNhwc[4] = {0, 3, 1, 2};
    const int64_t* order = nhwc ? kFromNhwc : kFromNchw;
    skip = 4 - pixels.rank;
    args.images = static_cast<const uint8_t*>(pixels.data);
    int64_t elements = 1;
    for (int d = 0; d < 4; ++d) {
      const int64_t from = order[d] - skip;
      args.sizes[d] = from < 0 ? 1 : pixels.sizes[from];
      args.image_strides[d] = from < 0 ? 0 : pixels.strides[from];
      if (args.sizes[d] < 1 || args.sizes[d] > kMostElements) return false;
      elements *= args.sizes[d];
      if (elements > kMostElements) return false;
    }
    return args.sizes[1] <= kMostChannels;
  }

  bool set_normalization(const Names& known, py::handle normalization) {
    const auto attribute = [&](PyObject* name) {
      return owned(PyObject_GetAttr(normalization.ptr(), name));
    };
    const py::object mean = attribute(known.mean), std = attribute(known.std);
    if (!PyTuple_CheckExact(mean.ptr()) || !PyTuple_CheckExact(std.ptr())) return false;
    const int64_t count = PyTuple_GET_SIZE(mean.ptr()), channel_count = args.sizes[1];
    if (PyTuple_GET_SIZE(std.ptr()) != count || (count != 1 && count != channel_count)) {
      return false;
    }
    double means[kMostChannels], stds[kMostChannels];
    for (int64_t c = 0; c < channel_count; ++c) {
      const int64_t from = count == 1 ? 0 : c;
      means[c] = PyFloat_AsDouble(PyTuple_GET_ITEM(mean.ptr(), from));
      stds[c] = PyFloat_AsDouble(PyTuple_GET_ITEM(std.ptr(), from));
    }
    const double largest = PyFloat_AsDouble(attribute(known.largest).ptr());
    const long rounding = PyLong_AsLong(attribute(known.rounding_code).ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (largest > known.largest_of[static_cast<int>(args.dtype)]) return false;
    set_rounding(args, channels, means, stds, channel_count, static_cast<Rounding>(rounding));
    return true;
  }

  // The strides of a dense output.
  void set_strides(MemoryFormat memory_format) {
    const bool channels_last = is_channels_last(memory_format, args.sizes, args.image_strides);
    const auto strides = dense_strides(args.sizes, channels_last);
    for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
  }

  bool set_output(const Names& known, py::handle out) {
    TensorMemory memory;
    if (!py::handle(reinterpret_cast<PyObject*>(Py_TYPE(out.ptr()))).is(known.tensor) ||
        !known.exchange.view(out.ptr(), memory) || memory.rank != 4 - skip ||
        memory.dtype != args.dtype ||
        !owned(PyObject_GetAttr(out.ptr(), known.requires_grad)).is(py::handle(Py_False))) {
      return false;
    }
    for (int d = static_cast<int>(skip); d < 4; ++d) {
      if (memory.sizes[d - skip] != args.sizes[d]) return false;
      if (args.sizes[d] > 1 && memory.strides[d - skip] != args.output_strides[d]) return false;
    }
    args.output = memory.data;
    const ByteSpan read = span_of(args.images, args.sizes, args.image_strides, 1);
    const ByteSpan written =
        span_of(args.output, args.sizes, args.output_strides, element_bytes(args.dtype));
    return !written.overlaps(read);
  }
};

}  // namespace

py::object normalize_small(py::handle images, py::handle normalization, py::handle input_layout,
                           py::handle dtype, py::handle memory_format, py::handle out) {
  const Names* found = names();
  if (found == nullptr) return py::none();
  const Names& known = *found;
  const int dtype_code = index_of(dtype, known.dtypes);
  const int memory_format_code = index_of(memory_format, known.memory_formats);
  if (dtype_code < 0 || memory_format_code < 0 ||
      !py::handle(reinterpret_cast<PyObject*>(Py_TYPE(normalization.ptr())))
           .is(known.normalization) ||
      !PyUnicode_CheckExact(input_layout.ptr())) {
    return py::none();
  }
  const bool nhwc = PyUnicode_CompareWithASCIIString(input_layout.ptr(), "NHWC") == 0;
  if (!nhwc && PyUnicode_CompareWithASCIIString(input_layout.ptr(), "NCHW") != 0) {
    return py::none();
  }
  Pixels pixels;
  SmallCall call;
  call.args.dtype = static_cast<ElementType>(dtype_code);
  if (!pixels.read(known, images) || !call.set_images(pixels, nhwc) ||
      !call.set_normalization(known, normalization) || is_watched(known)) {
    return py::none();
  }
  NormalizeArgs& args = call.args;
  call.set_strides(static_cast<MemoryFormat>(memory_format_code));
  if (!out.is_none()) {
    if (!call.set_output(known, out)) return py::none();
    pixfuse_normalize(&args);
    // As torch's own functions with out= do; a tensor of inference mode has no version.
    if (owned(PyObject_CallMethodNoArgs(out.ptr(), known.is_inference)).is(py::handle(Py_False))) {
      known.increment_version(py::make_tuple(out));
    }
    return py::reinterpret_borrow<py::object>(out);
  }
  const int64_t elements = args.sizes[0] * args.sizes[1] * args.sizes[2] * args.sizes[3];
  NewTensor tensor(4 - call.skip, args.sizes + call.skip, args.output_strides + call.skip,
                   args.dtype, elements * element_bytes(args.dtype));
  args.output = tensor.data();
  pixfuse_normalize(&args);
  return owned(tensor.release(known.exchange));
}

}  // namespace pixfuse
