// The CUDA backend, compiled for the host: <cuda_runtime.h> and its like are those beside this
// file.
#include "kernels/cuda/backend.cu"
#include "kernels/cuda/elementwise.cu"
#include "kernels/cuda/products.cu"
