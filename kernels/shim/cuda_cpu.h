/** CUDA C++ on the CPU: compiles the kernels of kernels/cuda/ unchanged with g++ (`-include cuda_cpu.h`) and runs them, one
 *  fiber per CUDA thread, one block at a time. It exists for tests: wrong indices, masks, barriers and waits show here in
 *  seconds, without a GPU. It needs none of NVIDIA's headers.
 *
 *  What it makes worse than a GPU, on purpose:
 *  - shared memory that nobody wrote, and the target of an asynchronous copy that nobody waited for, read as NaN;
 *  - warps run in the orders of `cpu::Order`, the greedy one being the hardest on missing barriers;
 *  - a copy lands at once or as late as the kernel allows (`cpu::Landing`).
 *
 *  What it cannot show: bank conflicts, registers, speed, races between blocks, errors of the memory model (but for the fences of wgmma.h).
 *
 *  What it asks of kernels: inline assembly only in ptx.cuh and sm90.cuh, whose twins are in tensor_core.h and wgmma.h; `__shared__` variables only in
 *  entry points (functions get them by reference); dynamic shared memory by `DYNAMIC_SHARED`; warp collectives with the full
 *  mask; x86-64. */
#pragma once

#if !defined(__x86_64__)
#error "the shim switches fibers with x86-64 instructions"
#endif

#define CUDA_CPU 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// All shared variables of a library lie in one section, so that a block can find them poisoned. Statics of templates and
// inline functions cannot lie there: the compiler refuses them, which keeps `__shared__` in entry points.
#define __shared__ static __attribute__((section("shim_shared")))

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vector_types.h"
// Order matters: blocks before what rendezvous in them.
#include "block.h"
#include "intrinsics.h"
#include "tensor_core.h"
#include "wgmma.h"
