#include "images/image_reader.h"

#include <cstring>
#include <string>
#include <string_view>

namespace pixfuse {
namespace {

namespace py = pybind11;
using std::string_view;

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

py::object attribute(PyObject* object, const char* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

template <class... Arguments>
py::object call(PyObject* object, PyObject* method, Arguments... arguments) {
  PyObject* stack[] = {object, arguments...};
  auto value = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(
      method, stack, sizeof stack / sizeof *stack | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!value) throw py::error_already_set();
  return value;
}

// The class, if its module has been imported; without that there are no objects of it.
py::object imported_class(const char* module_name, const char* name) {
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* module_ = PyDict_GetItemString(modules, module_name);
  if (module_ == nullptr) return {};
  return attribute(module_, name);
}

bool is_instance(PyObject* object, const py::object& type) {
  if (!type) return false;
  // Not PyObject_IsInstance: torch's metaclass answers that in Python.
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(type.ptr())) != 0;
}

// --- Pillow ---

// How a mode is read. Every other mode would lose precision, or has no rule.
struct Mode {
  string_view name;
  int64_t channels;     // of the result
  int64_t bytes;        // of a pixel in memory, and of Pillow's raw bytes
  const char* convert;  // to this mode first; null: as it is
};
constexpr Mode kModes[] = {
    {"RGB", 3, 3, nullptr}, {"L", 1, 1, nullptr},  {"RGBA", 4, 4, nullptr}, {"RGBX", 3, 4, nullptr},
    {"1", 1, 1, "L"},       {"LA", 4, 4, "RGBA"},  {"PA", 4, 4, "RGBA"},    {"La", 4, 4, "RGBA"},
    {"RGBa", 4, 4, "RGBA"}, {"CMYK", 3, 3, "RGB"}, {"YCbCr", 3, 3, "RGB"},  {"LAB", 3, 3, "RGB"},
    {"HSV", 3, 3, "RGB"},   {"P", 3, 3, "RGB"},
};

const Mode* find_mode(string_view name) {
  for (const Mode& mode : kModes) {
    if (mode.name == name) return &mode;
  }
  return nullptr;
}

string_view text_of(const py::object& text) {
  Py_ssize_t length = 0;
  const char* characters = PyUnicode_AsUTF8AndSize(text.ptr(), &length);
  if (characters == nullptr) throw py::error_already_set();
  return {characters, static_cast<size_t>(length)};
}

// Made once; Python keeps them until it ends.
PyObject* name_of(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}
struct Names {
  PyObject* load = name_of("load");
  PyObject* mode = name_of("mode");
  PyObject* size = name_of("size");
  PyObject* im = name_of("im");
  PyObject* arrow = name_of("__arrow_c_array__");
  PyObject* convert = name_of("convert");
  PyObject* tobytes = name_of("tobytes");
  PyObject* dtype = name_of("dtype");
  PyObject* layout = name_of("layout");
  PyObject* is_cpu = name_of("is_cpu");
  PyObject* detach = name_of("detach");
  PyObject* shape = name_of("shape");
  PyObject* stride = name_of("stride");
  PyObject* data_ptr = name_of("data_ptr");
  PyObject* untyped_storage = name_of("untyped_storage");
  PyObject* nbytes = name_of("nbytes");
};
const Names& names() {
  static const Names* const all = new Names;
  return *all;
}

py::object attribute(PyObject* object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

// The Arrow C data interface, as its specification lays it out.
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// The pixels of an export of `count` pixels of 1 byte, or of 4 with a child that holds them; null
// if it is not that.
const uint8_t* exported_pixels(const ArrowArray& array, int64_t count, int64_t bytes) {
  const ArrowArray* values = &array;
  if (bytes == 4) {
    if (array.n_children != 1 || array.length != count || array.offset != 0) return nullptr;
    values = array.children[0];
  }
  const bool plain = values->n_children == 0 && values->n_buffers == 2 && values->offset == 0 &&
                     values->null_count == 0 && values->length == count * bytes;
  return plain ? static_cast<const uint8_t*>(values->buffers[1]) : nullptr;
}

int64_t integer(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

// --- errors ---

std::string ImageReader::message(Py_ssize_t index, const std::string& expectation) const {
  return function_ + ": expected images[" + std::to_string(index) + "] " + expectation;
}

void ImageReader::raise(PyObject* type, Py_ssize_t index, const std::string& expectation) const {
  PyErr_SetString(type, message(index, expectation).c_str());
  throw py::error_already_set();
}

// The same kind of error, with the original as its cause, and the image named.
void ImageReader::raise_unreadable(py::error_already_set& error, Py_ssize_t index) const {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  PyObject* type = error.matches(PyExc_OSError) ? PyExc_OSError : PyExc_ValueError;
  const std::string got = py::str(error.value());
  const std::string kind = py::str(error.type().attr("__name__"));
  py::raise_from(
      error, type,
      message(index, "to be an image that Pillow can read, got " + kind + ": " + got).c_str());
  throw py::error_already_set();
}

void ImageReader::check_not_empty(const ImageSource& image, Py_ssize_t index) const {
  if (image.height > 0 && image.width > 0 && image.channels > 0) return;
  raise(PyExc_ValueError, index,
        "to have pixels, got " + std::to_string(image.height) + " x " +
            std::to_string(image.width) + " of " + std::to_string(image.channels) + " channels");
}

// What a tensor's storage holds. Fake tensors, those of torch.vmap and other subclasses have none,
// and a storage may have been given back by its owner.
ByteSpan ImageReader::memory_of(PyObject* tensor, Py_ssize_t index) const {
  const Names& name = names();
  try {
    const py::object storage = call(tensor, name.untyped_storage);
    const auto bytes = static_cast<uintptr_t>(integer(call(storage.ptr(), name.nbytes).ptr()));
    const auto begin = static_cast<uintptr_t>(integer(call(storage.ptr(), name.data_ptr).ptr()));
    return {begin, begin == 0 ? begin : begin + bytes};
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;  // NotImplementedError is one, too
    raise(PyExc_NotImplementedError, index,
          "to be a tensor that has memory, got " + type_name(tensor) +
              "; pass a batch tensor (N, C, H, W), which torch itself dispatches");
  }
}

// --- reading ---

ImageReader::ImageReader(bool arrow, std::string function)
    : arrow_(arrow),
      function_(std::move(function)),
      pillow_type_(imported_class("PIL.Image", "Image")),
      numpy_type_(imported_class("numpy", "ndarray")),
      tensor_type_(imported_class("torch", "Tensor")),
      uint8_(imported_class("torch", "uint8")),
      strided_(imported_class("torch", "strided")) {}

ImageSource ImageReader::read(PyObject* image, Py_ssize_t index, Holder& holder) const {
  ImageSource source{};
  if (is_instance(image, pillow_type_)) {
    source = read_pillow(image, index, holder);
  } else if (is_instance(image, numpy_type_)) {
    source = read_numpy(image, index, holder);
  } else if (is_instance(image, tensor_type_)) {
    source = read_tensor(image, index, holder);
  } else {
    raise(PyExc_TypeError, index,
          "to be a Pillow image, a numpy array or a torch.Tensor, got " + type_name(image));
  }
  check_not_empty(source, index);
  return source;
}

ImageSource ImageReader::read_pillow(PyObject* original, Py_ssize_t index, Holder& holder) const {
  const Names& name = names();
  auto image = py::reinterpret_borrow<py::object>(original);
  const Mode* mode = nullptr;
  py::object mode_name;
  try {
    // A lazy file, which is of another class, may change its mode and its size here.
    if (Py_TYPE(original) != reinterpret_cast<PyTypeObject*>(pillow_type_.ptr())) {
      call(image.ptr(), name.load);
    }
    mode_name = attribute(image.ptr(), name.mode);
    mode = find_mode(text_of(mode_name));
  } catch (py::error_already_set& error) {
    raise_unreadable(error, index);
  }
  if (mode == nullptr) {
    raise(PyExc_TypeError, index,
          "of a Pillow mode with 8 bits per channel, got mode " + std::string(py::repr(mode_name)) +
              "; convert it, for example with image.convert(\"RGB\"), where its range is known");
  }
  try {
    const Mode* wanted = mode;
    if (mode->name == "P" && py::cast<bool>(image.attr("has_transparency_data"))) {
      wanted = find_mode("PA");
    }
    if (mode->name == "La") image = call(image.ptr(), name.convert, py::str("LA").ptr());
    if (wanted->convert != nullptr) {
      image = call(image.ptr(), name.convert, py::str(wanted->convert).ptr());
    }
    mode = wanted;
  } catch (py::error_already_set& error) {
    raise_unreadable(error, index);
  }

  const py::object size = attribute(image.ptr(), name.size);
  if (!PyTuple_Check(size.ptr()) || PyTuple_GET_SIZE(size.ptr()) != 2) {
    raise(PyExc_TypeError, index, "to have a size of 2 numbers");
  }
  const int64_t width = integer(PyTuple_GET_ITEM(size.ptr(), 0));
  const int64_t height = integer(PyTuple_GET_ITEM(size.ptr(), 1));
  ImageSource source{nullptr, height, width, mode->channels, 0, 0, 1};
  check_not_empty(source, index);

  if (arrow_) {
    const int64_t bytes = mode->channels == 1 ? 1 : 4;
    py::object capsule;
    try {
      // As image.__arrow_c_array__() does, without the schema: the mode has said what it says.
      capsule = call(attribute(image.ptr(), name.im).ptr(), name.arrow);
    } catch (py::error_already_set& error) {
      // Over one block of Pillow's memory, or mapped from a file: copied below.
      if (!error.matches(PyExc_ValueError)) raise_unreadable(error, index);
    }
    if (capsule) {
      const auto* array =
          static_cast<const ArrowArray*>(PyCapsule_GetPointer(capsule.ptr(), "arrow_array"));
      if (array == nullptr) throw py::error_already_set();
      source.pixels = exported_pixels(*array, height * width, bytes);
      if (source.pixels != nullptr) {
        source.row_stride = width * bytes;
        source.pixel_stride = bytes;
        holder.hold(std::move(capsule));
        return source;
      }
    }
  }

  try {
    const py::object bytes = call(image.ptr(), name.tobytes);
    const int64_t expected = width * height * mode->bytes;
    if (!PyBytes_Check(bytes.ptr()) || PyBytes_GET_SIZE(bytes.ptr()) != expected) {
      raise(PyExc_ValueError, index, "to have " + std::to_string(expected) + " bytes");
    }
    source.pixels = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(bytes.ptr()));
    source.row_stride = width * mode->bytes;
    source.pixel_stride = mode->bytes;
    holder.hold(bytes);
    return source;
  } catch (py::error_already_set& error) {
    raise_unreadable(error, index);
  }
}

ImageSource ImageReader::read_numpy(PyObject* image, Py_ssize_t index, Holder& holder) const {
  Py_buffer& buffer = holder.buffer();
  const bool exported = PyObject_GetBuffer(image, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) == 0;
  if (!exported || buffer.format == nullptr || std::strcmp(buffer.format, "B") != 0) {
    PyErr_Clear();
    raise(PyExc_TypeError, index,
          "of dtype uint8, got " + std::string(py::str(attribute(image, "dtype"))) +
              "; pixels must still be bytes from 0 to 255: convert them to float here, not before");
  }
  const int rank = buffer.ndim;
  if (rank != 2 && rank != 3) {
    raise(PyExc_ValueError, index,
          "to have shape (H, W) or (H, W, C), got " +
              std::string(py::str(attribute(image, "shape"))));
  }
  return {static_cast<const uint8_t*>(buffer.buf), buffer.shape[0],   buffer.shape[1],
          rank == 3 ? buffer.shape[2] : 1,         buffer.strides[0], buffer.strides[1],
          rank == 3 ? buffer.strides[2] : 1};
}

ImageSource ImageReader::read_tensor(PyObject* image, Py_ssize_t index, Holder& holder) const {
  const Names& name = names();
  if (attribute(image, name.dtype).ptr() != uint8_.ptr()) {
    raise(PyExc_TypeError, index,
          "of dtype uint8, got " + std::string(py::str(attribute(image, "dtype"))) +
              "; pixels must still be bytes from 0 to 255: convert them to float here, not before");
  }
  if (attribute(image, name.is_cpu).ptr() != Py_True) {
    raise(PyExc_ValueError, index,
          "on the CPU, as the others are, got " + std::string(py::str(attribute(image, "device"))) +
              "; images must be on one device");
  }
  if (attribute(image, name.layout).ptr() != strided_.ptr()) {
    raise(PyExc_NotImplementedError, index,
          "to be a dense tensor, got layout " + std::string(py::str(attribute(image, "layout"))) +
              "; pass images.to_dense()");
  }
  // A tensor of its own on the same storage: the first may be given another one meanwhile.
  const py::object alias = call(image, name.detach);
  const py::object shape = attribute(alias.ptr(), name.shape);
  const py::object stride = call(alias.ptr(), name.stride);
  if (PyTuple_GET_SIZE(shape.ptr()) != 3) {
    raise(PyExc_ValueError, index,
          "to be a tensor of shape (C, H, W), got shape " +
              std::string(py::str(py::tuple(py::list(shape)))) +
              "; a batch goes in alone, without a list around it");
  }
  int64_t sizes[3], strides[3];
  for (int d = 0; d < 3; ++d) {
    sizes[d] = integer(PyTuple_GET_ITEM(shape.ptr(), d));
    strides[d] = integer(PyTuple_GET_ITEM(stride.ptr(), d));
  }
  const ByteSpan memory = memory_of(alias.ptr(), index);
  const auto address = static_cast<uintptr_t>(integer(call(alias.ptr(), name.data_ptr).ptr()));
  holder.hold(alias);
  const ImageSource source{reinterpret_cast<const uint8_t*>(address),
                           sizes[1],
                           sizes[2],
                           sizes[0],
                           strides[1],
                           strides[2],
                           strides[0]};
  const ByteSpan span = span_of(source);
  if (span.begin < span.end && (span.begin < memory.begin || span.end > memory.end)) {
    raise(PyExc_ValueError, index,
          "to have its pixels in memory, got a storage of " +
              std::to_string(memory.end - memory.begin) + " bytes for " +
              std::to_string(span.end - span.begin));
  }
  return source;
}

}  // namespace pixfuse
