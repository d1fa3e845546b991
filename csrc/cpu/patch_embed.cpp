// Patch embedding on the CPU. The pixels of kept patches are gathered into a matrix, chunk by chunk,
// which torch multiplies; the weights are folded before and positions added after, in one pass each.
// Letters beside the usual ones: R rows, the kept patches of all images; C = 3 P P.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/huge_pages.h"
#include "vlpfast/patch_pixels.h"
#include "vlpfast/rows.h"
#include "vlpfast/torch_products.h"

#define VLPFAST_EACH_TARGET "vlpfast/patch_gather.h"
#include "vlpfast/each_target.h"

namespace vlpfast {
namespace {

constexpr const char* kOp = "patch_embed";
// Pixels gathered at a time. Forward: what stays in the caches between two passes. Backward: a
// chunk costs a pass over the gradient of the weights.
constexpr int64_t kForwardPixels = 1 << 20, kBackwardPixels = 1 << 22;

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, bool is_bf16) {
  const ScalarType dtype = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  return on_huge_pages(torch::stable::new_empty(like, {rows, columns}, dtype));
}

Kept kept_of(const std::optional<Tensor>& ids, int64_t batch, int64_t num_patches) {
  if (!ids) return {nullptr, num_patches, num_patches, batch * num_patches};
  check_argument(*ids, ScalarType::Long, kOp, "ids");
  STD_TORCH_CHECK(ids->dim() == 2 && ids->size(0) == batch, kOp, ": ids must be (", batch, ", K)");
  const Kept kept{ids->const_data_ptr<int64_t>(), ids->size(1), num_patches, ids->numel()};
  for (int64_t row = 0; row < kept.R; ++row) {
    STD_TORCH_CHECK(kept.ids[row] >= 0 && kept.ids[row] < num_patches, kOp, ": ids must be in 0..",
                    num_patches - 1, ", got ", kept.ids[row]);
  }
  return kept;
}

// The pixels (chunk, C) of some rows at a time.
class Gather {
 public:
  Gather(const Tensor& like, const Images& images, const Kept& kept, int64_t C, bool bf16,
         int64_t most_pixels)
      : images_(images),
        kept_(kept),
        C_(C),
        chunk_(std::min(kept.R, std::max<int64_t>(1, most_pixels / C))),
        pixels_(new_matrix(like, chunk_, C, bf16)),
        rows_(rows_of(pixels_, kOp, "pixels")) {}

  int64_t chunk() const { return chunk_; }

  // Rows [first, first + count), count <= chunk().
  Tensor operator()(int64_t first, int64_t count) {
    torch::stable::parallel_for(0, count, row_grain(C_), [&](int64_t begin, int64_t end) {
      VLPFAST_ON_WIDEST(gather_rows(images_, kept_, first, rows_, begin, end));
    });
    return torch::stable::narrow(pixels_, 0, 0, count);
  }

 private:
  const Images& images_;
  const Kept& kept_;
  int64_t C_, chunk_;
  Tensor pixels_;
  Rows rows_;
};

// Weights of a convolution (D, 3, P, P) and what they become: W' (D, C) in the order of the pixels,
// and the shift (D,) that it needs.
struct Fold {
  Rows weight, folded;
  const float* bias;  // nullable
  float* shift;
  Normalisation norm;
  int64_t C;
  bool hwc;
};

VLPFAST_CLONES
void fold_rows(const Fold& f, int64_t begin, int64_t end) {
  const int64_t C = f.C, area = C / 3;
  std::vector<float> buffer(2 * C);
  float* planes = buffer.data();
  float* ordered = planes + C;
  for (int64_t d = begin; d < end; ++d) {
    load_row(f.weight, d, C, planes);
    float shift = f.bias != nullptr ? f.bias[d] : 0.0f;
    for (int64_t c = 0; c < 3; ++c) {
      float* __restrict__ plane = planes + c * area;
      const float scale = f.norm.scale[c];
      if (f.folded.is_bf16) {
        for (int64_t i = 0; i < area; ++i) plane[i] = widen(narrow(plane[i] * scale));
      } else {
        for (int64_t i = 0; i < area; ++i) plane[i] *= scale;
      }
      // Of the weights as rounded: the shift gives back exactly what the centre takes away.
      shift += f.norm.shift[c] * sum(plane, area);
    }
    f.shift[d] = shift;
    to_pixel_order(planes, C, f.hwc, ordered);
    store_row(f.folded, d, C, ordered);
  }
}

// table[p] = shift + position of patch p; one row where there are no positions.
VLPFAST_CLONES
std::vector<float> offsets_of(const float* shift, const Rows& position, int64_t num_patches,
                              int64_t D) {
  const bool placed = position.data != nullptr;
  std::vector<float> table((placed ? num_patches : 1) * D);
  for (size_t at = 0; at < table.size(); at += D) {
    std::copy_n(shift, D, table.data() + at);
    if (placed) add_row(position, at / D, D, table.data() + at);
  }
  return table;
}

VLPFAST_INLINE void put(float x, float& out) { out = x; }
VLPFAST_INLINE void put(float x, uint16_t& out) { out = narrow(x); }

template <class In, class Out>
VLPFAST_INLINE void add_offset(const In* __restrict__ in, const float* __restrict__ offset,
                               int64_t D, Out* __restrict__ out) {
  for (int64_t d = 0; d < D; ++d) {
    if constexpr (std::is_same_v<In, float>) {
      put(in[d] + offset[d], out[d]);
    } else {
      put(widen(in[d]) + offset[d], out[d]);
    }
  }
}

// Row first + i of the tokens from row i of a product.
struct Tokens {
  Rows product, out;
  const float* offsets;
  bool placed;
  int64_t first, D;
};

VLPFAST_CLONES
void finish_rows(const Tokens& t, const Kept& kept, int64_t begin, int64_t end) {
  const int64_t D = t.D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = t.first + i, in = i * D, out = row * D;
    const float* offset = t.offsets + (t.placed ? kept.patch(row) * D : 0);
    if (t.out.is_bf16) {
      add_offset(static_cast<const uint16_t*>(t.product.data) + in, offset, D,
                 static_cast<uint16_t*>(t.out.data) + out);
    } else if (t.product.is_bf16) {
      add_offset(static_cast<const uint16_t*>(t.product.data) + in, offset, D,
                 static_cast<float*>(t.out.data) + out);
    } else {
      add_offset(static_cast<const float*>(t.product.data) + in, offset, D,
                 static_cast<float*>(t.out.data) + out);
    }
  }
}

Tensor patch_embed_fwd_cpu(const Tensor& images, const Tensor& weight,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& position,
                           const std::optional<Tensor>& ids, std::vector<double> mean,
                           std::vector<double> std, bool hwc, bool bf16) {
  const int64_t D = weight.size(0), P = weight.size(3), C = 3 * P * P;
  const Images pixels = images_of(images, P, hwc, kOp);
  const Kept kept = kept_of(ids, images.size(0), pixels.num_patches);
  if (bias) check_argument(*bias, ScalarType::Float, kOp, "bias");
  const Rows places = position ? rows_of(*position, kOp, "pos_embed") : Rows{};

  Tensor folded = new_matrix(weight, D, C, bf16);
  std::vector<float> shift(D);
  const Fold fold{rows_of(weight, kOp, "weight"),
                  rows_of(folded, kOp, "folded"),
                  bias ? bias->const_data_ptr<float>() : nullptr,
                  shift.data(),
                  normalisation_of(mean, std, kOp),
                  C,
                  hwc};
  torch::stable::parallel_for(0, D, row_grain(C),
                              [&](int64_t begin, int64_t end) { fold_rows(fold, begin, end); });
  const Tensor folded_t = torch::stable::transpose(folded, 0, 1);
  const auto offsets = offsets_of(shift.data(), places, pixels.num_patches, D);

  Tensor out = new_matrix(weight, kept.R, D, bf16 && (!position || places.is_bf16));
  Gather gather(weight, pixels, kept, C, bf16, kForwardPixels);
  Tensor products = new_matrix(weight, gather.chunk(), D, bf16);
  Tokens tokens{rows_of(products, kOp, "product"), rows_of(out, kOp, "out"), offsets.data(),
                position.has_value(), 0, D};
  for (int64_t first = 0; first < kept.R; first += gather.chunk()) {
    const int64_t count = std::min(gather.chunk(), kept.R - first);
    torch_product(torch::stable::narrow(products, 0, 0, count), gather(first, count), folded_t);
    tokens.first = first;
    torch::stable::parallel_for(0, count, row_grain(D), [&](int64_t begin, int64_t end) {
      finish_rows(tokens, kept, begin, end);
    });
  }
  return out;
}

// The rows of each patch, in order: those of patch p are order[start[p]] to order[start[p + 1]].
struct RowsOfPatches {
  std::vector<int64_t> start, order;
  explicit RowsOfPatches(const Kept& kept) : start(kept.num_patches + 1), order(kept.R) {
    for (int64_t row = 0; row < kept.R; ++row) ++start[kept.patch(row) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t row = 0; row < kept.R; ++row) order[next[kept.patch(row)]++] = row;
  }
};

// Rows added before their sum is: rounding errors grow with the longer of two short sums.
constexpr int64_t kSumRows = 32;

// out[p] = sum of the gradients of patch p, in the order of the images.
VLPFAST_CLONES
void sum_patches(const Rows& grad, const RowsOfPatches& rows, int64_t D, float* out, int64_t begin,
                 int64_t end) {
  std::vector<float> buffer(D);
  float* __restrict__ part = buffer.data();
  for (int64_t p = begin; p < end; ++p) {
    float* __restrict__ total = out + p * D;
    std::fill_n(total, D, 0.0f);
    for (int64_t i = rows.start[p]; i < rows.start[p + 1]; i += kSumRows) {
      const int64_t last = std::min(i + kSumRows, rows.start[p + 1]);
      std::fill_n(part, D, 0.0f);
      for (int64_t j = i; j < last; ++j) add_row(grad, rows.order[j], D, part);
      for (int64_t d = 0; d < D; ++d) total[d] += part[d];
    }
  }
}

// Every row is of one patch, so the sum over patches is that over rows.
VLPFAST_CLONES
void sum_bias(const float* patches, int64_t num_patches, int64_t D, float* out) {
  sum_blocks(patches, num_patches, D, D, out);
}

VLPFAST_CLONES
void convert_rows(const Rows& in, int64_t first, const Rows& out, int64_t D, int64_t begin,
                  int64_t end) {
  std::vector<float> buffer(D);
  for (int64_t i = begin; i < end; ++i) {
    load_row(in, first + i, D, buffer.data());
    store_row(out, i, D, buffer.data());
  }
}

VLPFAST_CLONES
void add_rows(const Rows& in, const Rows& total, int64_t D, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) add_row(in, i, D, static_cast<float*>(total.data) + i * D);
}

// dW' (D, C) = grad^T pixels. A product of bf16 is rounded to bf16, so chunks are added in fp32.
Tensor grad_folded_of(const Tensor& grad, Gather& gather, int64_t R, int64_t D, int64_t C,
                      bool bf16) {
  const Rows grads = rows_of(grad, kOp, "grad");
  const bool convert = grads.is_bf16 != bf16, apart = bf16 && R > gather.chunk();
  Tensor product = new_matrix(grad, D, C, bf16);
  Tensor total = apart ? torch::stable::new_zeros(grad, {D, C}, ScalarType::Float) : product;
  Tensor converted = new_matrix(grad, convert ? gather.chunk() : 0, D, bf16);
  Tensor all = grad;
  for (int64_t first = 0; first < R; first += gather.chunk()) {
    const int64_t count = std::min(gather.chunk(), R - first);
    if (convert) {
      const Rows out = rows_of(converted, kOp, "grad");
      torch::stable::parallel_for(0, count, row_grain(D), [&](int64_t begin, int64_t end) {
        convert_rows(grads, first, out, D, begin, end);
      });
    }
    Tensor rows = convert ? torch::stable::narrow(converted, 0, 0, count)
                          : torch::stable::narrow(all, 0, first, count);
    const Tensor rows_t = torch::stable::transpose(rows, 0, 1);
    if (first == 0 || bf16) {
      torch_product(product, rows_t, gather(first, count));
    } else {
      torch_add_product(product, rows_t, gather(first, count));
    }
    if (apart) {
      const Rows in = rows_of(product, kOp, "product"), out = rows_of(total, kOp, "total");
      torch::stable::parallel_for(0, D, row_grain(C), [&](int64_t begin, int64_t end) {
        add_rows(in, out, C, begin, end);
      });
    }
  }
  return R > 0 ? total : torch::stable::zero_(total);
}

// Gradient of the weights from that of the folded ones.
struct Unfold {
  Rows grad_folded, grad_weight;
  const float* grad_bias;
  Normalisation norm;
  int64_t C;
  bool hwc;
};

VLPFAST_CLONES
void unfold_rows(const Unfold& u, int64_t begin, int64_t end) {
  const int64_t C = u.C, area = C / 3;
  std::vector<float> buffer(2 * C);
  float* ordered = buffer.data();
  float* planes = ordered + C;
  for (int64_t d = begin; d < end; ++d) {
    load_row(u.grad_folded, d, C, ordered);
    from_pixel_order(ordered, C, u.hwc, planes);
    for (int64_t c = 0; c < 3; ++c) {
      float* __restrict__ plane = planes + c * area;
      const float scale = u.norm.scale[c], shift = u.norm.shift[c] * u.grad_bias[d];
      for (int64_t i = 0; i < area; ++i) plane[i] = (plane[i] + shift) * scale;
    }
    store_row(u.grad_weight, d, C, planes);
  }
}

std::tuple<Tensor, Tensor, Tensor> patch_embed_bwd_cpu(
    const Tensor& grad, const Tensor& images, const Tensor& weight,
    const std::optional<Tensor>& ids, std::vector<double> mean, std::vector<double> std, bool hwc,
    bool bf16, bool weight_wanted) {
  const int64_t D = weight.size(0), P = weight.size(3), C = 3 * P * P;
  const Images pixels = images_of(images, P, hwc, kOp);
  const Kept kept = kept_of(ids, images.size(0), pixels.num_patches);
  const Rows grads = rows_of(grad, kOp, "grad");

  Tensor grad_position = new_matrix(weight, pixels.num_patches, D, false);
  Tensor grad_bias = torch::stable::new_empty(weight, {D}, ScalarType::Float);
  auto* positions = grad_position.mutable_data_ptr<float>();
  const RowsOfPatches rows(kept);
  torch::stable::parallel_for(0, pixels.num_patches, 1, [&](int64_t begin, int64_t end) {
    sum_patches(grads, rows, D, positions, begin, end);
  });
  sum_bias(positions, pixels.num_patches, D, grad_bias.mutable_data_ptr<float>());

  Tensor grad_weight = torch::stable::new_empty(weight, {weight_wanted ? D : 0, 3, P, P});
  if (weight_wanted) {
    Gather gather(weight, pixels, kept, C, bf16, kBackwardPixels);
    const Tensor grad_folded = grad_folded_of(grad, gather, kept.R, D, C, bf16);
    const Unfold unfold{rows_of(grad_folded, kOp, "grad_folded"),
                        rows_of(grad_weight, kOp, "grad_weight"),
                        grad_bias.const_data_ptr<float>(),
                        normalisation_of(mean, std, kOp),
                        C,
                        hwc};
    torch::stable::parallel_for(0, D, row_grain(C), [&](int64_t begin, int64_t end) {
      unfold_rows(unfold, begin, end);
    });
  }
  return {grad_weight, grad_bias, grad_position};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vlpfast::patch_embed_fwd_cpu));
  m.impl("patch_embed_bwd", TORCH_BOX(&vlpfast::patch_embed_bwd_cpu));
}
