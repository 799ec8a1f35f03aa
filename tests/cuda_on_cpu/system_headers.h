// What cuda_on_cpu.h needs of CUDA and of the language. Reading these takes a third of the time
// that a kernel takes to compile, so for kernels with planted mistakes toolchain.py has the
// compiler keep what it has read.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
