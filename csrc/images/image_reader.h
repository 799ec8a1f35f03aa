// One Python image as memory: classified, checked, and held.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "crop_mirror_normalize/crop_mirror_normalize_args.h"

namespace pixfuse {

// Keeps the memory of one image alive: an object, or a view of a buffer. To be destroyed with the
// GIL held.
class Holder {
 public:
  Holder() = default;
  Holder(Holder&& other) noexcept : object_(std::move(other.object_)), buffer_(other.buffer_) {
    other.buffer_ = {};
  }
  Holder& operator=(Holder&&) = delete;
  ~Holder() {
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  }

  void hold(pybind11::object object) { object_ = std::move(object); }
  Py_buffer& buffer() { return buffer_; }

 private:
  pybind11::object object_;
  Py_buffer buffer_{};
};

class ImageReader {
 public:
  // `arrow`: whether this Pillow's Arrow export can be trusted; `function`: who speaks in errors.
  ImageReader(bool arrow, std::string function);

  // Throws Python's TypeError, ValueError, NotImplementedError or OSError, which name
  // images[index].
  ImageSource read(PyObject* image, Py_ssize_t index, Holder& holder) const;

 private:
  bool arrow_;
  std::string function_;
  pybind11::object pillow_type_, numpy_type_, tensor_type_;  // null where not imported
  pybind11::object uint8_, strided_;                         // torch.uint8, torch.strided

  // "<function>: expected images[3] <expectation>"
  std::string message(Py_ssize_t index, const std::string& expectation) const;
  [[noreturn]] void raise(PyObject* type, Py_ssize_t index, const std::string& expectation) const;
  [[noreturn]] void raise_unreadable(pybind11::error_already_set& error, Py_ssize_t index) const;
  void check_not_empty(const ImageSource& image, Py_ssize_t index) const;
  ByteSpan memory_of(PyObject* tensor, Py_ssize_t index) const;

  ImageSource read_pillow(PyObject* image, Py_ssize_t index, Holder& holder) const;
  ImageSource read_numpy(PyObject* image, Py_ssize_t index, Holder& holder) const;
  ImageSource read_tensor(PyObject* image, Py_ssize_t index, Holder& holder) const;
};

}  // namespace pixfuse
