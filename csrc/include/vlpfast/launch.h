// Launchers of the CUDA kernels: pointers, sizes and a stream, so that neither side needs the other's
// headers. They return at once and report nothing; the caller checks the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vlpfast {

// Largest num_patches that fits one warp's keys into the default 48 KiB of shared memory.
constexpr int64_t kKeepIdsMaxPatches = 12288;

// seed: one int64 on the device; valid (num_samples, num_patches): nullable.
void launch_keep_ids(const int64_t* seed, const int64_t* sample_ids, const bool* valid, int64_t* ids,
                     int64_t* inverse, int64_t num_samples, int num_patches, int num_keep,
                     cudaStream_t stream);

}  // namespace vlpfast
