// The header below is DLPack's own, plain C with a version of its own, which torch ships among
// headers that must not be used for a stable build.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <cstdlib>
#include <new>

#include "images/tensor_exchange.h"

#if DLPACK_MAJOR_VERSION == 1 && DLPACK_MINOR_VERSION >= 3
#define PIXFUSE_TENSOR_EXCHANGE 1
#endif

namespace pixfuse {

#if PIXFUSE_TENSOR_EXCHANGE

namespace {

const DLPackExchangeAPI& table_of(const void* table) {
  return *static_cast<const DLPackExchangeAPI*>(table);
}

bool element_type_of(const DLDataType& type, ElementType& to) {
  if (type.lanes != 1) return false;
  if (type.code == kDLUInt && type.bits == 8) {
    to = ElementType::uint8;
  } else if (type.code == kDLFloat && type.bits == 32) {
    to = ElementType::float32;
  } else if (type.code == kDLFloat && type.bits == 16) {
    to = ElementType::float16;
  } else if (type.code == kDLBfloat && type.bits == 16) {
    to = ElementType::bfloat16;
  } else {
    return false;
  }
  return true;
}

DLDataType dl_type_of(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return {kDLFloat, 32, 1};
    case ElementType::float16:
      return {kDLFloat, 16, 1};
    case ElementType::bfloat16:
      return {kDLBfloat, 16, 1};
    case ElementType::uint8:
      break;
  }
  return {kDLUInt, 8, 1};
}

}  // namespace

TensorExchange::TensorExchange(PyObject* tensor_type) : table_(nullptr) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    const void* table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    // The table's header alone is the same in all versions.
    if (table != nullptr &&
        static_cast<const DLPackExchangeAPIHeader*>(table)->version.major == 1 &&
        table_of(table).dltensor_from_py_object_no_sync != nullptr) {
      table_ = table;
    }
    Py_DECREF(capsule);
  }
  PyErr_Clear();
}

bool TensorExchange::view(PyObject* tensor, TensorMemory& memory) const {
  DLTensor from;
  if (table_of(table_).dltensor_from_py_object_no_sync(tensor, &from) != 0) {
    PyErr_Clear();
    return false;
  }
  if (from.device.device_type != kDLCPU || from.strides == nullptr ||
      !element_type_of(from.dtype, memory.dtype)) {
    return false;
  }
  if (from.data == nullptr) return false;  // freed, or somebody's wrapper: for the operator
  memory.data = static_cast<char*>(from.data) + from.byte_offset;
  memory.rank = from.ndim;
  memory.sizes = from.shape;
  memory.strides = from.strides;
  return true;
}

// What DLPack hands on, and the elements, in one allocation.
struct NewTensor::Block {
  static constexpr size_t kAlignment = 64;
  DLManagedTensorVersioned managed;
  int64_t sizes[4], strides[4];

  void* elements() {
    constexpr size_t offset = (sizeof(Block) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<char*>(this) + offset;
  }
};

NewTensor::NewTensor(int64_t rank, const int64_t* sizes, const int64_t* strides, ElementType dtype,
                     int64_t bytes) {
  constexpr size_t alignment = Block::kAlignment;
  const size_t wanted = sizeof(Block) + alignment + static_cast<size_t>(bytes);
  void* memory = std::aligned_alloc(alignment, (wanted + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  block_ = new (memory) Block{};
  for (int64_t d = 0; d < rank; ++d) {
    block_->sizes[d] = sizes[d];
    block_->strides[d] = strides[d];
  }
  DLManagedTensorVersioned& managed = block_->managed;
  managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  managed.manager_ctx = block_;
  managed.deleter = [](DLManagedTensorVersioned* self) { std::free(self->manager_ctx); };
  DLTensor& tensor = managed.dl_tensor;
  tensor.data = block_->elements();
  tensor.device = {kDLCPU, 0};
  tensor.ndim = static_cast<int32_t>(rank);
  tensor.dtype = dl_type_of(dtype);
  tensor.shape = block_->sizes;
  tensor.strides = block_->strides;
}

NewTensor::~NewTensor() { std::free(block_); }

void* NewTensor::data() const { return block_->elements(); }

PyObject* NewTensor::release(const TensorExchange& exchange) {
  void* tensor = nullptr;
  if (table_of(exchange.table_).managed_tensor_to_py_object_no_sync(&block_->managed, &tensor) !=
      0) {
    return nullptr;
  }
  block_ = nullptr;
  return static_cast<PyObject*>(tensor);
}

#else  // built with the headers of a torch that has no such table

TensorExchange::TensorExchange(PyObject*) : table_(nullptr) {}
bool TensorExchange::view(PyObject*, TensorMemory&) const { return false; }
struct NewTensor::Block {};
NewTensor::NewTensor(int64_t, const int64_t*, const int64_t*, ElementType, int64_t)
    : block_(nullptr) {
  throw std::bad_alloc();
}
NewTensor::~NewTensor() {}
void* NewTensor::data() const { return nullptr; }
PyObject* NewTensor::release(const TensorExchange&) { return nullptr; }

#endif

}  // namespace pixfuse
