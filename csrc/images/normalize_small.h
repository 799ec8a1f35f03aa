// pixfuse.normalize of a small image or batch without torch's dispatcher, whose way to an operator
// and back takes longer than such an image does.
#pragma once
#include <pybind11/pybind11.h>

namespace pixfuse {

// The arguments are those of pixfuse.normalize, unchecked. Returns the result, or `out`; or None
// for every call that is not plain and small: for what might be an error, for what torch is asked
// to watch (modes, the profiler, a tracer), and for what is large enough for several threads. Then
// nothing has happened, and the operator is to be called. Both run the same loop.
pybind11::object normalize_small(pybind11::handle images, pybind11::handle normalization,
                                 pybind11::handle input_layout, pybind11::handle dtype,
                                 pybind11::handle memory_format, pybind11::handle out);

}  // namespace pixfuse
