// Centred pixels of kept patches as the rows of a matrix. Included by each_target.h: no guard.
namespace vlpfast::VLPFAST_NAMESPACE {

constexpr int kBlock = 16;
typedef float BlockF __attribute__((vector_size(4 * kBlock)));
typedef uint32_t BlockU __attribute__((vector_size(4 * kBlock)));
typedef int32_t BlockI __attribute__((vector_size(4 * kBlock)));
typedef uint16_t BlockH __attribute__((vector_size(2 * kBlock)));
typedef uint8_t BlockB __attribute__((vector_size(kBlock)));

template <class Vector>
VLPFAST_INLINE Vector read(const void* data) {
  Vector x;
  std::memcpy(&x, data, sizeof x);
  return x;
}

VLPFAST_INLINE BlockF values(const uint8_t* x) {
  const BlockH wide = __builtin_convertvector(read<BlockB>(x), BlockH);
  return __builtin_convertvector(__builtin_convertvector(wide, BlockI), BlockF);
}
VLPFAST_INLINE BlockF values(const float* x) { return read<BlockF>(x); }
VLPFAST_INLINE BlockF values(const uint16_t* x) {
  return (BlockF)(__builtin_convertvector(read<BlockH>(x), BlockU) << 16);
}

// The bits that a small integer has in fp32 and not in bf16 are 0: no rounding.
template <bool kInteger>
VLPFAST_INLINE void write(BlockF x, uint16_t* out) {
  BlockU bits = (BlockU)x;
  if (!kInteger) {
    const BlockU rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    bits = x != x ? bits | 0x400000u : rounded;
  }
  const BlockH half = __builtin_convertvector(bits >> 16, BlockH);
  std::memcpy(out, &half, sizeof half);
}
template <bool kInteger>
VLPFAST_INLINE void write(BlockF x, float* out) {
  std::memcpy(out, &x, sizeof x);
}

// `count` pixels; of a run that is no multiple of a block the last block is written twice, of one
// that is shorter than a block a buffer has the rest.
template <class In, class Out>
VLPFAST_INLINE void centre_run(const In* in, int64_t count, Out* out) {
  constexpr bool kInteger = std::is_same_v<In, uint8_t>;
  if (count < kBlock) {
    In padded[kBlock] = {};
    Out centred[kBlock];
    std::memcpy(padded, in, sizeof(In) * count);
    write<kInteger>(values(padded) - kCentre, centred);
    std::memcpy(out, centred, sizeof(Out) * count);
    return;
  }
  for (int64_t at = 0; at + kBlock <= count; at += kBlock) {
    write<kInteger>(values(in + at) - kCentre, out + at);
  }
  if (count % kBlock != 0) {
    write<kInteger>(values(in + count - kBlock) - kCentre, out + count - kBlock);
  }
}

template <class In, class Out>
VLPFAST_INLINE void gather_rows_of(const Images& images, const Kept& kept, int64_t first,
                                   Out* pixels, int64_t begin, int64_t end) {
  Out* out = pixels + begin * images.planes * images.P * images.run;
  for (int64_t row = first + begin; row < first + end; ++row) {
    const In* patch = static_cast<const In*>(images.data) +
                      images.offset(kept.image(row), kept.patch(row));
    for (int64_t plane = 0; plane < images.planes; ++plane) {
      for (int64_t i = 0; i < images.P; ++i, out += images.run) {
        centre_run(patch + plane * images.plane_stride + i * images.row_stride, images.run, out);
      }
    }
  }
}

template <class In>
void gather_rows_from(const Images& images, const Kept& kept, int64_t first, const Rows& pixels,
                      int64_t begin, int64_t end) {
  if (pixels.is_bf16) {
    gather_rows_of<In>(images, kept, first, static_cast<uint16_t*>(pixels.data), begin, end);
  } else {
    gather_rows_of<In>(images, kept, first, static_cast<float*>(pixels.data), begin, end);
  }
}

// Rows [begin, end) of `pixels` from the rows of `kept` from `first` on.
inline void gather_rows(const Images& images, const Kept& kept, int64_t first, const Rows& pixels,
                        int64_t begin, int64_t end) {
  switch (images.type) {
    case PixelType::kUint8:
      return gather_rows_from<uint8_t>(images, kept, first, pixels, begin, end);
    case PixelType::kFloat:
      return gather_rows_from<float>(images, kept, first, pixels, begin, end);
    case PixelType::kBFloat16:
      return gather_rows_from<uint16_t>(images, kept, first, pixels, begin, end);
  }
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
