// One kernel is enough: what matters is the container that nvcc puts it into.
extern "C" __global__ void NAME(float *values) { values[threadIdx.x] += 1.0f; }
