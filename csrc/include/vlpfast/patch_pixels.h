// Where the pixels of a patch lie in uint8, fp32 or bf16 images of either layout, which patches are
// kept, and how weights are brought into the order of the pixels.
// Letters beside the usual ones: C the pixels of a patch and their channels, 3 P P;
// R rows, the kept patches of all images.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/rows.h"

namespace vlpfast {

// Subtracted from pixels before they meet the weights: exact in bf16.
constexpr float kCentre = 128.0f;

// Which patch a row is.
struct Kept {
  const int64_t* ids;  // (R,), null: all patches
  int64_t K, num_patches, R;
  int64_t image(int64_t row) const { return row / K; }
  int64_t patch(int64_t row) const { return ids != nullptr ? ids[row] : row % K; }
};

enum class PixelType { kUint8, kFloat, kBFloat16 };

// A patch is `planes` x P runs of `run` values that lie together: 1 x P x 3 P in (H, W, 3) images,
// 3 x P x P in (3, H, W) ones. Strides are in elements.
struct Images {
  const void* data;
  PixelType type;
  int64_t P, columns, num_patches;
  int64_t planes, run, pixel;
  int64_t image_stride, plane_stride, row_stride;

  int64_t offset(int64_t image, int64_t patch) const {
    return image * image_stride + patch / columns * P * row_stride + patch % columns * P * pixel;
  }
};

// Mean and standard deviation of each channel, as the folded weights need them:
// (x / 255 - mean) / std = (x - 128) scale + shift scale.
struct Normalisation {
  std::array<float, 3> scale, shift;
};

inline Normalisation normalisation_of(const std::vector<double>& mean,
                                      const std::vector<double>& std, const char* op) {
  STD_TORCH_CHECK(mean.size() == 3 && std.size() == 3, op,
                  ": mean and std must have 3 values each, got ", mean.size(), " and ", std.size());
  Normalisation result;
  for (int c = 0; c < 3; ++c) {
    result.scale[c] = static_cast<float>(1.0 / (255.0 * std[c]));
    result.shift[c] = static_cast<float>(kCentre - 255.0 * mean[c]);
  }
  return result;
}

inline Images images_of(const Tensor& images, int64_t P, bool hwc, const char* op) {
  const ScalarType dtype = images.scalar_type();
  const bool known = dtype == ScalarType::Byte || dtype == ScalarType::Float ||
                     dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(known, op, ": images must be Byte, Float or BFloat16, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(images.dim() == 4 && images.size(hwc ? 3 : 1) == 3, op,
                  ": images must be 4-dimensional with 3 channels");
  const int row = hwc ? 1 : 2, column = row + 1;
  const bool together = images.size(column) == 1 || images.stride(column) == (hwc ? 3 : 1);
  STD_TORCH_CHECK(together && (!hwc || images.stride(3) == 1), op,
                  ": the pixels of a row of images must lie together");
  const int64_t columns = images.size(column) / P;
  STD_TORCH_CHECK(images.size(row) % P == 0 && images.size(column) % P == 0, op, ": patch_size ", P,
                  " must divide images, got ", images.size(row), " x ", images.size(column));
  return {images.data_ptr(),
          dtype == ScalarType::Byte    ? PixelType::kUint8
          : dtype == ScalarType::Float ? PixelType::kFloat
                                       : PixelType::kBFloat16,
          P,
          columns,
          columns * (images.size(row) / P),
          hwc ? 1 : 3,
          hwc ? 3 * P : P,
          hwc ? 3 : 1,
          images.stride(0),
          hwc ? 0 : images.stride(1),
          images.stride(row)};
}

// The order of a convolution's weights (3, P, P) from and to that of a patch's pixels.
VLPFAST_INLINE void to_pixel_order(const float* __restrict__ planes, int64_t C, bool hwc,
                                   float* __restrict__ out) {
  if (!hwc) {
    std::memcpy(out, planes, sizeof(float) * C);
    return;
  }
  const int64_t area = C / 3;
  for (int64_t i = 0; i < area; ++i) {
    for (int64_t c = 0; c < 3; ++c) out[3 * i + c] = planes[c * area + i];
  }
}

VLPFAST_INLINE void from_pixel_order(const float* __restrict__ in, int64_t C, bool hwc,
                                     float* __restrict__ planes) {
  if (!hwc) {
    std::memcpy(planes, in, sizeof(float) * C);
    return;
  }
  const int64_t area = C / 3;
  for (int64_t i = 0; i < area; ++i) {
    for (int64_t c = 0; c < 3; ++c) planes[c * area + i] = in[3 * i + c];
  }
}

}  // namespace vlpfast
