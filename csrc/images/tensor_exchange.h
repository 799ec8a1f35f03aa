// torch's tensors as memory, and memory as a tensor, through the table of C functions that DLPack
// defines for it: a tenth of the time that its Python attributes or an operator's dispatch take.
#pragma once
#include <Python.h>

#include <cstdint>

#include "common/element_type.h"

namespace pixfuse {

// A dense CPU tensor, seen through the object that owns it; strides count elements.
struct TensorMemory {
  void* data;
  int64_t rank;
  const int64_t* sizes;
  const int64_t* strides;
  ElementType dtype;
};

class TensorExchange {
 public:
  // `tensor_type`: torch.Tensor, which offers the table since torch 2.11; without it, available()
  // is false and nothing else may be called.
  explicit TensorExchange(PyObject* tensor_type);
  bool available() const { return table_ != nullptr; }

  // False for all that is no such memory of bytes or floats: tensors on other devices, sparse,
  // quantized, fake or wrapped ones. `tensor` is of exactly the type torch.Tensor.
  bool view(PyObject* tensor, TensorMemory& memory) const;

 private:
  const void* table_;
  friend class NewTensor;
};

// The memory of a tensor that does not exist yet: dense, uninitialized, aligned to 64 bytes.
class NewTensor {
 public:
  // `rank` at most 4. Throws std::bad_alloc.
  NewTensor(int64_t rank, const int64_t* sizes, const int64_t* strides, ElementType dtype,
            int64_t bytes);
  ~NewTensor();
  NewTensor(const NewTensor&) = delete;
  NewTensor& operator=(const NewTensor&) = delete;

  void* data() const;
  // The tensor, a new reference; or null with Python's error set. Once.
  PyObject* release(const TensorExchange& exchange);

 private:
  struct Block;
  Block* block_;
};

}  // namespace pixfuse
